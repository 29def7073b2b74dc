"""The machine's own limits: what no engine on it can beat."""

from __future__ import annotations

import asyncio
import time
import types
from collections.abc import Generator, Iterator

from benchmarks.readings import Reading, Setting, Workload
from benchmarks.stores import STORES

_WHAT = {
    "file": "fdatasync appends of 300 B",
    "sqlite": "commits of a row, WAL, synchronous=FULL",
    "postgres": "inserts of a row, asyncpg, one at a time",
    "redis": "XADD, appendfsync always, one at a time",
    "redis-everysec": "XADD, appendfsync everysec, one at a time",
}


def _commits(setting: Setting) -> Iterator[Reading]:
    rate = setting.raw(0.2 if setting.quick else 1.0)
    assert rate is not None
    yield Reading(_WHAT[setting.store], rate, "/s")


@types.coroutine
def _switch() -> Generator[None, None, None]:
    yield


async def _switching(times: int) -> None:
    for _ in range(times):
        await _switch()


async def _turning(times: int) -> None:
    for _ in range(times):
        await asyncio.sleep(0)


def _switches(setting: Setting) -> Iterator[Reading]:
    times = setting.size(1_000_000, 200_000)
    coroutine = _switching(times)
    began = time.perf_counter()
    for _ in range(times):
        coroutine.send(None)
    yield Reading("bare coroutine switches", times / (time.perf_counter() - began), "/s")
    coroutine.close()
    times //= 10
    began = time.perf_counter()
    asyncio.run(_turning(times))
    yield Reading("turns of asyncio's loop", times / (time.perf_counter() - began), "/s")


WORKLOADS = [
    Workload("raw", tuple(store for store in STORES if store != "memory"), _commits),
    Workload("raw", ("-",), _switches),
]
