"""Feeding a recorded history to workflow code: two events per step, decoded and checked."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from functools import cache
from typing import Any

from benchmarks.programs import fan, sequence
from benchmarks.readings import Reading, Setting, Stopwatch, Workload
from pyworkflow import Client
from pyworkflow._replay.replay import Replay
from pyworkflow.storage.memory import MemoryStorageBackend


@cache
def _history(workflow: Any, *args: int) -> tuple[str, list[Any]]:
    async def main() -> tuple[str, list[Any]]:
        async with MemoryStorageBackend() as storage, Client(storage=storage) as client:
            run_id = await client.start(workflow, *args)
            await client.result(run_id)
            return run_id, await client.get_events(run_id)

    return asyncio.run(main())


def _replayed(what: str, aim: float, workflow: Any, *args: int) -> Reading:
    run_id, events = _history(workflow, *args)
    replay = Replay(workflow, run_id)
    with Stopwatch() as watch:
        replay.feed(events)
    if replay.problem is not None or replay.outcome is None:
        raise RuntimeError(f"the history does not replay: {replay.problem}")
    steps = len(events) / 2
    rate = len(events) / watch.wall
    return Reading(what, rate, "events/s", cpu=watch.cpu / steps * 1e6, aim=aim)


def _replay(setting: Setting) -> Iterator[Reading]:
    steps = setting.size(10_000, 2_000)
    yield _replayed(f"{steps:,} sequential steps", 200_000.0, sequence, steps)
    times = steps // 100
    yield _replayed(f"gather of 100, {times} times", 120_000.0, fan, 100, times)


WORKLOADS = [Workload("replay", ("-",), _replay)]
