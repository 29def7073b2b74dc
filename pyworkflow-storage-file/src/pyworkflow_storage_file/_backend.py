"""The file backend: the storage contract as operations on the state."""

from __future__ import annotations

import asyncio
import hashlib
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
    Refusal,
    Run,
    RunClosed,
    RunDelta,
    RunNotFound,
    RunQuery,
    StorageBackend,
    StorageError,
    StorageInfo,
    WorkItem,
    check_change,
)
from pyworkflow_storage_file._calls import Calls
from pyworkflow_storage_file._dispatch import Dispatcher, nothing
from pyworkflow_storage_file._journal import Journal
from pyworkflow_storage_file._state import State
from pyworkflow_storage_file._writer import Batch, Writer, forks

__all__ = ["FileStorageBackend"]

MAX_PAYLOAD: Final = 16 * 1024 * 1024
MAX_EVENTS: Final = 10_000

_SAFE = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789-_.")
_LONGEST_NAME = 150
#: So many changes or leases the loop may handle by itself, if it waits for nothing else.
_FEW: Final = 8


class FileStorageBackend(StorageBackend):
    """Storage in a directory, for any number of processes on one machine.

    The whole state is kept in memory, and every change is a line of a journal on disk. A commit
    that returned survives the death of the process, and with ``fsync`` (the default) power loss.
    A thread writes; a lone small change is written by the loop itself while flushes take less than
    a millisecond, since waking the thread would take about as long.
    An object belongs to the event loop that first used it; ``twin`` makes one for another.
    After a fork, parent and child go on with files of their own.

    The clock is the machine's, plus the offset of ``shift_clock``. When somebody sets it, by more
    than a second, timers follow it; leases keep the time they had left, and what was due stays due.
    """

    #: The seam for tests of failing disks.
    _calls: Calls = Calls()
    #: After so many seconds of waiting for another process, calls raise ``StorageUnavailable``.
    _lock_timeout: float = 30.0
    #: A segment that has reached this length is sealed.
    _segment_bytes: int = 64 * 1024 * 1024

    def __init__(
        self,
        path: str | os.PathLike[str] = ".pyworkflow",
        *,
        namespace: str = "default",
        fsync: bool = True,
    ) -> None:
        self.path = Path(os.path.abspath(path))
        self.namespace = namespace
        self._directory = self.path / _directory_name(namespace)
        self._fsync = fsync
        self._dispatcher: Dispatcher | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._forks = 0
        self._closed = False

    def __repr__(self) -> str:
        return f"FileStorageBackend({str(self.path)!r}, namespace={self.namespace!r})"

    # --- life ---------------------------------------------------------------------------------

    async def open(self) -> None:
        """Make the directory if need be, read the journal. Idempotent.

        Raises:
            ConfigurationError: the path is no directory.
            StorageError: it cannot be used; ``StorageDamaged`` and ``SchemaTooNew`` are such.
        """
        await self._read(nothing, small=True)

    async def close(self) -> None:
        """Finish what was begun and end the thread. Idempotent."""
        self._closed = True
        dispatcher, self._dispatcher = self._dispatcher, None
        if dispatcher is not None and self._forks == forks():
            await dispatcher.close()

    def info(self) -> StorageInfo:
        """Name, place, capabilities and limits."""
        return StorageInfo(
            name="file",
            location=str(self.path),
            namespace=self.namespace,
            capabilities=Capabilities(
                durable=self._fsync,
                multi_process=True,
                watch=True,
                batched=True,
                purge_by_age=True,
                large_history=True,
            ),
            max_payload=MAX_PAYLOAD,
            max_events_per_commit=MAX_EVENTS,
        )

    async def migrate(self) -> None:
        """There is one format so far; opening checks it."""
        await self.open()

    def twin(self) -> FileStorageBackend:
        """Another object on the same directory and namespace."""
        twin = type(self)(self.path, namespace=self.namespace, fsync=self._fsync)
        twin._calls = self._calls
        twin._lock_timeout = self._lock_timeout
        twin._segment_bytes = self._segment_bytes
        return twin

    # --- clock --------------------------------------------------------------------------------

    async def now(self) -> datetime:
        """This machine's clock plus the offset that the store keeps."""
        now: datetime = await self._read(_now, small=True)
        return now

    async def shift_clock(self, by: timedelta) -> None:
        """Add to the offset, for all clients."""
        await self._write(partial(_shift_clock, by))

    # --- writing ------------------------------------------------------------------------------

    async def commit(self, change: Change) -> Committed:
        """Apply a change; durable on return."""
        self._check(change)
        committed: Committed = await self._write(partial(_commit, change), small=True)
        return committed

    async def commit_many(self, changes: Sequence[Change]) -> list[Answer]:
        """Apply independent changes with one write."""
        for change in changes:
            self._check(change)
        run = partial(_commit_many, changes)
        answers: list[Answer] = await self._write(run, small=len(changes) <= _FEW)
        return answers

    async def claim(self, request: ClaimRequest) -> Claimed:
        """Take due, free items. A caller that is cancelled meanwhile gives them back."""
        dispatcher = self._started()
        dispatcher.watchers.take_work_news()
        give_back = partial(_give_back, dispatcher)
        answer = dispatcher.submit(
            partial(_claim, request), writes=True, small=True, undo=give_back
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
        renewed: list[bool] = await self._write(
            partial(_renew, refs, lease), small=len(refs) <= _FEW
        )
        return renewed

    async def release(self, ref: ClaimRef, *, delay: timedelta | None = None) -> bool:
        """Give an item back."""
        released: bool = await self._write(partial(_release, ref, delay), small=True)
        return released

    async def announce(self, limit: int, mute: timedelta) -> list[WorkItem]:
        """Due, free items that nobody was told of lately; they are muted in the same step."""
        items: list[WorkItem] = await self._write(partial(_announce, limit, mute))
        return items

    async def free(self, owner: str) -> int:
        """End every lease of a process that is gone."""
        freed: int = await self._write(partial(_free, owner))
        return freed

    async def purge(
        self,
        *,
        before: datetime,
        limit: int = 1000,
        key_retention: timedelta = timedelta(days=30),
    ) -> int:
        """Remove ended runs. Their room on disk comes back when the journal is rewritten."""
        purged: int = await self._write(partial(_purge, before, limit, key_retention))
        return purged

    # --- reading ------------------------------------------------------------------------------

    async def next_due(
        self,
        *,
        queues: frozenset[str] | None = None,
        workflows: frozenset[str] | None = None,
    ) -> datetime | None:
        """When an item can be claimed next."""
        due: datetime | None = await self._read(
            lambda batch: batch.store.next_due(queues=queues, workflows=workflows, now=batch.now),
            small=True,
        )
        return due

    async def get_run(self, run_id: str) -> Run | None:
        """The run, or None."""
        run: Run | None = await self._read(
            lambda batch: batch.store.get_run(run_id, now=batch.now), small=True
        )
        return run

    async def find_run(self, idempotency_key: str) -> str | None:
        """The run that has the key, or had it and was purged; or None."""
        run_id: str | None = await self._read(
            lambda batch: batch.store.find_run(idempotency_key, now=batch.now), small=True
        )
        return run_id

    async def list_runs(self, query: RunQuery, cursor: str | None = None) -> Page[Run]:
        """Runs, newest first."""
        page: Page[Run] = await self._read(
            lambda batch: batch.store.list_runs(query, cursor, now=batch.now)
        )
        return page

    async def get_events(
        self, run_id: str, *, after: int = 0, limit: int | None = None
    ) -> list[Event]:
        """Events after ``after``, in order."""
        events: list[Event] = await self._read(
            lambda batch: batch.store.get_events(run_id, after=after, limit=limit), small=True
        )
        return events

    async def list_work(self, run_id: str) -> list[WorkItem]:
        """The run's items."""
        items: list[WorkItem] = await self._read(
            lambda batch: batch.store.list_work(run_id), small=True
        )
        return items

    async def holders(self) -> list[str]:
        """The owners of leases that have not ended."""
        owners: list[str] = await self._read(lambda batch: batch.store.holders(now=batch.now))
        return owners

    async def stats(self) -> Mapping[str, int]:
        """Counts of runs by status."""
        counts: Mapping[str, int] = await self._read(lambda batch: batch.store.stats(now=batch.now))
        return counts

    async def export_run(self, run_id: str) -> RunDelta | None:
        """The run without its events."""
        part: RunDelta | None = await self._read(lambda batch: batch.store.export_run(run_id))
        return part

    async def export_keys(self, cursor: str | None = None) -> Page[tuple[str, KeyMark]]:
        """Idempotency keys and their owners, purged runs' too."""
        page: Page[tuple[str, KeyMark]] = await self._read(
            lambda batch: batch.store.export_keys(cursor)
        )
        return page

    async def import_delta(self, delta: Delta) -> None:
        """Write effects as they are: how a copy arrives."""
        await self._write(partial(_import, delta))

    async def watch(self, run_id: str | None, *, after: int, timeout: timedelta) -> bool:
        """Wait for news. Changes by this object wake at once, others within 0.1 s."""
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

    # --- the files ----------------------------------------------------------------------------

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
        writer = Writer(self._make_journal, calls=self._calls)
        dispatcher = Dispatcher(writer, loop, lock_timeout=self._lock_timeout)
        self._dispatcher = dispatcher
        weakref.finalize(self, dispatcher.stop).atexit = False
        self._loop = loop
        self._forks = forks()
        return dispatcher

    @staticmethod
    def _check(change: Change) -> None:
        check_change(change, max_payload=MAX_PAYLOAD, max_events=MAX_EVENTS)

    def _make_journal(self, state: State) -> Journal:
        return Journal(
            self._directory,
            state,
            namespace=self.namespace,
            sync=self._fsync,
            calls=self._calls,
            segment_bytes=self._segment_bytes,
        )

    def _read(self, run: Callable[[Batch], Any], *, small: bool = False) -> asyncio.Future[Any]:
        return self._started().submit(run, writes=False, small=small)

    def _write(self, run: Callable[[Batch], Any], *, small: bool = False) -> asyncio.Future[Any]:
        return self._started().submit(run, writes=True, small=small)


# --- operations, as the writer runs them ------------------------------------------------------


def _now(batch: Batch) -> datetime:
    return batch.now


def _shift_clock(by: timedelta, batch: Batch) -> None:
    batch.shift_clock(by)


def _commit(change: Change, batch: Batch) -> Committed:
    committed, delta = batch.store.commit(change, now=batch.now, token=batch.token)
    batch.write(delta, durable=True)
    return committed


def _commit_many(changes: Sequence[Change], batch: Batch) -> list[Answer]:
    answers: list[Answer] = []
    for change in changes:
        try:
            answers.append(_commit(change, batch))
        except (Refusal, RunNotFound, RunClosed) as refusal:
            answers.append(refusal)
    return answers


# Claims and what follows from them need no flush: after power loss all holders are gone, and a
# token never comes again.


def _claim(request: ClaimRequest, batch: Batch) -> Claimed:
    claims, delta = batch.store.claim(request, now=batch.now, token=batch.token)
    batch.write(delta, durable=False)
    return Claimed(claims=claims, now=batch.now)


def _give_back(dispatcher: Dispatcher, claimed: Claimed) -> None:
    for claim in claimed.claims:
        released = dispatcher.submit(partial(_release, claim.ref, None), writes=True, small=True)
        released.add_done_callback(_forget)


def _forget(future: asyncio.Future[Any]) -> None:
    """Take note of an error that nobody waits for: the lease ends by itself then."""
    if not future.cancelled():
        future.exception()


def _renew(refs: Sequence[ClaimRef], lease: timedelta, batch: Batch) -> list[bool]:
    renewed, delta = batch.store.renew(refs, lease, now=batch.now)
    batch.write(delta, durable=False)
    return renewed


def _release(ref: ClaimRef, delay: timedelta | None, batch: Batch) -> bool:
    released, delta = batch.store.release(ref, delay, now=batch.now)
    batch.write(delta, durable=False)
    return released


def _announce(limit: int, mute: timedelta, batch: Batch) -> list[WorkItem]:
    items, delta = batch.store.announce(limit, mute, now=batch.now)
    batch.write(delta, durable=False)
    return items


def _free(owner: str, batch: Batch) -> int:
    freed, delta = batch.store.free(owner, now=batch.now)
    batch.write(delta, durable=False)
    return freed


def _purge(before: datetime, limit: int, key_retention: timedelta, batch: Batch) -> int:
    purged, delta = batch.store.purge(
        before=before, limit=limit, key_retention=key_retention, now=batch.now
    )
    batch.write(delta, durable=True)
    return purged


def _import(delta: Delta, batch: Batch) -> None:
    batch.write(batch.store.import_delta(delta), durable=True)


def _directory_name(namespace: str) -> str:
    """A file name for any text, distinct for distinct namespaces on any file system."""
    try:
        raw = namespace.encode()
    except UnicodeEncodeError as error:
        raise ConfigurationError(
            f"the namespace is no valid text: namespace={namespace!r}; use other characters"
        ) from error
    name = "".join(
        chr(byte) if byte in _SAFE and not (byte == ord(".") and place == 0) else f"%{byte:02x}"
        for place, byte in enumerate(raw)
    )
    if len(name) > _LONGEST_NAME:
        digest = hashlib.blake2b(raw, digest_size=16).hexdigest()
        name = f"{name[:100]}~{digest}"
    return name or "%"
