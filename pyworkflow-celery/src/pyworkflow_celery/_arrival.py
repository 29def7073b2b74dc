"""How messages arrive at a worker: what is unreadable goes no further, and harms nobody.

A message is a hint. Whatever is dropped here is rung for by a sweep, if there is an item for it.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any, cast

from pyworkflow.spi import Doorbell
from pyworkflow_celery import _celery
from pyworkflow_celery._config import queue_of
from pyworkflow_celery._publish import HANDLE, publisher_for
from pyworkflow_celery._shutdown import shutdown

__all__ = [
    "MOST_HOPS",
    "VERSION",
    "ArrivalStep",
    "DoorbellRequest",
    "doorbell_strategy",
    "kind_of",
    "pass_on",
    "wake",
]

_log = logging.getLogger("pyworkflow.celery")

VERSION = 1
"""Of the body of a doorbell."""
MOST_HOPS = 3
"""How often a doorbell is passed on; after that a sweep rings, when its time has come."""
_LONGEST = 16 * 1024
_LONGEST_ID = 2000
_RUBBISH = (ValueError, TypeError, LookupError, AttributeError, RecursionError)
#: A doorbell has none of these: it is never for later, never tried again, never part of a group.
_NOT_TAKEN = frozenset(
    ("eta", "expires", "retries", "timelimit", "group", "group_index", "stamped_headers", "stamps")
)


class Wake:
    """Wakes the consumer's loop when a thread of the pool is done: it may take the next message.

    Celery asks whether it may when its loop turns, and a thread that ends does not turn it.
    """

    def __init__(self) -> None:
        self._pipe: tuple[int, int] | None = None

    def register(self, hub: Any) -> None:
        """With the loop of every connection anew."""
        if self._pipe is None:
            self._pipe = read, write = os.pipe()
            os.set_blocking(read, False)
            os.set_blocking(write, False)
        hub.add_reader(self._pipe[0], self._read, self._pipe[0])

    def _read(self, fd: int) -> None:
        try:
            os.read(fd, 4096)
        except BlockingIOError:
            pass

    def __call__(self) -> None:
        """From any thread."""
        if self._pipe is not None:
            try:
                os.write(self._pipe[1], b".")
            except BlockingIOError:
                pass  # it is full of news


wake = Wake()


class DoorbellRequest(_celery.TaskRequest):  # type: ignore[misc]  # Celery has no types
    """A doorbell in the main process of a worker."""

    def __init_subclass__(cls) -> None:
        """Celery makes a subclass for each consumer, with an ``on_success`` of its own."""
        ended = cls.on_success

        def on_success(self: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return ended(self, *args, **kwargs)
            finally:
                wake()

        cls.on_success = on_success

    def cancel(self, pool: Any, signal: Any = None, emit_retry: bool = True) -> None:
        """Nothing: the drain ends what the doorbell began, or the end of the process does."""

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
            level,
            "a pool child died at work, which is done again: %s run_id=%s: %s",
            self.name,
            self.kwargs.get("run_id"),
            problem,
        )
        # It may have died before it claimed the item: then nothing frees it, and nobody rings.
        hops = self.request_dict.get("pyworkflow_hops") or 0
        if isinstance(hops, int) and hops < MOST_HOPS:
            pass_on(self._app, self.kwargs, self.request_dict, self.name, hops + 1)
        return None


def kind_of(item_id: str) -> str:
    """What a doorbell is for: a turn, a step, or a delivery."""
    kind = item_id.partition(":")[0]
    return kind if kind in ("turn", "step") else "delivery"


def pass_on(
    app: Any,
    fields: Mapping[str, Any],
    request: Mapping[str, Any],
    name: str,
    hops: int,
    headers: Mapping[str, str] | None = None,
) -> None:
    """Send a doorbell back to the queue that it came from, for another worker or child."""
    info = cast("dict[str, Any]", request.get("delivery_info") or {})
    bell = Doorbell(fields["run_id"], fields["item_id"], name=name, headers=headers or {})
    queue, priority = request.get("pyworkflow_queue"), info.get("priority")
    if not isinstance(queue, str) or not queue:
        # An application may give its queues any routing keys; ours have their own names.
        key = info.get("routing_key")
        known = isinstance(key, str) and key in app.amqp.queues
        queue = str(key) if known else queue_of(app, "default")
    publisher_for(app).pass_on(bell, queue, priority if isinstance(priority, int) else None, hops)


def doorbell_strategy(task: Any, app: Any, consumer: Any) -> Callable[..., Any]:
    """How a worker takes a doorbell: as any task, but one that is unreadable goes no further."""
    deliver = _celery.default_strategy(task, app, consumer)

    def on_message(message: Any, body: Any, ack: Any, *args: Any, **kwargs: Any) -> Any:
        problem = _problem_of(message)
        if problem is None:
            try:
                _clean(message)
                return deliver(message, body, ack, *args, **kwargs)
            except consumer.connection_errors:
                raise
            except Exception as exc:  # noqa: BLE001 - it must not come back, nor stay unacknowledged
                problem = f"{type(exc).__name__}: {str(exc)[:200]}"
                _log.debug("as it was raised", exc_info=True)
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
    if not isinstance(fields, dict) or parts[0] != [] or not isinstance(parts[2], dict):
        return "its body is not that of a Celery task"
    found = cast("dict[str, object]", fields)
    version = found.get("v", VERSION)
    if version != VERSION:
        return f"version={version!r:.40}, this worker knows version={VERSION}"
    ids = found.get("run_id"), found.get("item_id")
    if not all(map(_is_id, ids)) or set(found) - {"run_id", "item_id", "v"}:
        return "it names no work item"
    return None


def _is_id(value: object) -> bool:
    """Whether a store may be asked for it."""
    if not isinstance(value, str) or not 0 < len(value) <= _LONGEST_ID or "\0" in value:
        return False
    try:
        return bool(value.encode())
    except UnicodeEncodeError:
        return False  # half a character


def _clean(message: Any) -> None:
    """Leave of a message's headers what Celery can deal with: it raises for some that it cannot."""
    headers = cast("object", message.headers)
    sent = cast("dict[object, object]", headers) if isinstance(headers, dict) else {}
    kept = {
        key: value
        for key, value in sent.items()
        if isinstance(key, str)
        and key not in _NOT_TAKEN
        and (value is None or isinstance(value, str | int | float))
    }
    shadow = sent.get("shadow")
    hops = sent.get("pyworkflow_hops", 0)
    ours = sent.get("pyworkflow_headers")
    message.headers = {
        **kept,
        "id": _text(sent.get("id")) or _celery.uuid(),
        "task": HANDLE,
        "shadow": _text(shadow),
        "root_id": _text(sent.get("root_id")),
        "parent_id": _text(sent.get("parent_id")),
        "argsrepr": "()",
        "kwargsrepr": _text(sent.get("kwargsrepr")) or "",
        "ignore_result": True,
        "pyworkflow_hops": min(max(hops, 0), MOST_HOPS) if isinstance(hops, int) else MOST_HOPS,
        "pyworkflow_queue": _text(sent.get("pyworkflow_queue")),
        "pyworkflow_headers": ours if isinstance(ours, dict) else None,
    }
    properties = cast("dict[str, object] | None", message.properties)
    if isinstance(properties, dict):
        for name in ("reply_to", "correlation_id"):
            properties[name] = _text(properties.get(name))


