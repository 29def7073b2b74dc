"""Our own Celery application: ``celery -A pyworkflow.celery.app worker``, ``beat``, ``flower``."""

from __future__ import annotations

from typing import Any

from pyworkflow_celery._attach import equip
from pyworkflow_celery._celery import Celery
from pyworkflow_celery._config import provide

__all__ = ["app"]


def _make() -> Any:
    # Not the current application: a program may have one of its own besides.
    made = Celery(
        "pyworkflow", set_as_current=False, loader="pyworkflow_celery._loader:WorkflowLoader"
    )
    provide(made)
    equip(made, own=True)
    return made


app: Any = _make()
