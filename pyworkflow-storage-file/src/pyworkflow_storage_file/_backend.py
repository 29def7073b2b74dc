"""The file backend: the storage contract as operations on the state."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Final

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
    StorageFull,
    StorageInfo,
    WorkItem,
)
from pyworkflow.storekit import answer_each, check_change
from pyworkflow.storekit.embedded import FEW, Dispatcher, EmbeddedBackend, nothing
from pyworkflow_storage_file._calls import Calls
from pyworkflow_storage_file._files import has_store
from pyworkflow_storage_file._journal import SEGMENT_BYTES, Journal
from pyworkflow_storage_file._state import State
from pyworkflow_storage_file._writer import Batch, Writer

__all__ = ["FileStorageBackend"]

MAX_PAYLOAD: Final = 16 * 1024 * 1024
MAX_EVENTS: Final = 10_000

_SAFE = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789-_.")
_LONGEST_NAME = 150


class FileStorageBackend(EmbeddedBackend[Batch]):
    """Storage in a directory, for any number of processes on one machine.

    The whole state is kept in memory, and every change is a line of a journal on disk. A commit
    that returned survives the death of the process, and with ``fsync`` (the default) power loss.
    A thread writes; a lone small change is written by the loop itself while flushes take less than
    a millisecond, since waking the thread would take about as long.
    An object belongs to the event loop that first used it; ``clone`` makes one for another.
    After a fork, parent and child go on with files of their own.

    The clock is the machine's, plus the offset of ``shift_clock``. When somebody sets it, by more
    than a second, timers follow it; leases keep the time they had left, and what was due stays due.
    """

    #: The seam for tests of failing disks.
    _calls: Calls = Calls()
    #: After so many seconds of waiting for another process, calls raise ``StorageUnavailable``.
    _lock_timeout: float = 30.0
    #: A segment that has reached this length is sealed.
    _segment_bytes: int = SEGMENT_BYTES

    def __init__(
        self,
        path: str | os.PathLike[str] = ".pyworkflow",
        *,
        namespace: str = "default",
        fsync: bool = True,
    ) -> None:
        super().__init__()
        self.path = Path(os.path.abspath(path))
        self.namespace = namespace
        self._directory = self.path / _directory_name(namespace)
        self._fsync = fsync
        self._unreleased: dict[ClaimRef, None] = {}
        """What was to be released while the disk was full."""

    def __repr__(self) -> str:
        return f"FileStorageBackend({str(self.path)!r}, namespace={self.namespace!r})"

    # --- life ---------------------------------------------------------------------------------

    async def open(self) -> None:
        """Make the directory if need be, read the journal. Idempotent.

        Raises:
            ConfigurationError: the path is no directory, or is inside a store.
            StorageError: it cannot be used; ``StorageDamaged`` and ``SchemaTooNew`` are such.
        """
        await self._read(nothing, small=True)

    async def exists(self) -> bool:
        """Whether the directory has a store, whichever its namespaces are. Writes nothing.

        Raises:
            ConfigurationError: the path is inside a store.
        """
        return await asyncio.to_thread(_exists, self.path)

    def info(self) -> StorageInfo:
        """Name, place, capabilities and limits."""
        return StorageInfo(
            contract_version=2,
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

    def clone(self) -> FileStorageBackend:
        """Another object on the same directory and namespace."""
        clone = type(self)(self.path, namespace=self.namespace, fsync=self._fsync)
        clone._calls = self._calls
        clone._lock_timeout = self._lock_timeout
        clone._segment_bytes = self._segment_bytes
        return clone

    # --- clock --------------------------------------------------------------------------------

    async def now(self) -> datetime:
        """This machine's clock plus the offset that the store keeps."""
        return await self._read(_now, small=True)

    async def shift_clock(self, by: timedelta) -> None:
        """Add to the offset, for all clients."""
        await self._write(partial(_shift_clock, by))

    # --- writing ------------------------------------------------------------------------------

    async def commit(self, changes: Sequence[Change]) -> list[Answer]:
        """Apply independent changes with one write; durable on return."""
        for change in changes:
            self._check(change)
        run = partial(_commit_all, changes)
        return await self._write(run, small=len(changes) <= FEW)

    async def claim(self, request: ClaimRequest) -> Claimed:
        """Take due, free items. A caller that is cancelled meanwhile gives them back."""
        if self._unreleased:
            await self._release_later()
        return await self._claim(partial(_claim, request), _release, small=True)

    async def renew(self, refs: Sequence[ClaimRef], lease: timedelta) -> list[bool]:
        """Extend leases."""
        for ref in refs:
            self._unreleased.pop(ref, None)
        return await self._write(partial(_renew, refs, lease), small=len(refs) <= FEW)

    async def release(self, ref: ClaimRef, *, delay: timedelta | None = None) -> bool:
        """Give an item back."""
        try:
            return await self._write(partial(_release, ref, delay=delay), small=True)
        except StorageFull:
            self._unreleased[ref] = None
            raise

    async def _release_later(self) -> None:
        """Release what a full disk did not let: or it waits for the end of its lease."""
        for ref in list(self._unreleased):
            await self._write(partial(_release, ref), small=True)
            self._unreleased.pop(ref, None)

    async def announce(self, limit: int, mute: timedelta) -> list[WorkItem]:
        """Due, free items that nobody was told of lately; they are muted in the same step."""
        return await self._write(partial(_announce, limit, mute))

    async def free(self, owner: str) -> int:
        """End every lease of a process that is gone."""
        return await self._write(partial(_free, owner))

    async def recover(self) -> None:
        """Release all items; tokens are random, none is issued twice."""
        await self._write(_recover)

    async def purge(
        self,
        *,
        before: datetime,
        limit: int = 1000,
        key_retention: timedelta = timedelta(days=30),
    ) -> int:
        """Remove ended runs. Their room on disk comes back when the journal is rewritten."""
        return await self._write(partial(_purge, before, limit, key_retention))

    # --- reading ------------------------------------------------------------------------------

    async def next_due(
        self,
        *,
        queues: frozenset[str] | None = None,
        workflows: frozenset[str] | None = None,
    ) -> datetime | None:
        """When an item can be claimed next."""
        return await self._read(
            lambda batch: batch.store.next_due(queues=queues, workflows=workflows, now=batch.now),
            small=True,
        )

    async def get_run(self, run_id: str) -> Run | None:
        """The run, or None."""
        return await self._read(
            lambda batch: batch.store.get_run(run_id, now=batch.now), small=True
        )

    async def find_run(self, idempotency_key: str) -> str | None:
        """The run that has the key, or had it and was purged; or None."""
        return await self._read(
            lambda batch: batch.store.find_run(idempotency_key, now=batch.now), small=True
        )

    async def list_runs(self, query: RunQuery, cursor: str | None = None) -> Page[Run]:
        """Runs, newest first."""
        return await self._read(lambda batch: batch.store.list_runs(query, cursor, now=batch.now))

    async def get_events(
        self, run_id: str, *, after: int = 0, limit: int | None = None
    ) -> list[Event]:
        """Events after ``after``, in order."""
        return await self._read(
            lambda batch: batch.store.get_events(run_id, after=after, limit=limit), small=True
        )

    async def list_work(self, run_id: str) -> list[WorkItem]:
        """The run's items."""
        return await self._read(lambda batch: batch.store.list_work(run_id), small=True)

    async def holders(self) -> list[str]:
        """The owners of leases that have not ended."""
        return await self._read(lambda batch: batch.store.holders(now=batch.now))

    async def leases(self, owner: str) -> list[ClaimRef]:
        """The claims of ``owner`` whose leases have not ended."""
        return await self._read(lambda batch: batch.store.leases(owner, now=batch.now))

    async def stats(self) -> Mapping[str, int]:
        """Counts of runs by status."""
        return await self._read(lambda batch: batch.store.stats(now=batch.now))

    async def export_run(self, run_id: str) -> RunDelta | None:
        """The run without its events."""
        return await self._read(lambda batch: batch.store.export_run(run_id))

    async def export_keys(self, cursor: str | None = None) -> Page[tuple[str, KeyMark]]:
        """Idempotency keys and their owners, purged runs' too."""
        return await self._read(lambda batch: batch.store.export_keys(cursor))

    async def import_delta(self, delta: Delta) -> None:
        """Write effects as they are: how a copy arrives."""
        await self._write(partial(_import, delta))

    # --- the files ----------------------------------------------------------------------------

    def _begin(self, loop: asyncio.AbstractEventLoop) -> Dispatcher[Batch]:
        writer = Writer(self._make_journal, lock_timeout=self._lock_timeout)
        return Dispatcher(
            writer,
            loop,
            name="pyworkflow-storage-file",
            close_timeout=self._lock_timeout,
            upkeep=writer,
            stuck=writer.stuck,
        )

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


