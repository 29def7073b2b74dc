"""DBOS: its asynchronous interface, workflows started in the process that runs them.

That is its fastest way, and the one that its documentation shows first; a queue would add its polling.
Recovery after a crash needs the same executor id, which it has by default.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import sqlite3
import time
from contextlib import closing
from typing import Any

import measure
from dbos import DBOS, DBOSClient


@DBOS.step()
async def echo(x: int) -> int:
    return x


@DBOS.step()
async def stamp() -> float:
    return time.time()


@DBOS.step()
async def effect(log: str, run: int, number: int) -> list[int]:
    return await measure.effect(log, run, number)


@DBOS.workflow()
async def sequence(steps: int) -> int:
    total = 0
    for i in range(steps):
        total += await echo(i)
    return total


@DBOS.workflow()
async def fan(width: int) -> int:
    return sum(await asyncio.gather(*[echo(i) for i in range(width)]))


@DBOS.workflow()
async def nap(seconds: float) -> list[float]:
    start = await stamp()
    await DBOS.sleep_async(seconds)
    return [start, await stamp()]


@DBOS.workflow()
async def doze(seconds: float) -> None:
    await DBOS.sleep_async(seconds)


@DBOS.workflow()
async def work(run: int, steps: int, log: str) -> None:
    for number in range(steps):
        await effect(log, run, number)


KINDS: dict[str, Any] = {
    "sequence": sequence, "fan": fan, "nap": nap, "doze": doze, "work": work,
}  # fmt: skip


class Dbos:
    def __init__(self, told: dict[str, Any]) -> None:
        self._url: str = told["url"]
        self._path = self._url.removeprefix("sqlite:///") if "sqlite" in self._url else None
        self._wal: bool = told["store"] == "sqlite-wal"

    async def __aenter__(self) -> None:
        if self._wal and self._path:
            with closing(sqlite3.connect(self._path)) as db:
                db.execute("PRAGMA journal_mode = WAL")  # stays with the file
        # Fewer connections do not wait for one another's locks: a fifth faster, tried side by side.
        tuned: dict[str, Any] = {"sys_db_pool_size": 1} if self._wal else {}
        DBOS(
            config={
                **tuned,
                "name": "peers",
                "system_database_url": self._url,
                "application_version": "1",
                "log_level": "ERROR",
                "console_log_level": "ERROR",
            }
        )
        DBOS.launch()

    async def __aexit__(self, *exc: object) -> None:
        await asyncio.to_thread(DBOS.destroy)

    async def run(self, kind: str, *args: Any) -> Any:
        return await KINDS[kind](*args)

    async def start(self, kind: str, *args: Any) -> Any:
        return await DBOS.start_workflow_async(KINDS[kind], *args)

    async def result(self, handle: Any) -> Any:
        return await handle.get_result()

    async def existing(self) -> list[Any]:
        found = await DBOS.list_workflows_async(load_input=False, load_output=False)
        return [await DBOS.retrieve_workflow_async(each.workflow_id) for each in found]

    async def recorded(self) -> list[list[int]]:
        return await asyncio.to_thread(self._recorded)

    def _recorded(self) -> list[list[int]]:
        client = DBOSClient(system_database_url=self._url)
        try:
            return [
                step["output"]
                for each in client.list_workflows(load_input=False, load_output=False)
                for step in client.list_workflow_steps(each.workflow_id)
                if step["output"] is not None
            ]
        finally:
            client.destroy()

    def facts(self) -> dict[str, str]:
        durability = "the server's"
        if self._path:
            # Its connections set neither, so that a new one of this library has the same.
            with closing(sqlite3.connect(self._path)) as db:
                journal = db.execute("PRAGMA journal_mode").fetchone()[0]
                level = db.execute("PRAGMA synchronous").fetchone()[0]
            name = {0: "OFF", 1: "NORMAL", 2: "FULL", 3: "EXTRA"}[level]
            durability = f"{journal.upper()}, synchronous={name} (SQLite {sqlite3.sqlite_version})"
        return {
            "version": f"dbos {importlib.metadata.version('dbos')}",
            "durability": durability,
        }


if __name__ == "__main__":
    measure.main(Dbos)
