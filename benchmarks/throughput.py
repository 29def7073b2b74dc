"""Runs through the whole engine: W1 to W4."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.programs import fan, jittered, sequence
from benchmarks.readings import Reading, Setting, Stopwatch, Workload
from benchmarks.stores import STORES
from pyworkflow import Client

STEPS = 10
#: Durable commits of a run of ten steps: its creation, ten steps, its end.
COMMITS = 12
_W1_AIMS = {"sqlite": 6.0}
_W2_AIMS = {
    "memory": 20_000.0, "file": 12_000.0, "sqlite": 10_000.0, "postgres": 7_000.0, "redis": 7_000.0,
}  # fmt: skip
_W2J_AIMS = {"sqlite": 7_000.0, "postgres": 5_000.0}
#: Steps per second of many runs against raw commits: what batching has to gain at least.
_W2_FLOORS = {"file": 1.5, "sqlite": 1.2, "postgres": 1.5, "redis": 2.5}
#: Sequential steps against raw commits: aim and floor.
_W4_AIMS = {
    "file": (0.45, 0.35), "sqlite": (0.40, 0.30), "postgres": (0.45, 0.35), "redis": (0.45, 0.35),
}  # fmt: skip


def _mean(raw: list[float | None]) -> float | None:
    """The raw rate between two measurements of it."""
    known = [r for r in raw if r is not None]
    return statistics.mean(known) if known else None


def _w1(setting: Setting) -> Iterator[Reading]:
    times = setting.size(100, 20)
    before = setting.raw()

    async def main() -> tuple[list[float], Stopwatch]:
        took: list[float] = []
        with setting.storage() as storage:
            async with storage, Client(storage=storage) as client:
                for _ in range(3):
                    await client.run(sequence, STEPS)
                with Stopwatch(setting.store) as watch:
                    for _ in range(times):
                        began = time.perf_counter()
                        await client.run(sequence, STEPS)
                        took.append(time.perf_counter() - began)
        return took, watch

    took, watch = asyncio.run(main())
    p50 = statistics.median(took)
    what = f"one run of {STEPS} steps"
    raw = _mean([before, setting.raw()])
    if raw is not None:
        ratio = p50 * raw / COMMITS
        yield Reading(
            f"{what}, p50 : {COMMITS} raw commits", ratio, "x raw time",
            aim=2.5, floor=4.0, better="less",
        )  # fmt: skip
    yield Reading(
        f"{what}, p50", p50 * 1e3, "ms",
        aim=_W1_AIMS.get(setting.store), better="less", **watch.per_step(times * STEPS),
    )  # fmt: skip


def _at_once(setting: Setting, workflow: Any, runs: int, args: Any) -> Stopwatch:
    async def main() -> Stopwatch:
        with setting.storage() as storage:
            async with storage, Client(storage=storage) as client:
                await client.run(workflow, *args(0))
                with Stopwatch(setting.store) as watch:
                    starts = [client.start(workflow, *args(i)) for i in range(runs)]
                    ids = await asyncio.gather(*starts)
                    await asyncio.gather(*[client.result(i) for i in ids])
        return watch

    return asyncio.run(main())


def _bulk(
    setting: Setting, what: str, workflow: Any, args: Any, aim: float | None, floor: float | None
) -> Iterator[Reading]:
    runs = setting.size(500, 100)
    what = f"{runs} runs of {STEPS} {what} at once"
    before = setting.raw()
    watch = _at_once(setting, workflow, runs, args)
    rate = runs * STEPS / watch.wall
    raw = _mean([before, setting.raw()])
    if raw is not None:
        yield Reading(f"{what} : raw commits", rate / raw, "x raw rate", floor=floor)
    yield Reading(what, rate, "steps/s", aim=aim, **watch.per_step(runs * STEPS))


def _w2(setting: Setting) -> Iterator[Reading]:
    aim, floor = _W2_AIMS.get(setting.store), _W2_FLOORS.get(setting.store)
    return _bulk(setting, "steps", sequence, lambda _: (STEPS,), aim, floor)


def _w2j(setting: Setting) -> Iterator[Reading]:
    aim = _W2J_AIMS.get(setting.store)
    return _bulk(setting, "steps of 0-5 ms", jittered, lambda i: (STEPS, i), aim, None)


def _w3(setting: Setting) -> Iterator[Reading]:
    width = setting.size(200, 50)

    async def main() -> Stopwatch:
        with setting.storage() as storage:
            async with storage, Client(storage=storage) as client:
                await client.run(fan, 2, 1)
                with Stopwatch(setting.store) as watch:
                    await client.run(fan, width, 1)
        return watch

    watch = asyncio.run(main())
    yield Reading(
        f"gather of {width} steps", watch.wall * 1e3, "ms", better="less", **watch.per_step(width)
    )


def _w4(setting: Setting) -> Iterator[Reading]:
    """Sequential steps of one run; the raw limit is measured before, between and after."""
    short = setting.size(1_000, 200)
    before = setting.raw()
    aim, floor = _W4_AIMS.get(setting.store, (None, None))

    async def main(steps: int) -> Stopwatch:
        with setting.storage() as storage:
            async with storage, Client(storage=storage) as client:
                await client.run(sequence, STEPS)
                with Stopwatch(setting.store) as watch:
                    await client.run(sequence, steps)
        return watch

    watches: list[Stopwatch] = []
    for steps in (short, 8 * short):
        watch = asyncio.run(main(steps))
        watches.append(watch)
        after = setting.raw()
        raw = _mean([before, after])
        before = after
        what = f"{steps:,} sequential steps"
        rate = steps / watch.wall
        if raw is not None:
            yield Reading(f"{what} : raw commits", rate / raw, "x raw rate", aim=aim, floor=floor)
            yield Reading(f"raw commits around {what}", raw, "/s")
        yield Reading(what, rate, "steps/s", **watch.per_step(steps))
    first, second = watches
    what = f"{8 * short:,} steps : {short:,} steps"
    yield Reading(what, second.wall / first.wall, "x wall", aim=8.5, better="less")
    yield Reading(f"{what}, CPU", second.cpu / first.cpu, "x CPU", aim=8.5, better="less")


WORKLOADS = [
    Workload("W1", STORES, _w1),
    Workload("W2", STORES, _w2),
    Workload("W2j", STORES, _w2j),
    Workload("W3", STORES, _w3),
    Workload("W4", STORES, _w4),
]
