"""Doorbells: what becomes of one that comes, and how one is made for an item that is due."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from time import monotonic
from typing import TYPE_CHECKING

from pyworkflow import _plugins
from pyworkflow._clock import to_micros
from pyworkflow._definitions import find_workflow
from pyworkflow._engine.live import TURNS
from pyworkflow.errors import StorageError
from pyworkflow.runs import ItemKind, Run, WorkItem
from pyworkflow.spi.executor import Doorbell, Outcome, doorbell_headers
from pyworkflow.spi.storage import TURN, NewRun, Put
from pyworkflow.storekit import failpoints

if TYPE_CHECKING:
    from pyworkflow._engine.worker import Worker

__all__ = ["Bells", "bell_of_put"]

_log = logging.getLogger("pyworkflow.engine")

failpoints.register(
    __name__,
    None,
    {"ring.before": "items are due and durable, and their doorbells were not handed over"},
)

_AT_ONCE = datetime(1970, 1, 1, tzinfo=UTC)

TURNS_AT_ONCE = 16
"""Turns that a worker drives without their bells, while its bells come back to back."""
_BACK_TO_BACK = 0.01
"""Seconds between two doorbells within which the second one must have waited for the first."""
_REMEMBERED = 1000
_LOOKS = 10.0
"""Seconds between two looks at whether bells come for runs of another store."""
_HOOKS = ("pyworkflow_route", "pyworkflow_inject_headers")


class Bells:
    """The doorbells of one worker."""

    def __init__(self, worker: Worker, notify: Callable[[Sequence[Doorbell]], None] | None) -> None:
        self._worker = worker
        self._notify_broker = notify
        self._followed: set[str] = set()
        """Runs whose turns here a ``handle`` sees through."""
        self._free_since = 0.0
        """When the last doorbell was done with."""
        self._streak = 0
        """Doorbells that came back to back."""
        self._queue = ""
        """The queue of the last item that a doorbell brought."""
        self._looks_again = 0.0
        self._ended: OrderedDict[str, None] = OrderedDict()

    @property
    def rings(self) -> bool:
        """Whether others are told of new items."""
        return self._notify_broker is not None

    def ended(self, run_id: str) -> None:
        """A run ended here: bells for its turns may still be on their way."""
        self._ended[run_id] = None
        if len(self._ended) > _REMEMBERED:
            self._ended.popitem(last=False)

    async def handle(self, bell: Doorbell) -> Outcome:
        """Take the item that a doorbell names, and see it through.

        Bells that come back to back waited in the broker, so no worker stands idle: then due turns
        of the same queue are claimed with it, many at once, and their commits travel together. The
        bells of these find nothing to do.
        """
        worker, ref = self._worker, (bell.run_id, bell.item_id)
        if worker.is_stopping:
            return Outcome.BUSY
        waited = monotonic() - self._free_since < _BACK_TO_BACK
        self._streak = self._streak + 1 if waited else 0
        try:
            doorbell_headers.set(bell.headers)
            if bell.item_id == TURN and bell.run_id in self._ended:
                return Outcome.GONE
            taken = await worker.claim_due([ref])
            if taken:
                self._queue = taken[0].queue
            await self._take_more()
            if not taken:
                return await self._why_not(ref)
            await self._follow(ref)
        finally:
            self._free_since = monotonic()
        return Outcome.HANDLED

    async def _take_more(self) -> None:
        """Claim turns whose bells still wait."""
        worker = self._worker
        # Two in a row may be chance; then two turns at once, four, and so on.
        reach = min(2 ** max(0, self._streak - 2), TURNS_AT_ONCE)
        room = reach - (TURNS - worker.room())
        if room <= 0 or not self._queue or worker.is_stopping:
            return
        if worker.runner.in_threads():
            return  # what computes or blocks is better off in several processes
        if any(_plugins.hooks_active(hook) for hook in _HOOKS):
            return  # what a bell says of its item is known from the bell alone
        doorbell_headers.set({})
        await worker.claim_due(turns_of=self._queue, most=room)

    async def _follow(self, ref: tuple[str, str]) -> None:
        worker, run_id = self._worker, ref[0]
        own = worker.task_of(ref)
        if own is not None:
            await asyncio.wait({own})
        if run_id not in self._followed:
            # A turn that the item brought, and the steps that this turn handed off to itself.
            self._followed.add(run_id)
            try:
                while busy := worker.following(run_id):
                    await asyncio.wait(busy)
            finally:
                self._followed.discard(run_id)

    async def _why_not(self, ref: tuple[str, str]) -> Outcome:
        worker = self._worker
        if worker.following(ref[0]):
            return Outcome.BUSY
        items = await worker.storage.list_work(ref[0])
        item = next((i for i in items if i.item_id == ref[1]), None)
        if item is None:
            await self._look_for(ref[0])
            return Outcome.GONE
        now = worker.clock.micros()
        if item.lease is not None and to_micros(item.lease.until) > now:
            return Outcome.BUSY
        if to_micros(item.due_at) > now:
            return Outcome.GONE
        if item.kind is ItemKind.DELIVER:
            return Outcome.BUSY
        run = await worker.storage.get_run(ref[0])
        if run is None:
            return Outcome.GONE
        known = find_workflow(run.workflow) is not None
        return Outcome.BUSY if known else Outcome.UNKNOWN_WORKFLOW

    async def _look_for(self, run_id: str) -> None:
        """Warn, now and then, when bells come for runs of another store."""
        if monotonic() < self._looks_again:
            return
        storage = self._worker.storage
        self._looks_again = monotonic() + _LOOKS
        if await storage.get_run(run_id) is None:
            _log.warning(
                "a doorbell names a run that is not in this store: run_id=%s storage=%s; it was "
                "purged, or whoever started it uses another store or namespace",
                run_id,
                storage.info().location,
            )

    async def sweep(self, limit: int) -> int:
        """Ring for due items that nobody was told of lately; how many."""
        began = monotonic()
        items = await self._worker.storage.announce(limit, self._worker.settings.mute)
        if items and self._notify_broker is not None:
            self._notify_broker(await asyncio.gather(*(self._bell(item) for item in items)))
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
        if self._notify_broker is None:
            return
        bells = [
            bell_of_put(run_id, put, workflow=run.workflow, queue=run.queue, priority=run.priority)
            for put in puts
            if put.claimed is None and put.due_at is None
        ]
        if bells:
            if failpoints.active:
                failpoints.hit("ring.before")
            self._notify_broker(bells)


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
