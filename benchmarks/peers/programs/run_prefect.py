"""Prefect: asynchronous flows and tasks in one process, on a server that runs beside.

Results are kept in files, as resuming needs; logs are not sent to the server.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

import measure

_TOLD = json.loads(sys.argv[1])
# Read when it is imported.
os.environ |= {
    "PREFECT_HOME": _TOLD["home"],
    "PREFECT_API_URL": _TOLD["api"],
    "PREFECT_LOGGING_TO_API_ENABLED": "false",
    "PREFECT_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_RESULTS_PERSIST_BY_DEFAULT": "true",
}

import prefect  # noqa: E402 - it reads the settings above
from prefect import flow, task  # noqa: E402 - as above


@task
async def echo(x: int) -> int:
    return x


@flow
async def sequence(steps: int) -> int:
    total = 0
    for i in range(steps):
        total += await echo(i)
    return total


@flow
async def fan(width: int) -> int:
    return sum(await asyncio.gather(*[echo(i) for i in range(width)]))


KINDS: dict[str, Any] = {"sequence": sequence, "fan": fan}


class Prefect:
    def __init__(self, told: dict[str, Any]) -> None:
        del told

    async def __aenter__(self) -> None: ...

    async def __aexit__(self, *exc: object) -> None: ...

    async def run(self, kind: str, *args: Any) -> Any:
        return await KINDS[kind](*args)

    async def start(self, kind: str, *args: Any) -> Any:
        return asyncio.create_task(KINDS[kind](*args))

    async def result(self, handle: Any) -> Any:
        return await handle

    async def existing(self) -> list[Any]:
        raise NotImplementedError

    async def recorded(self) -> list[list[int]]:
        raise NotImplementedError

    def facts(self) -> dict[str, str]:
        return {
            "version": f"prefect {prefect.__version__}",
            "durability": "the server's SQLite file: WAL, synchronous=NORMAL (its own)",
        }


if __name__ == "__main__":
    measure.main(Prefect)
