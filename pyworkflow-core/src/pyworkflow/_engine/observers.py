"""Telling observers and the log what is durable: events, and the steps and runs they speak of."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, cast

from pyworkflow import _hooks, _plugins
from pyworkflow.events import Event, EventType
from pyworkflow.runs import ErrorInfo, Run, RunStatus

__all__ = ["log_end", "log_steps", "observed_hooks", "tell_observers"]

_log = logging.getLogger("pyworkflow.engine")

_LONGEST = 500
"""Characters of an error's message that a log line has."""

_HOOKS = (
    "pyworkflow_events_committed",
    "pyworkflow_step_started",
    "pyworkflow_step_ended",
    "pyworkflow_step_retrying",
)


def observed_hooks() -> list[str]:
    """The hooks about events that somebody implements; empty in the common case."""
    active = _hooks.table().active
    return [] if active.isdisjoint(_HOOKS) else [hook for hook in _HOOKS if hook in active]


def tell_observers(hooks: list[str], run_id: str, workflow: str, events: Sequence[Event]) -> None:
    """Tell of committed events, in their order."""
    if "pyworkflow_events_committed" in hooks:
        _plugins.observe("pyworkflow_events_committed", run_id=run_id, events=events)
    for event in events:
        hook = _STEP_HOOKS.get(event.type)
        if hook is None or hook not in hooks:
            continue
        data = cast("dict[str, Any]", event.data)
        facts: dict[str, Any] = {
            "run_id": run_id,
            "workflow": workflow,
            "step_id": event.op,
            "step_name": data["name"],
            "attempt": data["attempt"],
        }
        if event.type != EventType.STEP_STARTED:
            error = data.get("error")
            facts["error"] = None if error is None else ErrorInfo.from_json(error)
        if event.type == EventType.STEP_RETRYING:
            facts["retry_at"] = datetime.fromisoformat(data["retry_at"])
        elif event.type != EventType.STEP_STARTED:
            facts["seconds"] = _seconds(event, events)
        _plugins.observe(hook, **facts)


_STEP_HOOKS: dict[str, str] = {
    EventType.STEP_STARTED: "pyworkflow_step_started",
    EventType.STEP_RETRYING: "pyworkflow_step_retrying",
    EventType.STEP_COMPLETED: "pyworkflow_step_ended",
    EventType.STEP_FAILED: "pyworkflow_step_ended",
}


def log_steps(run_id: str, workflow: str, events: Sequence[Event]) -> None:
    """A line for each try of a step that failed."""
    for event in events:
        if event.type not in _FAILURES:  # a tuple of text: an enum's members hash slowly
            continue
        data = cast("dict[str, Any]", event.data)
        name, attempt = data.get("name", ""), data.get("attempt", 1)
        _log.warning(
            "step failed, %s: step=%s try=%s workflow=%s run_id=%s: %s",
            f"next try at {data['retry_at']}" if "retry_at" in data else "no further try",
            name,
            attempt,
            workflow,
            run_id,
            _said(ErrorInfo.from_json(data.get("error") or {})),
            extra=_context(run_id, workflow, event.op, name),
        )


def log_end(run: Run, status: RunStatus, error: ErrorInfo | None) -> None:
    """A line for a run's end."""
    if status is not RunStatus.FAILED and not _log.isEnabledFor(logging.INFO):
        return
    _log.log(
        logging.ERROR if status is RunStatus.FAILED else logging.INFO,
        "run %s: workflow=%s run_id=%s%s",
        status,
        run.workflow,
        run.run_id,
        "" if error is None else f": {_said(error)}",
        extra=_context(run.run_id, run.workflow, None, None),
    )


_FAILURES = (str(EventType.STEP_RETRYING), str(EventType.STEP_FAILED))


def _said(error: ErrorInfo) -> str:
    kind = error.type.rpartition(":")[2]
    message = error.message if len(error.message) <= _LONGEST else error.message[:_LONGEST] + "…"
    return f"{kind}: {message}" if message else kind


def _context(
    run_id: str, workflow: str, step_id: str | None, step_name: str | None
) -> Mapping[str, str | None]:
    """What records made in a run carry, see ``configure_logging``."""
    return {
        "run_id": run_id,
        "workflow_name": workflow,
        "step_id": step_id,
        "step_name": step_name,
    }


def _seconds(ended: Event, events: Sequence[Event]) -> float:
    """How long the last try took, when its start is in the same commit; else 0."""
    for event in events:
        at = event.data.get("at")
        if event.type == EventType.STEP_STARTED and event.op == ended.op and at is not None:
            took = ended.timestamp - datetime.fromisoformat(str(at))
            return max(0.0, took.total_seconds())
    return 0.0
