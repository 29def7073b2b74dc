"""Sending doorbells: a thread with a bounded queue, so that no caller ever waits for a broker.

What cannot be sent is kept for a while and sent when the broker answers again; what is lost all
the same is rung for by a sweep.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from time import monotonic
from typing import Any

from pyworkflow.spi import Doorbell
from pyworkflow.storekit import failpoints
from pyworkflow.worker import Backoff, OutageLog
from pyworkflow_celery._config import is_redis, priority_of, queue_of

__all__ = ["HANDLE", "Publisher", "flush_all", "publisher_for"]

HANDLE = "pyworkflow.handle"
_log = logging.getLogger("pyworkflow.celery")

failpoints.register(
    __name__,
    OSError,
    {
        "celery.before_publish": "a message is complete, and was not given to the broker",
        "celery.after_publish": "the broker has a message, and its sender does not know",
    },
)

_MOST = 10_000
"""Doorbells that wait to be sent; more push the oldest out."""
_TIMEOUT = 3.0
"""Seconds for one answer of the broker."""
_CONNECT = 1.0
_SOON = 1.0
"""Seconds after which a new message ends the pause before the next attempt."""
_FLUSH = 1.5
"""Seconds that the end of a process waits for what is not sent yet."""


@dataclass(frozen=True, slots=True)
class _Message:
    bell: Doorbell
    hops: int = 0
    route: tuple[str, int | None] | None = None
    """The Celery queue and the broker's priority, when they are not to follow from the doorbell."""


@dataclass(slots=True)
class _State:
    queue: deque[_Message] = field(default_factory=deque[_Message])
    sending: int = 0
    broken: bool = False
    closed: bool = False
    dropped: int = 0
    put: int = 0
    """Messages that were ever put in."""


