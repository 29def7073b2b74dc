"""Doorbells: what becomes of one that comes, and how one is made for an item that is due."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from time import monotonic
from typing import TYPE_CHECKING

from pyworkflow import _plugins
from pyworkflow._clock import to_micros
from pyworkflow._definitions import find_workflow
from pyworkflow.errors import StorageError
from pyworkflow.runs import ItemKind, Run, WorkItem
from pyworkflow.spi.executor import Doorbell, Outcome, doorbell_headers
from pyworkflow.spi.storage import NewRun, Put

if TYPE_CHECKING:
    from pyworkflow._engine.worker import Worker

__all__ = ["Bells", "bell_of_put"]

_AT_ONCE = datetime(1970, 1, 1, tzinfo=UTC)


class Bells:
    """The doorbells of one worker."""

    def __init__(self, worker: Worker, ring: Callable[[Sequence[Doorbell]], None] | None) -> None:
        self._worker = worker
        self._ring = ring
        self._followed: set[str] = set()
        """Runs whose turns here a ``handle`` sees through."""

    @property
    def rings(self) -> bool:
        """Whether others are told of new items."""
        return self._ring is not None

    async def handle(self, bell: Doorbell) -> Outcome:
        """Take the item that a doorbell names, and see it through."""
        worker, ref = self._worker, (bell.run_id, bell.item_id)
        if worker.is_stopping:
            return Outcome.BUSY
        doorbell_headers.set(bell.headers)
        if not await worker.claim_due([ref]):
            return await self._why_not(ref)
        own = worker.task_of(ref)
        if own is not None:
            await asyncio.wait({own})
        if bell.run_id not in self._followed:
            # A turn that the item brought, and the steps that this turn handed off to itself.
            self._followed.add(bell.run_id)
            try:
                while busy := worker.following(bell.run_id):
                    await asyncio.wait(busy)
            finally:
                self._followed.discard(bell.run_id)
        return Outcome.HANDLED

    async def _why_not(self, ref: tuple[str, str]) -> Outcome:
        worker = self._worker
        run = await worker.storage.get_run(ref[0])
        items = await worker.storage.list_work(ref[0])
        item = next((i for i in items if i.item_id == ref[1]), None)
        if run is None or item is None:
            return Outcome.GONE
        now = worker.clock.micros()
        if item.lease is not None and to_micros(item.lease.until) > now:
            return Outcome.BUSY
        if item.kind is not ItemKind.DELIVER and find_workflow(run.workflow) is None:
            return Outcome.UNKNOWN_WORKFLOW
        return Outcome.GONE if to_micros(item.due_at) > now else Outcome.BUSY

    async def sweep(self, limit: int) -> int:
        """Ring for due items that nobody was told of lately; how many."""
        began = monotonic()
        items = await self._worker.storage.announce(limit, self._worker.settings.mute)
        if items and self._ring is not None:
            self._ring(await asyncio.gather(*(self._bell(item) for item in items)))
        _plugins.observe(
            "pyworkflow_sweep_ended", announced=len(items), seconds=monotonic() - began
        )
        return len(items)

    async def _bell(self, item: WorkItem) -> Doorbell:
        workflow = None
        if item.kind is ItemKind.TURN:
            try:
                run = await self._worker.storage.get_run(item.run_id)
            except StorageError:
                run = None  # rung for without its name
            workflow = None if run is None else run.workflow
        return _bell_for(item, _name_of(item, workflow))

    def tell_of(self, run_id: str, run: Run | NewRun, puts: Sequence[Put]) -> None:
        """Ring for what these puts made due."""
        if self._ring is None:
            return
        bells = [
            bell_of_put(run_id, put, workflow=run.workflow, queue=run.queue, priority=run.priority)
            for put in puts
            if put.claimed is None and put.due_at is None
        ]
        if bells:
            self._ring(bells)


def bell_of_put(run_id: str, put: Put, *, workflow: str, queue: str, priority: int) -> Doorbell:
    """The doorbell of a new item of a run that has this workflow, queue and priority."""
    item = WorkItem(
        run_id=run_id,
        item_id=put.item_id,
        kind=put.kind,
        queue=put.queue or queue,
        priority=priority if put.priority is None else put.priority,
        due_at=_AT_ONCE,
        payload=put.payload,
    )
    return _bell_for(item, _name_of(item, workflow))


def _bell_for(item: WorkItem, name: str) -> Doorbell:
    """The doorbell of an item that is called ``name``."""
    queue, headers = item.queue, dict[str, str]()
    if _plugins.hooks_active("pyworkflow_route"):
        told = _plugins.ask("pyworkflow_route", item=item)
        if isinstance(told, str) and told:
            queue = told
    if _plugins.hooks_active("pyworkflow_inject_headers"):
        _plugins.observe("pyworkflow_inject_headers", run_id=item.run_id, headers=headers)
    return Doorbell(
        item.run_id,
        item.item_id,
        queue=queue,
        priority=item.priority,
        name=name,
        headers={str(key): str(value) for key, value in headers.items()},
    )


def _name_of(item: WorkItem, workflow: str | None) -> str:
    """What people call an item: its step's or workflow's name."""
    match item.kind:
        case ItemKind.STEP:
            return str(item.payload.get("name", item.item_id))
        case ItemKind.DELIVER:
            return "deliver"
        case _:
            return workflow or item.item_id
