"""What Celery workers run in these tests, and the client that starts it.

Every execution of a step appends a line to a log, ``TAG NAME PID``, in one write. A step that
waits does so for a file named by its tag: the test decides when it goes on.
"""

from __future__ import annotations

import asyncio
import ctypes
import functools
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pyworkflow
from pyworkflow import sleep

LOG = os.environ.get("STEP_LOG", os.devnull)
GATES = Path(os.environ.get("GATES", os.devnull))
VERSION = os.environ.get("PROGRAM_VERSION", "1")
#: Seconds until a step gives up waiting: only when something is broken.
PATIENCE = 60.0


def _named(decorator: Any) -> Any:
    """The decorator, with names that no other test's program has."""

    def named(fn: Any = None, **options: Any) -> Any:
        def decorate(fn: Any) -> Any:
            return decorator(name=f"celery_{fn.__name__}", **options)(fn)

        return decorate if fn is None else decorate(fn)

    return named


step, workflow = _named(pyworkflow.step), _named(pyworkflow.workflow)

#: Open from the start: workflow code may open nothing, and two workflows here note as well.
_LOG_FILE = os.open(LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def note(tag: str, name: str) -> None:
    """Record an execution."""
    os.write(_LOG_FILE, f"{tag} {name} {os.getpid()}\n".encode())


def times(tag: str, name: str) -> int:
    """How often a step of this tag and name has begun so far."""
    lines = Path(LOG).read_text("ascii").splitlines()
    return sum(line.startswith(f"{tag} {name} ") for line in lines)


def wait_for_gate(tag: str) -> None:
    """Block this thread until the test opens the gate."""
    end = time.monotonic() + PATIENCE
    while not (GATES / tag).exists():
        if time.monotonic() > end:
            raise TimeoutError(tag)
        time.sleep(0.01)


@step
async def quick(tag: str, name: str) -> str:
    """A short step."""
    note(tag, name)
    return name


@step
def threaded(tag: str, name: str) -> str:
    """A short sync step."""
    note(tag, name)
    return name


@step(dispatch="queue")
def share(tag: str, n: int) -> int:
    """A part of many, for any worker: long enough for others to come."""
    note(tag, f"part{n}")
    time.sleep(0.3)
    return os.getpid()


@step(queue="gpu")
def on_gpu(tag: str) -> str:
    """A step of another queue."""
    note(tag, "gpu")
    return "gpu"


@step(retry_delay=0.2)
async def shaky(tag: str) -> str:
    """Fails at first."""
    note(tag, "shaky")
    if times(tag, "shaky") == 1:
        raise ConnectionError(tag)
    return "steady"


@step(dispatch="queue", retry_delay=0.05)
def gated(tag: str) -> str:
    """Blocks a thread until the gate opens."""
    note(tag, "gated")
    wait_for_gate(tag)
    note(tag, "gated-end")
    return "gated"


@step(dispatch="queue", retry_delay=0.05)
async def clogging(tag: str, how: str) -> str:
    """Blocks the event loop until the gate opens, as an async step should not."""
    note(tag, "clogging")
    end = time.monotonic() + PATIENCE
    while not (GATES / tag).exists() and time.monotonic() < end:
        if how == "sleeps":
            time.sleep(0.05)  # noqa: ASYNC251 - as above
        else:
            sum(range(200_000))
    return "clogged"


@step(dispatch="queue")
def spinning(tag: str) -> str:
    """Uses its thread's share of the interpreter until the gate opens."""
    note(tag, "spinning")
    end = time.monotonic() + PATIENCE
    while not (GATES / tag).exists():
        assert time.monotonic() < end
        sum(range(200_000))
    return "spun"


@step(dispatch="queue")
def suicidal(tag: str, deaths: int) -> str:
    """Kills its process a number of times."""
    note(tag, "suicidal")
    if times(tag, "suicidal") <= deaths:
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


@step
async def brief(tag: str, name: str) -> str:
    """Takes longer than a crash needs."""
    note(tag, name)
    await asyncio.sleep(0.2)
    return name


@step
def deadly(tag: str) -> None:
    """Kills its process."""
    note(tag, "deadly")
    os.kill(os.getpid(), signal.SIGKILL)


@step(timeout=0.5, hard_timeout=True, max_retries=1, retry_delay=0.05)
def stuck(tag: str, tries: int) -> str:
    """Blocks its thread for ever, a number of times."""
    note(tag, "stuck")
    while times(tag, "stuck") <= tries:
        time.sleep(0.1)
    return "unblocked"


@step(timeout=0.5, hard_timeout=True, semantics="at_most_once")
def stuck_once(tag: str) -> str:
    """Blocks its thread, and must not be begun again."""
    note(tag, "stuck_once")
    wait_for_gate(tag)
    return "unblocked"


@step(max_retries=0, dispatch="queue")
def greedy(tag: str) -> int:
    """Wants more memory than there is."""
    note(tag, "greedy")
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), before[1]))
    try:
        return len(bytearray(1 << 30))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@step
