"""Replay: feed a history to a workflow function, one event at a time, and take what it asks for.

Never raises for what user code or a history does: ``problem`` says why it cannot go on. Inputs are
delivered in order of seq, one by one; command events are checked against what the code emitted,
by op and never by position. See ``transitions.py`` for the life of an op.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, cast

from pyworkflow._clock import to_micros
from pyworkflow._replay._cpython import prepare
from pyworkflow._replay.commands import (
    CancelRun,
    Command,
    CompleteRun,
    FailRun,
    Outcome,
    RunStep,
    StartSleep,
    WorkflowSpec,
)
from pyworkflow._replay.context import Op, RunContext
from pyworkflow._replay.ends import (
    RESERVE_OP,
    closing_problem,
    damaged,
    end_of_reserve,
    timed_out,
    too_long,
)
from pyworkflow._replay.loop import BusyLoop, WorkflowBlocked
from pyworkflow._replay.mismatch import OTHER_ARGUMENTS, arguments_of, describe_mismatch
from pyworkflow._replay.transitions import AFTER_END, TABLE, Action, OpKind, OpState
from pyworkflow._serialization import decode, decode_error
from pyworkflow.errors import (
    NonDeterminism,
    PayloadTooLarge,
    SerializationError,
    WorkflowContextError,
    WorkflowError,
)
from pyworkflow.events import EVENT_VERSION, Event, EventClass, EventType

__all__ = ["DEADLINE_OP", "GRACE_OP", "Replay", "WorkflowSpec"]

DEADLINE_OP = "0#deadline"
GRACE_OP = "0#grace"


# Replays whose code has begun and was not closed. The collector must not meet them: it would throw
# GeneratorExit into their code in the middle of whatever runs then, perhaps another run.
_alive: set[Replay] = set()

_CLOSING = frozenset(
    {EventType.WORKFLOW_COMPLETED, EventType.WORKFLOW_FAILED, EventType.WORKFLOW_CANCELLED}
)
_KNOWN = frozenset(str(t) for t in EventType)
# What every event is compared with: a member of an enum takes long to look up.
_INPUT, _OBSERVATION = str(EventClass.INPUT), str(EventClass.OBSERVATION)
_COMPLETED, _FAILED = str(EventType.STEP_COMPLETED), str(EventType.STEP_FAILED)
_MARKED, _CANCELLED = str(EventType.VERSION_MARKED), str(EventType.STEP_CANCELLED)
_DELIVER, _EMITTED = Action.DELIVER, OpState.EMITTED


class Replay:
    """One live coroutine of a run and the position in its history.

    ``fed`` is the seq of the last event fed, ``seen`` that of the last input delivered.
    """

    def __init__(self, workflow: WorkflowSpec, run_id: str) -> None:
        prepare()
        self.workflow = workflow
        self.run_id = run_id
        self.fed = 0
        self.seen = 0
        self.outcome: Outcome | None = None
        self.problem: WorkflowError | None = None
        self.max_result = 0
        """Bytes of a result that the worker takes; 0 for no limit."""
        self.unknown_event = False
        """A newer version of PyWorkflow wrote an event of the history."""
        self.spins = False
        """Its code took its worker for itself: a retry costs the others as much."""
        self.other_arguments: str | None = None
        """The op whose arguments are other than the recorded ones: the cause of the problem."""
        self.leftover: list[str] = []
        """Names of tasks that had not ended when the workflow returned."""
        self._context: RunContext | None = None
        self._root: asyncio.Task[object] | None = None
        self._seen_seq = 0
        self._markers: set[str] = set()
        self._ending: str | None = None  # "cancel", "deadline" or "limit", whichever came first
        self._reason = ""
        self._too_long: Event | None = None
        self.limit_end: int | None = None
        """The length at which a run past ``max_history`` is given up."""
        self.deadline: int | None = None
        """When the run must have ended (µs), or None; gone once delivered."""
        self.grace: int | None = None
        """When a run past its deadline is given up (µs)."""

    # --- feeding --------------------------------------------------------------------------------

    def acknowledge(self, seen_seq: int) -> None:
        """A committed turn delivered the inputs up to ``seen_seq``: what they do is replay."""
        self._seen_seq = seen_seq
        if self._context is not None:
            self._context.seen_seq = seen_seq

    def feed(self, events: Iterable[Event]) -> None:
        """Feed events in order of seq; those already fed are passed over. Stops at a problem."""
        events = tuple(events)
        if len(events) > 1:
            self.know_markers(events)
        for event in events:
            if event.seq <= self.fed:
                continue
            if self.problem is not None:
                return
            try:
                self._feed(event)
            except (KeyError, TypeError, ValueError) as exc:
                self.problem = damaged(event, exc)

    @property
    def needs_newer_code(self) -> bool:
        """Whether the problem is that newer code recorded the history: others may have that code."""
        if self.unknown_event:
            return True
        context = self._context
        return isinstance(self.problem, NonDeterminism) and (
            context is None or not all(map(context.knows_patch, self._markers))
        )

    def know_markers(self, events: Iterable[Event]) -> None:
        """Look ahead for version markers: one anywhere in the history counts from the start."""
        for event in events:
            if event.type == _MARKED:
                self._markers.add(str(event.data.get("id")))

    def skip_to(self, seq: int) -> None:
        """Everything up to ``seq`` was fed, or is of no concern to replay."""
        if self.problem is None and seq > self.fed:
            self.fed = seq

    def abandon(self, error: Exception, *, again: bool = False) -> None:
        """End the run with ``error``, whatever its code waits for (``again``: or came to)."""
        if self._context is not None and (self.outcome is None or again):
            self._finish(self._context, FailRun(error))

    def _feed(self, event: Event) -> None:
        if event.v > EVENT_VERSION or event.type not in _KNOWN:
            self.unknown_event = True
            self.problem = WorkflowError(
                f"the history holds an event that this version does not know: seq={event.seq} "
                f"type={event.type} v={event.v}; upgrade the worker"
            )
            return
        self.fed = event.seq
        klass = event.klass
        if klass == _OBSERVATION:
            return
        if klass == _INPUT:
            self._input(event)
        elif event.type in _CLOSING:
            self.problem = closing_problem(event, self.outcome)
        elif event.type == _MARKED:
            self._marked(event)
        else:
            self._recorded(event)

    def _recorded(self, event: Event) -> None:
        """A command event: the code must have emitted it."""
        matched = self._match(event)
        if matched is None:
            return
        op, state, _ = matched
        op.state = state
        if event.type == EventType.STEP_SCHEDULED:
            op.recorded = True
        elif event.type == EventType.STEP_CANCELLED:
            op.cancel_recorded = True
        else:
            op.until = _micros(event, "until")

    def _marked(self, event: Event) -> None:
        """A version marker is a command like any other: the code must have asked for it.

        Code that never asks is older or newer than what recorded it. Going on with that would
        record other steps under the ops of those that the marker stands for.
        """
        id = str(event.data["id"])
        self._markers.add(id)
        if self._context is None or not self._context.knows_patch(id):
            self.problem = NonDeterminism(
                f"{event.type} id={id}",
                f"code without patched({id!r}) or deprecate_patch({id!r}) before that event",
                event.seq,
            )

    def _input(self, event: Event) -> None:
        self.seen = event.seq
        if event.type == _COMPLETED and self._context is not None:
            self._result(self._context, event, to_micros(event.timestamp))
            return
        if event.type == EventType.WORKFLOW_STARTED:
            self._start(event)
            return
        context = self._context
        if context is None:
            self.problem = NonDeterminism("workflow.started", event.type, event.seq)
            return
        instant = to_micros(event.timestamp)
        match event.type:
            case EventType.CANCEL_REQUESTED:
                self._advance(context, event.seq, instant)
                self._cancel(context, "cancel", str(event.data.get("reason", "")))
            case EventType.WORKFLOW_DEADLINE:
                self._advance(context, event.seq, max(instant, self.deadline or 0))
                self.deadline = None
                if self._root is not None and not self._root.done():
                    self.grace = context.now + 60_000_000
                self._cancel(context, "deadline", "max_duration")
            case EventType.LIMIT_REACHED:
                self._advance(context, event.seq, instant)
                self._limited(context, event)
            case EventType.TIMER_FIRED if event.op == GRACE_OP:
                self._advance(context, event.seq, max(instant, self.grace or 0))
                self.grace = None
                if self.outcome is None:
                    self._finish(context, FailRun(timed_out(self.run_id)))
            case _:
                self._result(context, event, instant)

    def _limited(self, context: RunContext, event: Event) -> None:
        """The history is too long: time for the code to clean up, or none any more."""
        self._too_long = event
        if event.op != RESERVE_OP:
            self.limit_end = end_of_reserve(event)
            self._cancel(context, "limit", str(too_long(event)))
        elif self.outcome is None:
            self._finish(context, FailRun(too_long(event)))

    def _result(self, context: RunContext, event: Event, instant: int) -> None:
        """The input of an op."""
        matched = self._match(event)
        if matched is None:
            return
        op, state, action = matched
        op.state = state
        if op.until:
            context.waiting_timers.pop(event.op or "", None)
            instant = max(instant, op.until) if action is _DELIVER else instant
        self._advance(context, event.seq, instant)
        if action is not _DELIVER or context.closed:
            return
        if op.timer is not None:
            timer, op.timer = op.timer, None
            self._spin(context, context.loop.call_fired, timer)
            return
        future, op.future = op.future, None
        step, op.step = op.step, None
        op.text = ""
        try:
            if event.type == _FAILED:
                info = cast("dict[str, Any]", event.data["error"])
                error = decode_error(info)
                context.raised(error, str(info.get("traceback", "")))
                self._spin(context, _set_exception, future, error)
                return
            value = None if step is None else step.decode_result(str(event.data["result"]))
        except SerializationError as exc:
            self.problem = WorkflowError(
                f"a stored value can no longer be read: step={op.name} op={event.op} "
                f"seq={event.seq}: {exc}"
            )
            return
        self._guarded(context, context.loop.deliver, _set_result, future, value)

    def _match(self, event: Event) -> tuple[Op, OpState, Action] | None:
        """The op that an event belongs to, and what the event does to it.

        None and a problem when the code did not emit it.
        """
        context = self._context
        data = event.data
        name, recorded = data.get("name"), data.get("digest")
        op = context.ops.get(event.op or "") if context is not None else None
        row = None
        if context is not None and op is not None:
            row = TABLE.get((op.kind, op.state, event.type))
            if event.type == _CANCELLED and self.outcome is None:
                row = None if (op.state, event.type) in AFTER_END else row
            if (
                row is not None
                and (name is None or name == op.name)
                and (recorded is None or recorded == op.digest or context.same_call(op, recorded))
            ):
                return op, *row
        expected, found = describe_mismatch(context, event, op, fits=row is not None)
        other = op is not None and row is not None and (name is None or name == op.name)
        if other and context is not None and self.workflow.check_args == "warn":
            context.warnings.append(f"expected {expected}; found {found}")
            return op, *row  # type: ignore[misc]  # neither is None, see ``other``
        if other:
            self.other_arguments = event.op
        remedy = OTHER_ARGUMENTS if other else None
        self.problem = NonDeterminism(expected, found, event.seq, remedy)
        return None

    # --- running the code -----------------------------------------------------------------------

    def _start(self, event: Event) -> None:
        if self._context is not None:
            self.problem = NonDeterminism("one workflow.started", "another", event.seq)
            return
        data = event.data
        context = self._context = RunContext(
            run_id=self.run_id,
            workflow=str(data["workflow"]),
            seed=str(data["seed"]),
            start=to_micros(event.timestamp),
        )
        context.seen_seq = self._seen_seq
        context.markers = self._markers
        context.input_seq = event.seq
        # The limit that the run started with: on replay the same arguments must be refused.
        limit = data.get("max_payload")
        context.max_payload = limit if isinstance(limit, int) else 0
        if data.get("deadline") is not None:
            self.deadline = _micros(event, "deadline")
        try:
            if "salt" in data:
                context.salt = str(decode(str(data["salt"]))).encode()
            coro = self.workflow.call(str(data["args"]))
        except SerializationError as exc:
            self.problem = WorkflowError(f"the stored arguments can no longer be read: {exc}")
            return
        self._guarded(context, self._launch, context, coro)

    def _launch(self, context: RunContext, coro: Coroutine[Any, Any, object]) -> None:
        _alive.add(self)
        self._root = context.loop.start(coro)

    def _cancel(self, context: RunContext, cause: str, reason: str) -> None:
        root = self._root
        if root is None or root.done() or context.closed:
            return
        if self._ending is None:
            self._ending, self._reason = cause, reason
        self._spin(context, root.cancel, reason)

    def _advance(self, context: RunContext, seq: int, instant: int) -> None:
        context.input_seq = seq
        if instant > context.now:
            context.now = instant
            context.loop.advance(instant - context.start)

    def _spin(self, context: RunContext, callback: Any, *args: object) -> None:
        self._guarded(context, context.loop.deliver, callback, *args)

    def _guarded(self, context: RunContext, call: Any, *args: object) -> None:
        try:
            call(*args)
        except BusyLoop as exc:
            self.spins = True
            self.problem = WorkflowContextError(
                f"busy loop: workflow code runs without waiting for anything ({exc}); "
                "await a step, a sleep or an event instead of polling"
            )
        except WorkflowBlocked:
            context.loop.interrupted = True
        if context.loop.interrupted:
            self.blocked()
        elif context.misuse is not None:
            self.problem = context.misuse
        elif self.problem is None and self.outcome is None:
            root = self._root
            if root is not None and root.done():
                self._finish(context, self._ended(root))

    def _ended(self, root: asyncio.Task[object]) -> Outcome:
        if root.cancelled():
            if self._ending == "cancel":
                return CancelRun(self._reason)
            if self._ending == "deadline":
                return FailRun(timed_out(self.run_id))
            if self._ending == "limit" and self._too_long is not None:
                return FailRun(too_long(self._too_long))
            return FailRun(asyncio.CancelledError("raised by the workflow, without a cancel"))
        error = root.exception()
        if error is not None:
            return FailRun(error)
        try:
            if self.max_result:
                return CompleteRun(self.workflow.encode_result(root.result(), self.max_result))
            return CompleteRun(self.workflow.encode_result(root.result()))
        except PayloadTooLarge as exc:
            what = f"the result of workflow {self.workflow.name!r}"
            return FailRun(PayloadTooLarge(what, exc.size, exc.limit))
        except SerializationError as exc:
            return FailRun(exc)

    def _finish(self, context: RunContext, outcome: Outcome) -> None:
        self.outcome = outcome
        context.closed = True
        self.leftover = [n for n in context.loop.unfinished() if n != "1"]
        context.waiting_timers.clear()
        self.deadline = self.grace = None
        context.evicting = True
        if not context.loop.close_tasks():
            _alive.discard(self)

    # --- taking ---------------------------------------------------------------------------------

    def take(self) -> list[Command]:
        """The commands emitted since the last call that are still owed.

        Left out is what a command event carries already, what is over, and a step that was
        cancelled before anything of it was recorded.
        """
        context = self._context
        if context is None or not context.commands:
            return []
        commands, context.commands = context.commands, []
        ops, ended = context.ops, self.outcome is not None
        return [
            c
            for c in commands
            if not isinstance(c, RunStep | StartSleep)
            or (not ended and ops[c.op].state is OpState.EMITTED)
        ]

    @property
    def is_plain(self) -> bool:
        """Whether the code waits for no time; it may have a deadline."""
        context = self._context
        return context is not None and not context.waiting_timers

    def take_step(self) -> RunStep | None:
        """As ``take``, when a step is all that the code went on to; else None, and all is left."""
        context = self._context
        if (
            context is None
            or len(context.commands) != 1
            or self.problem is not None
            or self.outcome is not None
            or context.waiting_timers
            or context.warnings
        ):
            return None
        command = context.commands[0]
        if not isinstance(command, RunStep) or context.ops[command.op].state is not _EMITTED:
            return None
        context.commands.clear()
        return command

    def is_emitted(self, name: str) -> bool:
        """Whether the code asked for this op, and nothing of it is recorded or over."""
        op = None if self._context is None else self._context.ops.get(name)
        return op is not None and op.state is _EMITTED

    def op(self, name: str) -> Op:
        """The emitted op of this identity."""
        assert self._context is not None
        return self._context.ops[name]

    def pending_steps(self) -> dict[str, str]:
        """Op → name of the steps that have an item and no end, in order of creation."""
        if self._context is None:
            return {}
        recorded, step = OpState.RECORDED, OpKind.STEP
        return {
            name: op.name
            for name, op in self._context.ops.items()
            if op.state is recorded and op.kind is step
        }

    def next_timer(self) -> int | None:
        """When the next timer or deadline is due (µs), or None."""
        context = self._context
        if context is None:
            return None
        instants = [op.until for op in context.waiting_timers.values()]
        instants.extend(t for t in (self.deadline, self.grace) if t is not None)
        return min(instants, default=None)

    def due_timers(self, now: int) -> list[tuple[str, str, int]]:
        """(op, event type, until) of what is due at ``now``, ordered by (until, creation)."""
        context = self._context
        if context is None:
            return []
        due = [
            (op.until, op.number, name, op.kind)
            for name, op in context.waiting_timers.items()
            if op.until <= now
        ]
        due.sort()
        events = [
            (name, "sleep.completed" if kind == "sleep" else "timer.fired", until)
            for until, _, name, kind in due
        ]
        if self.deadline is not None and self.deadline <= now:
            events.append((DEADLINE_OP, "workflow.deadline", self.deadline))
        if self.grace is not None and self.grace <= now:
            events.append((GRACE_OP, "timer.fired", self.grace))
        return events

    def waiting_for(self) -> list[str]:
        """The ops that the run waits for, for people."""
        if self._context is None:
            return []
        open_states = (OpState.EMITTED, OpState.RECORDED)
        return [n for n, op in self._context.ops.items() if op.state in open_states]

    def arguments_of(self, op: str) -> str | None:
        """The arguments that the code gave a step, as payload text, while they are known."""
        return arguments_of(self._context, op)

    def take_warnings(self) -> list[str]:
        """Warnings for people since the last call."""
        context = self._context
        if context is None or not context.warnings:
            return []
        warnings, context.warnings = context.warnings, []
        return warnings

    @property
    def context(self) -> RunContext | None:
        """The run as its code sees it; None before ``workflow.started`` was fed."""
        return self._context

    def interrupt(self) -> bool:
        """Called by the watchdog: end the spin, the code blocks. False when it has not begun."""
        if self._context is None:
            return False
        self._context.loop.interrupted = True
        return True

    def blocked(self) -> None:
        """It was interrupted, be it while a value was read for the code: no feed may go on."""
        if self.outcome is None:
            self.spins = True
            self.problem = WorkflowContextError(
                "workflow code blocked its worker for too long; move blocking calls and long "
                "computations into a step (setting: watchdog)"
            )

    @property
    def is_interrupted(self) -> bool:
        """Whether the watchdog interrupted the code."""
        return self._context is not None and self._context.loop.interrupted

    @property
    def is_closed(self) -> bool:
        """Whether no code is left to close: it has not begun, or was closed."""
        return self not in _alive

    def close(self) -> list[str]:
        """Close the coroutine: eviction. The names of tasks that refused.

        User code in ``finally`` runs, with every primitive refusing.
        """
        context = self._context
        if context is None:
            return []
        context.closed = context.evicting = True
        refused = context.loop.close_tasks()
        if not refused:
            _alive.discard(self)
        return refused


def _set_result(future: asyncio.Future[Any] | None, value: object) -> None:
    if future is not None and not future.done():
        future.set_result(value)


def _set_exception(future: asyncio.Future[Any] | None, error: BaseException) -> None:
    if future is not None and not future.done():
        if isinstance(error, StopIteration):  # a future cannot carry it
            error = RuntimeError(f"the step raised {error!r}")
        future.set_exception(error)


def _micros(event: Event, name: str) -> int:
    from datetime import datetime

    return to_micros(datetime.fromisoformat(str(event.data[name])))
