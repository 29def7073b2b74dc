"""The SQLite backend: the storage contract as operations on a database file."""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final

from pyworkflow.spi import (
    Answer,
    Capabilities,
    Change,
    Claimed,
    ClaimRef,
    ClaimRequest,
    Committed,
    ConfigurationError,
    Delta,
    Event,
    KeyMark,
    Page,
    Run,
    RunDelta,
    RunQuery,
    StorageBackend,
    StorageError,
    StorageInfo,
    WorkItem,
    check_change,
)
from pyworkflow_storage_sql import _sqlite_reads as reads
from pyworkflow_storage_sql import _sqlite_runs as runs
from pyworkflow_storage_sql import _sqlite_work as work
from pyworkflow_storage_sql._sqlite_dispatch import Dispatcher, nothing
from pyworkflow_storage_sql._sqlite_reader import Reader
from pyworkflow_storage_sql._sqlite_rows import fitting
from pyworkflow_storage_sql._sqlite_schema import pending, storage_error
from pyworkflow_storage_sql._sqlite_twins import forks
from pyworkflow_storage_sql._sqlite_writer import Batch, Writer

__all__ = ["SQLiteStorageBackend"]

MAX_PAYLOAD: Final = 16 * 1024 * 1024
MAX_EVENTS: Final = 10_000
#: So many changes or leases the loop may handle by itself, if it waits for nothing else.
_FEW: Final = 8


