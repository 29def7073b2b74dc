"""What each operation costs with few and with many runs in the store: CPU of client and server.

``python -m benchmarks.growth`` measures 1,000, 30,000 and 300,000 runs; with ``--full`` 1,000,000 as
well, in the stores that are made for them. Nine of ten runs have ended, after three steps; the
others sleep. A store is filled by one process and measured by another.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

from benchmarks.stores import server, server_seconds
from pyworkflow import Client, step, workflow
from pyworkflow._plugins import make_storage
from pyworkflow.spi import (
    Change,
    ClaimRef,
    ClaimRequest,
    Event,
    ItemKind,
    LeaseFor,
    NewRun,
    Put,
    RunQuery,
    RunStatus,
    Settle,
    StorageBackend,
    Update,
)

SIZES: Final = (1_000, 30_000, 300_000)
FULL: Final = 1_000_000
#: Stores, and the most runs that each is measured with.
STORES: Final = {
    "file": 300_000,
    "memory": 300_000,
    "sqlite": FULL,
    "postgres": FULL,
    "redis": FULL,
}
#: Stores that are measured by the process that fills them: it is, or runs, the server.
IN_PROCESS: Final = frozenset({"memory", "postgres", "redis"})
_BATCH: Final = 250
_SLEEPERS: Final = 10
"""One run of so many sleeps."""
_MINUTE: Final = timedelta(minutes=1)
_IDLE_S: Final = 5.0


@step()
async def number(n: int) -> int:
    """A step that does nothing."""
    return n


@workflow()
async def ten_steps() -> int:
    """Ten steps, one after the other."""
    total = 0
    for n in range(10):
        total += await number(n)
    return total


def url_of(store: str, directory: Path) -> str:
    """The URL of the store that is measured; servers are started from their wheels."""
    behind = server(store)
    if behind is not None:
        return behind.url
    return {
        "file": f"file://{directory}/store?fsync=false",
        "memory": "memory://",
        "sqlite": f"sqlite:///{directory}/store.db",
    }[store]


# --- filling ----------------------------------------------------------------------------------


def run_id_of(n: int) -> str:
    """The id of a run that the fill makes."""
    return f"run_{n:012x}"


def _created(n: int) -> Change:
    started = {"workflow": "three", "version": "1", "args": "[]", "seed": "abcdef0123456789"}
    claimed = LeaseFor(owner="fill", lease=_MINUTE)
    return Change(
        run_id=run_id_of(n),
        key="start",
        create=NewRun(
            workflow=("one", "two", "three")[n % 3], version="1", args='[["order",1],{}]'
        ),
        events=[Event("workflow.started", "I", started)],
        put=[Put(item_id="turn", kind=ItemKind.TURN, claimed=claimed)],
    )


def _stepped(ref: ClaimRef, n: int) -> Change:
    op = f"1#{n}:step"
    began = {"name": "one", "attempt": 1, "worker": "host:123:456", "at": 1_234_567_890_123_456}
    ended = {"name": "one", "digest": "0123456789abcdef", "attempt": 1, "result": str(n)}
    events = [
        Event("step.started", "O", began, op=op),
        Event("step.completed", "I", ended, op=op, key=f"step:{op}"),
    ]
    return Change(
        run_id=ref.run_id, key=f"{ref.token}:{n}", claim=ref, seen=1 + 2 * n, events=events
    )


def _ended(ref: ClaimRef) -> Change:
    return Change(
        run_id=ref.run_id,
        key=f"{ref.token}:end",
        claim=ref,
        seen=7,
        events=[Event("workflow.completed", "C", {"result": "[0,1,2]"})],
        final=RunStatus.COMPLETED,
        update=Update(result="[0,1,2]"),
        settle=Settle(),
    )


async def fill(store: StorageBackend, size: int) -> None:
    """Write ``size`` runs through the contract."""
    far = await store.now() + timedelta(days=9)
    for start in range(0, size, _BATCH):
        numbers = range(start, min(start + _BATCH, size))
        answers: list[Any] = await store.commit([_created(n) for n in numbers])
        items = [answer.claims[0] for answer in answers]
        refs = [ClaimRef(item.run_id, item.item_id, item.lease.token) for item in items]
        for n in range(3):
            await store.commit([_stepped(ref, n) for ref in refs])
        await store.commit(
            [
                _ended(ref)
                if n % _SLEEPERS
                else Change(
                    run_id=ref.run_id,
                    key=f"{ref.token}:sleep",
                    claim=ref,
                    seen=7,
                    settle=Settle(reschedule_at=far),
                )
                for n, ref in zip(numbers, refs, strict=True)
            ]
        )


# --- measuring --------------------------------------------------------------------------------


class Meter:
    """CPU of this process and of the store's server, per call."""

    def __init__(self, store: str) -> None:
        self._store = store
        self.found: dict[str, float] = {}

    def seconds(self) -> float:
        """CPU used so far."""
        return time.process_time() + (server_seconds(self._store) or 0.0)

    async def call(
        self, name: str, act: Callable[[], Awaitable[object]], *, times: int, rounds: int = 3
    ) -> None:
        """Note the milliseconds of one call: the least mean of some rounds."""
        least = float("inf")
        for _ in range(rounds):
            began = self.seconds()
            for _ in range(times):
                await act()
            least = min(least, (self.seconds() - began) / times)
        self.found[name] = least * 1000


