"""``FaultyStorage``: any backend behind a bad line, for tests of whatever uses a store.

Faults come by chance from a seed, or exactly where a test wants one. The store behind stays sound:
what is disturbed is who talks to it.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from enum import StrEnum
from typing import TypeVar

from pyworkflow.errors import StorageUnavailable
from pyworkflow.events import Event
from pyworkflow.runs import Run, WorkItem
from pyworkflow.spi import Delta, KeyMark, RunDelta
from pyworkflow.spi.capabilities import StorageInfo
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
from pyworkflow_conformance._clock import shift_clock

__all__ = ["Fault", "FaultPlan", "FaultyStorage"]

R = TypeVar("R")


class Fault(StrEnum):
    """What can happen to a call."""

    BEFORE = "before"
    """``StorageUnavailable``, and the store was never asked."""
    AFTER = "after"
    """``StorageUnavailable``, and the store did it: the answer was lost."""
    DELAY = "delay"
    """The call takes longer, so that others come in between."""
    CANCEL = "cancel"
    """The call is cancelled at one of its awaits; then ``StorageUnavailable``."""
    DOUBLED = "doubled"
    """The call is made twice; the second answer is given. Only of calls that may be sent again."""


class FaultPlan:
    """Which calls are disturbed, and how. Shared by all objects on one store.

    Args:
        seed: Decides everything that is left to chance.
        rate: How many of the calls are disturbed, 0 to 1.
        kinds: The faults to choose from.
        methods: The methods to disturb; None for all that talk to the store.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        rate: float = 0.3,
        kinds: Iterable[Fault] = tuple(Fault),
        methods: Iterable[str] | None = None,
    ) -> None:
        self._random = random.Random(seed)
        self.rate = rate
        self.kinds = tuple(kinds)
        self.methods = None if methods is None else frozenset(methods)
        self.done: Counter[Fault] = Counter()
        """What has happened so far."""

    def next(self, method: str) -> Fault | None:
        """What happens to this call."""
        if not self.kinds or (self.methods is not None and method not in self.methods):
            return None
        if self._random.random() >= self.rate:
            return None
        return self._random.choice(self.kinds)

    def awaits(self) -> int:
        """After how many turns of the loop a call is cancelled."""
        return self._random.randrange(12)

    def pause(self) -> float:
        """Seconds by which a call is delayed."""
        return self._random.random() * 0.003