# --- operations, as the writer runs them ------------------------------------------------------


def _now(batch: Batch) -> datetime:
    return batch.now


def _shift_clock(by: timedelta, batch: Batch) -> None:
    batch.shift_clock(by)


def _commit(change: Change, batch: Batch) -> Committed:
    committed, delta = batch.store.commit(change, now=batch.now, token=batch.token)
    batch.write(delta, durable=True)
    return committed


def _commit_all(changes: Sequence[Change], batch: Batch) -> list[Answer]:
    return answer_each(changes, lambda change: _commit(change, batch))


# Claims and what follows from them need no flush: after power loss all holders are gone, and a
# token never comes again.


def _claim(request: ClaimRequest, batch: Batch) -> Claimed:
    claims, delta = batch.store.claim(request, now=batch.now, token=batch.token)
    batch.write(delta, durable=False)
    return Claimed(claims=claims, now=batch.now)


def _renew(refs: Sequence[ClaimRef], lease: timedelta, batch: Batch) -> list[bool]:
    renewed, delta = batch.store.renew(refs, lease, now=batch.now)
    batch.write(delta, durable=False)
    return renewed


def _release(ref: ClaimRef, batch: Batch, *, delay: timedelta | None = None) -> bool:
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


def _recover(batch: Batch) -> None:
    batch.write(batch.store.recover(), durable=True)


def _purge(before: datetime, limit: int, key_retention: timedelta, batch: Batch) -> int:
    purged, delta = batch.store.purge(
        before=before, limit=limit, key_retention=key_retention, now=batch.now
    )
    batch.write(delta, durable=True)
    return purged


def _import(delta: Delta, batch: Batch) -> None:
    batch.write(batch.store.import_delta(delta), durable=True)


def _exists(path: Path) -> bool:
    try:
        return has_store(path)
    except FileNotFoundError:
        return False
    except OSError:  # opening says what is wrong
        return True


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
