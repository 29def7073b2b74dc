"""What workers run in the tests of single faults, and how a process is made to die where it matters.

Every execution of a step appends a line to a log, as in ``_program``.
"""

from __future__ import annotations

import asyncio
import sys
from datetime import timedelta
from typing import Any

from pyworkflow import sleep, step, workflow
from pyworkflow.errors import WorkflowError
from tests.e2e._program import note

#: More than a payload may have.
LARGE = 5 << 20
NAP = timedelta(hours=1)

# A worker or client that is killed just before or just after the commit of a change that
# ``CHOSEN`` picks. The rest of the command line is that of ``pyworkflow``.
DYING = """
import os, signal, sys
from pyworkflow._engine.pipeline import Pipeline

when, chosen, module = sys.argv.pop(1), sys.argv.pop(1), sys.argv.pop(1)
inner = Pipeline.commit

async def commit(self, change):
    due = bool(getattr(change, chosen))
    if due and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    answer = await inner(self, change)
    if due and when == "after":
        os.kill(os.getpid(), signal.SIGKILL)
    return answer

Pipeline.commit = commit
if module == "cli":
    from pyworkflow.cli import main
    main()
else:
    from tests.e2e import _fault_program
    _fault_program.client(*sys.argv[1:])
"""


@step
async def small(run: int, name: str) -> str:
    """A short step."""
    note(run, name)
    return name


@workflow
async def fault_pair(run: int) -> list[str]:
    """Two steps."""
    return [await small(run, "one"), await small(run, "two")]


@workflow
async def fault_flooded(run: int, expected: int) -> int:
    """Hears so many inputs, waiting for nothing else."""
    heard = 0
    while heard < expected:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            heard += 1
    return heard


@workflow
async def fault_napper(run: int) -> list[str]:
    """A step, an hour, a step."""
    found = [await small(run, "one")]
    await sleep(NAP)
    return [*found, await small(run, "two")]


@step
async def unstorable(run: int) -> Any:
    """Gives what no store takes."""
    note(run, "unstorable")
    return lambda: run


@step(dispatch="queue")
async def oversized(run: int) -> str:
    """Gives more than any store takes."""
    note(run, "oversized")
    return "x" * LARGE


@workflow
async def fault_values(run: int) -> list[str]:
    """Two steps whose results cannot be stored; the kinds of errors that it is told."""
    told: list[str] = []
    for bad in (unstorable, oversized):
        try:
            await bad(run)
        except WorkflowError as error:
            told.append(type(error).__name__)
    return told


@workflow
async def fault_endless(run: int) -> None:
    """Never ends by itself."""
    while True:
        await small(run, "again")


def client(run: str) -> None:
    """Start a run in a process of its own, and say its id."""
    sys.stdout.write(fault_pair.options(idempotency_key=f"run-{run}").start(int(run)) + "\n")
