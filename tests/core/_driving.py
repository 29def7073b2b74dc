"""A store, a worker and a client in the loop of a test, with a clock that the test moves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

from pyworkflow._config import Settings
from pyworkflow._duration import parse_duration
from pyworkflow._engine.worker import Worker
from pyworkflow._operations import Operations
from pyworkflow.events import Event
from pyworkflow.runs import Run
from pyworkflow.spi import StorageBackend, WorkItem
from pyworkflow.storage.memory import MemoryStorageBackend
from pyworkflow.storekit import fsck

__all__ = ["Bench", "bench", "eventually", "settings"]


def settings(*, lease: float = 30.0, **others: Any) -> Settings:
    """Settings with a short lease, in seconds.

    A run of newer code stalls at this worker's second look, because no test has a second worker
    whose code fits; those that have one set the grace time.
    """
    others.setdefault("renew_every", timedelta(seconds=lease / 3))
    others.setdefault("version_grace", timedelta(0))
    return Settings(lease=timedelta(seconds=lease), **others)


async def eventually(check: Callable[[], Any], what: str = "", *, timeout: float = 60.0) -> Any:
    """Poll until ``check()`` (or what it awaits) is true; its value."""
    end = time.monotonic() + timeout
    while True:
        found = check()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return found
        assert time.monotonic() < end, f"did not happen within {timeout} s: {what or check}"
        await asyncio.sleep(0.005)


class Bench:
    """What a test holds on to: the store, its current worker, and questions about runs."""

    def __init__(self, storage: StorageBackend, config: Settings) -> None:
        self.storage = storage
        self.settings = config
        self.worker: Worker | None = None

    # --- workers ------------------------------------------------------------------------------

    async def work(self) -> Worker:
        """Begin a worker."""
        assert self.worker is None
        self.worker = Worker(self.storage, self.settings)
        await self.worker.open()
        self.worker.serve()
        return self.worker

    async def rest(self) -> None:
        """Stop the worker: nobody works, and no coroutine is kept."""
        worker, self.worker = self.worker, None
        if worker is not None:
            await worker.drain(0)
            await worker.close()

    async def crash(self) -> None:
        """The worker vanishes: what it holds stays held until its leases end."""
        worker, self.worker = self.worker, None
        if worker is not None:
            await worker.close()

    async def restart(self) -> Worker:
        """Another worker takes over, with nothing but the history."""
        await self.rest()
        return await self.work()

    # --- runs ---------------------------------------------------------------------------------

    @property
    def ops(self) -> Operations:
        """What a client does."""
        ops = Operations(self.storage, self.worker, None)
        ops._settings = self.settings
        return ops

    async def start(self, workflow: Any, *args: Any, key: str | None = None, **options: Any) -> str:
        """Start a run; its id."""
        bound = workflow.options(idempotency_key=key, **options)
        return await self.ops.start(workflow, args, {}, bound.options)

    async def result(self, run_id: str, timeout: float = 60.0) -> Any:
        """The result, or the error raised."""
        return await self.ops.result(run_id, timeout, "wait")

    async def run(self, workflow: Any, *args: Any, **options: Any) -> Any:
        """Start, and wait for the result."""
        return await self.result(await self.start(workflow, *args, **options))

    async def get(self, run_id: str) -> Run:
        """The run as its store has it."""
        found = await self.storage.get_run(run_id)
        assert found is not None
        return found

    async def until(self, run_id: str, *statuses: str, timeout: float = 60.0) -> Run:
        """Wait until the run has one of the statuses."""

        async def has() -> Run | None:
            found = await self.get(run_id)
            return found if found.status in statuses else None

        found: Run = await eventually(has, f"{run_id} becomes {statuses}", timeout=timeout)
        return found

    async def asleep(self, run_id: str) -> Run:
        """Wait until everything that the run owes lies in the future."""
        return await self.until(run_id, "suspended")

    async def events(self, run_id: str, type: str | None = None) -> list[Event]:
        """The history, or its events of one type."""
        events = await self.storage.get_events(run_id)
        return [e for e in events if type is None or e.type == type]

    async def types(self, run_id: str, *, observations: bool = False) -> list[str]:
        """The types of the history's events."""
        events = await self.storage.get_events(run_id)
        return [str(e.type) for e in events if observations or e.klass != "O"]

    async def has(self, run_id: str, type: str, count: int = 1) -> None:
        """Wait until the history holds so many events of the type."""

        async def there() -> bool:
            return len(await self.events(run_id, type)) >= count

        await eventually(there, f"{run_id} has {count} {type}")

    async def items(self, run_id: str) -> dict[str, WorkItem]:
        """The run's work items by id."""
        return {i.item_id: i for i in await self.storage.list_work(run_id)}

    async def pass_time(self, duration: str | float) -> None:
        """Move the storage's clock."""
        await self.storage.shift_clock(parse_duration(duration))

    async def check(self) -> None:
        """The store is sound."""
        assert [str(v) for v in await fsck(self.storage)] == []


@asynccontextmanager
async def bench(
    storage: StorageBackend | None = None, *, work: bool = True, lease: float = 30.0, **others: Any
) -> AsyncIterator[Bench]:
    """A bench with a worker on a fresh memory store; checks the store at the end."""
    made = Bench(storage or MemoryStorageBackend(), settings(lease=lease, **others))
    await made.storage.open()
    if work:
        await made.work()
    try:
        yield made
    finally:
        await made.rest()
    await made.check()
