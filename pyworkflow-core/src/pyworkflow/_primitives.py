"""What workflow code awaits and asks for: durable sleep, replayed time and randomness."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from random import Random
from typing import Any
from uuid import UUID

from pyworkflow._clock import from_micros, to_micros
from pyworkflow._context import StepContext, running_step
from pyworkflow._duration import resolve_instant
from pyworkflow._replay.context import RunContext, current_run
from pyworkflow.errors import ArgumentError, WorkflowContextError

__all__ = [
    "deprecate_patch",
    "is_evicting",
    "is_replaying",
    "now",
    "patched",
    "random",
    "sleep",
    "step_context",
    "uuid4",
]

_LONGEST_PATCH = 200


def _run(what: str, remedy: str) -> RunContext:
    run = current_run()
    if run is None:
        raise WorkflowContextError(f"{what} works in workflow code only; {remedy}")
    return run


async def sleep(until: str | float | timedelta | datetime) -> None:
    """Wait for a duration, or until an instant, holding nothing: durable over restarts.

    Never ends early. An instant that has passed returns at once; a naive datetime is taken as
    UTC, with a warning.

    Raises:
        WorkflowContextError: called outside of workflow code.
        ValueError: ``until`` is no duration; the message lists the formats.
    """
    run = _run("sleep()", "use asyncio.sleep() in steps and elsewhere")
    target = to_micros(resolve_instant(until, from_micros(run.now)))
    if target <= run.now:
        await asyncio.sleep(0)
        return
    op = run.start_sleep(target)
    future = run.ops[op].future
    assert future is not None
    try:
        await future
    except asyncio.CancelledError:
        run.cancel_timer(op)
        raise


def now() -> datetime:
    """The run's time: of the input being handled, the same on every replay. Aware UTC."""
    return from_micros(_run("now()", "use datetime.now(timezone.utc) elsewhere").now)


def uuid4() -> UUID:
    """A random UUID, the same on every replay."""
    return _run("uuid4()", "use uuid.uuid4() elsewhere").uuid4()


def random() -> Random:
    """The run's random numbers, the same on every replay."""
    return _run("random()", "use the random module elsewhere").random


def patched(id: str) -> bool:
    """Whether this run takes the code that was changed under ``id``.

    True for runs that reach this line for the first time now, False for those that passed it
    before the change. The first call decides for the run and is remembered: True is recorded, and
    from then on the run needs code that asks; without, it stalls. See ``deprecate_patch``.

    Raises:
        ArgumentError: The id is not text of 1 to 200 characters.
    """
    run = _run("patched()", "it decides between versions of workflow code")
    return run.patched(_patch_id(id))


def deprecate_patch(id: str) -> None:
    """Stands where ``patched(id)`` stood, when all runs take the new code.

    Records nothing. Put it there when no run is open that began before the change, with the new
    branch alone; remove it when no run is open that recorded the patch. The idea is Temporal's.
    """
    _run("deprecate_patch()", "it belongs to workflow code").deprecate_patch(_patch_id(id))


def _patch_id(id: Any) -> str:
    if not isinstance(id, str) or not 0 < len(id) <= _LONGEST_PATCH:
        raise ArgumentError(
            f"the id of a patch is text of 1 to {_LONGEST_PATCH} characters: id={id!r:.80}"
        )
    return id


def is_replaying() -> bool:
    """True while the workflow repeats what it did before. For diagnostics only."""
    run = current_run()
    return run is not None and run.is_replaying


def is_evicting() -> bool:
    """True while the coroutine is being closed to free memory: ``finally`` runs, nothing ends."""
    run = current_run()
    return run is not None and run.evicting


def step_context() -> StepContext:
    """The step that is running. ``current()`` asks the same anywhere, and does not raise.

    Raises:
        WorkflowContextError: called outside of a step.
    """
    step = None if current_run() is not None else running_step()
    if step is None:
        raise WorkflowContextError(
            "step_context() works in the body of a step that a run started; "
            "current() works anywhere, and is None outside of runs"
        )
    return step
