"""How late sleeps end on a worker that has nothing else to do."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Iterator
from datetime import datetime
from random import Random

from benchmarks.programs import naps
from benchmarks.readings import Reading, Setting, Workload
from benchmarks.stores import STORES
from pyworkflow import Client

_RUNS = 10


def _lateness(setting: Setting) -> Iterator[Reading]:
    each = setting.size(20, 4)
    random = Random(1)
    plan = [[random.uniform(0.05, 0.5) for _ in range(each)] for _ in range(_RUNS)]

    async def main() -> list[float]:
        late: list[float] = []
        with setting.storage() as storage:
            async with storage, Client(storage=storage) as client:
                ids = [await client.start(naps, seconds) for seconds in plan]
                for run_id in ids:
                    await client.result(run_id)
                    for event in await client.get_events(run_id):
                        if event.type == "sleep.completed":
                            until = datetime.fromisoformat(str(event.data["until"]))
                            late.append((event.timestamp - until).total_seconds() * 1e3)
        return late

    late = sorted(asyncio.run(main()))
    what = f"{len(late)} sleeps of 50-500 ms end late by"
    yield Reading(f"{what}, p50", statistics.median(late), "ms", better="less")
    yield Reading(f"{what}, p99", late[int(len(late) * 0.99)], "ms", better="less")
    yield Reading(f"{what}, at least", late[0], "ms", better="less")


WORKLOADS = [Workload("wake-ups", STORES, _lateness)]
