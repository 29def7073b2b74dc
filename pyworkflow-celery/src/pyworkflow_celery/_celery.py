"""Celery, kombu and billiard, which carry no types: everything untyped enters here, as ``Any``."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = [
    "Celery",
    "OperationalError",
    "StartStopStep",
    "TaskRequest",
    "WorkerLostError",
    "default_strategy",
    "redis_data_error",
    "set_pdeathsig",
    "signals",
    "task_ready",
    "uuid",
    "worker_state",
]


def _from(module: str, name: str) -> Any:
    return getattr(import_module(module), name)


Celery: Any = _from("celery", "Celery")
OperationalError: Any = _from("kombu.exceptions", "OperationalError")
StartStopStep: Any = _from("celery.bootsteps", "StartStopStep")
TaskRequest: Any = _from("celery.worker.request", "Request")
WorkerLostError: Any = _from("billiard.exceptions", "WorkerLostError")
default_strategy: Any = _from("celery.worker.strategy", "default")
set_pdeathsig: Any = _from("billiard.util", "set_pdeathsig")
signals: Any = import_module("celery.signals")
task_ready: Any = _from("celery.worker.state", "task_ready")
uuid: Any = _from("kombu.utils.uuid", "uuid")
worker_state: Any = import_module("celery.worker.state")


def redis_data_error() -> type[Exception]:
    """The error of the client of Redis for what it cannot send; only where that is installed."""
    found: type[Exception] = _from("redis.exceptions", "DataError")
    return found
