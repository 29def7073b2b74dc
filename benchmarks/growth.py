"""What each operation costs with few and with many runs in the store: CPU of client and server.

``python -m benchmarks.growth`` measures 1,000, 30,000 and 300,000 runs; with ``--full`` 1,000,000 as
well, in the stores that are made for them. Of twenty runs eighteen have ended, after three steps,
one sleeps and one has not started. Each size is a store of its own, on a server of its own; all are
filled first, then each operation is measured on one after the other, round by round, so that a busy
machine is as busy for each of them. PostgreSQL is vacuumed in between, as its autovacuum does.
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
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pyworkflow import Client, step, workflow
from pyworkflow._plugins import make_storage
from pyworkflow.spi import (
    Change,
    ClaimRef,
    ClaimRequest,
    Delta,
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

if TYPE_CHECKING:
    from tests.servers import PostgresServer, ValkeyServer

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
#: Stores that one process fills, and another opens and measures.
IN_FILES: Final = frozenset({"file", "sqlite"})
_BATCH: Final = 250
_MINUTE: Final = timedelta(minutes=1)
_IDLE_S: Final = 5.0
_OPS: Final = 200
"""Names of runs that are exported."""

Call = Callable[[], Awaitable[object]]


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


def _waiting(n: int, far: Any) -> Change:
    """A run that is to start days from now."""
    return Change(
        run_id=run_id_of(n),
        key="start",
        create=NewRun(workflow="later", version="1", args="[]", queue="later"),
        events=[Event("log.info", "O", {"message": "not yet"})],
        put=[Put(item_id="turn", kind=ItemKind.TURN, due_at=far)],
    )


def _driven(ref: ClaimRef, far: Any) -> Change:
    """Three steps; then the end, or a sleep of days."""
    events: list[Event] = []
    for n in range(3):
        op = f"1#{n}:step"
        began = {"name": "one", "attempt": 1, "worker": "host:123:456", "at": 1_234_567_890_123_456}
        ended = {"name": "one", "digest": "0123456789abcdef", "attempt": 1, "result": str(n)}
        events.append(Event("step.started", "O", began, op=op))
        events.append(Event("step.completed", "I", ended, op=op, key=f"step:{op}"))
    change = Change(run_id=ref.run_id, key=ref.token, claim=ref, seen=7, events=events)
    if far is not None:
        return replace(change, settle=Settle(reschedule_at=far))
    return replace(
        change,
        events=[*events, Event("workflow.completed", "C", {"result": "[0,1,2]"})],
        final=RunStatus.COMPLETED,
        update=Update(result="[0,1,2]"),
        settle=Settle(),
    )


async def fill(store: StorageBackend, size: int) -> None:
    """Write ``size`` runs through the contract."""
    far = await store.now() + timedelta(days=9)
    for start in range(0, size, _BATCH):
        numbers = range(start, min(start + _BATCH, size))
        answers: list[Any] = await store.commit(
            [_waiting(n, far) if n % 20 == 10 else _created(n) for n in numbers]
        )
        driven = []
        for n, answer in zip(numbers, answers, strict=True):
            for item in answer.claims:
                ref = ClaimRef(item.run_id, item.item_id, item.lease.token)
                driven.append(_driven(ref, None if n % 20 else far))
        await store.commit(driven)


# --- measuring --------------------------------------------------------------------------------


class Column:
    """A store of one size, and what was measured of it."""

    def __init__(
        self, size: int, store: StorageBackend, server: PostgresServer | ValkeyServer | None
    ) -> None:
        self.size = size
        self.store = store
        self.found: dict[str, float] = {}
        self.server = server

    def seconds(self) -> float:
        """CPU that this process and the store's server have used."""
        used = time.process_time()
        if self.server is None:
            return used
        try:
            return used + sum(_nanoseconds(pid) for pid in self.server.pids) / 1e9
        except OSError:  # no such files on this system; they count in hundredths of a second
            return used + self.server.cpu_seconds()


def _nanoseconds(pid: int) -> int:
    return sum(
        int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")
    )


class Table:
    """Columns that are measured together."""

    def __init__(self, columns: list[Column]) -> None:
        self.columns = columns

    async def call(
        self,
        name: str,
        make: Callable[[Column], Call],
        *,
        times: int = 10,
        rounds: int = 5,
        least: int = 0,
    ) -> None:
        """Note the milliseconds of one call: the least mean of some rounds.

        Stores of less than ``least`` runs are left out.
        """
        acts = [(column, make(column)) for column in self.columns if column.size >= least]
        for _ in range(rounds):
            for column, act in acts:
                began = column.seconds()
                for _ in range(times):
                    await act()
                mean = (column.seconds() - began) / times * 1000
                column.found[name] = min(mean, column.found.get(name, mean))


def _starts(prefix: str) -> Callable[[Column], Call]:
    def make(column: Column) -> Call:
        names: Iterator[int] = iter(range(10**9))

        async def start() -> object:
            change = Change(
                run_id=f"{prefix}{next(names)}",
                key="start",
                create=NewRun(workflow="new", version="1", args="[]", queue=prefix),
                events=[Event("workflow.started", "I", {"workflow": "new"})],
                put=[Put(item_id="turn", kind=ItemKind.TURN)],
            )
            return await column.store.commit_one(change)

        return start

    return make


