"""How runs end, in words and as errors."""

from __future__ import annotations

from pyworkflow._replay.commands import CancelRun, CompleteRun, FailRun, Outcome
from pyworkflow.errors import WorkflowTimeout

__all__ = ["describe", "timed_out"]


def timed_out(run_id: str) -> WorkflowTimeout:
    """The error of a run past its ``max_duration``."""
    return WorkflowTimeout(f"the run did not end within its max_duration: run_id={run_id}")


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
