"""Where the current code runs: in a workflow, in a step, or neither. Read by logging and steps."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from pyworkflow._replay.context import RunContext, current_run
from pyworkflow.events import Json

__all__ = ["LogContext", "StepContext", "current", "running_step", "step_context"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepContext:
    """What a step can know of itself."""

    run_id: str
    step_id: str
    """The op, for example ``1.3#2:step``."""
    step_name: str
    workflow_name: str
    attempt: int
    """1 for the first try."""

    @property
    def idempotency_key(self) -> str:
        """The same for every try of this step: pass it to services that take one."""
        return f"{self.run_id}/{self.step_id}"


class _Draft:
    """A step context that is being made."""

    __slots__ = ("attempt", "run_id", "step_id", "step_name", "workflow_name")
    run_id: str
    step_id: str
    step_name: str
    workflow_name: str
    attempt: int


def step_context(
    run_id: str, step_id: str, step_name: str, workflow_name: str, attempt: int
) -> StepContext:
    """``StepContext`` of these, made for every step: its own constructor takes three times as long.

    What is frozen is written through ``object.__setattr__``, field by field.
    """
    made: Any = _Draft()
    made.run_id = run_id
    made.step_id = step_id
    made.step_name = step_name
    made.workflow_name = workflow_name
    made.attempt = attempt
    made.__class__ = StepContext
    context: StepContext = made
    return context


#: The step whose body runs in this context, if any.
running_step: ContextVar[StepContext | None] = ContextVar("pyworkflow_step", default=None)


class LogContext:
    """Names for log records, and the way of a workflow's log lines into its history."""

    __slots__ = ("_run", "run_id", "step_id", "step_name", "workflow_name")

    def __init__(self, run: RunContext | None, step: StepContext | None) -> None:
        self._run = run
        self.step_id: str | None = None
        self.step_name: str | None = None
        if run is not None:
            self.run_id, self.workflow_name = run.run_id, run.workflow
        elif step is not None:
            self.run_id, self.workflow_name = step.run_id, step.workflow_name
            self.step_id, self.step_name = step.step_id, step.step_name

    @property
    def in_workflow(self) -> bool:
        """True in workflow code, False in a step."""
        return self._run is not None

    @property
    def replaying(self) -> bool:
        """True while workflow code repeats what a committed turn did, or is being closed."""
        return self._run is not None and (self._run.is_replaying or self._run.evicting)

    def emit_log(self, level: str, message: str, fields: Mapping[str, Json]) -> bool:
        """Record a line of workflow code; True when handlers shall get it as well."""
        return self._run is not None and self._run.log(level, message, fields)


def current() -> LogContext | None:
    """The context of the running code; None outside of workflows and steps."""
    run = current_run()
    if run is not None:
        return LogContext(run, None)
    step = running_step.get()
    return None if step is None else LogContext(None, step)