def _text(value: object) -> str | None:
    """A line of text that is not too long, for logs and monitors; None when it is none."""
    if not isinstance(value, str) or not value:
        return None
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in value[:500])


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
        channel: Any = getattr(consumer.task_consumer, "channel", None)
        if hasattr(getattr(channel, "qos", None), "can_consume"):
            _stop_when_told(channel.qos)
        handlers = getattr(channel, "handlers", None)
        if not isinstance(handlers, dict) or "BRPOP" not in handlers:
            return  # another transport, which frames its messages itself
        known = cast("dict[str, Callable[[], Any]]", handlers)
        known["BRPOP"] = _guarded(known["BRPOP"], channel)

    def stop(self, consumer: Any) -> None:
        """Nothing: the channel goes with its connection."""


def _stop_when_told(qos: Any) -> None:
    """Take nothing more once the worker ends: Celery's loop goes on when its pool is gone."""
    may = qos.can_consume
    qos.can_consume = lambda: not shutdown.told and may()


def _guarded(read: Callable[[], Any], channel: Any) -> Callable[[], Any]:
    # Of the last one, redis' own client says that it is not what it can send.
    rubbish = (*_RUBBISH, _celery.redis_data_error())

    def guarded() -> Any:
        before = _unacknowledged(channel)
        try:
            return read()
        except rubbish as exc:
            # By now it is out of the list.
            _log.warning(
                "what was in the queue is no message and was dropped: %s: %s",
                type(exc).__name__,
                str(exc)[:200],
            )
            _log.debug("as it was raised", exc_info=True)
            # Unless it was counted as taken: then it would fill the prefetch window for ever, and
            # be given to the next worker when this one ends.
            for tag in _unacknowledged(channel) - before:
                channel.basic_reject(tag, requeue=False)
            return True

    return guarded


def _unacknowledged(channel: Any) -> set[Any]:
    """The tags of what a channel was given and has not acknowledged; at most a few."""
    return set(getattr(getattr(channel, "qos", None), "_delivered", ()))
