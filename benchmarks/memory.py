"""What a sleeping run costs in memory: its coroutine kept, or evicted.

Each number is the resident set of a process of its own, taken when all runs sleep. Both stores
keep their runs in memory, so that the store's own share must be taken off: a third process opens
what the second one left, and does nothing else.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.readings import Reading, Setting, Workload

_SLEEPERS = """
import asyncio, ctypes, gc, os, sys
from pathlib import Path
from pyworkflow import Client, configure
from pyworkflow.storage.file import FileStorageBackend
from benchmarks.programs import doze, echo, sequence

path, runs, sessions, drive = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
configure(sessions=sessions)

def resident():
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        pass
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

async def settled(client, runs):
    while True:
        stats = await client._storage.stats()
        if stats.get("suspended", 0) >= runs:
            return
        await asyncio.sleep(0.05)

async def main():
    storage = FileStorageBackend(path, fsync=False)
    if drive == "open":
        before = resident()
        async with storage:
            print(resident() - before)
        return
    async with storage, Client(storage=storage) as client:
        await client.run(sequence, 10)
        before = resident()
        for _ in range(0, runs, 100):
            await asyncio.gather(*[client.start(doze) for _ in range(100)])
            await asyncio.sleep(0)
        await settled(client, runs)
        print(resident() - before)
        sys.stdout.flush()
        os._exit(0)

asyncio.run(main())
"""


def _resident(path: Path, runs: int, sessions: int, drive: str) -> float:
    done = subprocess.run(
        [sys.executable, "-c", _SLEEPERS, str(path), str(runs), str(sessions), drive],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path[1:]])},
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().rpartition("\n")[2] or f"status={done.returncode}")
    return float(done.stdout)


def _memory(setting: Setting) -> Iterator[Reading]:
    if not Path("/proc/self/statm").exists():
        return
    runs = setting.size(10_000, 1_000)
    with setting.scratch() as live, setting.scratch() as evicted:
        kept = _resident(live, runs, runs, "run")
        dropped = _resident(evicted, runs, 1, "run")
        store = _resident(evicted, runs, 1, "open")
    each = 1024 * runs
    live_kb, left_kb = (kept - dropped) / each, (dropped - store) / each
    yield Reading(f"{runs:,} sleeping runs, live: KB each", live_kb, "KB", aim=8.0, better="less")
    yield Reading("evicted: KB each", left_kb, "KB", aim=0.5, better="less")
    yield Reading("in the file store: KB each", store / each, "KB", better="less")


WORKLOADS = [Workload("memory", ("-",), _memory)]
