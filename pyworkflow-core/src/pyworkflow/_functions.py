"""The functions of the module: starting runs and asking about them, each sync and async.

The sync ones work anywhere except in workflow code. Where an event loop runs they block it, and
warn.
"""

from __future__ import annotations

from collections.abc import Coroutine, Iterable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

from pyworkflow._definitions import BoundWorkflow, Workflow, start_of
from pyworkflow._operations import IfStalled, Operations
from pyworkflow._queries import Named
from pyworkflow._results import parse_timeout
from pyworkflow._routing import call, call_async, refuse_in_workflow, refuse_waiting
from pyworkflow.events import Event
from pyworkflow.runs import Run
from pyworkflow.spi.storage import Page

__all__ = [
    "cancel",
    "cancel_async",
    "get_events",
    "get_events_async",
    "get_run",
    "get_run_async",
    "list_runs",
    "list_runs_async",
    "result",
    "result_async",
    "run",
    "run_async",
    "start",
    "start_async",
    "start_bound",
    "start_bound_async",
]

R = TypeVar("R")
D = str | int | float | timedelta
Target = Workflow[..., R] | BoundWorkflow[..., R]
Bound = BoundWorkflow[..., Any]
Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]

_RUN_FORM = "run_async(...)"
_START_FORM = "start_async(...)"


def start_bound(
    bound: Bound, args: Args, kwargs: Kwargs, what: str = "start()", form: str = _START_FORM
) -> str:
    """Start with a workflow's options; blocks until the run is durable."""
    refuse_in_workflow(what)
    text = bound.workflow.encode_call(args, kwargs)  # wrong arguments need no store
    return start_encoded(bound, text, what, form)


def start_encoded(bound: Bound, text: str, what: str = "start()", form: str = _START_FORM) -> str:
    """As ``start_bound``, with arguments that are encoded already."""

    def begin(ops: Operations) -> Coroutine[Any, Any, str]:
        return ops.start_encoded(bound.workflow, text, bound.options)

    def begun(ops: Operations, run_id: str) -> None:
        ops.begun_here(run_id, bound.workflow, bound.options)

    return call(what, form, begin, then=begun)


async def start_bound_async(bound: Bound, args: Args, kwargs: Kwargs) -> str:
    """``start_bound`` as a coroutine."""
    refuse_in_workflow("start_async()")
    text = bound.workflow.encode_call(args, kwargs)

    def begin(ops: Operations) -> Coroutine[Any, Any, str]:
        return ops.start_encoded(bound.workflow, text, bound.options)

    return await call_async("start_async()", begin)


def run_bound(bound: Bound, args: Args, kwargs: Kwargs, timeout: D | None) -> Any:
    """Start and wait for the result."""
    refuse_in_workflow("run()")
    refuse_waiting("run()", _RUN_FORM)
    parse_timeout(timeout)  # a wrong one starts nothing
    run_id = start_bound(bound, args, kwargs, "run()", _RUN_FORM)
    return call("run()", _RUN_FORM, lambda ops: ops.result(run_id, timeout), waits=True)


async def run_bound_async(bound: Bound, args: Args, kwargs: Kwargs, timeout: D | None) -> Any:
    """``run_bound`` as a coroutine."""
    parse_timeout(timeout)
    return await result_async(await start_bound_async(bound, args, kwargs), timeout=timeout)


def start(
    workflow: Target[Any], /, *args: Any, idempotency_key: str | None = None, **kwargs: Any
) -> str:
    """Begin a run of ``workflow``; returns its id once the run is durable.

    Takes a workflow, or ``workflow.options(...)`` for a run id, queue, tags and the like. With an
    ``idempotency_key`` or a run id that a run has already, and the same workflow and arguments,
    that run's id is returned and nothing is started.

    Raises:
        ArgumentError: the arguments do not fit; nothing was started.
        IdempotencyConflict: the key belongs to a run that was started with something else.
        RunIdConflict: the run id belongs to a run that was started with something else.
        PayloadTooLarge, SerializationError: the arguments cannot be stored.
        StorageError: the store cannot be used.
    """
    return start_bound(start_of("start()", workflow, idempotency_key), args, kwargs)


async def start_async(
    workflow: Target[Any], /, *args: Any, idempotency_key: str | None = None, **kwargs: Any
) -> str:
    """``start`` as a coroutine."""
    bound = start_of("start_async()", workflow, idempotency_key)
    return await start_bound_async(bound, args, kwargs)


