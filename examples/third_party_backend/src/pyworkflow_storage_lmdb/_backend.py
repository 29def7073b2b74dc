"""``LmdbStorageBackend``: each call is one transaction, done in the object's own thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path
from typing import TypeVar

import lmdb

from pyworkflow.spi import (
    Answer,
    Capabilities,
    Change,
    Claimed,
    ClaimRef,
    ClaimRequest,
    Delta,
    Event,
    KeyMark,
    Page,
    Run,
    RunDelta,
    RunQuery,
    StorageBackend,
    StorageInfo,
    WorkItem,
    utcnow,
)
from pyworkflow.storekit import LoopBound, check_change
from pyworkflow_storage_lmdb import _rules
from pyworkflow_storage_lmdb._environment import MAX_SIZE, Environment
from pyworkflow_storage_lmdb._tables import Tables

__all__ = ["LmdbStorageBackend"]

T = TypeVar("T")
MAX_PAYLOAD = 16 * 1024 * 1024
MAX_EVENTS = 10_000
CAPABILITIES = Capabilities(
    durable=True,
    multi_process=True,
    server_clock=True,
    batched=True,
    purge_by_age=True,
    large_history=True,
    gaps={"CRA-04": "LMDB has no checksums; a file system with checksums notices flipped bits"},
)


class LmdbStorageBackend(StorageBackend):
    """Storage in a directory with an LMDB file for each namespace.

    An object belongs to the event loop that first used it. After a fork, an object of the parent
    opens the store anew in the child. ``max_size`` bounds the file, in bytes; None: 1 TiB.
    """

    def __init__(
        self, path: str | Path, *, namespace: str = "default", max_size: int | None = None
    ) -> None:
        self.path = Path(path)
        self.namespace = namespace
        self.max_size = max_size
        self._bound = LoopBound[ThreadPoolExecutor](self)
        self._environment: Environment | None = None

    def __repr__(self) -> str:
        return f"LmdbStorageBackend({str(self.path)!r}, namespace={self.namespace!r})"

    def clone(self) -> LmdbStorageBackend:
        """Another object on the same store, for another event loop."""
        return LmdbStorageBackend(self.path, namespace=self.namespace, max_size=self.max_size)

    def info(self) -> StorageInfo:
        """Name, place, capabilities and limits."""
        return StorageInfo(
            contract_version=2,
            name="lmdb",
            location=str(self.path.absolute()),
            namespace=self.namespace,
            capabilities=CAPABILITIES,
            max_payload=MAX_PAYLOAD,
            max_events_per_commit=MAX_EVENTS,
        )

    # --- life -----------------------------------------------------------------------------------

    async def open(self) -> None:
        """Make the directory and the file, if they are not there."""
        await self._read(lambda tables: tables.now)

    async def migrate(self) -> None:
        """What opening does."""
        await self.open()

    async def close(self) -> None:
        """Let go of the file, after the calls that are under way."""
        thread = self._bound.close()
        if thread is not None:
            await asyncio.wrap_future(thread.submit(self._release))
            thread.shutdown(wait=False)

    def _release(self) -> None:
        environment, self._environment = self._environment, None
        if environment is not None:
            environment.release()

    async def _read(self, work: Callable[[Tables], T]) -> T:
        return await self._call(work, write=False)

    async def _write(self, work: Callable[[Tables], T]) -> T:
        return await self._call(work, write=True)

    async def _call(self, work: Callable[[Tables], T], *, write: bool) -> T:
        """One transaction. When the caller is cancelled, it is not begun, or it goes on alone."""
        thread = self._bound.get()
        if thread is None:  # the first use, in this process
            self._environment = None
            thread = self._bound.put(ThreadPoolExecutor(1, "pyworkflow-lmdb"))
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(thread, self._transact, work, write)

    def _transact(self, work: Callable[[Tables], T], write: bool) -> T:
        if self._environment is None:
            self._environment = Environment.acquire(self.path / self.namespace)

        def inside(txn: lmdb.Transaction) -> T:
            return work(Tables(txn, utcnow()))

        return self._environment.run(inside, write=write, max_size=self.max_size or MAX_SIZE)

    # --- clock ----------------------------------------------------------------------------------

    async def now(self) -> datetime:
        """The machine's clock, which never goes back, and the offset of ``shift_clock``."""
        return await self._read(lambda tables: tables.now)

    async def shift_clock(self, by: timedelta) -> None:
        """Move the clock of everybody who uses this store."""
        offset = by // timedelta(microseconds=1)
        await self._write(lambda t: t.put(b"moffset", (t.get(b"moffset") or 0) + offset))

    # --- changes --------------------------------------------------------------------------------

    async def commit(self, changes: Sequence[Change]) -> list[Answer]:
        """Each change accepted or refused alone, all in one transaction."""
        for change in changes:
            check_change(change, max_payload=MAX_PAYLOAD, max_events=MAX_EVENTS)
        return await self._write(lambda tables: _rules.commit_all(tables, changes))

    async def claim(self, request: ClaimRequest) -> Claimed:
        """Take due, free items."""
        return await self._write(lambda tables: _rules.claim(tables, request))

    async def renew(self, refs: Sequence[ClaimRef], lease: timedelta) -> list[bool]:
        """Extend leases."""
        return await self._write(lambda tables: _rules.renew(tables, refs, lease))

    async def release(self, ref: ClaimRef, *, delay: timedelta | None = None) -> bool:
        """Give an item back uncounted."""
        return await self._write(lambda tables: _rules.release(tables, ref, delay))

    async def announce(self, limit: int, mute: timedelta) -> list[WorkItem]:
        """Due, free items that nobody rang for."""
        return await self._write(lambda tables: _rules.announce(tables, limit, mute))

    async def purge(
        self,
        *,
        before: datetime,
        limit: int = 1000,
        key_retention: timedelta = timedelta(days=30),
    ) -> int:
        """Remove ended runs."""
        return await self._write(lambda t: _rules.purge(t, before, limit, key_retention))

    # --- reads ----------------------------------------------------------------------------------

    async def next_due(
        self,
        *,
        queues: frozenset[str] | None = None,
        workflows: frozenset[str] | None = None,
    ) -> datetime | None:
        """When to look again."""
        return await self._read(lambda tables: _rules.next_due(tables, queues, workflows))

    async def get_run(self, run_id: str) -> Run | None:
        """The run, or None."""
        run = await self._read(lambda t: (found := t.run(run_id)) and found.view())
        return run or None

    async def find_run(self, idempotency_key: str) -> str | None:
        """Who has the key."""
        return await self._read(lambda tables: _rules.find_run(tables, idempotency_key))

    async def list_runs(self, query: RunQuery, cursor: str | None = None) -> Page[Run]:
        """Runs, newest first."""
        return await self._read(lambda tables: _rules.list_runs(tables, query, cursor))

    async def get_events(
        self, run_id: str, *, after: int = 0, limit: int | None = None
    ) -> list[Event]:
        """Events in order of seq."""
        start = max(0, after)
        stop = None if limit is None else start + max(0, limit)
        return await self._read(
            lambda t: [] if (run := t.run(run_id)) is None else run.events[start:stop]
        )

    async def list_work(self, run_id: str) -> list[WorkItem]:
        """The run's items, ordered by id."""
        return await self._read(
            lambda t: [] if (run := t.run(run_id)) is None else run.export().items
        )

    async def stats(self) -> Mapping[str, int]:
        """Numbers of runs, per status, of events and of items."""
        return await self._read(_rules.stats)

    # --- moving between stores ------------------------------------------------------------------

    async def export_run(self, run_id: str) -> RunDelta | None:
        """The run without its events."""
        run = await self._read(lambda t: (found := t.run(run_id)) and found.export())
        return run or None

    async def export_keys(self, cursor: str | None = None) -> Page[tuple[str, KeyMark]]:
        """Idempotency keys and their owners."""
        return await self._read(lambda tables: _rules.export_keys(tables, cursor))

    async def import_delta(self, delta: Delta) -> None:
        """Write effects as they are."""
        await self._write(lambda tables: _rules.import_delta(tables, delta))
