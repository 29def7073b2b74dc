"""The memory backend: the reference store behind one lock, for tests, trials and as oracle."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from itertools import count
from typing import Self

from pyworkflow._clock import ticks, utcnow
from pyworkflow.errors import StorageError
from pyworkflow.events import Event
from pyworkflow.runs import Run, WorkItem
from pyworkflow.spi.capabilities import Capabilities, StorageInfo
from pyworkflow.spi.storage import (
    Answer,
    Change,
    Claimed,
    ClaimRef,
    ClaimRequest,
    Page,
    RunQuery,
    StorageBackend,
)
from pyworkflow.storekit._decide import REFUSALS
from pyworkflow.storekit.reference import Delta, KeyMark, ReferenceStore, RunDelta, check_change

__all__ = ["MemoryStorageBackend"]

_CAPABILITIES = Capabilities(
    server_clock=True, watch=True, batched=True, purge_by_age=True, large_history=True
)
_INFO = StorageInfo(
    contract_version=2, name="memory", location="memory:default", capabilities=_CAPABILITIES
)


class _Waiter:
    """Somebody in ``watch``, in whatever loop."""

    def __init__(self, run_id: str | None, after: int) -> None:
        self.run_id = run_id
        self.after = after
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()

    def wake(self) -> None:
        try:
            if asyncio.get_running_loop() is self._loop:
                self._news.set()
            else:
                self._loop.call_soon_threadsafe(self._news.set)
        except RuntimeError:
            pass  # its loop was closed: nobody waits any more

    async def wait(self, timeout: timedelta) -> bool:
        try:
            async with asyncio.timeout(max(0.0, timeout.total_seconds())):
                await self._news.wait()
        except TimeoutError:
            return self._news.is_set()
        return True


class _Shared:
    """What all clones have in common. Every method that touches the store holds the lock."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.store = ReferenceStore()
        self.offset = timedelta(0)
        self.waiters: dict[str | None, set[_Waiter]] = {}
        """By the run they wait for; None: workers."""
        self.news = 0
        self._zero = utcnow() - timedelta(microseconds=ticks())
        """What the clock showed when ``ticks`` was zero."""
        self._tokens = count(1)

    def now(self) -> datetime:
        # The rule of ``SteadyClock``, without a conversion: every call of the store asks.
        wall = utcnow()
        shown = self._zero + timedelta(0, 0, ticks())
        if wall > shown:
            self._zero += wall - shown
            shown = wall
        return shown + self.offset if self.offset else shown

    def token(self) -> str:
        return f"t{next(self._tokens)}"

    def tell(self, delta: Delta | None, now: datetime) -> None:
        """Wake whom a change concerns: readers of a run by events, workers by free items.

        Claims, renewals and items that are made with a lease are not told: nobody can claim them
        before their leases end, and workers look again sooner than that.
        """
        if delta is None:
            return
        waiters = self.waiters
        work = False
        for part in delta.parts:
            if "paused" in part.fields:
                work = True
            for item in part.items:
                if item.lease is None or item.lease.until <= now:
                    work = True
            if waiters and (readers := waiters.get(part.run_id)):
                length = part.events[-1].seq if part.events else 0
                ended = "final" in part.fields
                for waiter in readers:
                    if ended or length > waiter.after:
                        waiter.wake()
        if work:
            self.tell_workers()

    def tell_workers(self) -> None:
        """There may be something to claim."""
        self.news += 1
        for waiter in self.waiters.get(None, ()):
            waiter.wake()

    def add(self, waiter: _Waiter) -> None:
        """Wake it at its news."""
        self.waiters.setdefault(waiter.run_id, set()).add(waiter)

    def drop(self, waiter: _Waiter) -> None:
        """Forget it."""
        standing = self.waiters.get(waiter.run_id)
        if standing is not None:
            standing.discard(waiter)
            if not standing:
                del self.waiters[waiter.run_id]


