"""Telling observers what is durable: events, and the steps they speak of."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, cast

from pyworkflow import _hooks, _plugins
from pyworkflow.events import Event, EventType
from pyworkflow.runs import ErrorInfo

__all__ = ["observed_hooks", "tell_observers"]

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


def _seconds(ended: Event, events: Sequence[Event]) -> float:
    """How long the last try took, when its start is in the same commit; else 0."""
    for event in events:
        at = event.data.get("at")
        if event.type == EventType.STEP_STARTED and event.op == ended.op and at is not None:
            took = ended.timestamp - datetime.fromisoformat(str(at))
            return max(0.0, took.total_seconds())
    return 0.0
