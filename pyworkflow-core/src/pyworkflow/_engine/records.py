"""The events that the engine writes of steps and ends."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from pyworkflow._clock import EPOCH, from_micros
from pyworkflow._context import MAX_LINES, MAX_LINES_SIZE, StepLines, lines_of
from pyworkflow._engine.steps import StepEnd, StepTry
from pyworkflow._failures import encode_error
from pyworkflow._names import step_name
from pyworkflow._replay.commands import CancelRun, CompleteRun, FailRun, Outcome
from pyworkflow._serialization import payload_size
from pyworkflow.errors import PayloadTooLarge
from pyworkflow.events import EVENT_VERSION, Event, EventClass, EventType
from pyworkflow.runs import ErrorInfo, RunStatus
from pyworkflow.spi.storage import Update

if TYPE_CHECKING:
    from pyworkflow._engine.worker import Worker

__all__ = [
    "COMMAND",
    "INPUT",
    "OBSERVATION",
    "Ending",
    "cancelled_error",
    "cancelled_event",
    "end_events",
    "ended_by_cancel",
    "ending_of",
    "scheduled_event",
    "started_event",
    "suspension",
]

COMMAND, INPUT, OBSERVATION = (str(k) for k in EventClass)

# To look a member up in its enum takes longer than to make an event.
_STARTED, _COMPLETED = EventType.STEP_STARTED, EventType.STEP_COMPLETED
# A third of the time that the class itself takes.
_new: Any = getattr(tuple, "__new__")  # noqa: B009 - pyright does not know its generic type


def _event(type: str, klass: str, data: dict[str, Any], op: str, key: str | None = None) -> Event:
    """``Event`` of these: two are made for every step."""
    made: Event = _new(Event, (type, klass, data, op, key, "", 0, EPOCH, EVENT_VERSION))
    return made


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """What the end of a run changes."""

    status: RunStatus
    event: Event
    update: Update
    error: BaseException | None = None
    """What the run failed with."""


def ending_of(outcome: Outcome, workflow: str, max_payload: int) -> Ending:
    """The end that an outcome comes to; a result that is too large is a failure."""
    if isinstance(outcome, CompleteRun) and (size := payload_size(outcome.result)) > max_payload:
        what = f"the result of workflow {workflow!r}"
        outcome = FailRun(PayloadTooLarge(what, size, max_payload))
    match outcome:
        case CompleteRun(result):
            return Ending(
                status=RunStatus.COMPLETED,
                event=Event(EventType.WORKFLOW_COMPLETED, COMMAND, {"result": result}),
                update=Update(result=result),
            )
        case FailRun(error):
            encoded: Any = encode_error(error)
            return Ending(
                status=RunStatus.FAILED,
                event=Event(EventType.WORKFLOW_FAILED, COMMAND, {"error": encoded}),
                update=Update(error=ErrorInfo.from_json(encoded)),
                error=error,
            )
        case CancelRun(reason):
            return Ending(
                status=RunStatus.CANCELLED,
                event=Event(EventType.WORKFLOW_CANCELLED, COMMAND, {"reason": reason}),
                update=Update(error=cancelled_error(reason)),
            )


def cancelled_error(reason: str) -> ErrorInfo:
    """How a cancelled run keeps the reason."""
    return ErrorInfo(type="pyworkflow.errors:RunCancelled", message=reason, portable=True)


def suspension(waiting: list[str], timer: int | None) -> list[Event]:
    """The run waits for time or for the outside; nothing to tell while it waits for a step."""
    if any(op.endswith(":step") for op in waiting):
        return []
    until = None if timer is None else from_micros(timer).isoformat()
    data: dict[str, Any] = {"waiting": waiting[:20], "until": until}
    return [Event(EventType.WORKFLOW_SUSPENDED, OBSERVATION, data)]


def scheduled_event(what: StepTry) -> Event:
    """A step gets an item: from now on it is dispatched."""
    data = what.payload()
    del data["v"], data["op"]
    data["queue"] = what.step.queue
    return Event(EventType.STEP_SCHEDULED, COMMAND, data, what.op)


def cancelled_event(op: str, name: str, *, by: str | None = None) -> Event:
    """A step was cancelled: by the code, or (``by="end"``) by the end of its run."""
    data: dict[str, Any] = {"name": name} if by is None else {"name": name, "by": by}
    return Event(EventType.STEP_CANCELLED, COMMAND, data, op)


def started_event(what: StepTry, worker: str, *, dispatched: bool) -> Event:
    """A try began."""
    data: dict[str, Any] = {
        "name": what.step.name,
        "attempt": what.attempt,
        "worker": worker,
        "at": None if what.began is None else what.began.isoformat(),
        "dispatched": dispatched,
    }
    return _event(_STARTED, OBSERVATION, data, what.op)


def line_events(what: StepTry, lines: StepLines, most: int) -> list[Event]:
    """The log lines of an attempt as events of its op, at most so many, and how many are left out."""
    kept = lines.lines[: max(0, min(MAX_LINES, most - 4))]
    left_out = lines.left_out + len(lines.lines) - len(kept)
    step: dict[str, Any] = {"step": what.step.name, "attempt": what.attempt}
    events = [
        Event(
            f"log.{level}",
            OBSERVATION,
            {"message": message, "fields": dict(fields), **step},
            what.op,
        )
        for level, message, fields in kept
    ]
    if left_out:
        message = (
            f"{left_out} further log lines of this attempt are left out of the history: it takes "
            f"{MAX_LINES} lines and {MAX_LINES_SIZE // 1024} KiB of each attempt"
        )
        data: dict[str, Any] = {"message": message, "fields": {"left_out": left_out}, **step}
        events.append(Event(EventType.LOG_WARNING, OBSERVATION, data, what.op))
    return events


def ended_by_cancel(worker: Worker, what: StepTry, *, by: str | None = None) -> list[Event]:
    """The events of an attempt in place that was cancelled."""
    events = [started_event(what, worker.owner, dispatched=False)]
    if (lines := lines_of(what.seen)) is not None:
        events += line_events(what, lines, worker.max_events // 2)
    return [*events, cancelled_event(what.op, what.step.name, by=by)]


def end_events(
    worker: Worker, what: StepTry, end: StepEnd, *, started: bool, dispatched: bool = False
) -> tuple[list[Event], int | None]:
    """The events of a try's end, and when the next try is due (µs), or None."""
    events = [] if started else [started_event(what, worker.owner, dispatched=dispatched)]
    if (lines := lines_of(what.seen)) is not None:
        events += line_events(what, lines, worker.max_events // 2)
    data: dict[str, Any] = {"name": what.step.name, "attempt": what.attempt}
    if end.error is None:
        data["digest"] = what.digest
        data["result"] = end.result
        key = step_name(what.op)
        events.append(_event(_COMPLETED, INPUT, data, what.op, key))
        return events, None
    now = worker.clock.micros()
    verdict = worker.runner.judge(what, end, from_micros(now))
    worker.raised.note(what.run_id, what.op, end.error)
    data["error"] = verdict.error
    if verdict.retry_at is not None:
        data["retry_at"] = verdict.retry_at.isoformat()
        events.append(Event(EventType.STEP_RETRYING, OBSERVATION, data, what.op))
        delay = verdict.retry_at - from_micros(now)
        return events, now + max(delay, timedelta(0)) // timedelta(microseconds=1)
    data["digest"] = what.digest
    data["kind"] = end.kind
    events.append(Event(EventType.STEP_FAILED, INPUT, data, what.op, step_name(what.op)))
    return events, None
