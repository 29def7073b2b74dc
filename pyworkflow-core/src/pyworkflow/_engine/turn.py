"""What a claimed turn has gathered, how it is committed, and how what is durable is delivered.

``Session`` decides what is done when; this is what it does it with.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Sequence
from datetime import datetime
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from pyworkflow._clock import from_micros, to_micros
from pyworkflow._codecs import opened_events
from pyworkflow._engine.leases import ref_of
from pyworkflow._engine.live import InPlace, LiveRun
from pyworkflow._engine.observers import context_of
from pyworkflow._engine.records import (
    INPUT,
    OBSERVATION,
    end_events,
    scheduled_event,
    started_event,
)
from pyworkflow._engine.steps import StepTry
from pyworkflow._names import step_name, step_names
from pyworkflow._replay.commands import RunStep
from pyworkflow._replay.ends import LIMIT_OP, RESERVE_OP
from pyworkflow._replay.replay import Replay
from pyworkflow.errors import StorageUnavailable
from pyworkflow.events import Event, EventType
from pyworkflow.runs import ItemKind, Run, RunStatus, WorkItem
from pyworkflow.spi.storage import (
    Change,
    Committed,
    Control,
    ControlKind,
    LeaseFor,
    Put,
    Settle,
    Update,
    stored_event,
)
from pyworkflow.storekit import failpoints

if TYPE_CHECKING:
    from pyworkflow._engine.worker import Worker

__all__ = ["SLICE", "Turn"]

_log = logging.getLogger("pyworkflow.engine")

failpoints.register(
    __name__,
    StorageUnavailable,
    {
        "turn.before_commit": "a turn's change is complete, and nothing of it is stored",
        "turn.after_commit": "a turn's change is stored, nobody was told, no step of it has begun",
    },
)

SHARES = (20, 50, 80)
"""Percent of ``max_history`` at which a run warns, once each."""
RESERVE = 100
"""Events that a run past its limit may add to clean up; a tenth of the limit when that is more."""
_WARNED = "history:"
SLICE = 500
"""Events that are fed without a pause for the worker's loop."""


