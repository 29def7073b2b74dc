"""This engine: a client with a worker of its own in the same process."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import logging
import sqlite3
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import measure

from pyworkflow import Client, configure, sleep, step, workflow
from pyworkflow._plugins import make_storage
from pyworkflow.spi import RunQuery
from pyworkflow_storage_sql.sqlite._schema import connect

LEASE = 5.0
_PRAGMAS = ("journal_mode", "synchronous")


@step
async def echo(x: int) -> int:
    return x


@step
async def stamp() -> float:
    return time.time()


@step
async def effect(log: str, run: int, number: int) -> list[int]:
    return await measure.effect(log, run, number)


@workflow
async def sequence(steps: int) -> int:
    total = 0
    for i in range(steps):
        total += await echo(i)
    return total


@workflow
async def fan(width: int) -> int:
    return sum(await asyncio.gather(*[echo(i) for i in range(width)]))


@workflow
async def nap(seconds: float) -> list[float]:
    start = await stamp()
    await sleep(seconds)
    return [start, await stamp()]


@workflow
async def doze(seconds: float) -> None:
    await sleep(seconds)


@workflow
async def work(run: int, steps: int, log: str) -> None:
    for number in range(steps):
        await effect(log, run, number)


KINDS = {each.name: each for each in (sequence, fan, nap, doze, work)}


class Ours:
    def __init__(self, told: dict[str, Any]) -> None:
        self._url: str = told["url"]
        configure(lease=timedelta(seconds=LEASE), max_history=1_000_000)
        logging.getLogger("pyworkflow").setLevel(logging.ERROR)  # long runs warn
        self._client = Client(storage=self._url)

    async def __aenter__(self) -> None:
        await self._client.__aenter__()

    async def __aexit__(self, *exc: object) -> None:
        await self._client.__aexit__(None, None, None)

    async def run(self, kind: str, *args: Any) -> Any:
        return await self._client.run(KINDS[kind], *args)

    async def start(self, kind: str, *args: Any) -> Any:
        return await self._client.start(KINDS[kind], *args)

    async def result(self, handle: Any) -> Any:
        return await self._client.result(handle)

    async def existing(self) -> list[Any]:
        found: list[Any] = []
        cursor = None
        while True:
            page = await self._client.list_runs(limit=1000, cursor=cursor)
            found += [run.run_id for run in page.items]
            cursor = page.cursor
            if cursor is None:
                return found

    async def recorded(self) -> list[list[int]]:
        found: list[list[int]] = []
        async with make_storage(self._url, "default") as storage:  # a client would begin to work
            for run in (await storage.list_runs(RunQuery(limit=1000))).items:
                events = await storage.get_events(run.run_id)
                done = [each.data["result"] for each in events if each.type == "step.completed"]
                found += [json.loads(str(result)) for result in done]
        return found

    def facts(self) -> dict[str, str]:
        version = importlib.metadata.version("pyworkflow-core")
        durable = "the server's"
        if self._url.startswith("sqlite"):
            conn = connect(Path(self._url.removeprefix("sqlite:///")))  # as the store has it
            mode, level = (conn.execute(f"pragma {p}").fetchone()[0] for p in _PRAGMAS)
            conn.close()
            level = {1: "NORMAL", 2: "FULL", 3: "EXTRA"}.get(level, str(level))
            durable = f"{mode.upper()}, synchronous={level} (SQLite {sqlite3.sqlite_version})"
        return {"version": f"pyworkflow {version}", "durability": durable}


if __name__ == "__main__":
    measure.main(Ours)