async def asks_async(tag: str, depth: int) -> int:
    """Starts a run, and waits for it."""
    return 1 + await pyworkflow.run_async(asking, tag, depth - 1)


@step
def asks_in_a_thread(tag: str, depth: int) -> int:
    """The same in a thread."""
    return 1 + pyworkflow.run(asking, tag, depth - 1)


@workflow
async def asking(tag: str, depth: int) -> int:
    """A step of it waits for a run, whose step waits for a run …."""
    if depth == 0:
        await quick(tag, "leaf")
        return 0
    return await (asks_async if depth % 2 else asks_in_a_thread)(tag, depth)


@workflow
async def ten(tag: str) -> int:
    """Ten steps in a row."""
    for n in range(10):
        await (quick if n % 2 else threaded)(tag, f"s{n}")
    return 10


@workflow
async def fan(tag: str, width: int) -> list[int]:
    """Steps side by side; the process of each."""
    return list(await asyncio.gather(*(share(tag, n) for n in range(width))))


@workflow
async def routed(tag: str) -> str:
    """One step here, one there."""
    await quick(tag, "here")
    return await on_gpu(tag)


@workflow(queue="gpu")
async def whole_on_gpu(tag: str) -> str:
    """All of it there."""
    return await quick(tag, "whole")


@workflow(priority=9)
async def urgent(tag: str) -> str:
    """Before others."""
    return await quick(tag, "urgent")


@workflow
async def napper(tag: str, seconds: float) -> str:
    """Sleeps."""
    await quick(tag, "before")
    await sleep(seconds)
    return await quick(tag, "after")


@workflow
async def retrying(tag: str) -> str:
    """Has a step that fails at first."""
    return await shaky(tag)


@workflow
async def waiting(tag: str) -> str:
    """A step that blocks."""
    return await gated(tag)


@workflow
async def clogged(tag: str, how: str) -> str:
    """A step that blocks the event loop."""
    return await clogging(tag, how)


@workflow
async def computing(tag: str) -> str:
    """A step that computes."""
    return await spinning(tag)


@workflow
async def mixed(tag: str) -> list[object]:
    """A little of everything."""
    first: list[object] = [await quick(tag, "a"), await threaded(tag, "b"), await shaky(tag)]
    await sleep(0.05)
    parts = await asyncio.gather(*(share(tag, n) for n in range(3)))
    return [*first, len(parts), await quick(tag, "c")]


@step(dispatch="queue", max_retries=0)
def holding(tag: str, hold: float, total: float) -> str:
    """Keeps the interpreter's lock for ``hold`` seconds at a time, as C code may."""
    note(tag, "holding")
    keep = ctypes.PyDLL(None).usleep  # unlike CDLL, it does not release the lock
    end = time.monotonic() + total
    while time.monotonic() < end:
        keep(ctypes.c_uint(int(hold * 1_000_000)))
    return "held"