class MemoryStorageBackend(StorageBackend):
    """Everything in this process, gone with it.

    One object may be used by several event loops and threads; ``clone`` gives another object on the
    same data, which is closed on its own.
    """

    def __init__(self, *, namespace: str = "default") -> None:
        self._namespace = namespace
        self._info = replace(_INFO, location=f"memory:{namespace}", namespace=namespace)
        self._shared = _Shared()
        self._closed = False
        self._looked = 0

    def clone(self) -> Self:
        """Another object on the same data; of a subclass, with all that this one has."""
        other = copy.copy(self)
        other._closed = False
        other._looked = 0
        return other

    async def open(self) -> None:
        """Nothing to connect to."""
        self._use()

    async def close(self) -> None:
        """Later calls raise; the data lives while a clone does."""
        self._closed = True

    def info(self) -> StorageInfo:
        """What this store can do."""
        return self._info

    async def migrate(self) -> None:
        """Nothing is older than this process."""
        self._use()

    async def now(self) -> datetime:
        """This process's idea of now, moved by ``shift_clock``; the same for all clones."""
        shared = self._use()
        with shared.lock:
            return shared.now()

    async def shift_clock(self, by: timedelta) -> None:
        """Move the clock of all clones."""
        shared = self._use()
        with shared.lock:
            shared.offset += by
            shared.tell_workers()

    def _use(self) -> _Shared:
        if self._closed:
            raise StorageError("the memory storage is closed; make another one, or a clone before")
        return self._shared

    def _check(self, change: Change) -> None:
        check_change(
            change,
            max_payload=_INFO.max_payload,
            max_events=_INFO.max_events_per_commit,
        )

    async def commit(self, changes: Sequence[Change]) -> list[Answer]:
        """Each change accepted or refused alone; what cannot be stored refuses all of them."""
        shared = self._use()
        for change in changes:
            self._check(change)
        with shared.lock:
            now, commit, token = shared.now(), shared.store.commit, shared.token
            answers: list[Answer] = []
            for change in changes:
                try:
                    committed, delta = commit(change, now=now, token=token)
                except REFUSALS as refusal:
                    answers.append(refusal)
                else:
                    if delta is not None:
                        shared.tell(delta, now)
                    answers.append(committed)
            return answers

    async def claim(self, request: ClaimRequest) -> Claimed:
        """Take due, free items."""
        shared = self._use()
        with shared.lock:
            self._looked = shared.news
            now = shared.now()
            claims, _ = shared.store.claim(request, now=now, token=shared.token)
        return Claimed(claims=claims, now=now)

    async def renew(self, refs: Sequence[ClaimRef], lease: timedelta) -> list[bool]:
        """Extend leases."""
        shared = self._use()
        with shared.lock:
            now = shared.now()
            kept, delta = shared.store.renew(refs, lease, now=now)
            if lease <= timedelta(0):
                shared.tell(delta, now)
        return kept

    async def release(self, ref: ClaimRef, *, delay: timedelta | None = None) -> bool:
        """Give an item back."""
        shared = self._use()
        with shared.lock:
            now = shared.now()
            done, delta = shared.store.release(ref, delay, now=now)
            shared.tell(delta, now)
        return done

    async def announce(self, limit: int, mute: timedelta) -> list[WorkItem]:
        """Due, free items that nobody rang for."""
        shared = self._use()
        with shared.lock:
            return shared.store.announce(limit, mute, now=shared.now())[0]

    async def free(self, owner: str) -> int:
        """End every lease of ``owner``."""
        shared = self._use()
        with shared.lock:
            now = shared.now()
            freed, delta = shared.store.free(owner, now=now)
            shared.tell(delta, now)
        return freed

    async def recover(self) -> None:
        """Release all items."""
        shared = self._use()
        with shared.lock:
            shared.tell(shared.store.recover(), shared.now())

    async def holders(self) -> list[str]:
        """Owners of leases that have not ended."""
        shared = self._use()
        with shared.lock:
            return shared.store.holders(now=shared.now())

    async def leases(self, owner: str) -> list[ClaimRef]:
        """The claims of ``owner`` whose leases have not ended."""
        shared = self._use()
        with shared.lock:
            return shared.store.leases(owner, now=shared.now())

    async def next_due(
        self,
        *,
        queues: frozenset[str] | None = None,
        workflows: frozenset[str] | None = None,
    ) -> datetime | None:
        """When to look again."""
        shared = self._use()
        with shared.lock:
            return shared.store.next_due(queues=queues, workflows=workflows, now=shared.now())

    async def get_run(self, run_id: str) -> Run | None:
        """The run, or None."""
        shared = self._use()
        with shared.lock:
            return shared.store.get_run(run_id, now=shared.now())

    async def find_run(self, idempotency_key: str) -> str | None:
        """Who has the key."""
        shared = self._use()
        with shared.lock:
            return shared.store.find_run(idempotency_key, now=shared.now())

    async def list_runs(self, query: RunQuery, cursor: str | None = None) -> Page[Run]:
        """Runs, newest first."""
        shared = self._use()
        with shared.lock:
            return shared.store.list_runs(query, cursor, now=shared.now())

    async def get_events(
        self, run_id: str, *, after: int = 0, limit: int | None = None
    ) -> list[Event]:
        """Events in order of seq."""
        shared = self._use()
        with shared.lock:
            return shared.store.get_events(run_id, after=after, limit=limit)

    async def list_work(self, run_id: str) -> list[WorkItem]:
        """The run's items."""
        shared = self._use()
        with shared.lock:
            return shared.store.list_work(run_id)

    async def purge(
        self,
        *,
        before: datetime,
        limit: int = 1000,
        key_retention: timedelta = timedelta(days=30),
    ) -> int:
        """Remove ended runs."""
        shared = self._use()
        with shared.lock:
            now = shared.now()
            removed, delta = shared.store.purge(
                before=before, limit=limit, key_retention=key_retention, now=now
            )
            shared.tell(delta, now)
        return removed

    async def watch(self, run_id: str | None, *, after: int, timeout: timedelta) -> bool:
        """Wait for news; what came since this object's last ``claim`` counts as news."""
        shared = self._use()
        waiter = _Waiter(run_id, after)
        with shared.lock:
            if run_id is None:
                if shared.news != self._looked:
                    self._looked = shared.news
                    return True
            else:
                length, ended = shared.store.progress(run_id)
                if ended or length > after:
                    return True
            shared.add(waiter)
        try:
            return await waiter.wait(timeout)
        finally:
            with shared.lock:
                shared.drop(waiter)

    async def stats(self) -> Mapping[str, int]:
        """Numbers of runs, per status, of events and of items."""
        shared = self._use()
        with shared.lock:
            return shared.store.stats(now=shared.now())

    async def export_run(self, run_id: str) -> RunDelta | None:
        """The run without its events."""
        shared = self._use()
        with shared.lock:
            return shared.store.export_run(run_id)

    async def export_keys(self, cursor: str | None = None) -> Page[tuple[str, KeyMark]]:
        """Idempotency keys and their owners."""
        shared = self._use()
        with shared.lock:
            return shared.store.export_keys(cursor)

    async def import_delta(self, delta: Delta) -> None:
        """Write effects as they are."""
        shared = self._use()
        with shared.lock:
            shared.tell(shared.store.import_delta(delta), shared.now())
