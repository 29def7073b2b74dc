"""What is done to the database in one transaction, with one flush for all who wait.

A batch begins ``immediate``, does each operation in turn, and commits. An operation decides before
it writes, so that a refusal leaves nothing behind. It is done by the dispatcher's thread or by the
loop; whoever does it holds ``mutex``.
"""

from __future__ import annotations

import random
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable
from datetime import datetime
from typing import Final

from pyworkflow.spi import PayloadTooLarge, Refusal, RunClosed, RunNotFound
from pyworkflow.storekit import failpoints
from pyworkflow.storekit.embedded import (
    Answers,
    News,
    Operation,
    Pace,
    add_forkable,
    copy_error,
)
from pyworkflow_storage_sql.sqlite._cache import KnownRuns
from pyworkflow_storage_sql.sqlite._clock import StoreClock
from pyworkflow_storage_sql.sqlite._place import Place
from pyworkflow_storage_sql.sqlite._rows import from_micros
from pyworkflow_storage_sql.sqlite._schema import (
    claim_namespace,
    connect,
    is_busy,
    migrate,
    storage_error,
)

__all__ = ["Batch", "Writer"]

failpoints.register(
    __name__,
    OSError,
    {
        "sqlite.before_commit": "a transaction is written, and not committed",
        "sqlite.after_commit": "a transaction is committed, and nobody has an answer yet",
    },
)

#: What an operation may raise without having written.
_CLEAN: Final = (Refusal, RunNotFound, RunClosed, PayloadTooLarge, ValueError)


class Batch:
    """What operations work on: the connection inside a transaction, the clock, and the news."""

    __slots__ = (
        "clock",
        "conn",
        "dirty",
        "file",
        "micros",
        "namespace",
        "now",
        "runs",
        "token",
        "touched",
        "work",
    )

    def __init__(
        self,
        conn: sqlite3.Connection,
        file: str,
        namespace: int,
        clock: StoreClock,
        token: Callable[[], str],
        runs: KnownRuns,
    ) -> None:
        self.conn = conn
        self.file = file
        self.namespace = namespace
        self.clock = clock
        self.micros = clock.micros + clock.offset
        self.now: datetime = from_micros(self.micros)
        self.token = token
        self.runs = runs
        self.dirty = False
        self.work = False
        self.touched: dict[str, tuple[int, bool]] = {}

    def writes(self, *, work: bool = False) -> None:
        """Something is about to be written; ``work``: it may give a worker something to do."""
        self.runs.forget()
        self.changes(work=work)

    def changes(self, *, work: bool) -> None:
        """A change is about to be written, and ``runs`` will be told what it leaves behind."""
        self.dirty = True
        self.work = self.work or work

    def shift_clock(self, by: int) -> None:
        """Move the store's clock, by microseconds."""
        self.writes(work=True)
        self.clock.shift(self.conn, self.namespace, by)
        self.micros += by
        self.now = from_micros(self.micros)


