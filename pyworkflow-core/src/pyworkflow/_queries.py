"""Questions about runs, as callers write them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from pyworkflow._definitions import BoundWorkflow, Workflow
from pyworkflow.errors import ArgumentError
from pyworkflow.runs import RunStatus
from pyworkflow.spi.storage import RunQuery

__all__ = ["Named", "query_of"]

Named = Workflow[..., Any] | BoundWorkflow[..., Any]
"""A workflow, given where its name is meant."""


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
    wanted = [status] if isinstance(status, str) else list(status)
    try:
        return frozenset(RunStatus(s) for s in wanted)
    except ValueError:
        known = ", ".join(s.value for s in RunStatus)
        raise ArgumentError(f"not a status: {wanted!r}; there are {known}") from None
