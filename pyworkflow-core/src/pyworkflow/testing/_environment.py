"""A store with a clock that the test controls: a year of sleep takes milliseconds."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any, Self, TypeVar, cast

from pyworkflow._clock import ensure_utc
from pyworkflow._definitions import BoundWorkflow, Workflow
from pyworkflow._duration import parse_duration
from pyworkflow._memory import MemoryStorageBackend
from pyworkflow._resources import Resource
from pyworkflow._serialization import decode_error
from pyworkflow.errors import ArgumentError, WorkflowError
from pyworkflow.events import EventType
from pyworkflow.runs import Run, RunStatus
from pyworkflow.spi.storage import StorageBackend, TestClock, has_test_clock
from pyworkflow.testing._local import D, Driver, Look, refuse_in_workflow

__all__ = ["TestEnvironment"]

R = TypeVar("R")

_IDLE = (RunStatus.PAUSED, RunStatus.STALLED)
_POLL = 0.005


class TestEnvironment:
    """Runs workflows in this event loop, on a clock that skips what nobody needs to wait for.

    ``async with TestEnvironment() as env``. Sleeps, retry delays and deadlines are skipped when
    nothing is in progress: the clock jumps to the next instant at which something is due, one
    after the other, so nothing fires late. Steps really run, and are waited for in real time; the
    clock also goes on by itself meanwhile.

    With ``auto_skip=False`` only ``advance`` moves the clock. ``start`` is the clock's first
    instant, by default the present. Without ``storage`` the environment has a fresh memory store;
    a store that is passed in keeps the clock's offset and stays open.
    """

    __test__ = False  # for pytest: a class of this name is no test

    def __init__(
        self,
        storage: StorageBackend | None = None,
        start: datetime | None = None,
        auto_skip: bool = True,
    ) -> None:
        self._owned = storage is None
        made = MemoryStorageBackend() if storage is None else storage
        clock: object = made
        if not has_test_clock(clock):
            raise ArgumentError(
                f"the clock of this storage cannot be moved: storage={made.info().name}; "
                "leave storage out, or give one that has shift_clock"
            )
        self.storage: StorageBackend = made
        """The store, for looking at runs and events."""
        self._clock: TestClock = clock
        self._first = None if start is None else ensure_utc(start, stacklevel=3)
        self._auto_skip = auto_skip
        self._driver: Driver | None = None
        self._runs: set[str] = set()
        self._fakes: dict[Resource[Any], object] = {}
        # Between a look and the shift that follows from it nothing may start.
        self._lock = asyncio.Lock()

    async def __aenter__(self) -> Self:
        driver = Driver(self.storage)
        await driver.__aenter__()
        driver.worker.on_run_started = self._runs.add
        self._driver = driver
        for resource, value in self._fakes.items():
            driver.worker.runner.resources.override(resource, value)
        if self._first is not None:
            await self._shift(self._first - await self.storage.now())
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        driver, self._driver = self._driver, None
        if driver is not None:
            await driver.__aexit__(exc_type, exc, traceback)
        if self._owned:
            await self.storage.close()

    def override(self, resource: Resource[Any], value: object) -> None:
        """Let steps of this environment get ``value`` from ``resource.get()``, until it ends.

        ``value`` is neither opened nor closed; or it is another resource, opened instead. See
        ``pyworkflow.testing.override`` for all workers of the process.
        """
        self._fakes[resource] = value
        if self._driver is not None:
            self._driver.worker.runner.resources.override(resource, value)

    async def start(
        self,
        workflow: Workflow[..., Any] | BoundWorkflow[..., Any],
        /,
        *args: Any,
        idempotency_key: str | None = None,
        **kwargs: Any,
    ) -> str:
        """Start a run and drive it as far as it goes without moving the clock; its id.

        Takes a workflow or ``workflow.options(...)``.

        Raises as ``pyworkflow.start``.
        """
        driver = self._entered("start()")
        async with self._lock:
            run_id = await driver.start(workflow, args, kwargs, idempotency_key)
            self._runs.add(run_id)
        await driver.drive(self._runs)
        return run_id

    async def run(
        self,
        workflow: Workflow[..., R] | BoundWorkflow[..., R],
        /,
        *args: Any,
        **kwargs: Any,
    ) -> R:
        """Start a run and return its result. Raises as ``start`` and ``result``."""
        found: R = await self.result(await self.start(workflow, *args, **kwargs))
        return found

    async def result(self, run_id: str) -> Any:
        """The run's result, once the clock was moved as far as its end needs.

        Raises:
            RunNotFound: No run has this id.
            RunCancelled, RunTerminated, WorkflowTimeout: It ended without a result.
            TimeoutError: It waits for something that does not come, or, with
                ``auto_skip=False``, that needs ``advance``.
            NonDeterminism, WorkflowContextError: It stalled; this is why.
            Exception: What the workflow raised.
        """
        driver = self._entered("result()")
        run = await driver.find(run_id)
        stalled_before = run.stalled is not None
        while not run.status.is_terminal:
            self._runs.add(run_id)
            await driver.drive(self._runs)
            run = await driver.find(run_id)
            if run.status.is_terminal:
                break
            if run.status is RunStatus.STALLED and not stalled_before:
                raise await self._reason(run)
            if not self._auto_skip or not await self._skip(also=run_id if stalled_before else None):
                raise TimeoutError(await self._stuck(run))
            stalled_before = False
        self._runs.discard(run_id)
        return await driver.operations.result(run_id if run.next is None else run.next, 0)

    async def cancel(self, run_id: str, *, reason: str = "") -> None:
        """Ask a run to end and drive it as far as it goes without moving the clock.

        Raises as ``pyworkflow.cancel``.
        """
        driver = self._entered("cancel()")
        run = await driver.find(run_id)
        await driver.operations.cancel(run_id, reason)
        if not run.status.is_terminal:
            self._runs.add(run_id)
        await driver.drive(self._runs)

    async def advance(self, by: D) -> None:
        """Move the clock, and drive what becomes due, each at its own instant and in order."""
        driver = self._entered("advance()")
        end = await self.storage.now() + parse_duration(by)
        while True:
            await driver.drive(self._runs)
            if not await self._skip(until=end):
                break
        left = end - await self.storage.now()
        if left > timedelta(0):
            async with self._lock:
                await self._shift(left)
            await driver.drive(self._runs)

    async def now(self) -> datetime:
        """The store's clock. Aware UTC."""
        return await self.storage.now()

    # --- the clock --------------------------------------------------------------------------------

    async def _skip(self, *, until: datetime | None = None, also: str | None = None) -> bool:
        """Jump to the next instant at which something is due, if nothing is in progress.

        False when there is none (until then). Stalled and paused runs have none, but for ``also``.
        """
        driver = self._entered("the environment")
        async with self._lock:
            look = await self._look(driver, also)
            if look.due:
                return True
            if driver.worker.is_busy:
                return True
            if look.held or await driver.is_resuming():
                # Another worker of this store has it, or a step is about to see its run's end.
                await asyncio.sleep(_POLL)
                return True
            if look.next is None or (until is not None and look.next > until):
                return False
            await self._shift(look.next - look.now)
            return True

    async def _look(self, driver: Driver, also: str | None) -> Look:
        moving: list[str] = []
        for run_id in list(self._runs):
            run = await self.storage.get_run(run_id)
            if run is None or run.status.is_terminal:
                self._runs.discard(run_id)
            elif (
                run.status not in _IDLE
                or run_id == also
                or (run.stalled is not None and run_id in driver.worker.runner.awaited)
            ):
                moving.append(run_id)
        return await driver.look(moving)

    async def _shift(self, by: timedelta) -> None:
        driver = self._entered("the environment")
        held, lease = driver.worker.leases.held(), driver.worker.settings.lease
        if held:
            # Steps that wait for a run keep their leases, however far the clock jumps.
            await self.storage.renew(held, max(by, timedelta(0)) + lease)
        await self._clock.shift_clock(by)
        if held:
            await self.storage.renew(held, lease)
        driver.worker.clock.update(await self.storage.now())

    # --- what went wrong --------------------------------------------------------------------------

    def _entered(self, what: str) -> Driver:
        refuse_in_workflow(what)
        if self._driver is None:
            raise WorkflowError(
                f"{what} needs an entered environment: use `async with TestEnvironment() as env`"
            )
        return self._driver

    async def _reason(self, run: Run) -> BaseException:
        """Why a run stalled, as the exception that says so."""
        for event in reversed(await self.storage.get_events(run.run_id)):
            if event.type == EventType.WORKFLOW_STALLED:
                error = event.data.get("error")
                if isinstance(error, dict):
                    return decode_error(cast("dict[str, Any]", error))
                break
        return WorkflowError(f"the run stalled: {run.stalled} run_id={run.run_id}")

    async def _stuck(self, run: Run) -> str:
        waiting: object = []
        for event in reversed(await self.storage.get_events(run.run_id)):
            if event.type == EventType.WORKFLOW_SUSPENDED:
                waiting = event.data.get("waiting")
                break
        look = await self._entered("the environment").look([run.run_id])
        remedy = (
            "nothing is due: what it waits for must come from elsewhere"
            if look.next is None
            else f"the next is due at {look.next.isoformat()}: move the clock with advance()"
        )
        return (
            f"the run has not ended: run_id={run.run_id} status={run.status} "
            f"waiting={waiting}; {remedy}"
        )
