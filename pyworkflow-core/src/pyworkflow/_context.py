"""Where the current code runs: in a workflow, in a step, or neither. Read by logging and steps."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

from pyworkflow._replay.context import RunContext, current_run
from pyworkflow.events import Json

__all__ = [
    "Current",
    "LogContext",
    "MAX_LINES",
    "MAX_LINES_SIZE",
    "RunningTry",
    "StepContext",
    "StepLines",
    "current",
    "lines_of",
    "log_context",
    "mark_cancelled",
    "running_step",
    "running_try",
    "step_context",
]


MAX_LINES = 200
MAX_LINES_SIZE = 64 * 1024
"""Characters of an attempt's log lines, with their fields as JSON."""
_LONGEST_LINE = 16_384
_lines_lock = threading.Lock()


class StepLines:
    """The log lines of one attempt that go into its history; what is over the limits is counted."""

    __slots__ = ("left_out", "lines", "size")

    def __init__(self) -> None:
        self.lines: list[tuple[str, str, Mapping[str, Json]]] = []
        """(level, message, fields)"""
        self.size = 0
        self.left_out = 0

    def add(self, level: str, message: str, fields: Mapping[str, Json]) -> None:
        """Keep a line, or count it. Called from any thread of the step."""
        if len(message) > _LONGEST_LINE:
            message = message[:_LONGEST_LINE] + "… (cut)"
        size = len(message) + (len(json.dumps(fields)) if fields else 0)
        with _lines_lock:
            if len(self.lines) >= MAX_LINES or self.size + size > MAX_LINES_SIZE:
                self.left_out += 1
                return
            self.size += size
            self.lines.append((level, message, fields))


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
    _cancelled: bool = field(default=False, init=False, repr=False, compare=False)
    _lines: StepLines | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def is_cancelled(self) -> bool:
        """Whether the result of this attempt is no longer wanted.

        The run has ended, the workflow cancelled the step, the attempt timed out, or its worker
        stops. An async step gets ``CancelledError``; a thread cannot be interrupted, so a long sync
        step reads this between two pieces of work, and returns.
        """
        return self._cancelled

    @property
    def idempotency_key(self) -> str:
        """The same for every attempt of this step: pass it to services that take one.

        The run id, ``/``, and ``step_id``. A generated run id is ``run_`` and 24 characters of
        ``0-9a-f``; an id of your own has the characters that you gave it, at most 1,024.
        ``step_id`` has the characters ``0-9a-z.#:``, and grows with the depth of nested tasks:
        about 8 characters in the workflow itself, 2 to 4 more for each task inside a task.
        """
        return f"{self.run_id}/{self.step_id}"

    @property
    def header_key(self) -> str:
        """``idempotency_key`` as 32 characters of ``0-9a-f``, whatever the run id.

        Safe in HTTP headers, mail headers, URLs and file names, and never longer. The first half
        of the SHA-256 of ``idempotency_key``, so that it can be computed elsewhere.
        """
        return hashlib.sha256(self.idempotency_key.encode("utf-8", "surrogatepass")).hexdigest()[
            :32
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Current:
    """The run, and the step if any, that the running code belongs to; made by ``current()``."""

    run_id: str
    workflow: str
    step: str | None = None
    """The name of the step; None in workflow code."""
    step_id: str | None = None
    """The op of the step, for example ``1.3#2:step``; None in workflow code."""
    attempt: int | None = None
    """The attempt of the step, 1 for the first; None in workflow code."""
    is_replaying: bool = False
    """In workflow code: whether it repeats what a committed turn did. False in steps."""


class _Draft:
    """A step context that is being made."""

    __slots__ = (
        "_cancelled",
        "_lines",
        "attempt",
        "run_id",
        "step_id",
        "step_name",
        "workflow_name",
    )
    run_id: str
    step_id: str
    step_name: str
    workflow_name: str
    attempt: int
    _cancelled: bool
    _lines: StepLines | None


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
    made._cancelled = False
    made._lines = None
    made.__class__ = StepContext
    context: StepContext = made
    return context


def lines_of(context: StepContext | None) -> StepLines | None:
    """The log lines of the attempt so far, if there are any."""
    return None if context is None else context._lines


def mark_cancelled(context: StepContext) -> None:
    """From now on ``is_cancelled`` is true: read by the body, which may run in another thread."""
    object.__setattr__(context, "_cancelled", True)


class RunningTry(Protocol):
    """What the code of a step finds of the attempt that it belongs to."""

    @property
    def context(self) -> StepContext:
        """What the body sees of itself."""
        ...

    @property
    def opener(self) -> object:
        """What opens resources for the body (``_resources.Opener``)."""
        ...


#: The attempt whose body runs in this context, if any: one variable, since each step sets it.
running_try: ContextVar[RunningTry | None] = ContextVar("pyworkflow_try", default=None)


def running_step() -> StepContext | None:
    """The step whose body runs in this context, if any."""
    what = running_try.get()
    return None if what is None else what.context


class LogContext:
    """Names for log records, and the way of a workflow's log lines into its history."""

    __slots__ = ("_run", "_step", "run_id", "step_id", "step_name", "workflow_name")

    def __init__(self, run: RunContext | None, step: StepContext | None) -> None:
        self._run, self._step = run, step
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
        """Record a line of a workflow or step; True when handlers shall get it as well."""
        if self._run is not None:
            return self._run.log(level, message, fields)
        step = self._step
        if step is not None:
            with _lines_lock:
                lines = step._lines
                if lines is None:
                    object.__setattr__(step, "_lines", lines := StepLines())
            lines.add(level, message, fields)
        return True


def current() -> Current | None:
    """The run, workflow, step and attempt that this code runs in; None when it runs in none.

    For log processors, tags of errors, comments in SQL: it works anywhere, in workflow code, in
    async and sync steps, in libraries that they call, in hooks and log filters, and outside of
    runs. It changes nothing, is recorded nowhere, and never raises. A thread that a step starts
    by itself belongs to no step, unless the step passes on its context
    (``contextvars.copy_context``, as ``asyncio.to_thread`` does).
    """
    run = current_run()
    if run is not None:
        return Current(run_id=run.run_id, workflow=run.workflow, is_replaying=run.is_replaying)
    step = running_step()
    if step is None:
        return None
    return Current(
        run_id=step.run_id,
        workflow=step.workflow_name,
        step=step.step_name,
        step_id=step.step_id,
        attempt=step.attempt,
    )


def log_context() -> LogContext | None:
    """The context of the running code for log records; None outside of workflows and steps."""
    run = current_run()
    if run is not None:
        return LogContext(run, None)
    step = running_step()
    return None if step is None else LogContext(None, step)
