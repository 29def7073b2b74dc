"""The two Celery tasks, ``pyworkflow.handle`` and ``pyworkflow.sweep``, and how messages arrive.

A message is a hint: it is acknowledged before it is worked on, never redelivered, never scheduled
for later, and nothing is lost with it.
"""

from __future__ import annotations

import dataclasses
import logging
import random
from time import sleep
from typing import Any, cast

from pyworkflow.errors import (
    ConfigurationError,
    PluginNotFound,
    SchemaTooNew,
    StorageError,
    StorageUnavailable,
)
from pyworkflow.spi import Doorbell, Outcome
from pyworkflow.storekit import failpoints
from pyworkflow_celery._arrival import MOST_HOPS, VERSION, kind_of, pass_on
from pyworkflow_celery._publish import HANDLE, publisher_for
from pyworkflow_celery._shutdown import shutdown

__all__ = ["SWEEP", "keep_settings", "register_tasks"]

SWEEP = "pyworkflow.sweep"
_log = logging.getLogger("pyworkflow.celery")

failpoints.register(
    __name__,
    StorageUnavailable,
    {"celery.after_receive": "a doorbell has arrived where it is worked on, nothing is claimed"},
)

_HOP_AFTER = (0.05, 0.5)
_LAST = 0.25
_CANNOT = 1.0
#: Not as the application's own tasks have it: neither its defaults nor its annotations are meant.
_LIMITS = {
    "ignore_result": True,
    "store_errors_even_if_ignored": False,
    "acks_late": False,
    "rate_limit": "",
    "max_retries": 0,
}


def register_tasks(app: Any) -> None:
    """Give an application our two tasks."""
    options: dict[str, Any] = {
        **_LIMITS,
        "shared": False,
        "serializer": "json",
        "typing": False,
    }

    def handle(task: Any, run_id: str, item_id: str, v: int = VERSION) -> str:
        outcome = _handle(app, task.request, Doorbell(run_id, item_id, v))
        # What Celery logs as the result.
        return f"{kind_of(item_id)} of {run_id}: {outcome}"

    def sweep() -> int:
        return _sweep(app)

    app.task(
        name=HANDLE,
        Request="pyworkflow_celery._arrival:DoorbellRequest",
        Strategy="pyworkflow_celery._arrival:doorbell_strategy",
        bind=True,
        **options,
    )(handle)
    app.task(name=SWEEP, **options)(sweep)


def keep_settings(app: Any) -> None:
    """In a worker, before its pool starts: take back what annotations changed in our tasks."""
    for name in (HANDLE, SWEEP):
        task = app.tasks[name]
        for setting, value in _LIMITS.items():
            setattr(task, setting, value)
        task.time_limit = task.soft_time_limit = None


def _handle(app: Any, request: Any, bell: Doorbell) -> str:
    from pyworkflow_celery._worker import process_host

    sent = getattr(request, "pyworkflow_headers", None)
    if isinstance(sent, dict):
        headers = {str(k): str(v) for k, v in cast("dict[object, object]", sent).items()}
        bell = dataclasses.replace(bell, headers=headers)
    try:
        standing = process_host(app)
        shutdown.begin_task()
        if failpoints.active:
            failpoints.hit("celery.after_receive")
        outcome = Outcome.BUSY if standing.draining else standing.handle(bell)
        standing.outages.worked("doorbell")
    except (ConfigurationError, PluginNotFound, SchemaTooNew) as exc:
        _log.error("this worker cannot work: %s", exc)
        hops = getattr(request, "pyworkflow_hops", 0)
        if isinstance(hops, int) and hops < MOST_HOPS:
            _pass_on(app, request, bell, hops + 1)
            publisher_for(app).flush()
        # A worker that can do nothing is free all the time: leave the next ones to others.
        sleep(_CANNOT)
        return "misconfigured"
    except StorageError as exc:
        process_host(app).outages.failed(
            "doorbell", "doorbells are dropped, sweeps ring again", exc
        )
        _log.debug("a doorbell was dropped: %s run_id=%s", exc, bell.run_id)
        return "storage unavailable"
    if outcome is Outcome.BUSY and standing.draining:
        # This process is about to end, and the item may be free.
        _pass_on(app, request, bell)
        publisher_for(app).flush()
        # Not the next one at once: the pool would give it to this process, which is free.
        sleep(_LAST)
        return "passed on"
    if outcome is Outcome.UNKNOWN_WORKFLOW:
        hops = getattr(request, "pyworkflow_hops", 0)
        if isinstance(hops, int) and hops < MOST_HOPS:
            # Another worker may have it: a fleet is seldom updated at once.
            later = random.uniform(*_HOP_AFTER)
            standing.later(later, lambda: _pass_on(app, request, bell, hops + 1))
        else:
            _log.warning(
                "no worker seems to have the workflow of a run: name=%s run_id=%s; import its "
                "module in all workers of its queue: -I MODULE or PYWORKFLOW_MODULES",
                getattr(request, "shadow", None),
                bell.run_id,
            )
    elif outcome is not Outcome.HANDLED:
        # A purged run, a doubled message, somebody faster: all of it is as it should be.
        _log.debug(
            "nothing to do for a doorbell: %s run_id=%s item_id=%s",
            outcome,
            bell.run_id,
            bell.item_id,
        )
    return str(outcome)


def _pass_on(app: Any, request: Any, bell: Doorbell, hops: int = 0) -> None:
    """Leave a doorbell to another worker."""
    fields = {"run_id": bell.run_id, "item_id": bell.item_id}
    name = getattr(request, "shadow", None) or ""
    came = {
        "delivery_info": request.delivery_info,
        "pyworkflow_queue": getattr(request, "pyworkflow_queue", None),
    }
    pass_on(app, fields, came, name, hops, bell.headers)


def _sweep(app: Any) -> int:
    from pyworkflow_celery._worker import process_host

    try:
        standing = process_host(app)
        rang = 0 if standing.draining else standing.sweep()
        standing.outages.worked("sweep by message")
        return rang
    except StorageError as exc:
        process_host(app).outages.failed("sweep by message", "no sweep", exc)
    except (ConfigurationError, PluginNotFound) as exc:
        _log.error("this worker cannot work: %s", exc)
    return 0
