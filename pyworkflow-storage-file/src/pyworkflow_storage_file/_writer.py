"""The one thread that does all file work of a backend object.

The event loop queues operations; the thread takes everything that waits, takes the lock once,
applies each to the state, writes all records at once, flushes once, lets go of the lock, and hands
all answers to the loop in one call. The loop never waits for a disk.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from queue import Empty, SimpleQueue
from typing import Any, Final

from pyworkflow.spi import (
    Delta,
    PayloadTooLarge,
    Refusal,
    RunClosed,
    RunNotFound,
    StorageError,
    StorageUnavailable,
)
from pyworkflow_storage_file._calls import Calls
from pyworkflow_storage_file._files import storage_error
from pyworkflow_storage_file._journal import Journal, Record
from pyworkflow_storage_file._state import DELTA, State, encode

__all__ = ["Batch", "Operation", "Writer", "forks"]

_log = logging.getLogger("pyworkflow.storage.file")

#: A batch ends at this many operations or bytes, so that one payload does not hold up the others.
_BATCH_OPERATIONS: Final = 1000
_BATCH_BYTES: Final = 8 * 1024 * 1024
#: The journal is rewritten when it is larger than this and mostly garbage.
_REWRITE_BYTES: Final = 8 * 1024 * 1024
#: A wall clock that moved this far against the time since boot was set by somebody, ns.
_JUMP: Final = 1_000_000_000
#: What an operation may raise without having touched the state.
_CLEAN: Final = (Refusal, RunNotFound, RunClosed, PayloadTooLarge, ValueError)
#: Polls of the journal for what other processes wrote, in seconds.
_POLL_FIRST, _POLL_LAST = 0.02, 0.1

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

_live: weakref.WeakSet[Writer] = weakref.WeakSet()
_forks = 0


class Batch:
    """What operations work on: the state, the clock, and the records to be written."""

    __slots__ = ("bytes", "durable", "now", "records", "state", "store", "token")

    def __init__(self, state: State, now: datetime, token: Callable[[], str]) -> None:
        self.state = state
        self.store = state.store
        self.now = now
        self.token = token
        self.records: list[Record] = []
        self.durable = False
        self.bytes = 0

    def shift_clock(self, by: timedelta) -> None:
        """Move the store's clock."""
        self.state.shift += by
        self.records.append(self.state.clock_record())
        self.durable = True
        self.now += by

    def write(self, delta: Delta | None, *, durable: bool) -> None:
        """Have a change written that the store has applied."""
        if delta is None:
            return
        body = encode(delta.to_json())
        self.records.append(Record(DELTA, body))
        self.state.note(delta, len(body))
        self.bytes += len(body)
        self.durable = self.durable or durable


class Operation:
    """One call of the contract on its way through the thread."""

    __slots__ = ("future", "run", "undo", "writes")

    def __init__(
        self,
        run: Callable[[Batch], Any],
        future: asyncio.Future[Any],
        writes: bool,
        undo: Callable[[Any], None] | None,
    ) -> None:
        self.run = run
        self.future = future
        self.writes = writes
        self.undo = undo


Answers = list[tuple[Operation, Any, BaseException | None]]


