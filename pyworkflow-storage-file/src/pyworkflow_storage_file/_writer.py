"""What is done to the files and the state of a backend object, a batch at a time.

A batch takes the lock once, applies each operation to the state, writes all records at once,
flushes once, and lets go of the lock. It is done by the dispatcher's thread or by the loop; whoever
does it holds ``mutex``.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Final

from pyworkflow.spi import (
    Delta,
    PayloadTooLarge,
    Refusal,
    RunClosed,
    RunNotFound,
    StorageUnavailable,
)
from pyworkflow.storekit.embedded import (
    Answers,
    Forkable,
    News,
    Operation,
    add_forkable,
    copy_error,
)
from pyworkflow_storage_file._calls import Calls
from pyworkflow_storage_file._files import storage_error
from pyworkflow_storage_file._journal import Journal, Record
from pyworkflow_storage_file._state import DELTA, State, encode

__all__ = ["Batch", "Writer"]

_log = logging.getLogger("pyworkflow.storage.file")

#: A batch ends at this many bytes, so that one payload does not hold up the others.
_BATCH_BYTES: Final = 8 * 1024 * 1024
#: The journal is rewritten when it is larger than this and mostly garbage.
_REWRITE_BYTES: Final = 8 * 1024 * 1024
#: A wall clock that moved this far against the time since boot was set by somebody, ns.
_JUMP: Final = 1_000_000_000
#: What an operation may raise without having touched the state.
_CLEAN: Final = (Refusal, RunNotFound, RunClosed, PayloadTooLarge, ValueError)

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


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


#: Wall clock and time since boot, ns.
Clocks = tuple[int, int]


class Writer(Forkable):
    """A journal and the state it amounts to. Everything here blocks."""

    def __init__(
        self, make_journal: Callable[[State], Journal], *, calls: Calls, lock_timeout: float
    ) -> None:
        self.mutex = threading.Lock()
        """Held by whoever calls ``take``, ``take_news``, ``upkeep``, ``recover`` or ``close``."""
        self.is_open = False
        """The journal was read, and not closed yet."""
        self._state = State()
        self._journal = make_journal(self._state)
        self._lock = self._journal.lock
        self._lock_timeout = lock_timeout
        self.pace = self._journal.pace
        self._token_prefix = secrets.token_hex(8)
        self._tokens = 0
        self._calls = calls
        self._last_clocks = calls.clocks()
        self._rewrite_at = _REWRITE_BYTES
        self._work = 0
        """Counts the news for workers."""
        add_forkable(self)

    def take(self, waiting: list[Operation[Batch]], answers: Answers[Batch], *, wait: bool) -> bool:
        """Do as many of the operations as fit into one batch; the others are cut off of the list.

        Without ``wait``, False and nothing has happened when the lock is taken, or when there is
        more to do than these operations: what others wrote, repairs, a new segment.
        """
        try:
            if not self.is_open:
                self._journal.open()
                self.is_open = True
            if any(operation.writes for operation in waiting):
                return self._write(waiting, answers, wait)
            return self._read(waiting, answers, wait)
        except Exception as error:  # noqa: BLE001  whoever waits must hear of it
            if isinstance(error, OSError):
                error = storage_error("cannot use the store", self._journal.directory, error)
            self._journal.drop_lock()
            answers[:] = [(operation, None, copy_error(error)) for operation in waiting]
            return True

    def take_news(self) -> News:
        """The runs that changed since the last call, and the news for workers so far."""
        touched, work = self._state.take_news()
        self._work += work
        return touched, self._work

    def stuck(self) -> StorageUnavailable | None:
        """An error when another process has held the lock for too long. From any thread."""
        since = self._lock.waiting_since
        if since is None or time.monotonic() - since <= self._lock_timeout:
            return None
        return StorageUnavailable(
            f"another process holds the store's lock: "
            f"path={self._lock.path} seconds={self._lock_timeout:g}; "
            "is one of its processes stopped? Try again"
        )

    def recover(self) -> None:
        """Something was thrown into a batch from outside: believe nothing, hold nothing."""
        self._journal.invalidate()
        self._journal.drop_lock()

    def close(self) -> None:
        """Close the files. Idempotent."""
        self.is_open = False
        self._journal.close()

    def _read(self, waiting: list[Operation[Batch]], answers: Answers[Batch], wait: bool) -> bool:
        clocks = self._calls.clocks()
        if not self._journal.is_current() or self._has_jumped(clocks):
            if not wait:
                return False
            self._acquire(wait)
            self._journal.release()
            clocks = self._calls.clocks()
        self._last_clocks = clocks
        batch = Batch(self._state, self._instant(clocks), self._token)
        for operation in waiting:
            if not operation.future.done():
                try:
                    answers.append((operation, operation.run(batch), None))
                except Exception as error:  # noqa: BLE001  belongs to this caller alone
                    answers.append((operation, None, error))
        return True

    def _write(self, waiting: list[Operation[Batch]], answers: Answers[Batch], wait: bool) -> bool:
        journal, state = self._journal, self._state
        clocks = self._acquire(wait)
        if clocks is None:
            return False
        try:
            # From here on the state may be ahead of the files, whatever is thrown.
            journal.invalidate()
            batch = Batch(state, self._instant(clocks), self._token)
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
            journal.validate()
            del waiting[taken:]
            return True
        finally:
            journal.release()

    def _rebuild(self, batch: Batch) -> None:
        """Make the state anew from what is written and what this batch is going to write."""
        journal = self._journal
        journal.reload()
        journal.invalidate()
        for record in batch.records:
            self._state.load(*record)
        batch.store = self._state.store

    def _acquire(self, wait: bool) -> Clocks | None:
        """Take the lock, and read the clocks; None without the lock when that would take long.

        If somebody set the wall clock, leases do not move with it.
        """
        journal = self._journal
        if wait:
            journal.acquire()
        elif not journal.try_acquire():
            return None
        try:
            clocks = wall, boottime = self._calls.clocks()
            marker = journal.last_marker
            if marker is None:
                return clocks
            jump = (wall - marker.wall) - (boottime - marker.boottime)
            if abs(jump) > _JUMP:
                if not wait:
                    journal.release()
                    return None
                self._follow(jump, clocks)
            return clocks
        except BaseException:
            journal.release()
            raise

    def _follow(self, jump: int, clocks: Clocks) -> None:
        """With the lock held: somebody set the wall clock, by so many ns."""
        journal = self._journal
        _log.warning("the wall clock was set: seconds=%.3f", jump / 1e9)
        journal.invalidate()
        now = self._instant(clocks)
        delta = self._state.follow_jump(timedelta(microseconds=jump // 1000), now)
        if delta is None:
            journal.touch()
        else:
            body = encode(delta.to_json())
            self._state.note(delta, len(body))
            journal.append([Record(DELTA, body)], durable=False)
        journal.validate()

    def _has_jumped(self, clocks: Clocks) -> bool:
        last = self._last_clocks
        return abs((clocks[0] - last[0]) - (clocks[1] - last[1])) > _JUMP

    def _instant(self, clocks: Clocks) -> datetime:
        """What the store calls now."""
        return _EPOCH + timedelta(microseconds=clocks[0] // 1000) + self._state.shift

    def _token(self) -> str:
        self._tokens += 1
        return f"{self._token_prefix}{self._tokens:x}"

    @property
    def wants_upkeep(self) -> bool:
        """Whether there is so much garbage that ``upkeep`` should look."""
        return self._state.garbage > self._rewrite_at

    def upkeep(self) -> None:
        """Drop the garbage from the journal, when most of it is."""
        journal, state = self._journal, self._state
        try:
            self._acquire(wait=True)
            try:
                if journal.size > _REWRITE_BYTES and state.garbage * 2 > journal.size:
                    journal.rewrite(state.compact())
                self._rewrite_at = max(_REWRITE_BYTES, journal.size // 2)
            finally:
                journal.release()
        except Exception as error:  # noqa: BLE001  all was answered; the thread must go on
            self._rewrite_at = max(_REWRITE_BYTES, journal.size)
            _log.warning("the journal was not rewritten: %s", error)

    def after_fork_in_child(self) -> None:
        """In a forked child: close the parent's files, without unlocking them.

        Kept open, they would keep the lock when the parent dies; unlocked, it would lose it.
        """
        self.close()