class SQLiteStorageBackend(StorageBackend):
    """Storage in an SQLite database, for any number of processes on one machine.

    A commit that returned survives power loss (``synchronous=FULL``). All writes that wait go into
    one transaction, made by a thread; a lone small one is made by the loop itself while flushes
    take less than a millisecond, since waking the thread would take about as long. Long reads have
    a connection of their own.
    An object belongs to the event loop that first used it; ``twin`` makes one for another. Before
    a fork all connections are closed; parent and child then go on with connections of their own.

    The clock is the machine's, plus the offset of ``shift_clock``; when the machine's is set back,
    the store's stands still until it has caught up.
    """

    #: After so many seconds of waiting for another process, calls raise ``StorageUnavailable``.
    _lock_timeout: float = 10.0

    def __init__(self, path: str | os.PathLike[str], *, namespace: str = "default") -> None:
        try:
            namespace.encode()
        except UnicodeEncodeError as error:
            raise ConfigurationError(
                f"the namespace is no valid text: namespace={namespace!r}; use other characters"
            ) from error
        self.path = Path(path).absolute()
        self.namespace = namespace
        self._dispatcher: Dispatcher | None = None
        self._reader: Reader | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._forks = 0
        self._closed = False
        self._opened = False

    def __repr__(self) -> str:
        return f"SQLiteStorageBackend({str(self.path)!r}, namespace={self.namespace!r})"

    # --- life ---------------------------------------------------------------------------------

    async def open(self) -> None:
        """Open the database, make its tables if need be. Idempotent.

        Raises:
            ConfigurationError: There cannot be a store at the path.
            StorageError: It cannot be used; ``StorageDamaged`` and ``SchemaTooNew`` are such.
        """
        self._started()
        await self._submit(nothing, writes=False, small=True)
        self._opened = True

    async def close(self) -> None:
        """Finish what was begun, close the connections, end the threads. Idempotent."""
        self._closed = True
        dispatcher, self._dispatcher = self._dispatcher, None
        reader, self._reader = self._reader, None
        if self._forks != forks():
            return
        if dispatcher is not None:
            await dispatcher.close()
        if reader is not None:
            await reader.close()

    def info(self) -> StorageInfo:
        """Name, place, capabilities and limits."""
        return StorageInfo(
            name="sqlite",
            location=str(self.path),
            namespace=self.namespace,
            capabilities=Capabilities(
                durable=True,
                multi_process=True,
                server_clock=True,
                watch=True,
                batched=True,
                indexed_filters=True,
                purge_by_age=True,
                large_history=True,
                gaps={
                    "CRA-04": "SQLite's pages have no checksums: events and names of namespaces "
                    "are checked, a bit that flips in another row can go unnoticed"
                },
            ),
            max_payload=MAX_PAYLOAD,
            max_events_per_commit=MAX_EVENTS,
        )

    async def migrate(self) -> None:
        """Bring the tables forward; opening does it, too."""
        await self.open()

    async def pending_migrations(self) -> list[str]:
        """Names of the migrations that ``migrate`` would run now. Writes nothing, makes no file."""
        try:
            return await asyncio.to_thread(pending, self.path, self.namespace)
        except Exception as error:
            told = storage_error(error, self.path)
            if told is error:
                raise
            raise told from error

    def twin(self) -> SQLiteStorageBackend:
        """Another object on the same file and namespace."""
        twin = type(self)(self.path, namespace=self.namespace)
        twin._lock_timeout = self._lock_timeout
        return twin

    # --- clock --------------------------------------------------------------------------------

    async def now(self) -> datetime:
        """The store's clock."""
        now: datetime = await self._submit(lambda batch: batch.now, writes=False, small=True)
        return now

    async def shift_clock(self, by: timedelta) -> None:
        """Add to the offset, for all clients."""
        micros = by // timedelta(microseconds=1)
        await self._submit(lambda batch: batch.shift_clock(micros), writes=True)

    # --- writing ------------------------------------------------------------------------------

    async def commit(self, change: Change) -> Committed:
        """Apply a change; durable on return."""
        self._check(change)
        committed: Committed = await self._submit(
            partial(runs.commit, change), writes=True, small=True
        )
        return committed

    async def commit_many(self, changes: Sequence[Change]) -> list[Answer]:
        """Apply independent changes in one transaction."""
        for change in changes:
            self._check(change)
        run = partial(runs.commit_many, changes)
        answers: list[Answer] = await self._submit(run, writes=True, small=len(changes) <= _FEW)
        return answers

    async def claim(self, request: ClaimRequest) -> Claimed:
        """Take due, free items. A caller that is cancelled meanwhile gives them back."""
        dispatcher = self._started()
        dispatcher.watchers.take_work_news()
        give_back = partial(_give_back, dispatcher)
        answer = dispatcher.submit(
            partial(work.claim, request), writes=True, small=request.limit <= _FEW, undo=give_back
        )
        try:
            claimed: Claimed = await answer
        except asyncio.CancelledError:
            # The answer may have come just before: nobody will ever see it.
            if answer.done() and not answer.cancelled() and answer.exception() is None:
                give_back(answer.result())
            raise
        return claimed

    async def renew(self, refs: Sequence[ClaimRef], lease: timedelta) -> list[bool]:
        """Extend leases."""
        renewed: list[bool] = await self._submit(
            partial(work.renew, refs, lease), writes=True, small=len(refs) <= _FEW
        )
        return renewed

    async def release(self, ref: ClaimRef, *, delay: timedelta | None = None) -> bool:
        """Give an item back."""
        released: bool = await self._submit(
            partial(work.release, ref, delay), writes=True, small=True
        )
        return released

    async def announce(self, limit: int, mute: timedelta) -> list[WorkItem]:
        """Due, free items that nobody was told of lately; they are muted in the same step."""
        items: list[WorkItem] = await self._submit(partial(work.announce, limit, mute), writes=True)
        return items

    async def free(self, owner: str) -> int:
        """End every lease of a process that is gone."""
        freed: int = await self._submit(partial(work.free, owner), writes=True)
        return freed

    async def purge(
        self,
        *,
        before: datetime,
        limit: int = 1000,
        key_retention: timedelta = timedelta(days=30),
    ) -> int:
        """Remove ended runs, those first that ended first."""
        purged: int = await self._submit(
            partial(runs.purge, before, limit, key_retention), writes=True
        )
        return purged

    async def import_delta(self, delta: Delta) -> None:
        """Write effects as they are: how a copy arrives."""
        await self._submit(partial(runs.import_delta, delta), writes=True)

    # --- reading ------------------------------------------------------------------------------

    async def next_due(
        self,
        *,
        queues: frozenset[str] | None = None,
        workflows: frozenset[str] | None = None,
    ) -> datetime | None:
        """When an item can be claimed next."""
        due: datetime | None = await self._submit(
            partial(work.next_due, queues, workflows), writes=False, small=True
        )
        return due

    async def get_run(self, run_id: str) -> Run | None:
        """The run, or None."""
        return await reads.get_run(await self._ready(), self.namespace, run_id)

    async def find_run(self, idempotency_key: str) -> str | None:
        """The run that has the key, or had it and was purged; or None."""
        return await reads.find_run(await self._ready(), self.namespace, idempotency_key)

    async def list_runs(self, query: RunQuery, cursor: str | None = None) -> Page[Run]:
        """Runs, newest first."""
        return await reads.list_runs(await self._ready(), self.namespace, query, cursor)

    async def get_events(
        self, run_id: str, *, after: int = 0, limit: int | None = None
    ) -> list[Event]:
        """Events after ``after``, in order."""
        return await reads.get_events(await self._ready(), self.namespace, run_id, after, limit)

    async def list_work(self, run_id: str) -> list[WorkItem]:
        """The run's items."""
        return await reads.list_work(await self._ready(), self.namespace, run_id)

    async def stats(self) -> Mapping[str, int]:
        """Numbers of runs, per status, of events and of items."""
        return await reads.stats(await self._ready(), self.namespace)

    async def holders(self) -> list[str]:
        """The owners of leases that have not ended."""
        owners: list[str] = await self._submit(work.holders, writes=False)
        return owners

    async def export_run(self, run_id: str) -> RunDelta | None:
        """The run without its events."""
        part: RunDelta | None = await self._submit(partial(runs.export_run, run_id), writes=False)
        return part

    async def export_keys(self, cursor: str | None = None) -> Page[tuple[str, KeyMark]]:
        """Idempotency keys and their owners, purged runs' too."""
        page: Page[tuple[str, KeyMark]] = await self._submit(
            partial(runs.export_keys, cursor), writes=False
        )
        return page

    async def watch(self, run_id: str | None, *, after: int, timeout: timedelta) -> bool:
        """Wait for news. What this process writes wakes at once, others' within 0.1 s."""
        watchers = self._started().watchers
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout.total_seconds()
        while True:
            news: asyncio.Future[None] = loop.create_future()
            # Before the check, or news in between are missed.
            watchers.add(run_id, after, news)
            try:
                if run_id is None:
                    await self.open()
                    if watchers.take_work_news():
                        return True
                else:
                    run = await self.get_run(run_id)
                    if run is not None and (run.history_length > after or run.status.is_terminal):
                        return True
                left = end - loop.time()
                if left <= 0:
                    return False
                await asyncio.wait([news], timeout=left)
            finally:
                watchers.drop(run_id, news)

    # --- the connections ----------------------------------------------------------------------

    def _started(self) -> Dispatcher:
        if self._closed:
            raise StorageError(
                f"the storage was closed: path={self.path}; make another object for it"
            )
        loop = asyncio.get_running_loop()
        dispatcher = self._dispatcher
        if dispatcher is not None and self._forks == forks():
            if self._loop is loop:
                return dispatcher
            raise StorageError(
                f"the storage object belongs to another event loop: path={self.path}; "
                "use twin() to make one for this loop"
            )
        # The first use, or the first one in a forked child.
        writer = Writer(self.path, self.namespace, lock_timeout=self._lock_timeout)
        reader = Reader(self.path, self.namespace)
        dispatcher = Dispatcher(
            writer,
            loop,
            reader.look,
            place=(os.path.realpath(self.path), self.namespace),
            close_timeout=self._lock_timeout + 5,
        )
        self._dispatcher, self._reader = dispatcher, reader
        weakref.finalize(self, _let_go, dispatcher, reader).atexit = False
        self._loop = loop
        self._forks = forks()
        self._opened = False
        return dispatcher

    async def _ready(self) -> Reader:
        """The connection for reads, once the tables are there."""
        self._started()
        if not self._opened:
            await self.open()
        reader = self._reader
        if reader is None:
            raise StorageError(
                f"the storage was closed: path={self.path}; make another object for it"
            )
        return reader

    @staticmethod
    def _check(change: Change) -> None:
        check_change(change, max_payload=MAX_PAYLOAD, max_events=MAX_EVENTS)
        if change.create is not None:
            fitting(change.create.priority, "priority")

    def _submit(
        self, run: Callable[[Batch], Any], *, writes: bool, small: bool = False
    ) -> asyncio.Future[Any]:
        return self._started().submit(run, writes=writes, small=small)


def _give_back(dispatcher: Dispatcher, claimed: Claimed) -> None:
    """A claim's caller was cancelled: nobody knows its tokens."""
    for claim in claimed.claims:
        answer = dispatcher.submit(partial(work.release, claim.ref, None), writes=True, small=True)
        answer.add_done_callback(_forget)


def _forget(answer: asyncio.Future[Any]) -> None:
    # What could not be given back comes free when its lease ends.
    if not answer.cancelled():
        answer.exception()


def _let_go(dispatcher: Dispatcher, reader: Reader) -> None:
    dispatcher.stop()
    reader.stop()
