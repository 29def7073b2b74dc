"""Telling observers and the log what is durable: events, and the steps and runs they speak of."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, cast

from pyworkflow import _hooks, _plugins
from pyworkflow._failures import part_of
from pyworkflow._logging import BRIEF
from pyworkflow._text import indented
from pyworkflow._tracebacks import rebuilt
from pyworkflow.events import Event, EventType
from pyworkflow.runs import ErrorInfo, Run, RunStatus

__all__ = [
    "context_of",
    "Raised",
    "log_end",
    "log_stall",
    "log_steps",
    "observed_hooks",
    "tell_observers",
]

_log = logging.getLogger("pyworkflow.engine")

_LONGEST = 500
"""Characters of an error's message that a log line has."""
_REMEMBERED = 1000

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


class Raised:
    """What steps and runs failed with here, until that is durable and the log has it."""

    def __init__(self) -> None:
        self._errors: dict[tuple[str, str | None], BaseException] = {}

    def note(self, run_id: str, op: str | None, error: BaseException) -> None:
        """An attempt of this step failed, or the run (None): the log has it soon."""
        self._errors.pop((run_id, op), None)
        self._errors[run_id, op] = error
        if len(self._errors) > _REMEMBERED:
            # Commits that were given up: their records are never written.
            del self._errors[next(iter(self._errors))]

    def take(self, run_id: str, op: str | None) -> BaseException | None:
        """What the last attempt of this step, or the run, failed with, if it was here; once."""
        return self._errors.pop((run_id, op), None)


_STEP_FAILED = "step failed, {}: step={} try=%s workflow={} run_id=%s: {}%s"


def log_steps(run_id: str, workflow: str, events: Sequence[Event], raised: Raised) -> None:
    """A line for each attempt of a step that failed.

    ``exc_info`` comes with the last attempt: until then the failure is not final. The workflow may
    handle it all the same, so a line of text shows the place alone, and not the whole stack.
    """
    for event in events:
        if event.type not in _FAILURES:  # a tuple of text: an enum's members hash slowly
            continue
        data = cast("dict[str, Any]", event.data)
        name, again = data.get("name", ""), data.get("retry_at")
        info = ErrorInfo.from_json(data.get("error") or {})
        error = raised.take(run_id, event.op)
        if not _log.isEnabledFor(logging.WARNING):
            continue
        error = None if again is not None else error or rebuilt(info)
        what = "no further try" if again is None else "next try at %s"
        record = _log.makeRecord(
            _log.name,
            logging.WARNING,
            __file__,
            0,
            # Trackers group records by their template: by step, workflow and error.
            _STEP_FAILED.format(what, _literal(name), _literal(workflow), _kind(info)),
            (*(() if again is None else (again,)), data.get("attempt", 1), run_id, _said(info)),
            _triple(error),
            "log_steps",
            context_of(run_id, workflow, event.op, name),
        )
        record.exc_text = _place_of(error)
        setattr(record, BRIEF, True)
        _log.handle(record)


def _place_of(error: BaseException | None) -> str | None:
    """The line that raised, as text; formatters write it in place of the whole traceback."""
    stack = None if error is None else part_of(error, "__traceback__")
    if stack is None:
        return None
    last = traceback.extract_tb(stack, limit=-1)[-1]
    return indented(f'File "{last.filename}", line {last.lineno}, in {last.name}')


def _triple(error: BaseException | None) -> Any:
    """The exception as log records have it; ``logging`` itself would read its traceback."""
    return None if error is None else (type(error), error, part_of(error, "__traceback__"))


def log_end(run: Run, status: RunStatus, error: ErrorInfo | None, raised: Raised) -> None:
    """A line for a run's end."""
    failed = status is RunStatus.FAILED
    if not failed and not _log.isEnabledFor(logging.INFO):
        return
    exc_info = raised.take(run.run_id, None) if failed else None
    if failed and exc_info is None and error is not None:
        exc_info = rebuilt(error)
    # Trackers group records by their template: by workflow and error.
    template = f"run {status}: workflow={_literal(run.workflow)} run_id=%s%s"
    if error is not None:
        template = f"{template.removesuffix('%s')}: {_kind(error)}%s"
    _log.log(
        logging.ERROR if failed else logging.INFO,
        template,
        run.run_id,
        "" if error is None else _said(error),
        exc_info=_triple(exc_info),
        extra=context_of(run.run_id, run.workflow, None, None),
    )


def log_stall(run: Run, reason: str, problem: BaseException | None) -> None:
    """A line for a run that cannot go on; ``problem`` is why, unless ``reason`` says it all."""
    kind = "" if problem is None else type(problem).__name__
    rest = reason.removeprefix(kind) if kind else reason
    # Trackers group records by their template: by workflow and problem.
    template = f"the run stalled: {_literal(kind)}%s workflow={_literal(run.workflow)} run_id=%s"
    _log.error(
        template,
        rest,
        run.run_id,
        exc_info=_triple(problem),
        extra=context_of(run.run_id, run.workflow, None, None),
    )


_FAILURES = (str(EventType.STEP_RETRYING), str(EventType.STEP_FAILED))


def _kind(error: ErrorInfo) -> str:
    """The name of the error's type, for a template."""
    return _literal(error.type.rpartition(":")[2])


def _said(error: ErrorInfo) -> str:
    """What follows the name of the error's type."""
    message = error.message if len(error.message) <= _LONGEST else error.message[:_LONGEST] + "…"
    return f": {message}" if message else ""


def _literal(text: object) -> str:
    """Text as a part of a log record's template."""
    return str(text).replace("%", "%%")


def context_of(
    run_id: str, workflow: str, step_id: str | None = None, step_name: str | None = None
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
