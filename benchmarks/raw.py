"""The machine's own limits: what no engine on it can beat."""

from __future__ import annotations

import asyncio
import os
import time
import types
from collections.abc import Generator, Iterator
from pathlib import Path

from benchmarks.readings import Reading, Setting, Workload

LINE = b"x" * 299 + b"\n"
_flush = getattr(os, "fdatasync", os.fsync)


def appends_per_second(directory: Path, seconds: float = 0.25) -> float:
    """One line of 300 bytes and one flush at a time, as a journal without any engine would."""
    path = directory / "raw"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        _flush(fd)
        offset = count = 0
        began = time.perf_counter()
        while (took := time.perf_counter() - began) < seconds:
            os.pwrite(fd, LINE, offset)
            _flush(fd)
            offset += len(LINE)
            count += 1
        return count / took
    finally:
        os.close(fd)
        path.unlink()


def _appends(setting: Setting) -> Iterator[Reading]:
    with setting.scratch() as path:
        rate = appends_per_second(path, 0.2 if setting.quick else 1.0)
    yield Reading("fdatasync appends of 300 B", rate, "/s")


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
    Workload("raw", ("file",), _appends),
    Workload("raw", ("-",), _switches),
]