class Writer:
    """A thread, its journal, and the loop that it answers to."""

    def __init__(
        self,
        make_journal: Callable[[State], Journal],
        loop: asyncio.AbstractEventLoop,
        *,
        calls: Calls,
        lock_timeout: float,
    ) -> None:
        self._loop = loop
        self._lock_timeout = lock_timeout
        self._state = State()
        self._journal = make_journal(self._state)
        self._opened = False
        self._inbox: SimpleQueue[Operation | None] = SimpleQueue()
        self._token_prefix = secrets.token_hex(8)
        self._tokens = 0
        self._calls = calls
        self._last_clocks = calls.clocks()
        self._rewrite_at = _REWRITE_BYTES
        # The rest belongs to the loop.
        self._pending: set[Operation] = set()
        self._stuck_timer: asyncio.TimerHandle | None = None
        # By run, what waits for an event after a seq, or for the end; None: what waits for work.
        self._watchers: dict[str | None, dict[asyncio.Future[None], int]] = {}
        self._poll_timer: asyncio.TimerHandle | None = None
        self._poll_pause = _POLL_FIRST
        self._work_news = 0
        self._work_known = 0
        self._stopped: asyncio.Future[None] | None = None
        self._thread = threading.Thread(
            target=self._main, name="pyworkflow-storage-file", daemon=True
        )
        _live.add(self)
        self._thread.start()

    # --- on the loop --------------------------------------------------------------------------

    def submit(
        self,
        run: Callable[[Batch], Any],
        *,
        writes: bool,
        undo: Callable[[Any], None] | None = None,
    ) -> asyncio.Future[Any]:
        """Queue an operation. ``undo`` gets the answer when the caller was cancelled meanwhile."""
        future: asyncio.Future[Any] = self._loop.create_future()
        operation = Operation(run, future, writes, undo)
        self._pending.add(operation)
        self._inbox.put(operation)
        if self._stuck_timer is None:
            self._stuck_timer = self._loop.call_later(1.0, self._look_if_stuck)
        return future

    def stop(self) -> None:
        """End the thread when it has done what is queued. Idempotent, from any thread."""
        self._inbox.put(None)

    async def join(self) -> None:
        """Wait until the thread has ended; not for ever, another process may hold the lock."""
        thread = self._thread
        deadline = time.monotonic() + self._lock_timeout
        pause = 0.0002
        while thread.is_alive() and time.monotonic() < deadline:
            await asyncio.sleep(pause)
            pause = min(pause * 2, 0.02)
        if asyncio.get_running_loop() is not self._loop:
            return
        for timer in (self._stuck_timer, self._poll_timer):
            if timer is not None:
                timer.cancel()
        self._stuck_timer = self._poll_timer = None
        for operation in self._pending:
            if not operation.future.done():
                operation.future.set_exception(StorageError("the storage was closed"))
        self._pending.clear()

    def add_watcher(self, run_id: str | None, after: int, future: asyncio.Future[None]) -> None:
        """Have ``future`` done when the run has an event after ``after``, or ends.

        With None, when there may be work.
        """
        self._watchers.setdefault(run_id, {})[future] = after
        self._poll_pause = _POLL_FIRST
        if self._poll_timer is None:
            self._poll_timer = self._loop.call_later(_POLL_FIRST, self._poll)

    def drop_watcher(self, run_id: str | None, future: asyncio.Future[None]) -> None:
        """Take a future back."""
        futures = self._watchers.get(run_id)
        if futures is not None:
            futures.pop(future, None)
            if not futures:
                del self._watchers[run_id]

    def take_work_news(self) -> bool:
        """Whether there may be work that was not there at the last claim or call."""
        fresh = self._work_news != self._work_known
        self._work_known = self._work_news
        return fresh

    def _poll(self) -> None:
        self._poll_timer = None
        if self._watchers:
            future = self.submit(_nothing, writes=False)
            future.add_done_callback(self._polled)

    def _polled(self, future: asyncio.Future[Any]) -> None:
        if not future.cancelled() and future.exception() is not None:
            for futures in self._watchers.values():  # who waits shall ask, and learn of the error
                self._wake(futures)
        if self._watchers and self._poll_timer is None:
            self._poll_timer = self._loop.call_later(self._poll_pause, self._poll)
            self._poll_pause = min(self._poll_pause * 1.5, _POLL_LAST)

    def _wake(self, futures: Iterable[asyncio.Future[None]]) -> None:
        self._poll_pause = _POLL_FIRST
        for future in futures:
            if not future.done():
                future.set_result(None)

    def _resolve(self, answers: Answers, touched: dict[str, tuple[int, bool]], work: bool) -> None:
        for operation, result, error in answers:
            self._pending.discard(operation)
            future = operation.future
            if not future.done():
                if error is None:
                    future.set_result(result)
                else:
                    future.set_exception(error)
            elif operation.undo is not None and error is None:
                operation.undo(result)
        if work:
            self._work_news += 1
        if self._watchers:
            if work:
                self._wake(self._watchers.get(None, ()))
            for run_id, (seq, ended) in touched.items():
                futures = self._watchers.get(run_id)
                if futures is not None:
                    self._wake([f for f, after in futures.items() if ended or seq > after])

    def _look_if_stuck(self) -> None:
        """Fail what waits when another process has held the lock for too long."""
        self._stuck_timer = None
        if not self._pending:
            return
        since = self._journal.lock.waiting_since
        if since is not None and time.monotonic() - since > self._lock_timeout:
            for operation in self._pending:
                if not operation.future.done():
                    operation.future.set_exception(
                        StorageUnavailable(
                            f"another process holds the store's lock: "
                            f"path={self._journal.lock.path} seconds={self._lock_timeout:g}; "
                            "is one of its processes stopped? Try again"
                        )
                    )
            self._pending.clear()
        self._stuck_timer = self._loop.call_later(1.0, self._look_if_stuck)

    # --- on the thread ------------------------------------------------------------------------

    def _main(self) -> None:
        inbox = self._inbox
        waiting: list[Operation] = []
        stopping = False
        while not stopping or waiting:
            if not waiting:
                operation = inbox.get()
                if operation is None:
                    break
                waiting.append(operation)
            try:
                while len(waiting) < _BATCH_OPERATIONS:
                    operation = inbox.get_nowait()
                    if operation is None:
                        stopping = True
                    else:
                        waiting.append(operation)
            except Empty:
                pass
            taken = self._take(waiting)
            del waiting[:taken]
        self._journal.close()

    def _take(self, waiting: list[Operation]) -> int:
        """Do as many of the operations as fit into one batch, and answer them."""
        answers: Answers = []
        try:
            if not self._opened:
                self._journal.open()
                self._opened = True
            if any(operation.writes for operation in waiting):
                taken = self._write(waiting, answers)
            else:
                taken = self._read(waiting, answers)
        except Exception as error:  # noqa: BLE001  whoever waits must hear of it
            if isinstance(error, OSError):
                error = storage_error("cannot use the store", self._journal.directory, error)
            taken = len(waiting)
            answers = [(operation, None, _copy(error)) for operation in waiting]
        touched, work = self._state.take_news()
        try:
            self._loop.call_soon_threadsafe(self._resolve, answers, touched, work)
        except RuntimeError:
            pass  # the loop was closed: nobody waits any more
        if self._state.garbage > self._rewrite_at:
            self._rewrite()
        return taken

    def _read(self, waiting: list[Operation], answers: Answers) -> int:
        if not self._journal.is_current() or self._has_jumped():
            self._acquire()
            self._journal.release()
        batch = Batch(self._state, self._now(), self._token)
        for operation in waiting:
            if not operation.future.done():
                try:
                    answers.append((operation, operation.run(batch), None))
                except Exception as error:  # noqa: BLE001  belongs to this caller alone
                    answers.append((operation, None, error))
        return len(waiting)

    def _write(self, waiting: list[Operation], answers: Answers) -> int:
        journal, state = self._journal, self._state
        self._acquire()
        written = False
        try:
            batch = Batch(state, self._now(), self._token)
            taken = 0
            for operation in waiting:
                taken += 1
                if operation.future.done():
                    continue  # its caller is gone
                try:
                    answers.append((operation, operation.run(batch), None))
                except _CLEAN as refusal:
                    answers.append((operation, None, refusal))
                except Exception as error:  # noqa: BLE001  belongs to this caller alone
                    # The state may hold what can never be written.
                    self._rebuild(batch)
                    answers.append((operation, None, error))
                if batch.bytes > _BATCH_BYTES:
                    break
            if batch.records:
                journal.append(batch.records, durable=batch.durable)
            written = True
            return taken
        finally:
            if not written:
                journal.invalidate()  # the state may be ahead of the files
            journal.release()

    def _rebuild(self, batch: Batch) -> None:
        """Make the state anew from what is written and what this batch is going to write."""
        self._journal.reload()
        for record in batch.records:
            self._state.load(*record)
        batch.store = self._state.store

    def _acquire(self) -> None:
        """Take the lock; if somebody set the wall clock, leases do not move with it."""
        journal = self._journal
        journal.acquire()
        try:
            marker = journal.last_marker
            if marker is None:
                return
            wall, boottime = self._calls.clocks()
            jump = (wall - marker.wall) - (boottime - marker.boottime)
            if abs(jump) > _JUMP:
                _log.warning("the wall clock was set: seconds=%.3f", jump / 1e9)
                delta = self._state.follow_jump(timedelta(microseconds=jump // 1000), self._now())
                if delta is None:
                    journal.touch()
                else:
                    body = encode(delta.to_json())
                    self._state.note(delta, len(body))
                    journal.append([Record(DELTA, body)], durable=False)
        except BaseException:
            journal.invalidate()
            journal.release()
            raise

    def _has_jumped(self) -> bool:
        wall, boottime = self._calls.clocks()
        last_wall, last_boottime = self._last_clocks
        self._last_clocks = wall, boottime
        return abs((wall - last_wall) - (boottime - last_boottime)) > _JUMP

    def _now(self) -> datetime:
        wall = self._calls.clocks()[0]
        return _EPOCH + timedelta(microseconds=wall // 1000) + self._state.shift

    def _token(self) -> str:
        self._tokens += 1
        return f"{self._token_prefix}{self._tokens:x}"

    def _rewrite(self) -> None:
        """Drop the garbage from the journal, when most of it is."""
        journal, state = self._journal, self._state
        try:
            self._acquire()
            try:
                if journal.size > _REWRITE_BYTES and state.garbage * 2 > journal.size:
                    journal.rewrite(state.compact())
                self._rewrite_at = max(_REWRITE_BYTES, journal.size // 2)
            finally:
                journal.release()
        except Exception as error:  # noqa: BLE001  all was answered; the thread must go on
            self._rewrite_at = max(_REWRITE_BYTES, journal.size)
            _log.warning("the journal was not rewritten: %s", error)

    # --- after a fork -------------------------------------------------------------------------

    def abandon(self) -> None:
        """In a forked child: let go of the parent's files, without unlocking them."""
        self._journal.close()


def _nothing(_: Batch) -> None:
    """What a poll does: the batch reads what others wrote."""


def _copy(error: BaseException) -> BaseException:
    """The same error for another caller, since raising one adds to its traceback."""
    try:
        copy = type(error)(*error.args)
    except Exception:  # noqa: BLE001  an error with a constructor of its own
        return error
    copy.__cause__ = error.__cause__
    return copy


def forks() -> int:
    """How often this process, or one before it, was forked off: objects compare it with theirs."""
    return _forks


def _after_fork() -> None:
    global _forks
    _forks += 1
    # The child has the parent's descriptors: kept open, they would keep the lock when the parent
    # dies, and unlocking through them would take it from the parent.
    for writer in list(_live):
        writer.abandon()
    _live.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
