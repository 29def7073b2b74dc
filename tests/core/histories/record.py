"""Record the histories that are checked in: ``python -m tests.core.histories.record [NAME …]``.

Writes those of this release that are missing, or the ones named. A recorded history is never
recorded again once its release is out: that today's code replays it is what it is for.
"""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyworkflow
from pyworkflow import Event, RunCancelled, WorkflowTimeout
from pyworkflow.testing import History, TestEnvironment, replay
from tests.core import golden_workflows as golden

HISTORIES = Path(__file__).parent
Recording = Callable[[TestEnvironment], Awaitable[str]]


def ended(workflow: Any, *args: Any, raises: tuple[type[BaseException], ...] = ()) -> Recording:
    """Run to the end."""

    async def record(env: TestEnvironment) -> str:
        run_id = await env.start(workflow, *args)
        try:
            await env.result(run_id)
        except raises:
            pass
        return run_id

    return record


def cancelled(workflow: Any) -> Recording:
    """Cancel after a day."""

    async def record(env: TestEnvironment) -> str:
        run_id = await env.start(workflow)
        await env.advance("1d")
        await env.cancel(run_id, reason="changed my mind")
        try:
            await env.result(run_id)
        except RunCancelled:
            pass
        return run_id

    return record


async def still_open(env: TestEnvironment) -> str:
    """Leave the run in the middle of its sleeps."""
    run_id = await env.start(golden.still_open)
    await env.advance("2d")
    return run_id


async def patched_before(env: TestEnvironment) -> str:
    """The whole run is older than the change."""
    golden.before_patch = True
    try:
        return await ended(golden.patched_twice)(env)
    finally:
        golden.before_patch = False


async def patched_between(env: TestEnvironment) -> str:
    """The change comes while the run is in its second sleep."""
    golden.before_patch = True
    run_id = await env.start(golden.patched_twice)
    await env.advance("90m")
    golden.before_patch = False
    await env.result(run_id)
    return run_id


RECORDINGS: dict[str, Recording] = {
    "sequence": ended(golden.sequence, 3),
    "fan_out": ended(golden.fan_out),
    "timeouts": ended(golden.timeouts),
    "task_group": ended(golden.task_group),
    "retries": ended(golden.retries),
    "caught": ended(golden.caught),
    "failing": ended(golden.failing, raises=(golden.OutOfStock,)),
    "sleeps": ended(golden.sleeps),
    "open": still_open,
    "cancelled": cancelled(golden.cancelled),
    "cancel_refused": cancelled(golden.cancel_refused),
    "overdue": ended(golden.overdue, raises=(WorkflowTimeout,)),
    "patched": ended(golden.patched_twice),
    "patched_before": patched_before,
    "patched_between": patched_between,
    "logs": ended(golden.logs),
    "generators": ended(golden.generators),
    "values": ended(
        golden.values, golden.Point(1, 2), datetime(2025, 5, 5, tzinfo=UTC), {"red", "blue"}
    ),
    "chance": ended(golden.chance),
    "pipeline": ended(golden.pipeline),
    "dispatched": ended(golden.dispatched),
}


def scrubbed(event: Event) -> Event:
    """The event without what tells about the machine that recorded it."""
    return event._replace(data=_scrub(dict(event.data)))


def _scrub(value: Any) -> Any:
    if isinstance(value, list):
        return [_scrub(one) for one in value]
    if not isinstance(value, dict):
        return value
    local = {"traceback": "", "worker": "recorder", "exception": "ValueError: shown"}
    return {
        k: local[k] if isinstance(v, str) and k in local else _scrub(v) for k, v in value.items()
    }


async def record(name: str) -> None:
    """Run one workflow on a clock that skips its sleeps, and write its history."""
    async with TestEnvironment(start=datetime(2025, 1, 1, tzinfo=UTC)) as env:
        run_id = await RECORDINGS[name](env)
        history = await History.fetch(run_id, env.storage)
    history = dataclasses.replace(history, events=tuple(map(scrubbed, history.events)))
    replay(history).check()
    history.dump(HISTORIES / pyworkflow.__version__ / f"{name}.json")
    print(f"{name}: {len(history.events)} events, {history.run.status}")


def main() -> None:
    folder = HISTORIES / pyworkflow.__version__
    folder.mkdir(exist_ok=True)
    missing = [name for name in RECORDINGS if not (folder / f"{name}.json").exists()]
    for name in sys.argv[1:] or missing:
        asyncio.run(record(name))


if __name__ == "__main__":
    main()
