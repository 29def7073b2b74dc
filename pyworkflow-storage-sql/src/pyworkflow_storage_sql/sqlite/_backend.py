"""The SQLite backend: the storage contract as operations on a database file."""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from pyworkflow.spi import (
    Answer,
    Capabilities,
    Change,
    Claimed,
    ClaimRef,
    ClaimRequest,
    ConfigurationError,
    Delta,
    Event,
    KeyMark,
    Page,
    Run,
    RunDelta,
    RunQuery,
    StorageError,
    StorageInfo,
    WorkItem,
)
from pyworkflow.storekit import check_change, machine_clocks
from pyworkflow.storekit.embedded import FEW, Dispatcher, EmbeddedBackend, nothing
from pyworkflow_storage_sql.sqlite import _reads as reads
from pyworkflow_storage_sql.sqlite import _runs as runs
from pyworkflow_storage_sql.sqlite import _work as work
from pyworkflow_storage_sql.sqlite._clock import StoreClock
from pyworkflow_storage_sql.sqlite._place import Place
from pyworkflow_storage_sql.sqlite._reader import Reader
from pyworkflow_storage_sql.sqlite._rows import fitting
from pyworkflow_storage_sql.sqlite._schema import exists, pending, storage_error
from pyworkflow_storage_sql.sqlite._writer import Batch, Writer

__all__ = ["SQLiteStorageBackend"]

T = TypeVar("T")
MAX_PAYLOAD: Final = 16 * 1024 * 1024
MAX_EVENTS: Final = 10_000