class Publisher:
    """Sends doorbells for one application, in a thread of one process."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._state = _State()
        self._news = threading.Condition()
        self._thread: threading.Thread | None = None
        self._connection: Any = None
        self._producer: Any = None
        self._outages = OutageLog("the broker", _log, (Exception,))
        self._backoff = Backoff(Random())
        self.between = threading.Lock()
        """Held while a message is on its way: a fork waits for it."""

    def notify(self, bells: Sequence[Doorbell]) -> None:
        """Have them sent. Returns at once, from any thread; never raises."""
        self._put([_Message(bell) for bell in bells])

    def pass_on(self, bell: Doorbell, queue: str, priority: int | None, hops: int) -> None:
        """As ``ring``, for one that came from a Celery queue and goes back to it."""
        self._put([_Message(bell, hops, (queue, priority))])

    def _put(self, messages: Sequence[_Message]) -> None:
        state = self._state
        with self._news:
            if state.closed:
                return
            state.queue.extend(messages)
            state.put += len(messages)
            while len(state.queue) > _MOST:
                state.queue.popleft()
                state.dropped += 1
            if self._thread is None:
                try:
                    self._begin()
                except RuntimeError:
                    # The interpreter is ending and starts no thread: sweeps ring.
                    return
            self._news.notify()

    def _begin(self) -> None:
        thread = threading.Thread(target=self._main, name="pyworkflow-publisher", daemon=True)
        thread.start()
        self._thread = thread

    def flush(self, timeout: float = _FLUSH) -> bool:
        """Wait until all is sent; False when time is up or the broker does not answer."""
        state = self._state
        end = monotonic() + timeout
        with self._news:
            while state.queue or state.sending:
                left = end - monotonic()
                if left <= 0 or state.broken or self._thread is None:
                    return False
                self._news.wait(left)
        return True

    def close(self, timeout: float = _FLUSH) -> None:
        """Flush, and end the thread."""
        self.flush(timeout)
        with self._news:
            self._state.closed = True
            self._news.notify_all()

    def tell_unsent(self) -> None:
        """At the end of the process: say what the broker has not taken, if nobody has."""
        state = self._state
        if state.queue or state.sending:
            waiting = len(state.queue) + state.sending
            self._tell(TimeoutError("it does not answer"), waiting)

    # --- the thread -----------------------------------------------------------------------------

    def _main(self) -> None:
        while (message := self._next()) is not None:
            problem = self._try(message)
            with self._news:
                pause = self._settle(message, problem)
                self._news.notify_all()
                self._wait(pause)
        self._disconnect()

    def _wait(self, pause: float) -> None:
        """Before the next attempt: a new message ends the pause after a second."""
        state, began = self._state, monotonic()
        put = state.put
        while not state.closed:
            end = began + (pause if state.put == put else min(pause, _SOON))
            if (left := end - monotonic()) <= 0:
                return
            self._news.wait(left)

    def _next(self) -> _Message | None:
        """The next message, when there is one; None at the end."""
        state = self._state
        with self._news:
            while not state.queue and not state.closed:
                self._news.wait()
            if state.closed:
                return None
            state.sending = 1
            return state.queue.popleft()

    def _settle(self, message: _Message, problem: Exception | None) -> float:
        """Write down what became of a message; how long to wait before the next one."""
        state = self._state
        state.sending = 0
        if problem is None or not self._may_pass(problem):
            state.broken = False
            self._backoff.reset()
            if problem is None:
                self._outages.worked("send")
            else:
                # Such as one for a queue that the application refuses: the next may be sent.
                state.dropped += 1
                self._tell(problem, len(state.queue))
            return 0.0
        state.queue.appendleft(message)
        state.broken = True
        self._tell(problem, len(state.queue))
        return self._backoff.seconds()

    def _try(self, message: _Message) -> Exception | None:
        problem: Exception | None = None
        # Twice, when a connection was there: the broker may have closed an idle one.
        for _ in range(1 if self._connection is None else 2):
            try:
                with self.between:
                    self._send(message)
            except Exception as exc:  # noqa: BLE001 - whatever a broker's library raises
                problem = exc
                self._disconnect()
            else:
                return None
        return problem

    def _may_pass(self, problem: Exception) -> bool:
        """Whether the broker is at fault, and not this one message."""
        from pyworkflow_celery._celery import OperationalError

        try:
            transport = self._app.connection_for_write().transport
        except Exception:  # noqa: BLE001 - a setting that no library takes: nothing can be sent
            return True
        # A queue that the application does not know is a KeyError, which kombu counts as well.
        return not isinstance(problem, KeyError) and isinstance(
            problem,
            (OSError, OperationalError, *transport.connection_errors, *transport.channel_errors),
        )

    def _connect(self) -> None:
        app = self._app
        if is_redis(str(app.conf.broker_write_url or "")):
            options: dict[str, Any] = {
                "socket_timeout": _TIMEOUT,
                "socket_connect_timeout": _CONNECT,
                "retry_on_timeout": False,
            }
        else:
            # The broker says that it has the message: without this a full or closing one may not.
            options = {"confirm_publish": True, "read_timeout": _TIMEOUT, "write_timeout": _TIMEOUT}
        options |= {"max_retries": 1, "interval_start": 0, "interval_step": 0, "interval_max": 0}
        connection = app.connection_for_write(
            connect_timeout=_CONNECT, heartbeat=0, transport_options=options
        )
        try:
            connection.ensure_connection(
                max_retries=1, interval_start=0, interval_step=0, timeout=_CONNECT
            )
            self._producer = app.amqp.Producer(connection)
        except BaseException:
            connection.release()
            raise
        self._connection = connection

    def _send(self, what: _Message) -> None:
        from pyworkflow_celery._celery import uuid

        app, bell = self._app, what.bell
        if self._connection is None:
            self._connect()
        queue, priority = what.route or (queue_of(app, bell.queue), priority_of(app, bell.priority))
        task_id = uuid()
        # The second version whatever the application's own tasks are sent in.
        message = app.amqp.as_task_v2(
            task_id,
            HANDLE,
            (),
            {"run_id": bell.run_id, "item_id": bell.item_id, "v": bell.v},
            shadow=bell.name or None,
            ignore_result=True,
        )
        headers: dict[str, Any] = {"pyworkflow_queue": queue}
        if bell.headers:
            headers["pyworkflow_headers"] = dict(bell.headers)
        if what.hops:
            headers["pyworkflow_hops"] = what.hops
        if failpoints.active:
            failpoints.hit("celery.before_publish")
        app.amqp.send_task_message(
            self._producer,
            HANDLE,
            message,
            queue=queue,
            priority=priority,
            serializer="json",
            headers=headers,
            retry=False,
            timeout=_TIMEOUT,
            confirm_timeout=_TIMEOUT,
        )
        if failpoints.active:
            failpoints.hit("celery.after_publish")

    def _disconnect(self) -> None:
        connection, self._connection, self._producer = self._connection, None, None
        if connection is not None:
            try:
                connection.release()
            except Exception:  # noqa: BLE001 - it is broken already
                _log.debug("a connection to the broker could not be closed", exc_info=True)

    def _tell(self, problem: Exception, waiting: int) -> None:
        self._outages.failed(
            "send",
            f"the broker does not take messages: broker={self._place()} waiting={waiting} "
            f"dropped={self._state.dropped}; nothing is lost: runs go on when it answers, or when "
            "a sweep rings",
            problem,
        )

    def _place(self) -> str:
        try:
            return str(self._app.connection_for_write().as_uri())
        except Exception:  # noqa: BLE001 - this is for a log line
            return "(unreadable)"


# --- one for each process -----------------------------------------------------------------------


class _Standing:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.publishers: dict[int, Publisher] = {}
        self.at_exit = False
        self.held: list[Publisher] = []


_standing = _Standing()
#: What a parent had: kept, so that nothing in a child closes the parent's connections.
_inherited: list[_Standing] = []


def publisher_for(app: Any) -> Publisher:
    """The publisher of this process for an application."""
    with _standing.lock:
        found = _standing.publishers.get(id(app))
        if found is None:
            found = _standing.publishers[id(app)] = Publisher(app)
        if not _standing.at_exit:
            _standing.at_exit = True
            atexit.register(_flush_at_exit, os.getpid())
        return found


def flush_all(timeout: float = _FLUSH) -> None:
    """Wait until this process has sent all. Takes no lock but those of the publishers."""
    for publisher in list(_standing.publishers.values()):
        publisher.flush(timeout)


def _flush_at_exit(pid: int) -> None:
    if pid == os.getpid():
        flush_all()
        for publisher in list(_standing.publishers.values()):
            publisher.tell_unsent()


def _before_fork() -> None:
    # Between two messages no lock of the client library is held, and no message is half sent.
    for publisher in list(_standing.publishers.values()):
        if publisher.between.acquire(timeout=_TIMEOUT):
            _standing.held.append(publisher)


def _after_in_parent() -> None:
    while _standing.held:
        _standing.held.pop().between.release()


def _after_in_child() -> None:
    global _standing
    _inherited.append(_standing)
    _standing = _Standing()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork, after_in_parent=_after_in_parent, after_in_child=_after_in_child
    )
