"""Runs on Celery workers, next to tasks that do nothing on the same broker, pool and processes.

A broker of its own (Valkey, nothing on disk), one worker with two pool processes, or two workers
with one each. Work is put into the queue while no worker consumes it; then the clock starts.
"""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import stores
from benchmarks.programs import fan, naps, sequence
from benchmarks.readings import Reading, Setting, Workload
from pyworkflow import Client
from pyworkflow._plugins import make_executor, make_storage

if TYPE_CHECKING:
    from tests.servers import ValkeyServer

_STORES = ("sqlite", "postgres", "redis")
_STEPS = 10
_PATIENCE = 120.0


@functools.cache
def _broker() -> ValkeyServer:
    from tests.servers import ValkeyServer

    return ValkeyServer({"appendonly": "no", "appendfsync": "no"})


@dataclass
class _Fleet:
    url: str
    scratch: Path
    app: Any
    workers: list[subprocess.Popen[bytes]]

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        executor = make_executor("celery://", {"broker_url": _broker().url})
        async with (
            make_storage(self.url, "default") as storage,
            Client(storage=storage, executor=executor) as client,
        ):
            yield client
        await executor.close()

    def hold(self) -> None:
        """Let no worker take messages until ``go``."""
        self._control("cancel_consumer")

    def go(self) -> float:
        """Let them; when that was."""
        began = time.time()
        self._control("add_consumer")
        return began

    def _control(self, what: str) -> None:
        queue = self.app.conf.task_default_queue
        answers = getattr(self.app.control, what)(
            queue, reply=True, limit=len(self.workers), timeout=10
        )
        if len(answers) != len(self.workers):
            raise RuntimeError(f"{what}: {len(answers)} of {len(self.workers)} workers answered")


@contextmanager
def _fleet(setting: Setting, *, workers: int = 1, processes: int = 2) -> Iterator[_Fleet]:
    with ExitStack() as stack:
        scratch = stack.enter_context(setting.scratch())
        url = stack.enter_context(stores.fresh_url(setting.store, setting.directory))
        broker = _broker()
        broker.command("FLUSHALL")
        told = {
            "PYWORKFLOW_STORAGE": url,
            "PYWORKFLOW_EXECUTOR": "celery://",
            "PYWORKFLOW_BROKER_URL": broker.url,
            "PYWORKFLOW_MODULES": "benchmarks.programs",
        }
        os.environ.update(told)
        from benchmarks.celery_app import app

        begun: list[subprocess.Popen[bytes]] = []
        stack.callback(_end, begun)
        for number in range(workers):
            log = stack.enter_context((scratch / f"worker{number}.log").open("wb"))
            command = [
                *(sys.executable, "-m", "celery", "-A", "benchmarks.celery_app", "worker"),
                *("--pool=prefork", f"--concurrency={processes}", "--loglevel=warning"),
                f"--hostname=bench{number}@%h",
            ]
            begun.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))
        end = time.monotonic() + _PATIENCE
        while len(app.control.ping(timeout=0.5)) < workers:
            if time.monotonic() > end or any(w.poll() is not None for w in begun):
                raise RuntimeError((scratch / "worker0.log").read_text(errors="replace")[-2000:])
        yield _Fleet(url, scratch, app, begun)


def _end(workers: list[subprocess.Popen[bytes]]) -> None:
    for worker in workers:
        worker.terminate()
    for worker in workers:
        try:
            worker.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(worker.pid, signal.SIGKILL)
            worker.wait(5)


async def _ended(client: Client, runs: int) -> float:
    """Wait until so many runs have ended; when that was seen."""
    end = time.monotonic() + _PATIENCE
    storage = client._storage
    assert not isinstance(storage, str)
    assert storage is not None
    while (await storage.stats()).get("completed", 0) < runs:
        if time.monotonic() > end:
            raise RuntimeError(f"{runs} runs have not ended: {await storage.stats()}")
        await asyncio.sleep(0.02)
    return time.time()


def _nothings(fleet: _Fleet, tasks: int) -> float:
    """Tasks per second that do nothing."""
    from benchmarks.celery_app import mark, nothing

    told = fleet.scratch / "marked"
    told.unlink(missing_ok=True)
    fleet.hold()
    with fleet.app.pool.acquire(block=True) as connection:
        for _ in range(tasks):
            nothing.apply_async(connection=connection)
        mark.apply_async(args=[str(told)], connection=connection)
    began = fleet.go()
    end = time.monotonic() + _PATIENCE
    while not told.exists() or not told.read_text():
        if time.monotonic() > end:
            raise RuntimeError("the tasks that do nothing have not ended")
        time.sleep(0.01)
    return tasks / (float(told.read_text()) - began)


