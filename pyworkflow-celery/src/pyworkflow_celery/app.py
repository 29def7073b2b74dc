"""Our own Celery application: ``celery -A pyworkflow.celery.app worker``, ``beat``, ``flower``."""

from __future__ import annotations

from typing import Any

from pyworkflow.errors import ConfigurationError
from pyworkflow.worker import settings
from pyworkflow_celery._attach import equip
from pyworkflow_celery._celery import Celery
from pyworkflow_celery._config import app_conf, postpone

__all__ = ["app"]


def _make() -> Any:
    # Not the current application: a program may have one of its own besides.
    made = Celery(
        "pyworkflow", set_as_current=False, loader="pyworkflow_celery._loader:WorkflowLoader"
    )
    try:
        made.conf.update(app_conf(settings()))
    except ConfigurationError as exc:
        # Raised where it can be told in one line: a worker, beat or client that begins. Here, the
        # command line of Celery would make a page of it.
        postpone(made, exc)
    equip(made, own=True)
    return made


app: Any = _make()
