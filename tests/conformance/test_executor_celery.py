"""The Celery executor passes the executor suite: prefork workers, Valkey as broker, PostgreSQL."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from pyworkflow_celery._executor import CeleryExecutor
from pyworkflow_conformance import ExecutorConformance
from tests.servers import ValkeyServer, shared_postgres


class OwnBroker(ValkeyServer):
    stop = ValkeyServer.kill

    def drop(self) -> None:
        self.command("FLUSHALL")


class TestCelery(ExecutorConformance):
    capabilities = CeleryExecutor.capabilities
    valkey: OwnBroker

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _valkey(cls) -> Iterator[None]:
        with OwnBroker() as cls.valkey:
            yield

    def environment(self, namespace: str, folder: Path) -> Mapping[str, str]:
        store = shared_postgres().url
        return {
            "PYWORKFLOW_EXECUTOR": "celery://",
            "PYWORKFLOW_BROKER_URL": self.valkey.url,
            "PYWORKFLOW_STORAGE": store,
        }

    def worker_command(
        self, namespace: str, modules: Sequence[str], queues: Sequence[str], concurrency: int
    ) -> Sequence[str]:
        taken = [f"{namespace}.{'pyworkflow' if q == 'default' else q}" for q in queues]
        return [
            *(sys.executable, "-m", "celery", "-A", "pyworkflow.celery.app", "worker"),
            *("--loglevel=INFO", "-I", ",".join(modules), "-c", str(min(concurrency, 2))),
            *(["-Q", ",".join(taken)] if taken else []),
        ]

    def broker(self, namespace: str) -> OwnBroker:
        return self.valkey