def _started_runs(store: StorageBackend, prefix: str) -> Callable[[], Awaitable[object]]:
    names: Iterator[int] = iter(range(10**9))

    async def start() -> object:
        change = Change(
            run_id=f"{prefix}{next(names)}",
            key="start",
            create=NewRun(workflow="new", version="1", args="[]", queue=prefix),
            events=[Event("workflow.started", "I", {"workflow": "new"})],
            put=[Put(item_id="turn", kind=ItemKind.TURN)],
        )
        return await store.commit_one(change)

    return start


async def measure(name: str, store: StorageBackend, size: int) -> dict[str, float]:
    """Everything, in milliseconds of CPU."""
    meter = Meter(name)
    call = meter.call
    began = meter.seconds()
    await store.open()
    await store.claim(ClaimRequest(owner="m", lease=_MINUTE, limit=1))
    meter.found["open until the first claim, s"] = meter.seconds() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    meter.found["memory after opening, MB"] = peak
    await store.stats()  # what is new is counted once
    await call("start", _started_runs(store, "s"), times=100)
    start = _started_runs(store, "c")
    for _ in range(300):
        await start()
    due = ClaimRequest(owner="m", lease=_MINUTE, limit=10, queues=frozenset({"c"}))
    await call("claim 10 due runs", lambda: store.claim(due), times=10)
    none = ClaimRequest(owner="m", lease=_MINUTE, limit=10, queues=frozenset({"none"}))
    await call("claim, nothing due", lambda: store.claim(none), times=50)

    def listing(cursor: str | None = None, **query: Any) -> Callable[[], Awaitable[object]]:
        if "status" in query:
            query["status"] = frozenset(query["status"])
        return lambda: store.list_runs(RunQuery(**query), cursor)

    deep = await _cursor(store, size)
    await call("list, first page of 100", listing(), times=10)
    await call("list, page at 90 % depth", listing(deep), times=10)
    failed, stalled = RunStatus.FAILED, RunStatus.STALLED
    await call("list, status with no hit", listing(status=[failed]), times=10)
    await call(
        "list, open status with no hit", listing(status=[stalled, RunStatus.PENDING]), times=10
    )
    await call("list, suspended", listing(status=[RunStatus.SUSPENDED]), times=10)
    await call("list, workflow with no hit", listing(workflow="none"), times=10)
    both = listing(workflow="one", status=[failed, stalled])
    await call("list, workflow and two statuses, no hit", both, times=10)
    deep_both = listing(deep, workflow="one", status=[RunStatus.COMPLETED])
    await call("list, workflow and status, deep", deep_both, times=10)
    some = run_id_of(size // 2)
    await call("get_run", lambda: store.get_run(some), times=50)
    await call("get_events", lambda: store.get_events(some), times=50)
    await call("stats", store.stats, times=5)
    await call("holders", store.holders, times=20)
    await call("next_due", store.next_due, times=20)
    numbers = iter(range(1, size, 2))
    await call("export_run", lambda: store.export_run(run_id_of(next(numbers))), times=20)
    now = await store.now()
    if size >= 10_000:
        before = now + _MINUTE
        await call("purge, batch of 1,000", lambda: store.purge(before=before), times=1)
    await _run_steps(meter, store)
    return meter.found


async def _cursor(store: StorageBackend, size: int) -> str | None:
    """A cursor at nine tenths of the list."""
    cursor = None
    for _ in range(size * 9 // 10 // 1000):
        cursor = (await store.list_runs(RunQuery(limit=1000), cursor)).cursor
    return cursor


async def _run_steps(meter: Meter, store: StorageBackend) -> None:
    async with Client(storage=store) as client:

        async def run() -> None:
            await client.result(await client.start(ten_steps))

        for _ in range(20):
            await run()
        await meter.call("run of 10 steps", run, times=20)
        await asyncio.sleep(0.5)
        began = meter.seconds()
        await asyncio.sleep(_IDLE_S)
        meter.found["idle worker, % CPU"] = (meter.seconds() - began) / _IDLE_S * 100


# --- the table --------------------------------------------------------------------------------


def one(store: str, size: int, directory: Path, part: str) -> None:
    """A part of the work, in this process; what was measured goes to stdout as JSON."""
    logging.disable(logging.CRITICAL)

    async def main() -> None:
        backend = make_storage(url_of(store, directory))
        try:
            if part in {"fill", "all"}:
                await fill(backend, size)
            if part in {"measure", "all"}:
                print(json.dumps(await measure(store, backend, size)))
        finally:
            await backend.close()

    asyncio.run(main())


def measured(store: str, size: int, directory: Path) -> dict[str, float]:
    """One column of the table, by processes of its own."""
    with tempfile.TemporaryDirectory(prefix="pyworkflow-growth-", dir=directory) as place:
        answer = ""
        for part in ["all"] if store in IN_PROCESS else ["fill", "measure"]:
            command = [sys.executable, "-m", "benchmarks.growth", "--part", part]
            command += ["--stores", store, "--sizes", str(size), "--dir", place]
            answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, float] = json.loads(answer)
    return found


def table(store: str, columns: dict[int, dict[str, float]]) -> Iterator[str]:
    """Lines of Markdown: operations, and the last column against the one before it."""
    sizes = list(columns)
    yield f"| {store}: CPU per call, ms | " + " | ".join(f"{n:,}" for n in sizes) + " | ratio |"
    yield "|---|" + "---|" * (len(sizes) + 1)
    for name in dict.fromkeys(name for column in columns.values() for name in column):
        values = [columns[n].get(name) for n in sizes]
        shown = ["-" if value is None else f"{value:.3g}" for value in values]
        last, before = values[-1], values[-2] if len(values) > 1 else None
        ratio = "-" if last is None or not before else f"{last / before:.1f}"
        yield f"| {name} | " + " | ".join(shown) + f" | {ratio} |"


def main() -> None:
    """Measure what the arguments say."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("--stores", nargs="+", choices=sorted(STORES), default=sorted(STORES))
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES))
    parser.add_argument("--full", action="store_true", help="1,000,000 runs as well")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--part", choices=["fill", "measure", "all"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part is not None:
        one(given.stores[0], given.sizes[0], given.dir, given.part)
        return
    sizes = sorted({*given.sizes, FULL} if given.full else given.sizes)
    for store in given.stores:
        columns: dict[int, dict[str, float]] = {}
        for size in sizes:
            if size <= STORES[store]:
                columns[size] = measured(store, size, given.dir)
                print(f"{store}: {size:,} runs measured", file=sys.stderr)
        print("\n".join(table(store, columns)), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
