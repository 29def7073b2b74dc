"""Questions about runs, as callers write them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from pyworkflow._definitions import BoundWorkflow, Workflow
from pyworkflow.errors import ArgumentError
from pyworkflow.runs import RunStatus
from pyworkflow.spi.storage import RunQuery

__all__ = ["Named", "check_events", "check_reason", "check_run_id", "query_of"]

_LONGEST_REASON = 4096

Named = Workflow[..., Any] | BoundWorkflow[..., Any]
"""A workflow, given where its name is meant."""


def check_run_id(run_id: object) -> None:
    """Refuse what is no text, such as a workflow or a run. ``ArgumentError``."""
    if not isinstance(run_id, str):
        raise ArgumentError(f"run_id={run_id!r:.80} is not text; give the id that start() returned")


def check_events(after: object, limit: object) -> None:
    """Refuse a part of a history that is none. ``ArgumentError``."""
    if type(after) is not int or after < 0:
        raise ArgumentError(f"after={after!r} is not a whole number, at least 0")
    if limit is not None and (type(limit) is not int or limit < 0):
        raise ArgumentError(f"limit={limit!r} is not a whole number of events, at least 0")


def check_reason(reason: object) -> None:
    """Refuse a reason to cancel that is no text, or too long. ``ArgumentError``."""
    if not isinstance(reason, str):
        raise ArgumentError(f"reason={reason!r:.80} is not text")
    if len(reason) > _LONGEST_REASON:
        raise ArgumentError(f"the reason is too long: limit={_LONGEST_REASON} characters")


def query_of(
    status: str | Iterable[str] | None, workflow: str | Named | None, limit: int
) -> RunQuery:
    """The query of ``list_runs``.

    Raises:
        ArgumentError: no status, no workflow, or a limit below 1.
    """
    if type(limit) is not int or limit < 1:
        raise ArgumentError(f"limit={limit!r} is not a whole number of runs, at least 1")
    return RunQuery(status=_statuses(status), workflow=_workflow_name(workflow), limit=limit)


def _workflow_name(workflow: object) -> str | None:
    """The name that a filter means, given as text, as a workflow or as one with options."""
    if isinstance(workflow, BoundWorkflow):
        workflow = cast("BoundWorkflow[..., Any]", workflow).workflow
    if isinstance(workflow, Workflow):
        return cast("Workflow[..., Any]", workflow).name
    if workflow is None or isinstance(workflow, str):
        return workflow
    raise ArgumentError(f"workflow={workflow!r:.80} is neither a workflow nor the name of one")


def _statuses(status: str | Iterable[str] | None) -> frozenset[RunStatus] | None:
    if status is None:
        return None
    if not isinstance(status, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance] - callers pass what users wrote
        raise ArgumentError(f"status={status!r:.80} is neither a status nor a list of them")
    wanted = [status] if isinstance(status, str) else list(status)
    try:
        return frozenset(RunStatus(s) for s in wanted)
    except ValueError:
        known = ", ".join(s.value for s in RunStatus)
        raise ArgumentError(f"not a status: {wanted!r}; there are {known}") from None