def run(workflow: Target[R], /, *args: Any, timeout: D | None = None, **kwargs: Any) -> R:
    """Start a run, wait for its end, and return its result. Raises as ``start`` and ``result``."""
    found: R = run_bound(start_of("run()", workflow), args, kwargs, timeout)
    return found


async def run_async(
    workflow: Target[R], /, *args: Any, timeout: D | None = None, **kwargs: Any
) -> R:
    """``run`` as a coroutine."""
    found: R = await run_bound_async(start_of("run_async()", workflow), args, kwargs, timeout)
    return found


def result(run_id: str, *, timeout: D | None = None, if_stalled: IfStalled | None = None) -> Any:
    """Wait for the end of a run and return its result.

    In a step it releases the step's slot meanwhile, so that what it waits for can run.

    Args:
        run_id: The run.
        timeout: How long to wait; None waits for ever.
        if_stalled: ``"raise"`` (the default) raises ``RunStalled`` when the run has been stalled
            for the setting ``stalled_after`` without a break, ``"wait"`` waits on.

    Raises:
        RunNotFound: no run has this id.
        RunCancelled, RunTerminated, WorkflowTimeout: it ended without a result.
        RunStalled: no worker can drive it as its code is now.
        TimeoutError: it has not ended within ``timeout``; it is not cancelled.
        ArgumentError: ``timeout`` is no duration, or ``if_stalled`` another word.
        Exception: what the workflow raised.
    """
    form = "result_async(...)"
    return call("result()", form, lambda ops: ops.result(run_id, timeout, if_stalled), waits=True)


async def result_async(
    run_id: str, *, timeout: D | None = None, if_stalled: IfStalled | None = None
) -> Any:
    """``result`` as a coroutine."""

    def wait(ops: Operations) -> Coroutine[Any, Any, Any]:
        return ops.result(run_id, timeout, if_stalled)

    return await call_async("result_async()", wait, waits=True)


def get_run(run_id: str) -> Run:
    """The run as it is now, its values decoded. Raises ``RunNotFound``."""
    return call("get_run()", "get_run_async(...)", lambda ops: ops.get_run(run_id))


async def get_run_async(run_id: str) -> Run:
    """``get_run`` as a coroutine."""
    return await call_async("get_run_async()", lambda ops: ops.get_run(run_id))


def list_runs(
    *,
    status: str | Iterable[str] | None = None,
    workflow: str | Named | None = None,
    limit: int = 100,
    cursor: str | None = None,
) -> Page[Run]:
    """Runs, newest first: ``.items``, and ``.cursor`` for the next page (None at the end).

    ``workflow`` is a workflow or its name. Raises ``ArgumentError`` for a status, cursor or limit
    that is none.
    """

    def ask(ops: Operations) -> Coroutine[Any, Any, Page[Run]]:
        return ops.list_runs(status, workflow, limit, cursor)

    return call("list_runs()", "list_runs_async(...)", ask)


async def list_runs_async(
    *,
    status: str | Iterable[str] | None = None,
    workflow: str | Named | None = None,
    limit: int = 100,
    cursor: str | None = None,
) -> Page[Run]:
    """``list_runs`` as a coroutine."""

    def ask(ops: Operations) -> Coroutine[Any, Any, Page[Run]]:
        return ops.list_runs(status, workflow, limit, cursor)

    return await call_async("list_runs_async()", ask)


def get_events(run_id: str, *, after: int = 0, limit: int | None = None) -> list[Event]:
    """The run's events with seq above ``after``, in order; at most ``limit``.

    Raises ``RunNotFound``, and ``ArgumentError`` for a negative number.
    """
    form = "get_events_async(...)"
    return call("get_events()", form, lambda ops: ops.get_events(run_id, after, limit))


async def get_events_async(run_id: str, *, after: int = 0, limit: int | None = None) -> list[Event]:
    """``get_events`` as a coroutine."""
    return await call_async("get_events_async()", lambda ops: ops.get_events(run_id, after, limit))


def cancel(run_id: str, *, reason: str = "") -> None:
    """Ask a run to end; returns when the request is durable.

    The workflow gets ``CancelledError`` where it waits and may clean up. A run that no code has
    begun, or that is stalled, is closed at once. No-op on a cancelled run.

    Raises:
        RunNotFound: no run has this id.
        RunClosed: it has ended otherwise.
    """
    call("cancel()", "cancel_async(...)", lambda ops: ops.cancel(run_id, reason))


async def cancel_async(run_id: str, *, reason: str = "") -> None:
    """``cancel`` as a coroutine."""
    await call_async("cancel_async()", lambda ops: ops.cancel(run_id, reason))