def _runs(setting: Setting) -> Iterator[Reading]:
    runs, tasks = setting.size(500, 200), setting.size(4_000, 1_500)
    with _fleet(setting) as fleet:

        async def durable() -> float:
            async with fleet.client() as client:
                fleet.hold()
                done = (await client._storage.stats()).get("completed", 0)  # type: ignore[union-attr]
                await asyncio.gather(*[client.start(sequence, _STEPS) for _ in range(runs)])
                began = fleet.go()
                return runs / (await _ended(client, done + runs) - began)

        asyncio.run(durable())  # every process has met its store
        before = _nothings(fleet, tasks)
        rate = asyncio.run(durable())
        nothings = statistics.mean([before, _nothings(fleet, tasks)])
    what = f"{runs} runs of {_STEPS} steps"
    yield Reading(
        f"{what}, one run : a task that does nothing", nothings / rate, "x raw time",
        aim=3.0, better="less",
    )  # fmt: skip
    yield Reading(f"{what}, prefork, 2 processes", rate, "runs/s")
    yield Reading("tasks that do nothing, same worker", nothings, "tasks/s")


def _latency(setting: Setting) -> Iterator[Reading]:
    times = setting.size(100, 30)

    async def main(fleet: _Fleet) -> list[float]:
        took: list[float] = []
        async with fleet.client() as client:
            for _ in range(5):
                await client.run(sequence, _STEPS)
            for _ in range(times):
                began = time.perf_counter()
                await client.run(sequence, _STEPS)
                took.append((time.perf_counter() - began) * 1e3)
        return sorted(took)

    with _fleet(setting) as fleet:
        took = asyncio.run(main(fleet))
    what = f"start to result of {_STEPS} steps"
    yield Reading(f"{what}, p50", statistics.median(took), "ms", better="less")
    yield Reading(f"{what}, p95", took[int(len(took) * 0.95)], "ms", better="less")


def _fan_out(setting: Setting) -> Iterator[Reading]:
    width = setting.size(200, 50)

    async def main(fleet: _Fleet) -> float:
        async with fleet.client() as client:
            await client.run(fan, 4, 1)
            began = time.perf_counter()
            await client.run(fan, width, 1)
            return (time.perf_counter() - began) * 1e3

    with _fleet(setting, workers=2, processes=1) as fleet:
        took = asyncio.run(main(fleet))
    yield Reading(f"gather of {width} steps over two workers", took, "ms", better="less")


def _lateness(events: list[Any]) -> Iterator[float]:
    for event in events:
        if event.type == "sleep.completed":
            until = datetime.fromisoformat(str(event.data["until"]))
            yield (event.timestamp - until).total_seconds() * 1e3


def _sleepers(setting: Setting) -> Iterator[Reading]:
    alone, many = setting.size(50, 15), setting.size(2_000, 300)

    async def main(fleet: _Fleet) -> tuple[list[float], list[float], float]:
        async with fleet.client() as client:
            run_id = await client.start(naps, [0.3] * alone)
            await client.result(run_id)
            idle = sorted(_lateness(await client.get_events(run_id)))
            ids: list[str] = []
            for first in range(0, many, 100):
                part = range(first, min(first + 100, many))
                ids += await asyncio.gather(*[client.start(naps, [5.0]) for _ in part])
            began = time.time()
            took = await _ended(client, 1 + many) - began
            late: list[float] = []
            for each in ids:
                late += _lateness(await client.get_events(each))
        return idle, sorted(late), took

    with _fleet(setting) as fleet:
        idle, late, took = asyncio.run(main(fleet))
    what = f"{alone} sleeps on an idle worker end late by"
    yield Reading(f"{what}, p50", statistics.median(idle), "ms", better="less")
    yield Reading(f"{what}, p99", idle[int(len(idle) * 0.99)], "ms", aim=250.0, better="less")
    what = f"{many:,} sleepers of 5 s"
    yield Reading(f"{what} end late by, p50", statistics.median(late), "ms", better="less")
    yield Reading(f"{what} end late by, p99", late[int(len(late) * 0.99)], "ms", better="less")
    yield Reading(f"{what}, all done after", took, "s", better="less")


WORKLOADS = [
    Workload("celery-runs", _STORES, _runs),
    Workload("celery-latency", _STORES, _latency),
    Workload("celery-fan", _STORES, _fan_out),
    Workload("celery-sleepers", _STORES, _sleepers),
]
