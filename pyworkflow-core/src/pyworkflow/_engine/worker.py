"""A worker: claims due items, drives turns, runs dispatched steps. One per event loop.

Implements ``Runtime``, what executors call. The embedded worker, ``pyworkflow worker`` and the
testing kit run this same code.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Callable, Collection, Coroutine, Sequence
from datetime import datetime, timedelta
from time import monotonic
from typing import Any

from pyworkflow import _plugins
from pyworkflow._clock import from_micros, to_micros
from pyworkflow._codecs import writer_for
from pyworkflow._config import Settings
from pyworkflow._definitions import find_workflow, workflow_names
from pyworkflow._duration import parse_duration
from pyworkflow._engine.bells import Bells
from pyworkflow._engine.blocking import LoopWatch
from pyworkflow._engine.damaged import DamagedWork
from pyworkflow._engine.deliver import deliver
from pyworkflow._engine.dispatched import DispatchedSteps
from pyworkflow._engine.eviction import Evictor
from pyworkflow._engine.faults import Faults
from pyworkflow._engine.guard import shared_guard
from pyworkflow._engine.keeper import LeaseKeeper
from pyworkflow._engine.kept import KeptRuns
from pyworkflow._engine.leases import claim, give_back, ref_of
from pyworkflow._engine.live import TURNS, LiveRun
from pyworkflow._engine.observers import Raised, log_end, log_steps, observed_hooks, tell_observers
from pyworkflow._engine.outages import Outages
from pyworkflow._engine.owner import free_gone, free_process, new_owner
from pyworkflow._engine.pipeline import Pipeline, StorageClock
from pyworkflow._engine.recovery import Recovery
from pyworkflow._engine.serving import Serving
from pyworkflow._engine.session import Session
from pyworkflow._engine.steps import StepEnd, StepRunner, StepTry
from pyworkflow._engine.straight import Roads
from pyworkflow._engine.suspects import POISONED, Suspects, is_poison
from pyworkflow._engine.unfit import UnfitRuns
from pyworkflow._portable import import_listed, note_imports
from pyworkflow._replay._cpython import Batch, prepare
from pyworkflow.errors import Refusal, RunClosed, RunNotFound, StorageDamaged, StorageError
from pyworkflow.events import Event
from pyworkflow.runs import ErrorInfo, ItemKind, Run, RunStatus, WorkItem
from pyworkflow.spi.capabilities import StorageInfo
from pyworkflow.spi.executor import Doorbell, Outcome, doorbell_headers
from pyworkflow.spi.storage import (
    TURN,
    Claim,
    ClaimRef,
    ClaimRequest,
    Committed,
    LeaseFor,
    NewRun,
    Put,
    StorageBackend,
)

__all__ = ["Worker"]

_log = logging.getLogger("pyworkflow.engine")


class Worker:
    """Drives runs of one store in the event loop that ``open`` was awaited in."""

    __slots__ = (  # see ``Turn``
        "__weakref__", "_aside", "_bells", "_deliveries", "_held", "_owns_storage", "_server",
        "_serves", "_steps", "_stopping", "_tasks", "_turns", "_unwatch", "client", "clock",
        "codecs", "damaged", "end_process", "evictor", "faults", "guard", "is_closed", "kept", "leases",
        "loop", "max_events", "max_payload", "on_run_ended", "on_run_started", "outages", "owner",
        "pipeline", "queues", "raised", "recovery", "roads", "runner", "settings", "spread",
        "storage", "suspects", "unfit", "woken",
    )  # fmt: skip

    def __init__(
        self,
        storage: StorageBackend,
        settings: Settings,
        *,
        queues: Sequence[str] | None = None,
        spread: bool = False,
        notify: Callable[[Sequence[Doorbell]], None] | None = None,
        end_process: Callable[[], None] | None = None,
        owns_storage: bool = False,
        serves: Collection[str] | None = None,
    ) -> None:
        self.storage = storage
        self.loop: asyncio.AbstractEventLoop
        """The loop that ``open`` was awaited in."""
        self._owns_storage = owns_storage
        self.settings = settings
        self.owner = new_owner()
        self._held = LeaseFor(self.owner, settings.lease)
        self.spread = spread
        """Parallel branches go to other workers too: the executor is distributed."""
        self.on_run_ended: Callable[[str], object] | None = None
        self.on_run_started: Callable[[str], object] | None = None
        """Called with each run that a client in this worker started for it."""
        self.client: object | None = None
        """What clients in its steps talk to; made by them."""
        self.is_closed = False
        self.queues = None if queues is None else frozenset(queues)
        self._serves = self.queues if serves is None else frozenset(serves)
        self._bells = Bells(self, notify)
        self.clock = StorageClock()
        prepare()
        self.guard = shared_guard()
        self.evictor = Evictor()
        self.codecs = writer_for(settings)
        self.max_events = storage.info().max_events_per_commit
        stored = min(settings.max_payload, storage.info().max_payload)
        patience = settings.lease.total_seconds()
        self.outages = Outages(storage.now, self.owner)
        self.pipeline = Pipeline(
            storage, self.clock, patience, self.codecs, stored, outages=self.outages
        )
        self.pipeline.batch = Batch()
        self.max_payload = stored if self.codecs is None else self.codecs.max_size
        """Bytes of one payload before codecs."""
        self.runner = StepRunner(self, stored, may_end_process=end_process is not None)
        self.end_process = end_process
        self.leases = LeaseKeeper.of(storage, settings, self._lost, self.outages)
        self.suspects = Suspects(self)
        self.recovery = Recovery(self)
        self.roads = Roads()
        self.damaged = DamagedWork(storage, self.recovery.wanted)
        self.unfit = UnfitRuns(settings.version_grace)
        self.faults = Faults()
        self.raised = Raised()
        self.kept = KeptRuns(self.evictor, settings.sessions)
        self._steps = DispatchedSteps(self)
        self._turns: dict[str, asyncio.Task[None]] = {}
        self._deliveries: dict[tuple[str, str], asyncio.Task[Any]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._aside: set[asyncio.Task[Any]] = set()
        """Tasks that keep the worker in order, and are no work."""
        self._server: asyncio.Task[None] | None = None
        self.woken = asyncio.Event()
        """There may be something to claim."""
        self._stopping = False
        self._unwatch: Callable[[], None] = lambda: None

    # --- life ---------------------------------------------------------------------------------

    async def open(self) -> None:
        """Open the store and free what processes of this machine left behind."""
        import_listed(self.settings.portable_modules)
        note_imports()
        self.loop = asyncio.get_running_loop()
        self.runner.resources.begin()
        await self.storage.open()
        self.clock.begin(await self.storage.now())
        self._unwatch = self.guard.watch(LoopWatch(self.runner.runs_async))
        await self.free_gone()

    def serve(self) -> None:
        """Claim whatever is due, from now on, in a task of this loop."""
        if self._server is None:
            self._server = self.spawn(Serving(self).run())

    @property
    def is_serving(self) -> bool:
        """Whether the worker looks for due work itself."""
        return self._server is not None

    async def drain(self, grace: str | float | timedelta = 10) -> None:
        """Claim no more; let what runs end within ``grace``, then give it back.

        A step that is cut off is due again at once, and the try is not counted.
        """
        self._stopping = True
        self.wake()
        self.outages.hurry()
        if self._server is not None:
            # A claim that is under way must not come after what is given back below.
            await asyncio.wait({self._server}, timeout=2.0)
        end = monotonic() + parse_duration(grace).total_seconds()
        while (busy := self._busy()) and (left := end - monotonic()) > 0:
            await asyncio.wait(busy, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if ending := self._steps.ending():
            await asyncio.wait(ending, timeout=5.0)
        refs = self.leases.held()
        for task in self._busy():
            task.cancel()
        if busy := self._busy():
            await asyncio.wait(busy, timeout=1.0)
        await self.pipeline.idle(timeout=5.0)
        for ref in refs:
            if self.runner.in_threads(ref.run_id):
                # A thread cannot be stopped: nobody may begin beside it. What the process held
                # is free when it has ended, or when the lease has.
                continue
            try:
                await give_back(self.storage, ref)
            except StorageError as exc:
                _log.warning("a claim could not be given back and will run out: %s", exc)
        if await self.runner.threads_ended(timeout=2.0):
            # What an answer gave to a task that was cut off is in nobody's books but the store's.
            try:
                await self.storage.free(self.owner)
            except StorageError as exc:
                _log.warning("claims could not be given back and will run out: %s", exc)
            # Not under a step that still runs in a thread: close() does not wait for it.
            await self.runner.resources.close()

    async def close(self) -> None:
        """Stop at once and let go of coroutines and threads. A store that was given stays open."""
        self._stopping = self.is_closed = True
        self._unwatch()
        self.recovery.close()
        self.outages.close()
        self.leases.close()
        tasks = [t for t in self._tasks | self._aside if not t.done()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=1.0)
        await self.leases.closed(timeout=2.0)
        self.kept.evict()
        self.evictor.stop()
        await self.runner.resources.close()
        self.runner.close()
        if self._owns_storage:
            await self.storage.close()

    def spawn(self, coro: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """A task of this worker, kept until it ends."""
        # Not the context of the caller or of the step that happens to cause it: the headers of
        # the doorbell alone, which hooks read.
        context = contextvars.Context()
        if headers := doorbell_headers.get():
            context.run(doorbell_headers.set, headers)
        task = asyncio.get_running_loop().create_task(coro, context=context)
        self.keep_task(task)
        return task

    def spawn_aside(self, coro: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """A task that is no work: nothing waits for its end."""
        task = asyncio.get_running_loop().create_task(coro)
        self._aside.add(task)
        task.add_done_callback(self._aside.discard)
        return task

    def keep_task(self, task: asyncio.Task[Any]) -> None:
        """Take over a task that was begun elsewhere in this worker."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _busy(self) -> set[asyncio.Task[Any]]:
        return {t for t in self._tasks if t is not self._server and not t.done()}

    @property
    def is_stopping(self) -> bool:
        """Whether the worker drains: it begins nothing more."""
        return self._stopping

    @property
    def is_busy(self) -> bool:
        """Whether a turn or step of this worker is in progress, and does more than to wait."""
        return not self._busy() <= self._steps.waiting()

    async def settle_down(self) -> None:
        """Wait until nothing is in progress here."""
        while busy := self._busy():
            await asyncio.wait(busy)

    def held(self) -> LeaseFor:
        """How this worker asks to hold an item."""
        return self._held

    # --- claiming -----------------------------------------------------------------------------

    def wake(self) -> None:
        """There may be something to claim."""
        self.woken.set()

    def serves(self, queue: str) -> bool:
        """Whether work of this queue is for this worker."""
        if self._serves is None or queue in self._serves:
            return True
        # Doorbells that a plugin sends to other queues say nothing of who serves what.
        return self._bells.rings and _plugins.hooks_active("pyworkflow_route")

    def room(self) -> int:
        """How many more turns may be driven here."""
        return TURNS - len(self._turns)

    @property
    def has_room(self) -> bool:
        """Whether turns and steps may begin here."""
        return bool(self.room() and self._steps.room())

    async def claim_due(
        self, items: Sequence[tuple[str, str]] | None = None, *, turns_of: str = "", most: int = 100
    ) -> list[WorkItem]:
        """Claim what is due, and begin it: just ``items``, or turns of the queue ``turns_of``."""
        await self.leases.ready()
        await self.suspects.none_alone()
        await self.leases.after_pause(self.storage)
        kinds = {ItemKind.DELIVER}
        if (turns := self.room()) > 0:
            kinds.add(ItemKind.TURN)
        if (steps := self._steps.room()) > 0 and not turns_of:
            kinds.add(ItemKind.STEP)
        queues = frozenset((turns_of,)) if turns_of else self.queues
        request = ClaimRequest(
            owner=self.owner,
            lease=self.settings.lease,
            limit=max(1, min(turns, steps, most)),
            items=items,
            queues=queues if items is None else None,
            kinds=frozenset(kinds),
            workflows=workflow_names(),
            known=self.kept.known,
        )
        asked = monotonic()
        with self.recovery.claiming():
            claimed = await claim(self.storage, request)
            self.clock.update(claimed.now)
            self.leases.asked_at = asked
            claims = await self.suspects.sift(claimed.claims)
            for taken in claims:
                self._begin(taken)
        if (alone := self.suspects.alone) is not None:
            self.suspects.follow(self._task_on(alone))
        return [taken.item for taken in claims]

    def _begin(self, claim: Claim) -> None:
        match claim.item.kind:
            case ItemKind.TURN:
                self.begin_turn(claim)
            case ItemKind.STEP:
                self._steps.begin(claim)
            case ItemKind.DELIVER:
                ref = (claim.item.run_id, claim.item.item_id)
                task = self.spawn(self.contained(deliver(self, claim), claim.ref))
                self._deliveries[ref] = task
                task.add_done_callback(lambda _: self._deliveries.pop(ref, None))

    async def free_gone(self) -> int:
        """Free at once what processes of this machine held that are gone."""
        return await free_gone(self.storage)

    # --- Runtime: what executors call -----------------------------------------------------------

    def info(self) -> StorageInfo:
        """The store."""
        return self.storage.info()

    async def handle(self, bell: Doorbell) -> Outcome:
        """Take the item that a doorbell names, and see it through."""
        return await self._bells.handle(bell)

    async def sweep(self, limit: int = 100) -> int:
        """Ring for due items that nobody was told of lately; how many."""
        return await self._bells.sweep(limit)

    def following(self, run_id: str) -> set[asyncio.Task[Any]]:
        """The run's turn in this worker, and the steps that it handed off to itself."""
        busy: set[asyncio.Task[Any]] = set(self._steps.adopted(run_id))
        turn = self._turns.get(run_id)
        if turn is not None:
            busy.add(turn)
        return busy

    def task_of(self, ref: tuple[str, str]) -> asyncio.Task[Any] | None:
        """What works on a (run, item) that is no turn."""
        return self._steps.task_of(ref) or self._deliveries.get(ref)

    def _task_on(self, key: tuple[str, str]) -> asyncio.Task[Any] | None:
        return self._turns.get(key[0]) if key[1] == TURN else self.task_of(key)

    def works_on(self, ref: ClaimRef) -> bool:
        """Whether the item is in progress here."""
        return self._task_on((ref.run_id, ref.item_id)) is not None

    def may_come_to_know(self, ref: ClaimRef) -> bool:
        """Whether an answer to work in progress may bring the item, or a thread still runs it."""
        return bool(
            self.following(ref.run_id)
            or self._steps.works_for(ref.run_id)
            or self.runner.in_threads(ref.run_id)
        )

    async def next_due(self) -> datetime | None:
        """When an item is due next."""
        return await self.storage.next_due(queues=self.queues)

    async def seconds_until_due(self) -> float | None:
        """How long until an item is due."""
        due = await self.next_due()
        if due is None:
            return None
        self.clock.update(await self.storage.now())
        return (to_micros(due) - self.clock.micros()) / 1_000_000

    async def wait_for_news(self, timeout: float) -> bool:
        """Until the store has news for workers, or for ``timeout`` seconds."""
        return await self.storage.watch(None, after=0, timeout=timedelta(seconds=timeout))

    def free(self, pid: int) -> asyncio.Task[None]:
        """A pool child with this pid has died: what it held is due at once."""

        async def free_all() -> None:
            if freed := await free_process(self.storage, pid):
                await self.sweep(freed)

        return self.spawn(self.contained(free_all(), None))

    # --- turns --------------------------------------------------------------------------------

    def begin_turn(self, claim: Claim, *, resumed: bool = True) -> None:
        """Drive a turn that was claimed."""
        run_id = claim.item.run_id
        task = self.spawn(self.contained(self._turn(claim, resumed), claim.ref))
        self._turns[run_id] = task
        task.add_done_callback(lambda done: self._turn_done(run_id, done))

    def _turn_done(self, run_id: str, task: asyncio.Task[None]) -> None:
        if self._turns.get(run_id) is task:
            del self._turns[run_id]
        if not self.room() > 1:
            self.wake()

    async def contained(self, coro: Coroutine[Any, Any, None], ref: ClaimRef | None) -> None:
        """Whatever goes wrong with one item, which is claimed by ``ref``, stays with it."""
        run_id = "-" if ref is None else ref.run_id
        try:
            await self.damaged.attempt(coro, ref)
        except (Refusal, RunClosed, RunNotFound) as refusal:
            _log.debug("the claim is over: %r run_id=%s", refusal, run_id)
        except StorageError as exc:
            self.outages.failed("work", "work is given up until the storage works again", exc)
            _log.debug("an item is given up: %s run_id=%s", exc, run_id)
            self.recovery.wanted()
        except Exception:  # noqa: BLE001 - a fault of one item must not stop the worker
            _log.exception("an item could not be worked on run_id=%s", run_id)
        else:
            self.outages.worked("work")

    async def _turn(self, claim: Claim, resumed: bool) -> None:
        run = claim.run
        workflow = find_workflow(run.workflow)
        live = self.kept.take(run.run_id)
        if workflow is None or (live is None and run.stalled is None and self.unfit.knows(run)):
            if live is not None:
                self.kept.drop(live)
            pause = None if workflow is None else self.unfit.leave(run)[0]
            await self.storage.release(claim.ref, delay=pause)
            return
        if live is not None and live.workflow is not workflow:
            self.kept.drop(live)
            live = None
        replayed = 0 if live is not None else len(claim.events)
        if live is None:
            live = LiveRun(workflow, run.run_id, self.max_payload)
        _plugins.observe(
            "pyworkflow_turn_started",
            run_id=run.run_id,
            workflow=run.workflow,
            replayed=replayed,
        )
        began = monotonic()
        keep = False
        try:
            with _plugins.around(
                "pyworkflow_around_turn", run_id=run.run_id, workflow=run.workflow
            ):
                keep = await self._drive(live, claim, resumed)
        finally:
            # A coroutine is kept or closed, never forgotten: a collector that met it would run
            # its ``finally`` inside whatever is running then.
            if keep and not self._stopping:
                self.kept.keep(live)
            else:
                self.kept.drop(live)
            self.leases.discard(claim.ref)
            _plugins.observe(
                "pyworkflow_turn_ended",
                run_id=run.run_id,
                workflow=run.workflow,
                seconds=monotonic() - began,
            )

    async def _drive(self, live: LiveRun, claim: Claim, resumed: bool) -> bool:
        """See a turn through; whether the coroutine may be kept."""
        run, events = claim.run, claim.events
        session = Session(self, live, run, claim.item, resumed=resumed and run.seen_seq > 0)
        if claim.cut or live.replay.fed < claim.after:
            try:
                fed, ask = live.replay.fed, self.storage.get_events
                lease = self.settings.lease
                events = await self.outages.answered(lease, ask, run.run_id, after=fed)
            except StorageDamaged as damage:
                await session.stall_for(damage)
                return False
        if run.stalled == POISONED:
            # It was put aside for long enough: record that, or it would be counted no more.
            await session.unstall()
        elif await is_poison(self, claim):
            again = self.clock.micros() + 3_600_000_000
            await session.stall(POISONED, from_micros(again))
            return False
        return await session.drive(events, run.seen_seq)

    def evict(self, run_id: str | None = None) -> None:
        """Drop the kept coroutine of a run, or all of them."""
        self.kept.evict(run_id)

    async def continue_turn(self, item: WorkItem, answer: Committed, own: Sequence[Event]) -> None:
        """Drive the turn that came with the answer to a step's result."""
        patience = self.settings.lease / 2  # nobody renews the claim yet
        run = await self.outages.answered(patience, self.storage.get_run, item.run_id)
        if run is None:
            return
        live = self.kept.runs.get(item.run_id)
        after = answer.seen_seq
        events: Sequence[Event] = sorted([*own, *answer.unseen_events], key=lambda e: e.seq)
        if live is None or live.replay.fed < after:
            after = 0 if live is None else live.replay.fed
            read = self.storage.get_events
            events = await self.outages.answered(patience, read, item.run_id, after=after)
        claim = Claim(item=item, run=run, events=events, after=after)
        self.begin_turn(claim, resumed=False)

    # --- steps --------------------------------------------------------------------------------

    def adopt_step(
        self, what: StepTry, item: WorkItem, task: asyncio.Task[None] | None, end: StepEnd | None
    ) -> None:
        """A step handed off by a session: running, ended meanwhile, or not begun."""
        self._steps.adopt(what, item, task, end)

    async def finish_step(
        self, what: StepTry, end: StepEnd, item: WorkItem, *, started: bool
    ) -> None:
        """Record how a dispatched step ended."""
        await self.contained(self._steps.finish(what, end, item, started=started), ref_of(item))

    def cancel_step(self, run_id: str, item_id: str) -> None:
        """The workflow gave a step up: end it, if it runs here."""
        self._steps.cancel(run_id, item_id)

    def cancel_steps(self, run_id: str) -> None:
        """The run has ended without code: end what runs of it here."""
        self._steps.cancel_run(run_id)

    def _lost(self, ref: ClaimRef) -> None:
        if ref.item_id != TURN:
            self._steps.cancel(ref.run_id, ref.item_id, ref.token)

    # --- after commits --------------------------------------------------------------------------

    @property
    def rings(self) -> bool:
        """Whether this worker tells others of new items itself."""
        return self._bells.rings

    def announce_puts(self, run: Run, puts: Sequence[Put]) -> None:
        """New items are durable: somebody should claim them."""
        if puts:
            self.tell_of(run.run_id, run, puts)

    def tell_of(self, run_id: str, run: Run | NewRun, puts: Sequence[Put]) -> None:
        """Ring for what these puts made due, and look for work here."""
        self._bells.tell_of(run_id, run, puts)
        self.wake()

    def committed(
        self, run_id: str, workflow: str, events: Sequence[Event], answer: Committed
    ) -> None:
        """Events are durable: tell the log and the observers."""
        if self.suspects.alone is not None:
            self.suspects.committed(run_id, events)
        log_steps(run_id, workflow, events, self.raised)
        if not events or not (hooks := observed_hooks()):
            return
        tell_observers(hooks, run_id, workflow, answer.stored(run_id, events))

    def run_ended(self, run: Run, status: RunStatus, error: ErrorInfo | None) -> None:
        """A run has ended."""
        self._bells.ended(run.run_id)
        log_end(run, status, error, self.raised)
        if self.on_run_ended is not None:
            self.on_run_ended(run.run_id)
        _plugins.observe(
            "pyworkflow_run_ended",
            run_id=run.run_id,
            workflow=run.workflow,
            status=status,
            error=error,
        )