def _claims(*, limit: int = 10, **filters: frozenset[str]) -> Callable[[Column], Call]:
    request = ClaimRequest(owner="m", lease=_MINUTE, limit=limit, **filters)
    return lambda column: lambda: column.store.claim(request)


async def measure_work(table: Table) -> None:
    """What workers ask for."""
    other = frozenset({"other"})
    await table.call("start", _starts("s"), times=50)
    for column in table.columns:
        start = _starts("c")(column)
        for _ in range(300):
            await start()
    await table.call("claim 10 due runs", _claims(queues=frozenset({"c"})), times=6)
    await table.call("claim, another queue", _claims(queues=other), times=30)
    await table.call("claim, another workflow", _claims(workflows=other), times=30)
    await table.call("next_due", lambda c: c.store.next_due, times=30)
    await table.call(
        "next_due, another queue", lambda c: lambda: c.store.next_due(queues=other), times=30
    )
    await table.call(
        "next_due, another workflow", lambda c: lambda: c.store.next_due(workflows=other), times=30
    )
    await table.call("holders", lambda c: c.store.holders, times=30)


async def measure_lists(table: Table) -> None:
    """Pages of 100."""
    deep = {column.size: await _cursor(column) for column in table.columns}

    async def page(name: str, *, deeply: bool = False, **query: Any) -> None:
        if "status" in query:
            query["status"] = frozenset(query["status"])
        asked = RunQuery(**query)
        await table.call(
            f"list, {name}",
            lambda c: lambda: c.store.list_runs(asked, deep[c.size] if deeply else None),
            times=6,
        )

    completed, failed, stalled = RunStatus.COMPLETED, RunStatus.FAILED, RunStatus.STALLED
    pending, suspended, running = RunStatus.PENDING, RunStatus.SUSPENDED, RunStatus.RUNNING
    await page("first page")
    await page("page at 90 % depth", deeply=True)
    await page("completed", status=[completed])
    await page("completed, deep", status=[completed], deeply=True)
    await page("failed (no hit)", status=[failed])
    await page("suspended", status=[suspended])
    await page("suspended, deep", status=[suspended], deeply=True)
    await page("pending", status=[pending])
    await page("running or stalled (no hit)", status=[running, stalled])
    await page("suspended or failed", status=[suspended, failed])
    await page("workflow", workflow="one")
    await page("workflow, deep", workflow="one", deeply=True)
    await page("workflow (no hit)", workflow="none")
    await page("workflow, completed, deep", workflow="one", status=[completed], deeply=True)
    await page("workflow, failed or stalled (no hit)", workflow="one", status=[failed, stalled])
    await page("workflow, suspended (no hit)", workflow="later", status=[suspended])
    await page("workflow, pending (no hit)", workflow="one", status=[pending])
    await page("workflow, running (no hit)", workflow="later", status=[running])


