"""One claimed turn of a run: replay, carry out, commit, deliver, until nothing is left to do.

A session has at most one commit in flight; what ends meanwhile joins the next. ``seen`` is always
the last input *delivered*, and a commit that carries it carries every command, marker and log that
the inputs up to it produced. Inputs are delivered after the commit that made them durable, by seq.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any

from pyworkflow import _plugins
from pyworkflow._clock import from_micros
from pyworkflow._engine.live import InPlace, LiveRun
from pyworkflow._engine.observers import context_of, log_stall
from pyworkflow._engine.records import (
    COMMAND,
    INPUT,
    OBSERVATION,
    cancelled_error,
    cancelled_event,
    ended_by_cancel,
    ending_of,
    suspension,
)
from pyworkflow._engine.steps import StepTry
from pyworkflow._engine.straight import Straight
from pyworkflow._failures import encode_error
from pyworkflow._names import derived_name, step_names
from pyworkflow._replay.commands import (
    CancelStep,
    Command,
    EmitLog,
    MarkVersion,
    RunStep,
    StartSleep,
)
from pyworkflow._replay.mismatch import first_difference
from pyworkflow._replay.replay import DEADLINE_OP, Replay
from pyworkflow._tracebacks import join_stacks
from pyworkflow.errors import (
    NonDeterminism,
    PayloadTooLarge,
    Refusal,
    RunClosed,
    RunNotFound,
    SerializationError,
    StorageError,
    StorageUnavailable,
    UnseenInput,
)
from pyworkflow.events import Event, EventType
from pyworkflow.runs import Run, RunStatus, WorkItem
from pyworkflow.spi.storage import Change, Control, ControlKind, Settle, Update
from pyworkflow.storekit import failpoints

if TYPE_CHECKING:
    from pyworkflow._engine.worker import Worker

__all__ = ["FLUSH", "Session"]

_log = logging.getLogger("pyworkflow.engine")

failpoints.register(
    __name__,
    StorageUnavailable,
    {"turn.before_end": "the workflow has returned, and its end is not sent to the storage"},
)

#: Seconds after which a step that still runs in place is handed off to an item of its own.
FLUSH = 0.1
_SPUN, _SPUN_LONGEST = 5, 300
"""Seconds until code that spins is tried again: doubled each time, up to five minutes."""
_BYTES = 8 * 1024 * 1024
"""Characters of results after which a change takes no further one."""


class Session(Straight):
    """Drives one run under the claim of its turn."""

    __slots__ = (
        "_abandoned", "_cancel", "_most", "_resumed", "_several", "_waiter",
    )  # fmt: skip

    def __init__(
        self, worker: Worker, live: LiveRun, run: Run, item: WorkItem, *, resumed: bool
    ) -> None:
        super().__init__(worker, live, run, item)
        self._waiter: asyncio.Future[None] | None = None
        self._resumed = resumed
        self._cancel: str | None = None
        self._abandoned = False
        # Half of what the storage takes in one change: a round adds to what commands made.
        self._most = max(1, worker.max_events // 2)
        # Of ends (up to three events), timers and hand-offs (two) each, in one round.
        self._several = max(1, self._most // 6)

    # --- the loop -------------------------------------------------------------------------------

    async def drive(self, events: Sequence[Event], seen_seq: int) -> bool:
        """Drive the turn to its end. True when the coroutine may be kept.

        Raises the storage's refusal or ``StorageError``: the coroutine must be dropped. Any other
        exception is a fault of one item, and stays with it.
        """
        self._replay.acknowledge(seen_seq)
        for event in events:
            if event.type == EventType.CANCEL_REQUESTED and event.seq > seen_seq:
                self._cancel = str(event.data.get("reason", ""))
            elif event.type == EventType.WORKFLOW_STALLED:
                self._stalled_at = self._stalled_at or event.timestamp
            elif event.type == EventType.WORKFLOW_UNSTALLED:
                self._stalled_at = None
        try:
            await self._feed(events)
            if self._replay.other_arguments is not None:
                await self._compare_replays(events)
            self._know_warnings(events)
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
                    self._worker.faults.over(self._run.run_id)
                    return done
        except (Refusal, RunClosed, RunNotFound, StorageError):
            raise
        except Exception as fault:  # noqa: BLE001 - the same again would come at each claim
            await self._faulted(fault)
            return False
        finally:
            self._worker.leases.discard(self._ref)
            for place in self._running.values():
                if place.task is not None:
                    place.task.cancel()

    async def _faulted(self, fault: Exception) -> None:
        """The turn came to a fault that no rule foresees: again after a pause, or stalled until then."""
        _log.error("an item could not be worked on run_id=%s", self._run.run_id, exc_info=fault)
        pause, stalls = self._worker.faults.count(self._run.run_id)
        if stalls and self._cancel is not None:
            await self._close_without_code(self._cancel)
        elif stalls:
            again = from_micros(self._worker.clock.micros()) + pause
            await self.stall(f"{type(fault).__name__}: {fault}", again, fault)
        else:
            await self._worker.storage.release(self._ref, delay=pause)

    async def _compare_replays(self, events: Sequence[Event]) -> None:
        """Say which argument a second replay of the same history changes, or that none does.

        Of a step that ran in place only the digest of its arguments is recorded: what a clock or a
        random id gave is found by comparing two replays.
        """
        op, problem = self._replay.other_arguments, self._replay.problem
        first = None if op is None else self._replay.arguments_of(op)
        if first is None or op is None or not isinstance(problem, NonDeterminism):
            return
        again = Replay(self._live.workflow, self._run.run_id)
        again.acknowledge(self._replay.seen)
        try:
            await self._feed_to(again, events)
            second = again.arguments_of(op)
            secret = again.context is not None and bool(again.context.salt)
        finally:
            self._worker.evictor.close(again)
        if second is None:
            return
        differs = first_difference(first, second, values=not secret, names=("first", "second"))
        found = (
            f"; two replays of the same history give this step other arguments{differs}"
            if differs
            else "; a second replay gives this step the same arguments: the code was changed"
        )
        self._replay.problem = NonDeterminism(
            problem.expected, problem.found + found, problem.seq, problem.remedy
        )

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
            if not (replay.needs_newer_code and await self._leave_to_others(replay.problem)):
                await self.stall_for(replay.problem)
            return False
        for warning in replay.take_warnings():
            _log.warning("%s run_id=%s", warning, self._run.run_id)
        commands = replay.take()
        if self._forgetful or (self._worker.is_stopping and replay.outcome is None):
            # What runs is recorded; nothing new begins here. The coroutine goes, and with it
            # what it asked for: whoever claims the turn next asks again, of the same inputs.
            self._forgetful = self._forgetful or bool(commands)
            if not self._running and not self._ended:
                await self._worker.storage.release(self._ref)
                return False
        else:
            self._carry_out(commands)
        if len(self._events) > self._most:
            await self._commit_part(self._most)
            return None
        if replay.outcome is not None and not self._forgetful:
            return await self._finish()
        if self._is_straight(FLUSH):
            left = await self._go_straight()
            if left is not None and left[0].paused:
                await self._pause()
                return False
            if left is not None:
                await self._deliver(*left)
            return None
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
        if self._running and not (owed or self._over):
            await self._wait()
            return None
        return await self._commit_round(due, overdue)

    async def _wait(self) -> None:
        """Until a step ends, a timer is due, or a step has run long enough to be handed off."""
        loop = self._loop
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
        if self._road is not None and not self._road.done():
            self._step_ended(self._road)
        elif self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

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

    def _cancel_step(self, command: CancelStep) -> None:
        place = self._running.pop(command.op, None)
        if place is not None and place.task is not None:
            place.task.cancel()
            self._ended = [p for p in self._ended if p is not place]
        self._handing = [p for p in self._handing if p.what.op != command.op]
        op = self._replay.op(command.op)
        if op.recorded and not op.cancel_recorded:
            self._events.append(cancelled_event(command.op, command.name))
            self._drops += step_names(command.op)
        elif place is not None and place.what.began is not None and not op.recorded:
            # It ran in place: nothing is to be dropped, and people see what became of it.
            self._events += ended_by_cancel(self._worker, place.what)

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
        while self._ended and rest > 0 and size < _BYTES and len(self._events) < self._most:
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
            self._events.append(Event(type, INPUT, data, op, derived_name("timer", op)))
        if self._over:
            self._events.append(self._limit_event())
        handing, held = self._hand_off(several), self._worker.held()
        handed = {p.what.op for p in handing}
        inputs = any(e.klass == INPUT for e in self._events)
        left = bool(self._handing or self._running.keys() - handed)
        settle = not (inputs or left or self._worker.is_stopping or self._outgrows())
        again: Settle | None = None
        timer: int | None = None
        if settle:
            timer = self._replay.next_timer()
            again = Settle(reschedule_at=None if timer is None else from_micros(timer))
            if not handing and not self._puts:
                self._events.extend(suspension(self._replay.waiting_for(), timer))
        answer, events = await self._commit(settle=again, take_turn=held if settle else None)
        self._take_over(handing, answer)
        turn = None
        if settle:
            self._worker.leases.discard(self._ref)
            turn = answer.turn
            if turn is None:
                if timer is None and not self._replay.waiting_for():
                    self._warn_of_no_wake_up()
                # What the answer brought is for whoever claims the turn next.
                return True
            self._hold(turn)
        if answer.paused and not settle:
            await self._pause()
            return False
        await self._deliver(answer, events)
        return None

    def _warn_of_no_wake_up(self) -> None:
        """The code waits for something that no step and no timer will bring."""
        _log.warning(
            "nothing can wake the run: workflow=%s run_id=%s; its code waits, and no step or timer "
            "is pending that could let it go on: await a step or sleep(), or set what it waits for "
            "in another task; `pyworkflow runs cancel %s` ends the run",
            self._run.workflow,
            self._run.run_id,
            self._run.run_id,
            extra=context_of(self._run.run_id, self._run.workflow),
        )

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
        cancelled, dispatched = self._pending_at_end()
        room = self._most - len(self._events)
        if len(cancelled) > room:
            # One change does not take them all; those that are recorded are pending no more.
            self._events += cancelled[:room]
            await self._commit_part(self._most)
            return None
        try:
            if failpoints.active:
                failpoints.hit("turn.before_end")
            last = [*cancelled, ending.event]
            await self._commit(final=ending.status, update=ending.update, last=last)
        except UnseenInput as refusal:
            await self._feed(refusal.inputs)
            return None
        except (PayloadTooLarge, SerializationError) as exc:
            self._abandon(exc)
            return None
        for item_id in (name for op in dispatched for name in step_names(op)):
            self._worker.cancel_step(self._run.run_id, item_id)
        if ending.error is not None and self._replay.context is not None:
            join_stacks(ending.error, self._replay.context.step_errors)
            self._worker.raised.note(self._run.run_id, None, ending.error)
        self._worker.run_ended(self._run, ending.status, ending.update.error)
        return False

    def _pending_at_end(self) -> tuple[list[Event], list[str]]:
        """``step.cancelled`` of the steps that the run's end leaves behind; the dispatched ops.

        Made again for each try to end: what ends meanwhile as an input is pending no more.
        """
        replay = self._replay
        pending = replay.pending_steps()
        for event in self._events:
            if event.type == EventType.STEP_SCHEDULED and event.op is not None:
                pending[event.op] = str(event.data["name"])
        dispatched = list(pending)
        if self._abandoned:
            return [], dispatched  # no replay comes to this end: it could not accept them
        events = [cancelled_event(op, name, by="end") for op, name in pending.items()]
        for op, place in self._running.items():
            if op not in pending and place.what.began is not None and replay.is_emitted(op):
                events += ended_by_cancel(self._worker, place.what, by="end")
        return events, dispatched

    async def _leave_to_others(self, problem: Exception) -> bool:
        """Release a run that newer code recorded; False when nothing fits within the grace time."""
        if self._run.stalled is not None:
            return False
        unfit = self._worker.unfit
        pause, first = unfit.leave(self._run)
        if pause is None:
            return False
        if first:
            _log.info(
                "newer code recorded the run, and it is left to workers that have that code; it "
                "stalls when there is none: workflow=%s run_id=%s: %s",
                self._run.workflow,
                self._run.run_id,
                problem,
            )
        await self._worker.storage.release(self._ref, delay=pause)
        return True

    async def stall_for(self, problem: Exception) -> None:
        """The run cannot go on here: say so once, and try again later."""
        if self._cancel is not None:
            await self._close_without_code(self._cancel)
            return
        reason = f"{type(problem).__name__}: {problem}"
        # Slowly longer: in a fleet of two versions the worker that fits may be the next to look.
        pause = min(2 ** ((self._claims - 1) // 4), 10)
        if self._replay.spins:
            pause = min(_SPUN * 2 ** min(self._claims - 1, 10), _SPUN_LONGEST)
        again = self._worker.clock.micros() + pause * 1_000_000
        await self.stall(reason, from_micros(again), problem)

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
        self._worker.cancel_steps(self._run.run_id)
        self._worker.run_ended(self._run, RunStatus.CANCELLED, info)

    async def unstall(self) -> None:
        """Record before anything runs that the run is tried again."""
        await self._commit()

    async def stall(
        self, reason: str, reschedule_at: Any, problem: Exception | None = None
    ) -> None:
        """Mark the run stalled, its turn due again at ``reschedule_at``."""
        events: list[Event] = []
        if self._run.stalled != reason:
            error: Any = None if problem is None else encode_error(problem)
            data: dict[str, Any] = {"reason": reason, "error": error}
            events.append(Event(EventType.WORKFLOW_STALLED, OBSERVATION, data))
        self._changes += 1
        answer = await self._worker.pipeline.commit(
            Change(
                run_id=self._run.run_id,
                key=f"{self._ref.token}:{self._changes}",
                claim=self._ref,
                control=Control(ControlKind.STALL, reason),
                events=events,
                settle=Settle(reschedule_at=reschedule_at),
            )
        )
        self._worker.committed(self._run.run_id, self._run.workflow, events, answer)
        if events:
            log_stall(self._run, reason, problem)
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
            for _ in range(several):
                if not self._ended or len(self._events) >= self._most:
                    break
                place = self._ended.pop(0)
                del self._running[place.what.op]
                self._record_end(place)
            # What ended during a commit is in ``_ended`` now.
            self._handing = [p for p in self._handing if p.end is None]
            handing = self._hand_off(several)
            settle: Settle | None = None
            if not self._handing and not self._ended:
                timer = self._replay.next_timer()
                settle = Settle(reschedule_at=None if timer is None else from_micros(timer))
            answer, _ = await self._commit(settle=settle)
            self._take_over(handing, answer)
            if settle is not None:
                return
