"""Driving chosen runs in the caller's event loop: ``start_local`` and ``resume_local``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any, NamedTuple, Self

from pyworkflow._config import settings
from pyworkflow._declared import DeclaredWorkflow
from pyworkflow._definitions import BoundWorkflow, Workflow, find_workflow, start_of
from pyworkflow._duration import parse_duration
from pyworkflow._engine.worker import Worker
from pyworkflow._local import configured_storage
from pyworkflow._operations import Operations
from pyworkflow._plugins import load_observers
from pyworkflow._replay.context import current_run
from pyworkflow._results import stalled_since
from pyworkflow.errors import ArgumentError, ConfigurationError, RunNotFound
from pyworkflow.runs import Run
from pyworkflow.spi._contract import check_storage_contract
from pyworkflow.spi.storage import StorageBackend

__all__ = ["D", "Driver", "Look", "opened", "refuse_in_workflow", "resume_local", "start_local"]

D = str | int | float | timedelta

#: Seconds between looks for timers that become due while a step is still running.
_LOOK_EVERY = 0.02


class Look(NamedTuple):
    """What runs own at one instant."""

    now: datetime
    due: list[tuple[str, str]]
    """Items that are due and free."""
    next: datetime | None
    """When the next free item is due."""
    held: bool
    """Another worker has an item."""


class Driver:
    """A worker that takes only what belongs to the runs it is given."""

    def __init__(self, storage: StorageBackend) -> None:
        check_storage_contract(storage)
        self.storage = storage
        self.worker = Worker(storage, settings())
        self.operations = Operations(storage, self.worker, None)
        self.started: set[str] = set()
        """Runs that were started here, those that steps started included."""
        self.worker.on_run_started = self.started.add

    async def __aenter__(self) -> Self:
        load_observers()
        await self.worker.open()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # A test that is cut off gives back what it held: a later call goes on at once.
        await self.worker.drain(0)
        await self.worker.close()

    async def start(
        self,
        workflow: Workflow[..., Any] | BoundWorkflow[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        idempotency_key: str | None,
    ) -> str:
        """Make a run durable and begin it."""
        bound = start_of("start()", workflow, idempotency_key)
        named, options = bound.workflow, bound.options
        defined = find_workflow(named.name)
        if defined is None and isinstance(named, DeclaredWorkflow):
            raise ArgumentError(
                f"the workflow is only declared here: name={named.name}; import the module that "
                "defines it, so that the test can run it"
            )
        if defined is not named and not isinstance(named, DeclaredWorkflow):
            raise ArgumentError(
                f"another workflow took the name since this one was defined: name={named.name}; "
                "start that one, or give one of them another name"
            )
        text = named.encode_call(args, kwargs)
        return await self.operations.start_encoded(named, text, options)

    async def find(self, run_id: str) -> Run:
        """The run, if its code is here. ``RunNotFound``, ``ConfigurationError``."""
        run = await self.storage.get_run(run_id)
        if run is None:
            raise RunNotFound(run_id)
        if not run.status.is_terminal and find_workflow(run.workflow) is None:
            raise ConfigurationError(
                f"no workflow of this name is defined here: workflow={run.workflow} "
                f"run_id={run_id}; import its module first"
            )
        return run

    async def look(self, runs: Iterable[str]) -> Look:
        """What these runs own now."""
        now = await self.storage.now()
        due: list[tuple[str, str]] = []
        later: datetime | None = None
        held = False
        for run_id in runs:
            for item in await self.storage.list_work(run_id):
                if item.lease is not None and item.lease.until > now:
                    held = held or item.lease.owner != self.worker.owner
                elif item.due_at <= now:
                    due.append((run_id, item.item_id))
                elif later is None or item.due_at < later:
                    later = item.due_at
        return Look(now, due, later, held)

    async def is_resuming(self) -> bool:
        """Whether a step that waits for a run is about to resume: what it waits for is there."""
        for run_id in list(self.worker.runner.awaited):
            run = await self.storage.get_run(run_id)
            if run is None or run.status.is_terminal:
                return True
            if run.stalled is not None:
                since = await stalled_since(self.storage, run)
                after = self.worker.settings.stalled_after
                if since is not None and since + after <= await self.storage.now():
                    return True
        return False

    async def drive(self, runs: Iterable[str]) -> None:
        """Work until nothing of these runs is due and nothing is in progress here.

        Timers that become due while a step still runs are fired meanwhile.
        """
        chosen = set(runs)
        while True:
            look = await self.look(chosen | self.started)
            if look.due and await self.worker.claim_due(look.due):
                continue
            if not self.worker.is_busy:
                return
            try:
                async with asyncio.timeout(_LOOK_EVERY):
                    await self.worker.settle_down()
            except TimeoutError:
                continue

    async def drive_for(self, run_id: str, wait: timedelta) -> None:
        """Drive a run, and wait up to ``wait`` in all for what becomes due."""
        left = wait
        while True:
            await self.drive([run_id])
            look = await self.look({run_id} | self.started)
            if look.due and not look.held:
                if not await self.worker.claim_due(look.due):
                    return  # paused
                continue
            pause = None if look.next is None else look.next - look.now
            if pause is None or pause > left:
                return
            await asyncio.sleep(pause.total_seconds())
            left -= pause


@asynccontextmanager
async def opened(storage: StorageBackend | None) -> AsyncGenerator[StorageBackend, None]:
    """``storage``, which stays open, or the configured one, closed at the end."""
    if storage is not None:
        await storage.open()
        yield storage
        return
    async with configured_storage(settings()) as configured:
        yield configured


def refuse_in_workflow(what: str) -> None:
    """Raise in workflow code, and stall the run."""
    running = current_run()
    if running is not None:
        running.refuse(f"{what} cannot be called in workflow code; it drives whole runs")


async def start_local(
    workflow: Workflow[..., Any] | BoundWorkflow[..., Any],
    /,
    *args: Any,
    storage: StorageBackend | None = None,
    idempotency_key: str | None = None,
    wait: D = 0,
    **kwargs: Any,
) -> str:
    """Start a run and drive it in this event loop as far as it goes now; its id.

    On return the run has ended, or waits for something that is not due yet: a sleep, a retry.
    With ``wait``, what becomes due within that time in all is waited for, in real time. Runs that
    its steps start are driven, too; other runs of the store are left alone.

    Args:
        workflow: The workflow, or ``workflow.options(...)``.
        *args: Its arguments.
        storage: The store, which stays open; without it the configured one, opened and closed.
        idempotency_key: As in ``pyworkflow.start``; a standing run is driven on.
        wait: How long to wait for sleeps and retries, in all.
        **kwargs: Its keyword arguments.

    Raises:
        ArgumentError: The arguments do not fit; nothing was started.
        IdempotencyConflict: The key belongs to a run that was started with something else.
        RunIdConflict: The run id belongs to a run that was started with something else.
        StorageError: The store cannot be used.
    """
    refuse_in_workflow("start_local()")
    patience = parse_duration(wait)
    async with opened(storage) as store, Driver(store) as driver:
        run_id = await driver.start(workflow, args, kwargs, idempotency_key)
        await driver.drive_for(run_id, patience)
    return run_id


async def resume_local(run_id: str, *, storage: StorageBackend | None = None, wait: D = 0) -> str:
    """Drive a run on, in this event loop, as far as it goes now; its id.

    Fires only what is due by the store's clock, so a sleep that is not over goes on. Does nothing
    with a run that has ended.

    Raises:
        RunNotFound: No run has this id.
        ConfigurationError: The run's workflow is not defined in this process.
        StorageError: The store cannot be used.
    """
    refuse_in_workflow("resume_local()")
    patience = parse_duration(wait)
    async with opened(storage) as store, Driver(store) as driver:
        run = await driver.find(run_id)
        if not run.status.is_terminal:
            await driver.drive_for(run_id, patience)
    return run_id
