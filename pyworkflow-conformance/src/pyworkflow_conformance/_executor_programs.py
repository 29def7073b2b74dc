"""The workflows that the worker processes of the executor checks run.

Steps leave what they do in files of a folder that is an argument, since they share nothing else
with the check.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

from pyworkflow.errors import RetryableError, StepTimeout, WorkerLost
from pyworkflow.testing.internals import sleep, step, workflow
from pyworkflow_conformance._executor_effects import leave

__all__ = [
    "burn",
    "fan",
    "held",
    "kinds",
    "kills_step",
    "kills_turn",
    "late",
    "nap",
    "one",
    "routed",
    "stuck",
]

#: Seconds after which a step that waits for the check gives up.
PATIENCE = 90.0


@step(name="conformance_exe.quick", max_retries=0)
async def quick(folder: str, name: str) -> str:
    """Nothing but its trace."""
    leave(folder, name, "begin")
    leave(folder, name, "end")
    return name


@step(name="conformance_exe.quick_sync", max_retries=0)
def quick_sync(folder: str, name: str) -> str:
    """The same in a thread."""
    leave(folder, name, "begin")
    leave(folder, name, "end")
    return name


@step(name="conformance_exe.wait_for_go", max_retries=0)
async def wait_for_go(folder: str, name: str) -> int:
    """Hold a worker until the check makes the file ``name.go``."""
    leave(folder, name, "begin")
    end = time.monotonic() + PATIENCE
    while not (Path(folder) / f"{name}.go").exists():
        if time.monotonic() > end:
            raise RuntimeError("the check never said go")
        await asyncio.sleep(0.02)
    leave(folder, name, "end")
    return os.getpid()


@step(name="conformance_exe.spin", max_retries=0)
def spin(folder: str, name: str, seconds: float) -> str:
    """Keep a processor, and the interpreter, busy."""
    leave(folder, name, "begin")
    end = time.monotonic() + seconds
    number = 1
    while time.monotonic() < end:
        number = number * 3 % 1_000_003
    leave(folder, name, "end")
    return name


@step(name="conformance_exe.overdue", timeout=0.5, max_retries=0)
async def overdue(folder: str, name: str) -> None:
    """Take longer than allowed."""
    leave(folder, name, "begin")
    await asyncio.sleep(PATIENCE)
    leave(folder, name, "end")


@step(name="conformance_exe.block", timeout=0.5, max_retries=0, hard_timeout=True)
def block(folder: str, name: str) -> None:
    """Take longer than allowed, where no coroutine can be cancelled."""
    leave(folder, name, "begin")
    time.sleep(PATIENCE)
    leave(folder, name, "end")


@step(name="conformance_exe.kill", max_retries=0)
async def kill(folder: str, name: str) -> None:
    """Take the process down."""
    leave(folder, name, "begin")
    os.kill(os.getpid(), signal.SIGKILL)


@step(name="conformance_exe.elsewhere", queue="conformance-other", max_retries=0)
async def elsewhere(folder: str, name: str) -> int:
    """A step of another queue."""
    leave(folder, name, "begin")
    leave(folder, name, "end")
    return os.getpid()


@step(name="conformance_exe.twice", max_retries=1, retry_delay=0.2)
async def twice(folder: str, name: str) -> str:
    """Fail once."""
    leave(folder, name, "begin")
    if not (Path(folder) / f"{name}.failed").exists():
        (Path(folder) / f"{name}.failed").touch()
        raise RetryableError("once")
    leave(folder, name, "end")
    return name


@workflow(name="conformance_exe.one")
async def one(folder: str, name: str) -> str:
    """One short step."""
    return await quick(folder, name)


@workflow(name="conformance_exe.held")
async def held(folder: str, name: str) -> int:
    """One step that waits for the check, and one after it."""
    pid = await wait_for_go(folder, name)
    await quick(folder, f"{name}-after")
    return pid


@workflow(name="conformance_exe.burn")
async def burn(folder: str, name: str, seconds: float) -> str:
    """One step of pure computing."""
    return await spin(folder, name, seconds)


@workflow(name="conformance_exe.late")
async def late(folder: str, name: str) -> str:
    """A step that is not done in time."""
    try:
        await overdue(folder, name)
    except StepTimeout:
        return "timeout"
    return "no timeout"


@workflow(name="conformance_exe.stuck")
async def stuck(folder: str, name: str) -> str:
    """A blocking step that is not done in time."""
    try:
        await block(folder, name)
    except StepTimeout:
        return "timeout"
    return "no timeout"


@workflow(name="conformance_exe.kills_step")
async def kills_step(folder: str, name: str) -> str:
    """A step that kills whoever works on it."""
    try:
        await kill(folder, name)
    except WorkerLost as error:
        return type(error).__name__
    return "alive"


@workflow(name="conformance_exe.kills_turn")
async def kills_turn(folder: str, name: str) -> str:  # noqa: ARG001 - all take both
    """Workflow code that kills whoever runs it."""
    os.kill(os.getpid(), signal.SIGKILL)
    return name


@workflow(name="conformance_exe.nap")
async def nap(folder: str, name: str, seconds: float) -> str:
    """Sleep between two steps."""
    await quick(folder, f"{name}-before")
    await sleep(seconds)
    return await quick(folder, f"{name}-after")


@workflow(name="conformance_exe.fan")
async def fan(folder: str, name: str, number: int) -> list[str]:
    """Steps side by side."""
    return list(await asyncio.gather(*(quick(folder, f"{name}-{n}") for n in range(number))))


@workflow(name="conformance_exe.kinds")
async def kinds(folder: str, name: str) -> list[str]:
    """An async step, a blocking one, one that is tried again."""
    first = await quick(folder, f"{name}-async")
    second = await quick_sync(folder, f"{name}-sync")
    third = await twice(folder, f"{name}-again")
    return [first, second, third]


@workflow(name="conformance_exe.routed")
async def routed(folder: str, name: str) -> int:
    """A step of another queue, and one of its own."""
    pid = await elsewhere(folder, name)
    await quick(folder, f"{name}-after")
    return pid
