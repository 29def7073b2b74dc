"""How runs end, in words and as errors."""

from __future__ import annotations

from pyworkflow._replay.commands import CancelRun, CompleteRun, FailRun, Outcome
from pyworkflow._serialization import unwrapped
from pyworkflow.errors import (
    HistoryTooLong,
    NonDeterminism,
    SerializationError,
    WorkflowError,
    WorkflowTimeout,
)
from pyworkflow.events import Event, EventType

__all__ = [
    "LIMIT_OP",
    "RESERVE_OP",
    "closing_problem",
    "describe",
    "end_of_reserve",
    "timed_out",
    "too_long",
]

LIMIT_OP = "0#limit"
RESERVE_OP = "0#reserve"


def timed_out(run_id: str) -> WorkflowTimeout:
    """The error of a run past its ``max_duration``."""
    return WorkflowTimeout(f"the run did not end within its max_duration: run_id={run_id}")


def too_long(event: Event) -> HistoryTooLong:
    """The error of a run whose ``limit.reached`` this is."""
    return HistoryTooLong(_number(event, "length"), _number(event, "limit"))


def _number(event: Event, name: str) -> int:
    value = event.data.get(name)
    return value if isinstance(value, int) else 0


def end_of_reserve(event: Event) -> int:
    """The length at which a run that reached its limit has used up its reserve."""
    return event.seq + _number(event, "reserve")


def damaged(event: Event, cause: Exception) -> WorkflowError:
    """An event whose data is not what its type has: no code can be driven by it."""
    what = f"missing={cause}" if isinstance(cause, KeyError) else f"cause={cause!r}"
    return WorkflowError(
        f"the history holds an event without its fields: seq={event.seq} type={event.type} {what}; "
        "it was not written by PyWorkflow, or the store is damaged: see `pyworkflow storage check`"
    )


def closing_problem(event: Event, found: Outcome | None) -> WorkflowError | None:
    """Why the code does not fit a closing event; it must have come to the same end."""
    expected = {
        EventType.WORKFLOW_COMPLETED: CompleteRun,
        EventType.WORKFLOW_FAILED: FailRun,
        EventType.WORKFLOW_CANCELLED: CancelRun,
    }[EventType(event.type)]
    if event.data.get("kind") == "control":
        return None  # closed from outside, without code
    if not isinstance(found, expected):
        return NonDeterminism(event.type, describe(found), event.seq)
    if isinstance(found, CompleteRun):
        try:
            recorded = unwrapped(str(event.data.get("result")))
        except SerializationError as exc:
            return WorkflowError(f"the stored result can no longer be read: {exc}")
        if found.result != recorded:
            return NonDeterminism(
                f"{event.type} result={recorded}", f"result={found.result}", event.seq
            )
    return None


def describe(outcome: Outcome | None) -> str:
    """What the code came to, for a message."""
    match outcome:
        case None:
            return "the code still waits"
        case CompleteRun(result):
            return f"completed with {result[:200]}"
        case FailRun(error):
            return f"failed with {error!r}"
        case CancelRun(reason):
            return f"cancelled ({reason})"
