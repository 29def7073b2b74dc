"""Runs through the whole engine: W1 to W4."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.programs import fan, jittered, sequence
from benchmarks.raw import appends_per_second
from benchmarks.readings import Reading, Setting, Stopwatch, Workload
from pyworkflow import Client

STORES = ("memory", "file")
STEPS = 10
#: Durable commits of a run of ten steps: its creation, ten steps, its end.
COMMITS = 12
_W2_AIMS = {"memory": 20_000.0, "file": 12_000.0}


def _raw(setting: Setting) -> float | None:
    if setting.store != "file":
        return None
    with setting.scratch() as path:
        return appends_per_second(path)


def _ratio(rate: float, raw: list[float | None]) -> float | None:
    """``rate`` against the mean of the raw rates measured before and after it."""
    known = [r for r in raw if r is not None]
    return rate / statistics.mean(known) if known else None


def _w1(setting: Setting) -> Iterator[Reading]:
    times = setting.size(100, 20)
    before = _raw(setting)

    async def main() -> tuple[list[float], float]:
        took: list[float] = []
        with setting.storage() as storage:
            async with storage, Client(storage=storage) as client:
                for _ in range(3):
                    await client.run(sequence, STEPS)
                with Stopwatch() as watch:
                    for _ in range(times):
                        began = time.perf_counter()
                        await client.run(sequence, STEPS)
                        took.append(time.perf_counter() - began)
        return took, watch.cpu

    took, cpu = asyncio.run(main())
    p50 = statistics.median(took)
    raw = _ratio(COMMITS / p50, [before, _raw(setting)])
    yield Reading(
        f"one run of {STEPS} steps, p50",
        p50 * 1e3,
        "ms",
        cpu=cpu / times / STEPS * 1e6,
        raw=None if raw is None else 1 / raw,
        better="less",
    )


def _at_once(setting: Setting, workflow: Any, runs: int, args: Any) -> tuple[float, float]:
    async def main() -> Stopwatch:
        with setting.storage() as storage:
            async with storage, Client(storage=storage) as client:
                await client.run(workflow, *args(0))
                with Stopwatch() as watch:
                    starts = [client.start(workflow, *args(i)) for i in range(runs)]
                    ids = await asyncio.gather(*starts)
                    await asyncio.gather(*[client.result(i) for i in ids])
        return watch

    watch = asyncio.run(main())
    return watch.wall, watch.cpu


def _w2(setting: Setting) -> Iterator[Reading]:
    runs = setting.size(500, 100)
    before = _raw(setting)
    wall, cpu = _at_once(setting, sequence, runs, lambda _: (STEPS,))
    steps = runs * STEPS
    yield Reading(
        f"{runs} runs of {STEPS} steps at once",
        steps / wall,
        "steps/s",
        cpu=cpu / steps * 1e6,
        raw=_ratio(steps / wall, [before, _raw(setting)]),
        aim=_W2_AIMS[setting.store],
    )


def _w2j(setting: Setting) -> Iterator[Reading]:
    runs = setting.size(500, 100)
    before = _raw(setting)
    wall, cpu = _at_once(setting, jittered, runs, lambda i: (STEPS, i))
    steps = runs * STEPS
    yield Reading(
        f"{runs} runs of {STEPS} steps of 0-5 ms",
        steps / wall,
        "steps/s",
        cpu=cpu / steps * 1e6,
        raw=_ratio(steps / wall, [before, _raw(setting)]),
    )


def _w3(setting: Setting) -> Iterator[Reading]:
    width = setting.size(200, 50)

    async def main() -> Stopwatch:
        with setting.storage() as storage:
            async with storage, Client(storage=storage) as client:
                await client.run(fan, 2, 1)
                with Stopwatch() as watch:
                    await client.run(fan, width, 1)
        return watch

    watch = asyncio.run(main())
    yield Reading(
        f"gather of {width} steps",
        watch.wall * 1e3,
        "ms",
        cpu=watch.cpu / width * 1e6,
        better="less",
    )


def _w4(setting: Setting) -> Iterator[Reading]:
    """Sequential steps of one run; the raw limit is measured before, between and after."""
    short = setting.size(1_000, 200)
    raw = [_raw(setting)]

    async def main(steps: int) -> Stopwatch:
        with setting.storage() as storage:
            async with storage, Client(storage=storage) as client:
                await client.run(sequence, STEPS)
                with Stopwatch() as watch:
                    await client.run(sequence, steps)
        return watch

    watches: list[Stopwatch] = []
    for steps in (short, 8 * short):
        watch = asyncio.run(main(steps))
        raw.append(_raw(setting))
        watches.append(watch)
        rate = steps / watch.wall
        ratio = _ratio(rate, raw[-2:])
        yield Reading(
            f"{steps:,} sequential steps",
            rate,
            "steps/s",
            cpu=watch.cpu / steps * 1e6,
            raw=ratio,
        )
        if ratio is not None:
            yield Reading(f"{steps:,} sequential steps : raw appends", ratio, "x", aim=0.45)
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