class Turn:
    """One claimed turn: what it owes the storage, and the steps that run in it."""

    # Instances of more than 30 attributes share no table of them: each access would be a search,
    # dozens of times per step.
    __slots__ = (
        "_careful", "_changes", "_claims", "_control", "_drops", "_ended", "_events",
        "_forgetful", "_handing", "_length", "_live", "_loop", "_over", "_puts", "_queue",
        "_quiet", "_ref", "_replay", "_run", "_running", "_stalled_at", "_worker",
    )  # fmt: skip

    def __init__(self, worker: Worker, live: LiveRun, run: Run, item: WorkItem) -> None:
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        self._live = live
        self._replay = live.replay
        self._run = run
        self._queue = run.queue
        self._hold(item)
        # A turn that is claimed again without progress may hold a step that kills its worker:
        # then steps get an item, and so a count of their own, before they start.
        self._careful = item.claims > 1
        self._events: list[Event] = []
        self._puts: list[Put] = []
        self._drops: list[str] = []
        self._running: dict[str, InPlace] = {}
        self._handing: list[InPlace] = []
        self._ended: list[InPlace] = []
        self._over = False
        """The history has reached its limit, and its code was not notified."""
        self._length = run.history_length
        self._quiet = worker.settings.max_history * SHARES[0] // 100
        """A shorter history is neither warned of nor over, unless it was over once."""
        self._forgetful = False
        """What the code asked for was forgotten: the inputs that led to it were not seen."""
        self._stalled_at: datetime | None = None
        self._control: Control | None = None
        if run.stalled is not None:
            self._control = Control(ControlKind.UNSTALL)
            self._events.append(Event(EventType.WORKFLOW_UNSTALLED, OBSERVATION, {}))

    def _hold(self, item: WorkItem) -> None:
        self._ref = ref_of(item)
        self._claims = item.claims
        self._changes = 0
        self._worker.leases.add(self._ref)

    async def _feed(self, events: Sequence[Event]) -> None:
        """Deliver, yielding to the worker's loop on a long history."""
        await self._feed_to(self._replay, events)

    async def _feed_to(self, replay: Replay, events: Sequence[Event]) -> None:
        if len(events) > SLICE:
            replay.know_markers(events)
        for start in range(0, len(events), SLICE):
            if start:
                await asyncio.sleep(0)
            part = events[start : start + SLICE]
            if self._worker.codecs is not None:
                part = await opened_events(part)  # what takes long, beside the loop
            self._worker.guard.feed(replay, part, self._worker.settings.watchdog)

    def _dispatch(self, what: StepTry, *, attempt: int = 1, due_us: int | None = None) -> None:
        """Owe a step to whoever claims it."""
        self._events.append(scheduled_event(what))
        self._puts.append(self._put_of(what, attempt=attempt, due_us=due_us))

    def _put_of(
        self,
        what: StepTry,
        *,
        attempt: int = 1,
        due_us: int | None = None,
        claimed: LeaseFor | None = None,
    ) -> Put:
        return Put(
            item_id=step_name(what.op),
            kind=ItemKind.STEP,
            due_at=None if due_us is None else from_micros(due_us),
            queue=what.step.queue or self._queue,
            priority=what.step.priority,
            payload=what.payload(attempt),
            notified=claimed is None and due_us is None and self._worker.rings,
            claimed=claimed,
        )

    def _record_end(self, place: InPlace) -> None:
        what, end = place.what, place.end
        assert end is not None
        events, retry_us = end_events(self._worker, what, end, started=False)
        if retry_us is not None:
            self._events.extend(events)
            self._dispatch(what, attempt=what.attempt + 1, due_us=retry_us)
        else:
            self._events.extend(events)

    async def _commit(
        self,
        *,
        settle: Settle | None = None,
        take_turn: LeaseFor | None = None,
        final: RunStatus | None = None,
        update: Update | None = None,
        last: Sequence[Event] = (),
        seen: bool = True,
    ) -> tuple[Committed, list[Event]]:
        """Commit what has gathered; the answer, and the events as they were sent."""
        events = [*self._events, *last] if last else self._events
        change = self._change(
            events, settle=settle, take_turn=take_turn, final=final, update=update, seen=seen
        )
        answer = await self._worker.pipeline.commit(change)
        self._taken(events, answer)
        return answer, events

    def _change(
        self,
        events: list[Event],
        *,
        settle: Settle | None = None,
        take_turn: LeaseFor | None = None,
        final: RunStatus | None = None,
        update: Update | None = None,
        seen: bool = True,
    ) -> Change:
        if failpoints.active:
            failpoints.hit("turn.before_commit")
        self._changes += 1
        return Change(
            run_id=self._run.run_id,
            key=f"{self._ref.token}:{self._changes}",
            claim=self._ref,
            seen=self._replay.seen or None if seen and not self._forgetful else None,
            events=events,
            settle=settle,
            put=self._puts,
            drop=self._drops,
            take_turn=take_turn,
            final=final,
            update=update,
            # A run that heals and ends at once is stalled no more by its end.
            control=None if final is not None else self._control,
        )

    def _taken(self, events: list[Event], answer: Committed) -> None:
        """The change with these events is durable: nothing of it is owed any more."""
        if failpoints.active:
            failpoints.hit("turn.after_commit")
        puts, drops = self._puts, self._drops
        self._events = []
        if self._control is not None:
            self._control = None
            self._say_resumed()
        self._replay.acknowledge(answer.seen_seq)
        if drops:
            self._drops = []
            for item_id in drops:
                self._worker.cancel_step(self._run.run_id, item_id)
        if puts:
            self._puts = []
            self._worker.announce_puts(self._run, puts)
        self._worker.committed(self._run.run_id, self._run.workflow, events, answer)

    def _say_resumed(self) -> None:
        since = self._stalled_at
        _log.info(
            "the run resumes: workflow=%s run_id=%s stalled_for=%s stalled_by=%s",
            self._run.workflow,
            self._run.run_id,
            "?" if since is None else self._seconds_since(since),
            self._run.stalled,
            extra=context_of(self._run.run_id, self._run.workflow),
        )

    def _seconds_since(self, at: datetime) -> str:
        seconds = max(0, self._worker.clock.micros() - to_micros(at)) / 1_000_000
        return f"{seconds:.1f}s"

    async def _commit_part(self, number: int) -> None:
        """Commit the first ``number`` events alone: one change may not hold them all.

        Without ``seen``: what the delivered inputs produced is not complete yet.
        """
        part, events = self._events[:number], self._events[number:]
        items = {name for event in part if event.op for name in step_names(event.op)}
        puts = [p for p in self._puts if p.item_id not in items]
        drops = [d for d in self._drops if d not in items]
        self._puts = [p for p in self._puts if p.item_id in items]
        self._drops = [d for d in self._drops if d in items]
        self._events = part
        answer, sent = await self._commit(seen=False)
        self._events, self._puts, self._drops = events, puts, drops
        await self._deliver(answer, sent)

    async def _deliver(self, answer: Committed, events: list[Event]) -> None:
        """Feed what others added and what was just committed, strictly by seq."""
        await self._feed(self._to_feed(answer, events))
        self._fed(answer)

    def _to_feed(self, answer: Committed, events: list[Event]) -> list[Event]:
        # As ``answer.stored``, without those that no replay reads.
        run_id, at, seqs, skipped = self._run.run_id, answer.timestamp, answer.seqs, answer.skipped
        own = [
            stored_event(event, run_id, seqs[index], at)
            for index, event in enumerate(events)
            if event.klass != OBSERVATION and index not in skipped
        ]
        return (
            sorted([*own, *answer.unseen_events], key=attrgetter("seq"))
            if answer.unseen_events
            else own
        )

    def _fed(self, answer: Committed) -> None:
        self._replay.skip_to(answer.last_seq)
        self._length = length = answer.last_seq
        if length >= self._quiet or self._replay.limit_end is not None:
            self._check_length(length)

    def _check_length(self, length: int) -> None:
        """Warn of a long history in good time; note that its limit, or its reserve, is reached."""
        limit, end = self._worker.settings.max_history, self._replay.limit_end
        self._over = length >= (limit if end is None else end)
        if length * 100 < limit * SHARES[0] or self._over:
            return
        warned = self._live.warned
        share = max(s for s in SHARES if length * 100 >= limit * s)
        if share in warned:
            return
        warned.update(s for s in SHARES if s <= share)
        message = f"the history is getting long: events={length} limit={limit} used={share}%"
        _log.warning(
            "%s run_id=%s; at the limit the workflow is cancelled, to clean up, and fails: poll "
            "with growing pauses, or split the work over several runs",
            message,
            self._run.run_id,
        )
        line: dict[str, Any] = {"message": message, "fields": {}}
        key = f"{_WARNED}{share}"
        self._events.append(Event(EventType.LOG_WARNING, OBSERVATION, line, None, key))

    def _know_warnings(self, events: Sequence[Event]) -> None:
        """Those that the history has already: they come once in a run, not once in a worker."""
        if self._run.history_length * 100 >= self._worker.settings.max_history * SHARES[0]:
            self._live.warned.update(
                int(e.key.removeprefix(_WARNED))
                for e in events
                if e.key is not None and e.key.startswith(_WARNED)
            )

    def _outgrows(self) -> bool:
        """Whether the history reaches its limit with what has gathered: its code is next."""
        limit, end = self._worker.settings.max_history, self._replay.limit_end
        return self._length + len(self._events) >= (limit if end is None else end)

    def _limit_event(self) -> Event:
        """The input that the history has no room any more, or that its reserve is used up."""
        limit, first = self._worker.settings.max_history, self._replay.limit_end is None
        # What is pending may start, end and be cancelled yet: that is no cleanup of the code's.
        pending = 4 * len(self._replay.waiting_for())
        data: dict[str, Any] = {
            "length": self._length,
            "limit": limit,
            "reserve": max(RESERVE, limit // 10) + pending if first else 0,
        }
        op = LIMIT_OP if first else RESERVE_OP
        return Event(EventType.LIMIT_REACHED, INPUT, data, op, f"limit:{op}")

    def _hand_off(self, number: int) -> list[InPlace]:
        """Up to ``number`` steps get an item of their own with the next commit."""
        handing, self._handing = self._handing[:number], self._handing[number:]
        for place in handing:
            self._events.append(scheduled_event(place.what))
            self._events.append(started_event(place.what, self._worker.owner, dispatched=False))
            self._puts.append(self._put_of(place.what, claimed=self._worker.held()))
        return handing

    def _take_over(self, handing: list[InPlace], answer: Committed) -> None:
        """Steps that were handed off go on under a claim of their own."""
        for place in handing:
            item_id = step_name(place.what.op)
            item = next((i for i in answer.claims if i.item_id == item_id), None)
            self._running.pop(place.what.op, None)
            self._ended = [p for p in self._ended if p is not place]
            if item is None:  # cannot be while the contract holds; the item is due for anybody
                if place.task is not None:
                    place.task.cancel()
                continue
            place.item = item
            self._worker.adopt_step(place.what, item, place.task, place.end)

    def _try_of(self, command: RunStep) -> StepTry:
        step: Any = command.step  # a Step: replay knows it by less than that
        run = self._run
        return StepTry(
            run.run_id, run.workflow, command.op, step, command.args, command.digest, 1,
            step.policy, step.timeout,
        )  # fmt: skip

    def _start(self, what: StepTry) -> None:
        place = InPlace(what)
        self._running[what.op] = place
        loop = self._loop
        if loop.get_task_factory() is None:
            # What create_task comes to, in half the time: a name is not made up for each.
            place.task = asyncio.Task(
                self._body(place), loop=loop, name=what.op, context=contextvars.Context()
            )
        else:
            place.task = loop.create_task(
                self._body(place), name=what.op, context=contextvars.Context()
            )

    async def _body(self, place: InPlace) -> None:
        place.end = end = await self._worker.runner.run(place.what)
        if place.item is not None:
            await self._worker.finish_step(place.what, end, place.item, started=True)
        else:
            self._ended.append(place)
            self._notify()

    def _notify(self) -> None:
        """A step has ended."""
        raise NotImplementedError