class Writer:
    """The connection that writes. Everything here blocks."""

    def __init__(
        self, place: Place, namespace: str, clock: StoreClock, *, lock_timeout: float
    ) -> None:
        self.mutex = threading.Lock()
        """Held by whoever calls another method."""
        self.is_open = False
        self.pace = Pace()
        self.path = place.path
        self._place = str(place.path)
        self._name = namespace
        self._lock_timeout = lock_timeout
        self._conn: sqlite3.Connection | None = None
        self._control: sqlite3.Cursor
        """For what each transaction asks beside its operations; ``execute`` would make one each."""
        self._files = place
        self._is_elsewhere = False
        """It was not at its path after the last batch: nothing more is written meanwhile."""
        self._namespace = 0
        self._clock = clock
        self._was_committed = False
        """Whether the last transaction was, so that what it left behind is known."""
        self._token_prefix = secrets.token_hex(8)
        self._tokens = 0
        self._runs = KnownRuns()
        self._touched: dict[str, tuple[int, bool]] = {}
        self._work = 0
        add_forkable(self)

    def take(self, waiting: list[Operation[Batch]], answers: Answers[Batch], *, wait: bool) -> bool:
        """Do the operations as one batch.

        Without ``wait``, False and nothing has happened when somebody else holds the lock.
        """
        try:
            conn = self._conn or self._open()
            if self._is_elsewhere:
                self._refuse_elsewhere()
            return self._do(conn, waiting, answers, wait)
        except Exception as error:  # noqa: BLE001  whoever waits must hear of it
            self.recover()
            told = storage_error(error, self.path)
            answers[:] = [(operation, None, copy_error(told)) for operation in waiting]
            return True

    def take_news(self) -> News:
        """The runs that changed since the last call, and the news for workers so far."""
        touched, self._touched = self._touched, {}
        return touched, self._work

    def recover(self) -> None:
        """Something broke in a batch: hold nothing, believe nothing."""
        self._runs.forget()
        conn = self._conn
        if conn is None:
            return
        try:
            if conn.in_transaction:
                conn.execute("rollback")
        except sqlite3.Error:
            self.close()

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self.is_open = False
        self._runs = KnownRuns()
        conn, self._conn = self._conn, None
        if conn is not None:
            self._files.closing()
            conn.close()

    def before_fork(self) -> None:
        """Let nobody be in a transaction while the process forks, and close the connection."""
        self.mutex.acquire()
        self.close()

    def after_fork(self) -> None:
        """In the parent: go on; the next batch opens again."""
        self.mutex.release()

    def after_fork_in_child(self) -> None:
        """In the child: the thread does not exist here, and the object makes another writer."""

    def _open(self) -> sqlite3.Connection:
        self._refuse_elsewhere()
        conn = connect(self.path)
        try:
            migrate(conn, self.path)
            self._namespace, self._work = claim_namespace(conn, self.path, self._name)
            conn.execute("pragma busy_timeout = 0")
            self._files.opened()
        except BaseException:
            conn.close()
            raise
        self._conn = conn
        self._control = conn.cursor()
        self.is_open = True
        return conn

    def _refuse_elsewhere(self) -> None:
        self._is_elsewhere = True
        self._files.check()
        self._is_elsewhere = False

    def _do(
        self,
        conn: sqlite3.Connection,
        waiting: list[Operation[Batch]],
        answers: Answers[Batch],
        wait: bool,
    ) -> bool:
        writes = waiting[0].writes or any(operation.writes for operation in waiting)
        if not (self._begin(wait, writes) and self._read_clock(conn, wait, writes)):
            return False
        batch = self._batch(conn)
        for operation in waiting:
            if operation.future.done():
                continue  # its caller is gone
            try:
                answers.append((operation, operation.run(batch), None))
            except _CLEAN as refusal:
                answers.append((operation, None, refusal))
            except Exception:
                if len(waiting) == 1 or not conn.in_transaction:
                    raise
                # It may have written a part. The others are done again without it.
                conn.execute("rollback")
                self._runs.forget()
                self._one_by_one(conn, waiting, answers)
                return True
        self._commit(conn, batch)
        return True

    def _one_by_one(
        self, conn: sqlite3.Connection, waiting: list[Operation[Batch]], answers: Answers[Batch]
    ) -> None:
        answers.clear()
        for operation in waiting:
            own: Answers[Batch] = []
            try:
                self._do(conn, [operation], own, True)
            except Exception as error:  # noqa: BLE001  belongs to this caller alone
                self.recover()
                own = [(operation, None, storage_error(error, self.path))]
            answers += own

    def _begin(self, wait: bool, writes: bool) -> bool:
        if not writes:
            self._control.execute("begin")
            return True
        try:
            self._control.execute("begin immediate")
            return True
        except sqlite3.OperationalError as error:
            if not is_busy(error):
                raise
            if not wait:
                return False
        # Shorter pauses than those of SQLite's own handler, which sleeps up to 0.1 s.
        end = time.monotonic() + self._lock_timeout
        pause = 0.0003
        while True:
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 1.5, 0.01)
            try:
                self._control.execute("begin immediate")
                return True
            except sqlite3.OperationalError as error:
                if not is_busy(error) or time.monotonic() > end:
                    raise

    def _read_clock(self, conn: sqlite3.Connection, wait: bool, writes: bool) -> bool:
        """Read the clock in the transaction; False without one when that would take long."""
        clock = self._clock
        was_committed, self._was_committed = self._was_committed, False
        unchanged = writes and self._runs.begin(self._control)
        clock.read(conn, self._namespace, unchanged=unchanged and was_committed)
        if clock.jump:
            # In a transaction of its own: the batch may be rolled back, the clock would not be.
            if not writes:
                conn.execute("rollback")
                if not self._begin(False, True):
                    self._work = clock.work
                    # Another process writes, and follows the clock; a read need not wait for it.
                    return self._begin(wait, writes)
                clock.read(conn, self._namespace)
            if clock.jump:
                clock.follow(conn, self._namespace)
                conn.execute("commit")
                clock.followed()
            else:
                conn.execute("rollback")
            if not self._begin(wait, writes):
                return False
            if writes:
                self._runs.begin(self._control)
            clock.read(conn, self._namespace)
        self._work = clock.work
        return True

    def _batch(self, conn: sqlite3.Connection) -> Batch:
        return Batch(conn, self._place, self._namespace, self._clock, self._token, self._runs)

    def _commit(self, conn: sqlite3.Connection, batch: Batch) -> None:
        if not batch.dirty:
            self._control.execute("commit")
            self._was_committed = True
            self._refuse_elsewhere()
            return
        self._clock.keep(conn, self._namespace, work=batch.work)
        self._work = self._clock.work
        if failpoints.active:
            failpoints.hit("sqlite.before_commit")
        began = time.perf_counter_ns()
        self._control.execute("commit")
        self._was_committed = True
        self.pace.flushed(time.perf_counter_ns() - began)
        self._refuse_elsewhere()
        if failpoints.active:
            failpoints.hit("sqlite.after_commit")
        if batch.touched:
            self._touched.update(batch.touched)

    def _token(self) -> str:
        self._tokens += 1
        return f"{self._token_prefix}{self._tokens:x}"
