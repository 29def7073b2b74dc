"""Restate: its services behind Hypercorn and a client, in one process, on a server that runs beside.

Restate's server calls the services over HTTP; steps are ``ctx.run``, each recorded before it returns.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import time
import uuid
from datetime import timedelta
from typing import Any

import httpx
import hypercorn
import hypercorn.asyncio
import measure
import restate

SERVICE = restate.Service("peers")


async def echo(x: int) -> int:
    return x


async def stamp() -> float:
    return time.time()


@SERVICE.handler()
async def sequence(ctx: restate.Context, args: list[Any]) -> int:
    total = 0
    for i in range(args[0]):
        total += await ctx.run_typed("echo", echo, x=i)
    return total


@SERVICE.handler()
async def fan(ctx: restate.Context, args: list[Any]) -> int:
    steps = [ctx.run_typed("echo", echo, x=i) for i in range(args[0])]
    return sum([await each for each in await restate.gather(*steps)])


@SERVICE.handler()
async def nap(ctx: restate.Context, args: list[Any]) -> list[float]:
    start = await ctx.run_typed("stamp", stamp)
    await ctx.sleep(timedelta(seconds=args[0]))
    return [start, await ctx.run_typed("stamp", stamp)]


@SERVICE.handler()
async def doze(ctx: restate.Context, args: list[Any]) -> None:
    await ctx.sleep(timedelta(seconds=args[0]))


@SERVICE.handler()
async def work(ctx: restate.Context, args: list[Any]) -> None:
    run, steps, log = args
    for number in range(steps):
        await ctx.run_typed("effect", measure.effect, log=log, run=run, step=number)


class Restate:
    def __init__(self, told: dict[str, Any]) -> None:
        self._ingress: str = told["ingress"]
        self._admin: str = told["admin"]
        self._port: int = told["port"]
        self._facts: dict[str, str] = told["facts"]
        limits = httpx.Limits(max_connections=None)
        self._http = httpx.AsyncClient(timeout=None, limits=limits)

    async def __aenter__(self) -> None:
        config = hypercorn.Config()
        config.bind = [f"127.0.0.1:{self._port}"]
        config.h2_max_concurrent_streams = 2**31 - 1  # as its documentation has it
        config.loglevel = "CRITICAL"
        self._stop = asyncio.Event()
        app = restate.app([SERVICE])
        self._serving = asyncio.create_task(
            hypercorn.asyncio.serve(app, config, shutdown_trigger=self._stop.wait)  # type: ignore[arg-type]  # an ASGI application
        )
        told = {"uri": f"http://127.0.0.1:{self._port}", "force": True}
        while True:  # until our side answers
            answer = await self._http.post(f"{self._admin}/deployments", json=told)
            if answer.is_success:
                break
            await asyncio.sleep(0.05)

    async def __aexit__(self, *exc: object) -> None:
        await self._http.aclose()
        self._stop.set()
        try:
            await asyncio.wait_for(self._serving, 5)
        except TimeoutError:
            pass  # connections of the server that stay open

    async def run(self, kind: str, *args: Any) -> Any:
        answer = await self._http.post(f"{self._ingress}/peers/{kind}", json=args)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    async def start(self, kind: str, *args: Any) -> Any:
        key = str(uuid.uuid4())  # without one, nobody can ask for the result
        answer = await self._http.post(
            f"{self._ingress}/peers/{kind}/send", json=args, headers={"idempotency-key": key}
        )
        answer.raise_for_status()
        return answer.json()["invocationId"]

    async def result(self, handle: Any) -> Any:
        answer = await self._http.get(f"{self._ingress}/restate/invocation/{handle}/attach")
        answer.raise_for_status()
        return answer.json() if answer.content else None

    async def _query(self, sql: str) -> list[dict[str, Any]]:
        answer = await self._http.post(
            f"{self._admin}/query", json={"query": sql}, headers={"accept": "application/json"}
        )
        answer.raise_for_status()
        rows: list[dict[str, Any]] = answer.json()["rows"]
        return rows

    async def existing(self) -> list[Any]:
        return [row["id"] for row in await self._query("select id from sys_invocation")]

    async def recorded(self) -> list[list[int]]:
        rows = await self._query(
            "select entry_json from sys_journal where entry_type = 'Notification: Run'"
        )
        found: list[list[int]] = []
        for row in rows:
            completion = json.loads(row["entry_json"])["Notification"]["Completion"]["Run"]
            found.append(json.loads(bytes(completion["result"]["Success"])))
        return found

    def facts(self) -> dict[str, str]:
        version = f"restate-sdk {importlib.metadata.version('restate-sdk')}"
        return {"version": version, **self._facts}


if __name__ == "__main__":
    measure.main(Restate)
