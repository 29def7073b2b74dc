"""One claimed turn of a run: replay, carry out, commit, deliver, until nothing is left to do.

A session has at most one commit in flight; what ends meanwhile joins the next. ``seen`` is always
the last input *delivered*, and a commit that carries it carries every command, marker and log that
the inputs up to it produced. Inputs are delivered after the commit that made them durable, by seq.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from operator import attrgetter
from time import monotonic
from typing import TYPE_CHECKING, Any, cast

from pyworkflow import _plugins
from pyworkflow._clock import from_micros
from pyworkflow._codecs import opened_events
from pyworkflow._definitions import Step
from pyworkflow._engine.live import InPlace, LiveRun
from pyworkflow._engine.records import (
    COMMAND,
    INPUT,
    OBSERVATION,
    cancelled_error,
    end_events,
    ending_of,
    scheduled_event,
    started_event,
    suspension,
)
from pyworkflow._engine.steps import StepTry
from pyworkflow._failures import encode_error
from pyworkflow._replay.commands import (
    CancelStep,
    Command,
    EmitLog,
    MarkVersion,
    RunStep,
    StartSleep,
)
from pyworkflow._replay.replay import DEADLINE_OP
from pyworkflow.errors import HistoryTooLong, PayloadTooLarge, SerializationError, UnseenInput
from pyworkflow.events import Event, EventType
from pyworkflow.runs import ItemKind, Run, RunStatus, WorkItem
from pyworkflow.spi.storage import (
    TURN,
    Change,
    ClaimRef,
    Committed,
    Control,
    ControlKind,
    Held,
    Put,
    Settle,
    Update,
)

if TYPE_CHECKING:
    from pyworkflow._engine.worker import Worker

__all__ = ["FLUSH", "Session"]

_log = logging.getLogger("pyworkflow.engine")

#: Seconds after which a step that still runs in place is handed off to an item of its own.
FLUSH = 0.1
_WARN_AT = 10_240
_BYTES = 8 * 1024 * 1024
"""Characters of results after which a change takes no further one."""
_SLICE = 500


class Session:
    """Drives one run under the claim of its turn."""

    def __init__(
        self, worker: Worker, live: LiveRun, run: Run, item: WorkItem, *, resumed: bool
    ) -> None:
        self._worker = worker
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
        self._waiter: asyncio.Future[None] | None = None
        self._resumed = resumed
        self._control: Control | None = None
        self._cancel: str | None = None
        self._abandoned = False
        # Half of what the storage takes in one change: a round adds to what commands made.
        self._most = max(1, worker.max_events // 2)
        # Of ends (up to three events), timers and hand-offs (two) each, in one round.
        self._several = max(1, self._most // 6)
        if run.stalled is not None:
            self._control = Control(ControlKind.UNSTALL)
            self._events.append(Event(EventType.WORKFLOW_UNSTALLED, OBSERVATION, {}))

    def _hold(self, item: WorkItem) -> None:
        assert item.lease is not None
        self._ref = ClaimRef(item.run_id, item.item_id, item.lease.token)
        self._claims = item.claims
        self._changes = 0
        self._worker.leases.add(self._ref)

    # --- the loop -------------------------------------------------------------------------------

    async def drive(self, events: Sequence[Event], seen_seq: int) -> bool:
        """Drive the turn to its end. True when the coroutine may be kept.

        Raises the storage's refusal or ``StorageError``: the coroutine must be dropped.
        """
        self._replay.acknowledge(seen_seq)
        for event in events:
            if event.type == EventType.CANCEL_REQUESTED and event.seq > seen_seq:
                self._cancel = str(event.data.get("reason", ""))
        try:
            await self._feed(events)
            self._check_length(self._run.history_length)
            if self._resumed:
                data: dict[str, Any] = {
                    "worker": self._worker.owner,
                    "cause": "claimed",
                    "replayed": len(events),
                }
                self._events.append(Event(EventType.WORKFLOW_RESUMED, OBSERVATION, data))
            while True:
                try:
                    done = await self._turn()
                except (PayloadTooLarge, SerializationError) as exc:
                    # The storage does not take what the code made: the run fails, and says why.
                    self._abandon(exc)
                    continue
                if done is not None:
                    return done
        finally:
            self._worker.leases.discard(self._ref)
            for place in self._running.values():
                if place.task is not None:
                    place.task.cancel()

    def _abandon(self, error: Exception) -> None:
        if self._abandoned:
            raise error  # not even the failure can be stored: the turn is given up
        self._abandoned = True
        self._events, self._puts, self._drops = [], [], []
        self._replay.abandon(error, again=True)

    async def _turn(self) -> bool | None:
        """One round. None to go on, else whether the coroutine may be kept."""
        replay = self._replay
        if replay.problem is not None:
            await self._stall(replay.problem)
            return False
        for warning in replay.take_warnings():
            _log.warning("%s run_id=%s", warning, self._run.run_id)
        commands = replay.take()
        if self._worker.is_stopping and replay.outcome is None:
            # What runs is recorded; nothing new begins here. The coroutine goes, and with it
            # what it asked for: whoever claims the turn next asks again.
            if not self._running and not self._ended:
                await self._worker.storage.release(self._ref)
                return False
        else:
            self._carry_out(commands)
        if len(self._events) > self._most:
            await self._commit_part(self._most)
            return None
        if replay.outcome is not None:
            return await self._finish()
        if self._running and not self._ended:
            await asyncio.sleep(0)  # a short step ends here
        due = replay.due_timers(self._worker.clock.micros())
        late = monotonic() - FLUSH
        overdue = [
            p
            for p in self._running.values()
            if p.since <= late and p.end is None and p not in self._handing
        ]
        owed = self._ended or due or self._puts or self._drops or self._handing or overdue
        if self._running and not owed:
            await self._wait()
            return None
        return await self._commit_round(due, overdue)

    async def _wait(self) -> None:
        """Until a step ends, a timer is due, or a step has run long enough to be handed off."""
        loop = asyncio.get_running_loop()
        left = min(p.since for p in self._running.values()) + FLUSH - monotonic()
        timer = self._replay.next_timer()
        if timer is not None:
            left = min(left, (timer - self._worker.clock.micros()) / 1_000_000)
        self._waiter = waiter = loop.create_future()
        handle = loop.call_later(max(left, 0.0), self._notify)
        try:
            await waiter
        finally:
            handle.cancel()
            self._waiter = None

    def _notify(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _feed(self, events: Sequence[Event]) -> None:
        """Deliver, yielding to the worker's loop on a long history."""
        if len(events) > _SLICE:
            self._replay.know_markers(events)
        for start in range(0, len(events), _SLICE):
            if start:
                await asyncio.sleep(0)
            part = events[start : start + _SLICE]
            if self._worker.codecs is not None:
                part = await opened_events(part)  # what takes long, beside the loop
            self._worker.guard.feed(self._replay, part)

    # --- carrying out commands --------------------------------------------------------------------

    def _carry_out(self, commands: list[Command]) -> None:
        if not commands:
            return
        steps: list[StepTry] = []
        for command in commands:
            match command:
                case RunStep():
                    steps.append(self._try_of(command))
                case CancelStep():
                    self._cancel_step(command)
                case StartSleep(op, until):
                    wake: dict[str, Any] = {"until": from_micros(until).isoformat()}
                    self._events.append(Event(EventType.SLEEP_CREATED, COMMAND, wake, op))
                case MarkVersion(id):
                    key = f"marker:{id}"
                    marked = Event(EventType.VERSION_MARKED, COMMAND, {"id": id}, None, key)
                    self._events.append(marked)
                case EmitLog(level, message, fields):
                    line: dict[str, Any] = {"message": message, "fields": dict(fields)}
                    self._events.append(Event(f"log.{level}", OBSERVATION, line))
        own = True
        for what in steps:
            if what.step.is_queued:
                self._dispatch(what)
            elif self._careful:
                self._handing.append(InPlace(what))
            elif self._worker.spread and not own:
                self._dispatch(what)
            else:
                own = False
                self._start(what)

    def _try_of(self, command: RunStep) -> StepTry:
        step = cast("Step[Any, Any]", command.step)
        return StepTry(
            run_id=self._run.run_id,
            workflow=self._run.workflow,
            op=command.op,
            step=step,
            args=command.args,
            digest=command.digest,
            attempt=1,
            policy=step.policy,
            timeout=step.timeout,
        )

    def _start(self, what: StepTry) -> None:
        place = InPlace(what)
        self._running[what.op] = place
        place.task = asyncio.get_running_loop().create_task(self._body(place))

    async def _body(self, place: InPlace) -> None:
        place.end = end = await self._worker.runner.run(place.what)
        if place.item is not None:
            await self._worker.finish_step(place.what, end, place.item, started=True)
        else:
            self._ended.append(place)
            self._notify()

    def _cancel_step(self, command: CancelStep) -> None:
        place = self._running.pop(command.op, None)
        if place is not None and place.task is not None:
            place.task.cancel()
            self._ended = [p for p in self._ended if p is not place]
        self._handing = [p for p in self._handing if p.what.op != command.op]
        op = self._replay.op(command.op)
        if op.recorded and not op.cancel_recorded:
            data = {"name": command.name}
            self._events.append(Event(EventType.STEP_CANCELLED, COMMAND, data, command.op))
            self._drops.append(f"step:{command.op}")

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
        claimed: Held | None = None,
    ) -> Put:
        return Put(
            item_id=f"step:{what.op}",
            kind=ItemKind.STEP,
            due_at=None if due_us is None else from_micros(due_us),
            queue=what.step.queue or self._queue,
            priority=what.step.priority,
            payload=what.payload(attempt),
            rung=claimed is None and due_us is None and self._worker.rings,
            claimed=claimed,
        )

    # --- committing -------------------------------------------------------------------------------

    async def _commit_round(
        self, due: list[tuple[str, str, int]], overdue: list[InPlace]
    ) -> bool | None:
        """Record what ended and what is due, hand off what takes long, settle when idle."""
        several = self._several
        for place in overdue[: max(0, several - len(self._handing))]:
            if place.what.began is None and place.task is not None:
                # It waits for a free slot: somebody else may have one.
                place.task.cancel()
                del self._running[place.what.op]
                self._dispatch(place.what)
            else:
                self._handing.append(place)
        size, rest = 0, several
        while self._ended and rest > 0 and size < _BYTES:
            place = self._ended.pop(0)
            rest -= 1
            size += len(place.end.result or "") if place.end is not None else 0
            del self._running[place.what.op]
            self._record_end(place)
        now = self._worker.clock.micros()
        for op, type, until in due[:several]:
            data: dict[str, Any] = {
                "until": from_micros(until).isoformat(),
                "lag": max(0, now - until) / 1_000_000,
            }
            if op == DEADLINE_OP:
                data = {"deadline": data["until"]}
            self._events.append(Event(type, INPUT, data, op, f"timer:{op}"))
        handing, held = self._hand_off(several), self._worker.held()
        handed = {p.what.op for p in handing}
        inputs = any(e.klass == INPUT for e in self._events)
        left = bool(self._handing or self._running.keys() - handed)
        settle = not (inputs or left or self._worker.is_stopping)
        again: Settle | None = None
        if settle:
            timer = self._replay.next_timer()
            again = Settle(again_at=None if timer is None else from_micros(timer))
            if not handing and not self._puts:
                self._events.extend(suspension(self._replay.waiting_for(), timer))
        answer, events = await self._commit(settle=again, take_turn=held if settle else None)
        self._take_over(handing, answer)
        turn = None
        if settle:
            self._worker.leases.discard(self._ref)
            turn = next((i for i in answer.claims if i.item_id == TURN), None)
            if turn is None:
                # What the answer brought is for whoever claims the turn next.
                return True
            self._hold(turn)
        if answer.paused and not settle:
            await self._pause()
            return False
        await self._deliver(answer, events)
        return None

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
        take_turn: Held | None = None,
        final: RunStatus | None = None,
        update: Update | None = None,
        last: Event | None = None,
        seen: bool = True,
    ) -> tuple[Committed, list[Event]]:
        """Commit what has gathered; the answer, and the events as they were sent."""
        events = self._events if last is None else [*self._events, last]
        self._changes += 1
        answer = await self._worker.pipeline.commit(
            Change(
                run_id=self._run.run_id,
                key=f"{self._ref.token}:{self._changes}",
                claim=self._ref,
                seen=self._replay.seen or None if seen else None,
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
        )
        puts, drops = self._puts, self._drops
        self._events, self._puts, self._drops, self._control = [], [], [], None
        self._replay.acknowledge(answer.seen_seq)
        for item_id in drops:
            self._worker.cancel_step(self._run.run_id, item_id)
        if puts:
            self._worker.announce_puts(self._run, puts)
        self._worker.committed(self._run.run_id, self._run.workflow, events, answer)
        return answer, events

    async def _commit_part(self, number: int) -> None:
        """Commit the first ``number`` events alone: one change may not hold them all.

        Without ``seen``: what the delivered inputs produced is not complete yet.
        """
        part, events = self._events[:number], self._events[number:]
        items = {f"step:{event.op}" for event in part}
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
        run_id, at = self._run.run_id, answer.timestamp
        own = [
            Event(e.type, e.klass, e.data, e.op, e.key, run_id, answer.seqs[i], at)
            for i, e in enumerate(events)
            if e.klass != OBSERVATION and i not in answer.skipped
        ]
        if answer.others:
            own = sorted([*own, *answer.others], key=attrgetter("seq"))
        await self._feed(own)
        self._replay.skip_to(answer.last_seq)
        self._check_length(answer.last_seq)

    def _check_length(self, length: int) -> None:
        limit = self._worker.settings.max_history
        if length >= limit:
            self._replay.abandon(HistoryTooLong(length, limit))
        elif length >= _WARN_AT and not self._live.warned:
            self._live.warned = True
            message = f"the history is getting long: events={length} limit={limit}"
            _log.warning("%s run_id=%s", message, self._run.run_id)
            warning: dict[str, Any] = {"message": message, "fields": {}}
            self._events.append(Event(EventType.LOG_WARNING, OBSERVATION, warning))

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
            item_id = f"step:{place.what.op}"
            item = next((i for i in answer.claims if i.item_id == item_id), None)
            self._running.pop(place.what.op, None)
            self._ended = [p for p in self._ended if p is not place]
            if item is None:  # cannot be while the contract holds; the item is due for anybody
                if place.task is not None:
                    place.task.cancel()
                continue
            place.item = item
            self._worker.adopt_step(place.what, item, place.task, place.end)

    async def _finish(self) -> bool | None:
        """Commit the run's end. None when inputs came that it did not know: deliver and repeat."""
        outcome = self._replay.outcome
        assert outcome is not None
        ending = ending_of(outcome, self._run.workflow, self._worker.max_payload)
        if self._replay.leftover:
            _log.warning(
                "the workflow returned while tasks were running; they were closed: tasks=%s "
                "run_id=%s; await them, or use a TaskGroup",
                ", ".join(self._replay.leftover[:10]),
                self._run.run_id,
            )
            self._replay.leftover = []
        try:
            await self._commit(final=ending.status, update=ending.update, last=ending.event)
        except UnseenInput as refusal:
            await self._feed(refusal.inputs)
            return None
        except (PayloadTooLarge, SerializationError) as exc:
            self._abandon(exc)
            return None
        self._worker.run_ended(self._run, ending.status, ending.update.error)
        return False

    async def _stall(self, problem: Exception) -> None:
        """The code cannot go on from this history: say so once, and try again later."""
        if self._cancel is not None:
            await self._close_without_code(self._cancel)
            return
        reason = f"{type(problem).__name__}: {problem}"
        again = self._worker.clock.micros() + min(2 ** (self._claims - 1), 10) * 1_000_000
        await self.stall(reason, from_micros(again), encode_error(problem))

    async def _close_without_code(self, reason: str) -> None:
        """A cancel that no code can be given: it ends the run as one of a stalled run does."""
        self._changes += 1
        data: dict[str, Any] = {"reason": reason, "kind": "control"}
        last = Event(EventType.WORKFLOW_CANCELLED, COMMAND, data)
        info = cancelled_error(reason)
        answer = await self._worker.pipeline.commit(
            Change(
                run_id=self._run.run_id,
                key=f"{self._ref.token}:{self._changes}",
                claim=self._ref,
                control=Control(ControlKind.TERMINATE, reason),
                events=[last],
                update=Update(error=info),
                final=RunStatus.CANCELLED,
            )
        )
        self._worker.committed(self._run.run_id, self._run.workflow, [last], answer)
        self._worker.run_ended(self._run, RunStatus.CANCELLED, info)

    async def unstall(self) -> None:
        """Record before anything runs that the run is tried again."""
        await self._commit()

    async def stall(self, reason: str, again_at: Any, error: Any = None) -> None:
        """Mark the run stalled, its turn due again at ``again_at``."""
        events: list[Event] = []
        if self._run.stalled != reason:
            data: dict[str, Any] = {"reason": reason, "error": error}
            events.append(Event(EventType.WORKFLOW_STALLED, OBSERVATION, data))
            _log.error("the run stalled: %s run_id=%s", reason, self._run.run_id)
        self._changes += 1
        answer = await self._worker.pipeline.commit(
            Change(
                run_id=self._run.run_id,
                key=f"{self._ref.token}:{self._changes}",
                claim=self._ref,
                control=Control(ControlKind.STALL, reason),
                events=events,
                settle=Settle(again_at=again_at),
            )
        )
        self._worker.committed(self._run.run_id, self._run.workflow, events, answer)
        if events:
            _plugins.observe(
                "pyworkflow_run_stalled",
                run_id=self._run.run_id,
                workflow=self._run.workflow,
                reason=reason,
            )

    async def _pause(self) -> None:
        """The run was paused: let steps end as items of their own, and give the turn back."""
        self._replay.take()
        self._handing = [p for p in self._running.values() if p.end is None]
        several = self._several
        while True:
            for place in self._ended[:several]:
                del self._running[place.what.op]
                self._record_end(place)
            del self._ended[:several]
            # What ended during a commit is in ``_ended`` now.
            self._handing = [p for p in self._handing if p.end is None]
            handing = self._hand_off(several)
            settle: Settle | None = None
            if not self._handing and not self._ended:
                timer = self._replay.next_timer()
                settle = Settle(again_at=None if timer is None else from_micros(timer))
            answer, _ = await self._commit(settle=settle)
            self._take_over(handing, answer)
            if settle is not None:
                return
