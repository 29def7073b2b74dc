"""Workflows beside one that kills its process, in the workflow's own code or in a step."""

from __future__ import annotations

import asyncio
import os

from pyworkflow import step, workflow

LOG = os.environ.get("STEP_LOG", os.devnull)
_LOG_FILE = os.open(LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT)  # workflow code may open nothing


def note(name: str) -> None:
    """Record an execution."""
    os.write(_LOG_FILE, f"{name} {os.getpid()}\n".encode())


@step(name="h2_short", max_retries=0)
async def short() -> str:
    """Takes longer than a crash needs."""
    await asyncio.sleep(0.3)
    return "done"


@step(name="h2_deadly", max_retries=0)
def deadly() -> None:
    """Kills its process."""
    note("deadly")
    os._exit(9)


@workflow(name="h2_fine")
async def fine(number: int) -> str:
    """One short step."""
    return await short()


@workflow(name="h2_poison")
async def poison(number: int) -> None:
    """Kills its process in the workflow's code."""
    note("poison")
    os._exit(9)


@workflow(name="h2_killer")
async def killer(number: int) -> str:
    """Kills its process in a step."""
    try:
        await deadly()
    except Exception as error:  # noqa: BLE001 - its type is the result
        return type(error).__name__
    return "alive"
