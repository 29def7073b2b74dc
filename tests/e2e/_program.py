"""What the tests of real processes run: scripts and workers on one file store.

Every execution of a step appends a line to a log, ``RUN STEP PID``, in one write.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

from pyworkflow import configure, result, sleep, start, step, workflow
from pyworkflow._config import Settings
from pyworkflow.storage.file import FileStorageBackend
from pyworkflow.worker import create_runtime, serve_here

LOG = os.environ.get("STEP_LOG", os.devnull)


def note(run: int, name: str) -> None:
    """Record an execution."""
    line = f"{run} {name} {os.getpid()}\n".encode()
    file = os.open(LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(file, line)
    finally:
        os.close(file)


@step
async def quick(run: int, name: str) -> str:
    """A short step."""
    note(run, name)
    return name


@step
def threaded(run: int, name: str) -> str:
    """A sync step of a few milliseconds."""
    note(run, name)
    time.sleep(0.005)
    return name


@step
async def long(run: int, name: str) -> str:
    """Long enough to get an item of its own."""
    note(run, name)
    await asyncio.sleep(0.15)
    return name


@step(retry_delay=0.01)
async def shaky(run: int, name: str) -> str:
    """Fails at its first execution."""
    first = f"{run} {name} " not in Path(LOG).read_text("ascii")  # noqa: ASYNC240 - a few lines
    note(run, name)
    if first:
        raise ConnectionError(name)
    return name


@step(dispatch="queue")
async def by_queue(run: int, name: str) -> str:
    """Goes through an item from the start."""
    note(run, name)
    return name


@workflow
async def journey(run: int) -> list[str]:
    """All kinds of steps in all kinds of order."""
    found = [await quick(run, "a"), await threaded(run, "b"), await shaky(run, "c")]
    found += await asyncio.gather(
        quick(run, "d1"), threaded(run, "d2"), by_queue(run, "d3"), quick(run, "d4")
    )
    await sleep(0.02)
    async with asyncio.timeout(60):
        found.append(await long(run, "e"))
    await asyncio.sleep(0.01)
    for n in range(5):
        found.append(await quick(run, f"f{n}"))
    return found


EXPECTED = ["a", "b", "c", "d1", "d2", "d3", "d4", "e", "f0", "f1", "f2", "f3", "f4"]


@step
async def brief(run: int, name: str) -> str:
    """A step that gives way to others."""
    note(run, name)
    await asyncio.sleep(0.002)
    return name


@workflow
async def errand(run: int) -> int:
    """A few steps in a row and side by side."""
    for n in range(4):
        await brief(run, f"s{n}")
    return len(await asyncio.gather(*(brief(run, f"p{n}") for n in range(4))))


@step
async def deadly(run: int) -> None:
    """Takes its worker down."""
    note(run, "deadly")
    os._exit(9)


@workflow
async def doomed(run: int) -> str:
    """Has a step that takes its worker down."""
    try:
        await deadly(run)
    except Exception as exc:  # noqa: BLE001 - whatever comes is told
        return type(exc).__name__
    return "survived"


@step
async def patient(run: int) -> str:
    """Takes a while."""
    note(run, "patient")
    await asyncio.sleep(0.4)
    note(run, "patient-end")
    return "ended"


@workflow
async def slow(run: int) -> str:
    """One step that takes a while."""
    return await patient(run)


@workflow
async def napper(run: int) -> str:
    """Sleeps for an hour."""
    await quick(run, "before")
    await sleep("1h")
    return await quick(run, "after")


@workflow
async def heavy(run: int, ballast: str) -> int:
    """Has a large argument, and sleeps for an hour."""
    await sleep("1h")
    return len(ballast)


def script(store: str, runs: str) -> None:
    """Start runs, or find them again, and wait for their results."""
    configure(storage=FileStorageBackend(store), lease="5s")
    ids = [start(journey, n, idempotency_key=f"run-{n}") for n in range(int(runs))]
    for run_id in ids:
        assert result(run_id, timeout=60) == EXPECTED
    print("done")


def ends(store: str) -> None:
    """Start runs and come to the end of the script: one run ends, one sleeps."""
    configure(storage=FileStorageBackend(store), lease="300s")
    print(start(slow, 1), start(napper, 2))


def serve(store: str) -> None:
    """A worker process."""
    config = Settings(lease=timedelta(seconds=5), renew_every=timedelta(seconds=1))
    runtime = create_runtime(storage=FileStorageBackend(store), config=config)
    serve_here(runtime)


if __name__ == "__main__":
    {"script": script, "ends": ends, "serve": serve}[sys.argv[1]](*sys.argv[2:])