@workflow
async def starved(tag: str, hold: float, total: float) -> str:
    """A step that starves all threads of its process."""
    return await holding(tag, hold, total)


@workflow
async def limited(tag: str, tries: int) -> str:
    """A step whose time limit ends its process."""
    try:
        return await stuck(tag, tries)
    except pyworkflow.StepTimeout:
        return "StepTimeout"


@workflow
async def limited_once(tag: str) -> str:
    """The same, at most once."""
    try:
        return await stuck_once(tag)
    except pyworkflow.StepTimeout:
        return "StepTimeout"


@workflow
async def doomed(tag: str, deaths: int) -> str:
    """A step that kills its process."""
    try:
        return await suicidal(tag, deaths)
    except Exception as exc:  # noqa: BLE001 - whatever comes is told
        return type(exc).__name__


@workflow
async def beside(tag: str, name: str) -> str:
    """A short step, or one that kills its process, in the turn itself."""
    if name != "deadly":
        return await brief(tag, name)
    try:
        await deadly(tag)
    except Exception as exc:  # noqa: BLE001 - whatever comes is told
        return type(exc).__name__
    return "alive"


@workflow
async def hungry(tag: str) -> str:
    """A step that wants too much memory."""
    try:
        return str(await greedy(tag))
    except Exception as exc:  # noqa: BLE001 - whatever comes is told
        return type(exc).__name__


@workflow
async def poisoned(tag: str) -> str:
    """Takes its process down in the workflow itself, until the gate is open."""
    note(tag, "poisoned")
    if not (GATES / tag).exists():
        os._exit(3)
    return "cured"


@workflow
async def blocked(tag: str) -> str:
    """Blocks the event loop in the workflow itself."""
    note(tag, "blocked")
    if not (GATES / tag).exists():
        time.sleep(5)  # noqa: ASYNC251 - what must not be done
    return "ended"


if VERSION == "1":

    @workflow
    async def changing(tag: str) -> str:
        """The old code: one step, then another."""
        return await quick(tag, "old") + await gated(tag)

else:

    @workflow
    async def changing(tag: str) -> str:
        """The new code: another step first."""
        return await threaded(tag, "new") + await quick(tag, "old")


def _strike(what: str) -> None:
    """Once, in whatever process gets here first."""
    try:
        (GATES / "failpoint").unlink()
    except FileNotFoundError:
        return
    note("failpoint", what)
    if what == "term":
        os.kill(os.getppid(), signal.SIGTERM)
    else:
        os.kill(os.getpid(), signal.SIGKILL)


def _arm(what: str, nth: int) -> None:
    """Strike at the nth commit of a process: ``before`` or ``after`` it, or ``term``: during it."""
    from pyworkflow_storage_sql.postgres._backend import PostgresStorageBackend

    count = 0

    def around(inner: Any) -> Any:
        @functools.wraps(inner)
        async def commit(self: object, change: object) -> object:
            nonlocal count
            count += 1
            due = count == nth
            if due and what != "after":
                _strike(what)
            answer = await inner(self, change)
            if due and what == "after":
                _strike(what)
            return answer

        return commit

    PostgresStorageBackend.commit = around(PostgresStorageBackend.commit)


if FAILPOINT := os.environ.get("FAILPOINT"):
    _arm(FAILPOINT.partition(":")[0], int(FAILPOINT.partition(":")[2]))


def client() -> None:
    """Answer requests, a line each: ``[name, [argument, …], {option: …}]``."""
    for line in sys.stdin:
        name, args, options = json.loads(line)
        try:
            answer = globals()[name.removeprefix("celery_")].options(**options).start(*args)
        except Exception as exc:  # noqa: BLE001 - told to the test
            answer = {"error": type(exc).__name__, "message": str(exc)}
        print(json.dumps(answer), flush=True)
