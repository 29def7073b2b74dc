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
from collections.abc import Callable, Generator
from contextlib import contextmanager
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
from pyworkflow_storage_file._codec import encode
from pyworkflow_storage_file._compact import Plan, Stopped
from pyworkflow_storage_file._files import storage_error
from pyworkflow_storage_file._journal import Clocks, Journal
from pyworkflow_storage_file._merge import DELTA
from pyworkflow_storage_file._packing import Packer, prepare
from pyworkflow_storage_file._records import Record
from pyworkflow_storage_file._state import State

__all__ = ["Batch", "Writer"]

_log = logging.getLogger("pyworkflow.storage.file")

#: A batch ends at this many bytes, so that one payload does not hold up the others.
_BATCH_BYTES: Final = 8 * 1024 * 1024
#: Garbage is dropped when the files are larger than this and mostly garbage.
_GARBAGE_BYTES: Final = 8 * 1024 * 1024
#: So long ``close`` lets the packing end that was begun; what it has not done another process does.
_PACKING_S: Final = 2.0
#: A wall clock that is this far ahead of the store's was set forward, ns.
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


class Writer(Forkable):
    """A journal and the state it amounts to. Everything here blocks."""

    def __init__(self, make_journal: Callable[[State], Journal], *, lock_timeout: float) -> None:
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
        self._packer = Packer(self._journal.make_files, self)
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
                self._journal.open(self._prepare)
                self.is_open = True
            for operation in waiting:
                if operation.writes:
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
        if self.is_open and self._packer.is_busy:
            # It needs the mutex to come to its end: what was purged may be most of the files.
            self.mutex.release()
            try:
                self._packer.wait(_PACKING_S)
            finally:
                self.mutex.acquire()
        self.is_open = False
        self._packer.stop()
        self._journal.close()

    def _read(self, waiting: list[Operation[Batch]], answers: Answers[Batch], wait: bool) -> bool:
        is_current = self._journal.is_current()
        clocks = self._journal.read_clocks()
        if not is_current or self._jump(clocks) > _JUMP:
            if not wait:
                return False
            self._acquire(wait)
            self._journal.release()
            clocks = self._journal.read_clocks()
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
            if wait:
                journal.make_room()
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
            journal.check_place()
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

        If the wall clock was set forward, leases keep the time they had left.
        """
        journal = self._journal
        if wait:
            journal.acquire()
        elif not journal.try_acquire():
            return None
        try:
            clocks = journal.read_clocks()
            jump = self._jump(clocks)
            if jump > _JUMP and journal.last_marker is not None:
                if not wait:
                    journal.release()
                    return None
                self._follow(jump, clocks)
            return clocks
        except BaseException:
            journal.release()
            raise

    def _follow(self, jump: int, clocks: Clocks) -> None:
        """With the lock held: the wall clock was set forward, by so many ns."""
        journal = self._journal
        journal.make_room()
        _log.warning("the clock of this machine was set forward: seconds=%.3f", jump / 1e9)
        journal.invalidate()
        self._instant(clocks)
        delta = self._state.store.postpone(timedelta(microseconds=jump // 1000))
        if delta is None:
            journal.touch()
        else:
            body = encode(delta.to_json())
            self._state.note(delta, len(body))
            journal.append([Record(DELTA, body)], durable=False)
        journal.validate()

    def _jump(self, clocks: Clocks) -> int:
        """By how much the wall clock was set forward since the store's clock was read, ns."""
        return -self._journal.clock.lead(*clocks)

    def _instant(self, clocks: Clocks) -> datetime:
        """What the store calls now."""
        reading = self._journal.clock.read(*clocks)
        return _EPOCH + timedelta(microseconds=reading // 1000) + self._state.shift

    def _token(self) -> str:
        self._tokens += 1
        return f"{self._token_prefix}{self._tokens:x}"

    # --- packing ------------------------------------------------------------------------------

    @property
    def wants_upkeep(self) -> bool:
        """Whether there is something to pack."""
        return (self._journal.has_sealed or self._is_garbage) and self._packer.is_ready

    @property
    def _is_garbage(self) -> bool:
        size = self._journal.size
        if size <= _GARBAGE_BYTES:
            return False  # as after most batches
        garbage = self._state.garbage + sum(pack.dead for pack in self._journal.packs)
        return garbage * 2 > size

    def upkeep(self) -> None:
        """Begin to pack, in another thread."""
        self._packer.start()

    def seal(self, stop: Callable[[], bool]) -> frozenset[str]:
        """From the thread that packs: see ``Host``."""
        with self._exclusive(stop):
            if self._is_garbage:
                self._journal.seal()
            return frozenset(pack.name for pack in self._journal.packs if pack.dead * 2 > pack.size)

    def install(self, plan: Plan, stop: Callable[[], bool]) -> bool:
        """From the thread that packs: see ``Host``."""
        with self._exclusive(stop):
            done = self._journal.install(plan)
            self._journal.clean_up()
        with self._mutex(stop):
            self._journal.read_ahead()
        return done

    @contextmanager
    def _mutex(self, stop: Callable[[], bool]) -> Generator[None]:
        while not self.mutex.acquire(timeout=0.05):
            if stop():
                raise Stopped
        try:
            if stop() or not self.is_open:
                raise Stopped
            yield
        finally:
            self.mutex.release()

    @contextmanager
    def _exclusive(self, stop: Callable[[], bool]) -> Generator[None]:
        """With the mutex and the store's lock, and with all that was written read."""
        with self._mutex(stop):
            self._journal.acquire()
            try:
                yield
            finally:
                self._journal.release()

    def _prepare(self) -> None:
        prepare(self._journal.make_files(), self._lock)

    def after_fork_in_child(self) -> None:
        """In a forked child: close the parent's files, without unlocking them.

        Kept open, they would keep the lock when the parent dies; unlocked, it would lose it.
        """
        self.is_open = False
        self._packer.abandon()
        self._journal.close()