async def _cursor(column: Column) -> str | None:
    """A cursor at nine tenths of the list."""
    cursor = None
    for _ in range(column.size * 9 // 10 // 1000):
        cursor = (await column.store.list_runs(RunQuery(limit=1000), cursor)).cursor
    return cursor


def _reads(read: Callable[[StorageBackend, str], Awaitable[object]]) -> Callable[[Column], Call]:
    """Reads of runs from all over the store."""

    def make(column: Column) -> Call:
        numbers = iter(range(1, 10**9, 2))
        stride = column.size // _OPS + 1

        async def act() -> object:
            n = next(numbers) * stride % column.size
            return await read(column.store, run_id_of(n))

        return act

    return make


async def _copied(store: StorageBackend, run_id: str) -> None:
    """What ``storage copy`` does for a run: read it here, and write it, here too, as another."""
    part, events = await store.export_run(run_id), await store.get_events(run_id)
    assert part is not None
    copy = replace(part, run_id=f"copy-{time.monotonic_ns()}", events=events, items=[])
    await store.import_delta(Delta([copy]))


async def measure_runs(table: Table) -> None:
    """Reads of single runs, what keeps a store small, and a worker."""
    await table.call("get_run", _reads(lambda s, r: s.get_run(r)), times=30)
    await table.call("get_events", _reads(lambda s, r: s.get_events(r)), times=30)
    await table.call("copy of a run", _reads(_copied), times=20)
    await table.call("stats (counts rows)", lambda c: c.store.stats, times=1, rounds=3)
    now = {c.size: await c.store.now() for c in table.columns}
    await table.call(
        "purge that finds nothing",
        lambda c: lambda: c.store.purge(before=now[c.size] - timedelta(days=9)),
        times=3,
    )
    await table.call(
        "purge of 1,000",
        lambda c: lambda: c.store.purge(before=now[c.size] + _MINUTE),
        times=1,
        least=10_000,
    )
    async with AsyncExitStack() as stack:
        clients: dict[int, Client] = {}
        for column in table.columns:
            client = Client(storage=column.store)
            clients[column.size] = await stack.enter_async_context(client)

        def runs(column: Column) -> Call:
            client = clients[column.size]

            async def run() -> None:
                await client.result(await client.start(ten_steps))

            return run

        for column in table.columns:
            for _ in range(20):
                await runs(column)()
        await table.call("run of 10 steps", runs, times=20)
    for column in table.columns:
        async with Client(storage=column.store) as client:
            await client.result(await client.start(ten_steps))
            await asyncio.sleep(0.5)
            began = column.seconds()
            await asyncio.sleep(_IDLE_S)
            column.found["idle worker, % of a core"] = (column.seconds() - began) / _IDLE_S * 100


async def measure_opening(column: Column) -> None:
    """Until a process has its first answer."""
    began = column.seconds()
    await column.store.open()
    await column.store.claim(ClaimRequest(owner="m", lease=_MINUTE, limit=1))
    await column.store.close()
    column.found["open until the first claim, ms"] = (column.seconds() - began) * 1000
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    column.found["memory after opening, MB"] = peak


# --- stores -----------------------------------------------------------------------------------


def column_of(store: str, size: int, directory: Path) -> Column:
    """A store of one size; servers are started from their wheels."""
    from tests.servers import PostgresServer, ValkeyServer

    if store == "file":
        return Column(size, make_storage(f"file://{directory}/{size}?fsync=false"), None)
    if store == "sqlite":
        return Column(size, make_storage(f"sqlite:///{directory}/{size}.db"), None)
    if store == "memory":
        return Column(size, make_storage("memory://", f"growth-{size}"), None)
    server = PostgresServer() if store == "postgres" else ValkeyServer({"appendfsync": "always"})
    return Column(size, make_storage(server.url), server)


async def take_part(part: str, store: str, sizes: list[int], directory: Path) -> None:
    """A part of the work, in this process; what was measured goes to stdout as JSON."""
    columns = [column_of(store, size, directory) for size in sizes]
    try:
        if part in {"fill", "all"}:
            for column in columns:
                await fill(column.store, column.size)
                print(f"{store}: {column.size:,} runs written", file=sys.stderr)
        if part == "open":
            for column in columns:
                await measure_opening(column)
        if part in {"measure", "all"}:
            for column in columns:
                if store == "postgres":
                    assert column.server is not None
                    column.server.sql("VACUUM ANALYZE")
                await column.store.open()
            table = Table(columns)
            for measure in (measure_work, measure_lists, measure_runs):
                await measure(table)
        print(json.dumps({column.size: column.found for column in columns}))
    finally:
        for column in columns:
            await column.store.close()
            if column.server is not None:
                column.server.remove()


def measured(store: str, sizes: list[int], directory: Path) -> dict[int, dict[str, float]]:
    """The columns of one store, by processes of their own."""
    found: dict[int, dict[str, float]] = {size: {} for size in sizes}
    with tempfile.TemporaryDirectory(prefix="pyworkflow-growth-", dir=directory) as place:

        def run(part: str, some: list[int]) -> None:
            command = [sys.executable, "-m", "benchmarks.growth", "--part", part, "--dir", place]
            command += ["--stores", store, "--sizes", *map(str, some)]
            answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            for size, values in json.loads(answer).items():
                found[int(size)] |= values

        if store not in IN_FILES:
            run("all", sizes)
            return found
        for part in ("fill", "open"):
            for size in sizes:
                run(part, [size])
        run("measure", sizes)
    return found


# --- the table --------------------------------------------------------------------------------


def lines(store: str, columns: dict[int, dict[str, float]]) -> Iterator[str]:
    """Lines of Markdown: operations, and the last column against the one of 30,000 runs."""
    sizes = list(columns)
    base = SIZES[1] if SIZES[1] in sizes[:-1] else sizes[0]
    yield f"| {store}: CPU per call, ms | " + " | ".join(f"{n:,}" for n in sizes) + " | ratio |"
    yield "|---|" + "---|" * (len(sizes) + 1)
    for name in dict.fromkeys(name for column in columns.values() for name in column):
        values = [columns[n].get(name) for n in sizes]
        shown = ["-" if value is None else f"{value:.2g}" for value in values]
        last, first = values[-1], columns[base].get(name)
        ratio = "-" if last is None or not first else f"{last / first:.1f}"
        yield f"| {name} | " + " | ".join(shown) + f" | {ratio} |"


def main() -> None:
    """Measure what the arguments say."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("--stores", nargs="+", choices=sorted(STORES), default=sorted(STORES))
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES))
    parser.add_argument("--full", action="store_true", help="1,000,000 runs as well")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument(
        "--part", choices=["fill", "open", "measure", "all"], help=argparse.SUPPRESS
    )
    given = parser.parse_args()
    if given.part is not None:
        logging.disable(logging.CRITICAL)
        asyncio.run(take_part(given.part, given.stores[0], given.sizes, given.dir))
        return
    sizes = sorted({*given.sizes, FULL} if given.full else given.sizes)
    for store in given.stores:
        columns = measured(store, [n for n in sizes if n <= STORES[store]], given.dir)
        print("\n".join(lines(store, columns)), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
