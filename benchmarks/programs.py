"""The workflows that are measured. Their steps do next to nothing: what is left is the engine."""

from __future__ import annotations

import asyncio
from random import Random

from pyworkflow import sleep, step, workflow


@step
async def echo(x: int) -> int:
    return x


@step
async def pause(seconds: float) -> float:
    await asyncio.sleep(seconds)
    return seconds


@workflow
async def sequence(n: int) -> int:
    total = 0
    for i in range(n):
        total += await echo(i)
    return total


@workflow
async def jittered(n: int, seed: int) -> float:
    random = Random(seed)
    return sum([await pause(random.uniform(0, 0.005)) for _ in range(n)])


@workflow
async def fan(width: int, times: int) -> int:
    total = 0
    for _ in range(times):
        total += sum(await asyncio.gather(*[echo(i) for i in range(width)]))
    return total


@workflow
async def naps(seconds: list[float]) -> None:
    for each in seconds:
        await sleep(each)


@workflow
async def doze() -> None:
    await sleep("1d")
