"""How soon workers work again after an outage of the store's server.

``python -m benchmarks.outages`` stops a PostgreSQL and a Valkey of its own, starts them again, and
measures the seconds from their first answer to the next step: of a run that was in progress, of one
that slept meanwhile, and of one that is started then. Workers are ``pyworkflow worker`` and Celery's.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from pyworkflow import Client, configure, sleep, step, workflow
from tests.celery._harness import Fleet, fleet_on
from tests.servers import PostgresServer, ValkeyServer

WORKERS: Final = ("embedded", "prefork", "threads", "solo")
STORES: Final = ("postgres", "redis")
OUTAGES_S: Final = (3.0, 20.0)
_LOG: Final = os.environ.get("OUTAGE_LOG", os.devnull)


@step
async def tick(name: str) -> None:
    """Write down when it ran."""
    await asyncio.sleep(0.05)
    await asyncio.to_thread(_note, name)


def _note(name: str) -> None:
    with Path(_LOG).open("a", encoding="ascii") as log:
        log.write(f"{name} {time.monotonic()}\n")


@workflow
async def busy() -> None:
    """Steps one after the other."""
    for _ in range(100_000):
        await tick("busy")


@workflow
async def sleeper(seconds: float) -> None:
    """A sleep that ends during the outage, and a step."""
    await tick("asleep")
    await sleep(seconds)
    await tick("slept")


@workflow
async def fresh() -> None:
    """One step."""
    await tick("fresh")


def times(path: Path, name: str) -> list[float]:
    """When the steps of this name ran."""
    lines = [line.split() for line in path.read_text("ascii").splitlines()]
    return [float(at) for each, at in lines if each == name]


@contextmanager
def workers(fleet: Fleet, kind: str) -> Iterator[None]:
    """A worker of a kind."""
    settings = {"PYWORKFLOW_MODULES": __spec__.name, "PYWORKFLOW_LEASE": "60s"}
    if kind != "embedded":
        for _ in range(2 if kind == "solo" else 1):  # one is busy all the time
            fleet.worker(pool=kind, **settings)
        yield
        return
    env = fleet.environment(**settings, PYWORKFLOW_EXECUTOR="local://")
    with (fleet.path / "worker-embedded.log").open("wb") as log:
        words = [sys.executable, "-m", "pyworkflow.cli", "worker", __spec__.name]
        process = subprocess.Popen(words, env=env, cwd=fleet.path, stdout=log, stderr=log)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def measure(store: str, kind: str, outage: float) -> dict[str, float]:
    """Seconds from the server's return to the next step of each run."""
    server = PostgresServer() if store == "postgres" else ValkeyServer({"appendonly": "yes"})
    with server, tempfile.TemporaryDirectory() as folder, fleet_on(Path(folder)) as fleet:
        fleet.storage_url = server.database() if isinstance(server, PostgresServer) else server.url
        log = Path(folder) / "ticks"
        log.touch()
        os.environ["OUTAGE_LOG"] = str(log)
        env = {k: v for k, v in fleet.environment().items() if k.startswith("PYWORKFLOW_")}
        os.environ.update(env)
        configure(storage=fleet.storage_url, executor="celery://", broker_url=fleet.broker_url)
        with workers(fleet, kind):
            asyncio.run(_start(busy))
            asyncio.run(_start(sleeper, outage / 2))
            fleet.eventually(
                lambda: len(times(log, "busy")) > 5 and times(log, "asleep"), "the runs are on"
            )
            server.stop()
            time.sleep(outage)
            server.start()
            back = time.monotonic()
            asyncio.run(_start(fresh))
            names = ("busy", "slept", "fresh")
            fleet.eventually(
                lambda: all(any(at > back for at in times(log, name)) for name in names),
                "all runs go on",
            )
            found = {name: min(t for t in times(log, name) if t > back) - back for name in names}
            if "never retrieved" in fleet.logs():
                print("a message of asyncio's in the log")
    return found


async def _start(flow: object, *args: object) -> None:
    async with Client() as client:
        await client.start(flow, *args)  # type: ignore[arg-type]  # any workflow


def main() -> None:
    """Measure what the command line says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.outages", description=__doc__)
    parser.add_argument("--store", action="append", choices=STORES)
    parser.add_argument("--worker", action="append", choices=WORKERS)
    parser.add_argument("--outage", action="append", type=float, help="seconds")
    given = parser.parse_args()
    cases = list(
        itertools.product(given.store or STORES, given.worker or WORKERS, given.outage or OUTAGES_S)
    )
    if len(cases) > 1:  # each in a process of its own, for a client has one store
        for store, kind, outage in cases:
            words = ["--store", store, "--worker", kind, "--outage", str(outage)]
            subprocess.run([sys.executable, "-m", "benchmarks.outages", *words], check=False)
        return
    ((store, kind, outage),) = cases
    found = measure(store, kind, outage)
    told = " ".join(f"{name}={seconds:.2f}" for name, seconds in found.items())
    load = os.getloadavg()[0]
    print(f"{store:8} {kind:8} outage={outage:g} s  {told}  load={load:.1f}", flush=True)


if __name__ == "__main__":
    main()
