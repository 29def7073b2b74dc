"""How messages arrive at a worker: what is unreadable goes no further, and harms nobody.

A message is a hint. Whatever is dropped here is rung for by a sweep, if there is an item for it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any, cast

from pyworkflow.spi import Doorbell
from pyworkflow_celery import _celery
from pyworkflow_celery._config import queue_of
from pyworkflow_celery._publish import publisher_for
from pyworkflow_celery._shutdown import shutdown

__all__ = [
    "MOST_HOPS",
    "VERSION",
    "ArrivalStep",
    "DoorbellRequest",
    "doorbell_strategy",
    "pass_on",
]

_log = logging.getLogger("pyworkflow.celery")

VERSION = 1
"""Of the body of a doorbell."""
MOST_HOPS = 3
"""How often a doorbell is passed on; after that a sweep rings, when its time has come."""
_LONGEST = 16 * 1024


class DoorbellRequest(_celery.TaskRequest):  # type: ignore[misc]  # Celery has no types
    """A doorbell in the main process of a worker."""

    def cancel(self, pool: Any, signal: Any = None, emit_retry: bool = True) -> None:
        """Let the drain end what the doorbell began; kill only when that is not waited for."""
        if shutdown.may_kill:
            _celery.TaskRequest.cancel(self, pool, signal, emit_retry)

    def on_failure(self, exc_info: Any, *args: Any, **kwargs: Any) -> Any:
        """A pool child that died takes nothing with it: one line for it, not two tracebacks."""
        problem = exc_info.exception
        problem = getattr(problem, "exc", problem)
        if not isinstance(problem, _celery.WorkerLostError):
            return _celery.TaskRequest.on_failure(self, exc_info, *args, **kwargs)
        _celery.task_ready(self)
        # With 0 it has ended of itself, after a drain.
        level = logging.DEBUG if "exitcode 0" in str(problem) else logging.WARNING
        _log.log(
            level, "a pool child died at work, which is done again: %s: %s", self.name, problem
        )
        # It may have died before it claimed the item: then nothing frees it, and nobody rings.
        hops = self.request_dict.get("pyworkflow_hops") or 0
        if isinstance(hops, int) and hops < MOST_HOPS:
            pass_on(self._app, self.kwargs, self.delivery_info, self.name, hops + 1)
        return None


def pass_on(
    app: Any,
    fields: Mapping[str, Any],
    delivery_info: Mapping[str, Any] | None,
    name: str,
    hops: int,
    headers: Mapping[str, str] | None = None,
) -> None:
    """Send a doorbell back to the queue that it came from, for another worker or child."""
    info = delivery_info or {}
    bell = Doorbell(fields["run_id"], fields["item_id"], name=name, headers=headers or {})
    queue = str(info.get("routing_key") or queue_of(app, "default"))
    publisher_for(app).pass_on(bell, queue, info.get("priority"), hops)


def doorbell_strategy(task: Any, app: Any, consumer: Any) -> Callable[..., Any]:
    """How a worker takes a doorbell: as any task, but one that is unreadable goes no further."""
    deliver = _celery.default_strategy(task, app, consumer)

    def on_message(message: Any, body: Any, ack: Any, *args: Any, **kwargs: Any) -> Any:
        problem = _problem_of(message)
        if problem is None:
            return deliver(message, body, ack, *args, **kwargs)
        # It would be no more readable the next time; a sweep rings for the item, if there is one.
        _log.warning("a message is unreadable and was dropped: %s", problem)
        ack(_log, consumer.connection_errors)
        return None

    return on_message


def _problem_of(message: Any) -> str | None:
    """What is wrong with a message, before anything of it is decoded by the library."""
    if message.content_type != "application/json":
        return f"content_type={str(message.content_type)[:80]!r}, expected 'application/json'"
    raw = message.body
    if not isinstance(raw, str | bytes) or len(raw) > _LONGEST:
        return f"its body is no text of at most {_LONGEST} bytes"
    try:
        body = cast("object", json.loads(raw))
    except (ValueError, RecursionError):
        return "its body is not JSON"
    parts = cast("list[object]", body) if isinstance(body, list) else []
    fields = parts[1] if len(parts) == 3 else None
    if not isinstance(fields, dict):
        return "its body is not that of a Celery task"
    found = cast("dict[str, object]", fields)
    version = found.get("v", VERSION)
    if version != VERSION:
        return f"version={version!r:.40}, this worker knows version={VERSION}"
    if not (
        isinstance(found.get("run_id"), str)
        and isinstance(found.get("item_id"), str)
        and set(found) <= {"run_id", "item_id", "v"}
    ):
        return "it names no work item"
    return None


class ArrivalStep(_celery.StartStopStep):  # type: ignore[misc]  # Celery has no types
    """Keeps rubbish in a Redis list from ending the worker: kombu raises it through everything."""

    name = "pyworkflow.arrival"
    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **kwargs: Any) -> None:
        """Nothing: the channel does not exist before the consumer starts."""

    def create(self, consumer: Any) -> None:
        """Nothing."""

    def start(self, consumer: Any) -> None:
        """With every connection anew."""
        channel = getattr(consumer.task_consumer, "channel", None)
        handlers = getattr(channel, "handlers", None)
        if not isinstance(handlers, dict) or "BRPOP" not in handlers:
            return  # another transport, which frames its messages itself
        known = cast("dict[str, Callable[[], Any]]", handlers)
        known["BRPOP"] = _guarded(known["BRPOP"])

    def stop(self, consumer: Any) -> None:
        """Nothing: the channel goes with its connection."""


def _guarded(read: Callable[[], Any]) -> Callable[[], Any]:
    def guarded() -> Any:
        try:
            return read()
        except (ValueError, TypeError, LookupError, AttributeError) as exc:
            # By now it is out of the list.
            _log.warning(
                "what was in the queue is no message and was dropped: %s: %s",
                type(exc).__name__,
                str(exc)[:200],
            )
            _log.debug("as it was raised", exc_info=True)
            return True

    return guarded