class SQLiteStorageBackend(EmbeddedBackend[Batch]):
    """Storage in an SQLite database, for any number of processes on one machine.

    A commit that returned survives power loss (``synchronous=FULL``). All writes that wait go into
    one transaction, made by a thread; a lone small one is made by the loop itself while flushes
    take less than a millisecond, since waking the thread would take about as long. Long reads have
    a connection of their own.
    An object belongs to the event loop that first used it; ``clone`` makes one for another. Before
    a fork all connections are closed; parent and child then go on with connections of their own.

    The clock is the machine's, plus the offset of ``shift_clock``. When the machine's is set back,
    or was ahead before, the store's continues from its latest reading at the pace of real time;
    when it is set forward, leases keep the time that they had left.
    """

    #: After so many seconds of waiting for another process, calls raise ``StorageUnavailable``.
    _lock_timeout: float = 10.0
    #: The wall clock and the time since boot, microseconds.
    _clocks: Callable[[], tuple[int, int]] = staticmethod(machine_clocks)

    def __init__(self, path: str | os.PathLike[str], *, namespace: str = "default") -> None:
        super().__init__()
        try:
            namespace.encode()
        except UnicodeEncodeError as error:
            raise ConfigurationError(
                f"the namespace is no valid text: namespace={namespace!r}; use other characters"
            ) from error
        self.path = Path(path).absolute()
        self.namespace = namespace
        self._reader: Reader | None = None
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
        await self._read(nothing, small=True)
        self._opened = True

    async def close(self) -> None:
        """Finish what was begun, close the connections, end the threads. Idempotent."""
        reader, self._reader = self._reader, None
        await super().close()
        if reader is not None:  # in a forked child it has nothing to close
            await reader.close()

    def info(self) -> StorageInfo:
        """Name, place, capabilities and limits."""
        return StorageInfo(
            contract_version=2,
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
        return await self._look(partial(pending, self.path, self.namespace))

    async def exists(self) -> bool:
        """Whether the file is a store, whichever its namespaces are. Writes nothing.

        Raises:
            ConfigurationError: It is a directory, or a database of something else.
            StorageError: It cannot be read.
        """
        return await self._look(partial(exists, self.path))

    async def _look(self, call: Callable[[], T]) -> T:
        """``call`` in a thread, without opening the store."""
        try:
            return await asyncio.to_thread(call)
        except Exception as error:
            told = storage_error(error, self.path)
            if told is error:
                raise
            raise told from error

    def clone(self) -> SQLiteStorageBackend:
        """Another object on the same file and namespace."""
        clone = type(self)(self.path, namespace=self.namespace)
        clone._lock_timeout = self._lock_timeout
        clone._clocks = self._clocks
        return clone

    # --- clock --------------------------------------------------------------------------------

    async def now(self) -> datetime:
        """The store's clock."""
        return await self._read(lambda batch: batch.now, small=True)

    async def shift_clock(self, by: timedelta) -> None:
        """Add to the offset, for all clients."""
        micros = by // timedelta(microseconds=1)
        await self._write(lambda batch: batch.shift_clock(micros))

    # --- writing ------------------------------------------------------------------------------

    async def commit(self, changes: Sequence[Change]) -> list[Answer]:
        """Apply independent changes in one transaction; durable on return."""
        for change in changes:
            self._check(change)
        run = partial(runs.commit_all, changes)
        return await self._write(run, small=len(changes) <= FEW)

    async def claim(self, request: ClaimRequest) -> Claimed:
        """Take due, free items. A caller that is cancelled meanwhile gives them back."""
        return await self._claim(partial(work.claim, request), _release, small=request.limit <= FEW)

    async def renew(self, refs: Sequence[ClaimRef], lease: timedelta) -> list[bool]:
        """Extend leases."""
        return await self._write(partial(work.renew, refs, lease), small=len(refs) <= FEW)

    async def release(self, ref: ClaimRef, *, delay: timedelta | None = None) -> bool:
        """Give an item back."""
        return await self._write(partial(work.release, ref, delay), small=True)

    async def announce(self, limit: int, mute: timedelta) -> list[WorkItem]:
        """Due, free items that nobody was told of lately; they are muted in the same step."""
        return await self._write(partial(work.announce, limit, mute))

    async def free(self, owner: str) -> int:
        """End every lease of a process that is gone."""
        return await self._write(partial(work.free, owner))

    async def recover(self) -> None:
        """Release all items; tokens are random, none is issued twice."""
        await self._write(work.recover)

    async def purge(
        self,
        *,
        before: datetime,
        limit: int = 1000,
        key_retention: timedelta = timedelta(days=30),
    ) -> int:
        """Remove ended runs, those first that ended first."""
        return await self._write(partial(runs.purge, before, limit, key_retention))

    async def import_delta(self, delta: Delta) -> None:
        """Write effects as they are: how a copy arrives."""
        await self._write(partial(runs.import_delta, delta))

    # --- reading ------------------------------------------------------------------------------

    async def next_due(
        self,
        *,
        queues: frozenset[str] | None = None,
        workflows: frozenset[str] | None = None,
    ) -> datetime | None:
        """When an item can be claimed next."""
        return await self._read(partial(work.next_due, queues, workflows), small=True)

    async def get_run(self, run_id: str) -> Run | None:
        """The run, or None."""
        return await self._read(partial(runs.get_run, run_id), small=True)

    async def find_run(self, idempotency_key: str) -> str | None:
        """The run that has the key, or had it and was purged; or None."""
        return await self._read(partial(runs.find_run, idempotency_key), small=True)

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
        return await self._read(partial(runs.list_work, run_id), small=True)

    async def stats(self) -> Mapping[str, int]:
        """Numbers of runs, per status, of events and of items."""
        return await reads.stats(await self._ready(), self.namespace)

    async def holders(self) -> list[str]:
        """The owners of leases that have not ended."""
        return await self._read(work.holders)

    async def leases(self, owner: str) -> list[ClaimRef]:
        """The claims of ``owner`` whose leases have not ended."""
        return await self._read(partial(work.leases, owner))

    async def export_run(self, run_id: str) -> RunDelta | None:
        """The run without its events."""
        return await self._read(partial(runs.export_run, run_id))

    async def export_keys(self, cursor: str | None = None) -> Page[tuple[str, KeyMark]]:
        """Idempotency keys and their owners, purged runs' too."""
        return await self._read(partial(runs.export_keys, cursor))

    # --- the connections ----------------------------------------------------------------------

    def _begin(self, loop: asyncio.AbstractEventLoop) -> Dispatcher[Batch]:
        clock = StoreClock(self._clocks)
        place = Place(self.path)
        writer = Writer(place, self.namespace, clock, lock_timeout=self._lock_timeout)
        reader = self._reader = Reader(place, self.namespace, clock.shown)
        weakref.finalize(self, reader.stop).atexit = False
        self._opened = False
        return Dispatcher(
            writer,
            loop,
            name="pyworkflow-storage-sqlite",
            close_timeout=self._lock_timeout + 5,
            look=reader.look,
            place=("sqlite", os.path.realpath(self.path), self.namespace),
        )

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


def _release(ref: ClaimRef, batch: Batch) -> bool:
    return work.release(ref, None, batch)