class FaultyStorage(StorageBackend):
    """A store that fails as networks and processes do: never wrongly, often at the worst moment.

    ``open``, ``close`` and ``info`` are never disturbed. ``clone`` shares the plan.
    """

    def __init__(self, inner: StorageBackend, plan: FaultPlan | None = None) -> None:
        self.inner = inner
        self.plan = FaultPlan() if plan is None else plan

    async def _call(
        self, method: str, call: Callable[[], Awaitable[R]], *, repeatable: bool = True
    ) -> R:
        fault = self.plan.next(method)
        if fault is Fault.DOUBLED and not repeatable:
            fault = Fault.DELAY
        if fault is None:
            return await call()
        self.plan.done[fault] += 1
        if fault is Fault.BEFORE:
            raise StorageUnavailable(f"the store was not reached: method={method}; ask again")
        if fault is Fault.DELAY:
            await asyncio.sleep(self.plan.pause())
            return await call()
        if fault is Fault.CANCEL:
            await cancelled_after(call, self.plan.awaits())
            raise StorageUnavailable(f"the call was given up: method={method}; ask again")
        if fault is Fault.DOUBLED:
            await call()
            return await call()
        await call()
        raise StorageUnavailable(f"the answer was lost: method={method}; ask again")

    # --- not disturbed ------------------------------------------------------------------------

    async def open(self) -> None:
        """Open the store behind."""
        await self.inner.open()

    async def close(self) -> None:
        """Close the store behind."""
        await self.inner.close()

    def info(self) -> StorageInfo:
        """What the store behind says."""
        return self.inner.info()

    def clone(self) -> FaultyStorage:
        """Another object under the same plan."""
        return FaultyStorage(self.inner.clone(), self.plan)

    async def migrate(self) -> None:
        """Migrate the store behind."""
        await self.inner.migrate()

    async def shift_clock(self, by: timedelta) -> None:
        """Move the clock of the store behind, once."""
        await shift_clock(self.inner, by)

    # --- disturbed ----------------------------------------------------------------------------

    async def now(self) -> datetime:
        """As the store behind."""
        return await self._call("now", self.inner.now)

    async def commit(self, changes: Sequence[Change]) -> list[Answer]:
        """As the store behind; sent twice at times."""
        return await self._call("commit", lambda: self.inner.commit(changes))

    async def claim(self, request: ClaimRequest) -> Claimed:
        """As the store behind. A claim whose answer is lost stands until its lease ends."""
        return await self._call("claim", lambda: self.inner.claim(request), repeatable=False)

    async def renew(self, refs: Sequence[ClaimRef], lease: timedelta) -> list[bool]:
        """As the store behind."""
        return await self._call("renew", lambda: self.inner.renew(refs, lease))

    async def release(self, ref: ClaimRef, *, delay: timedelta | None = None) -> bool:
        """As the store behind."""
        return await self._call(
            "release", lambda: self.inner.release(ref, delay=delay), repeatable=False
        )

    async def next_due(
        self,
        *,
        queues: frozenset[str] | None = None,
        workflows: frozenset[str] | None = None,
    ) -> datetime | None:
        """As the store behind."""
        return await self._call(
            "next_due", lambda: self.inner.next_due(queues=queues, workflows=workflows)
        )

    async def get_run(self, run_id: str) -> Run | None:
        """As the store behind."""
        return await self._call("get_run", lambda: self.inner.get_run(run_id))

    async def find_run(self, idempotency_key: str) -> str | None:
        """As the store behind."""
        return await self._call("find_run", lambda: self.inner.find_run(idempotency_key))

    async def list_runs(self, query: RunQuery, cursor: str | None = None) -> Page[Run]:
        """As the store behind."""
        return await self._call("list_runs", lambda: self.inner.list_runs(query, cursor))

    async def get_events(
        self, run_id: str, *, after: int = 0, limit: int | None = None
    ) -> list[Event]:
        """As the store behind."""
        return await self._call(
            "get_events", lambda: self.inner.get_events(run_id, after=after, limit=limit)
        )

    async def list_work(self, run_id: str) -> list[WorkItem]:
        """As the store behind."""
        return await self._call("list_work", lambda: self.inner.list_work(run_id))

    async def purge(
        self,
        *,
        before: datetime,
        limit: int = 1000,
        key_retention: timedelta = timedelta(days=30),
    ) -> int:
        """As the store behind."""
        return await self._call(
            "purge",
            lambda: self.inner.purge(before=before, limit=limit, key_retention=key_retention),
            repeatable=False,
        )

    async def announce(self, limit: int, mute: timedelta) -> list[WorkItem]:
        """As the store behind."""
        return await self._call(
            "announce", lambda: self.inner.announce(limit, mute), repeatable=False
        )

    async def holders(self) -> list[str]:
        """As the store behind."""
        return await self._call("holders", self.inner.holders)

    async def leases(self, owner: str) -> list[ClaimRef]:
        """As the store behind."""
        return await self._call("leases", lambda: self.inner.leases(owner))

    async def recover(self) -> None:
        """As the store behind."""
        await self._call("recover", self.inner.recover, repeatable=False)

    async def free(self, owner: str) -> int:
        """As the store behind."""
        return await self._call("free", lambda: self.inner.free(owner), repeatable=False)

    async def watch(self, run_id: str | None, *, after: int, timeout: timedelta) -> bool:
        """As the store behind."""
        return await self._call(
            "watch",
            lambda: self.inner.watch(run_id, after=after, timeout=timeout),
            repeatable=False,
        )

    async def stats(self) -> Mapping[str, int]:
        """As the store behind."""
        return await self._call("stats", self.inner.stats)

    async def export_run(self, run_id: str) -> RunDelta | None:
        """As the store behind."""
        return await self._call("export_run", lambda: self.inner.export_run(run_id))

    async def export_keys(self, cursor: str | None = None) -> Page[tuple[str, KeyMark]]:
        """As the store behind."""
        return await self._call("export_keys", lambda: self.inner.export_keys(cursor))

    async def import_delta(self, delta: Delta) -> None:
        """As the store behind; sent twice at times."""
        return await self._call("import_delta", lambda: self.inner.import_delta(delta))


async def cancelled_after(call: Callable[[], Awaitable[R]], turns: int) -> R | None:
    """Make a call, and cancel it after so many turns of the loop; its answer if it was faster.

    What it raises otherwise is raised here; that it was cancelled is not.
    """

    async def made() -> R:
        return await call()

    task = asyncio.ensure_future(made())
    for _ in range(turns):
        if task.done():
            break
        await asyncio.sleep(0)
    task.cancel()
    try:
        return await task
    except asyncio.CancelledError:
        current = asyncio.current_task()
        if current is not None and current.cancelling():
            raise
        return None
