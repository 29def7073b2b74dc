"""What the crash loop runs: workflows, a process that works on them, and the process it forks from.

A *nursery* has imported everything and forks a real process for each order, so that an order costs
milliseconds. It runs nothing itself, has one thread, and never opens a store.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from pyworkflow import sleep, step, workflow
from pyworkflow._config import Settings
from pyworkflow._engine.deliver import event_payload, run_payload
from pyworkflow._engine.worker import Worker
from pyworkflow._operations import Operations
from pyworkflow._plugins import make_storage
from pyworkflow.errors import RunExists, StepInterrupted, StorageError
from pyworkflow.events import Event
from pyworkflow.runs import ItemKind, ParentRef
from pyworkflow.spi import Change, NewRun, Put, RunQuery, StorageBackend
from pyworkflow.storekit import failpoints
from tests.e2e import _program
from tests.e2e._program import by_queue, long, note, quick, shaky, threaded

__all__ = ["EXPECTED", "KEPT", "PURGED", "TWICE", "Nursery", "Order", "Told", "command"]

#: Seconds after which a process that hangs is ended.
PATIENCE = 60
LEASE = timedelta(seconds=1.5)
#: Ids of runs that are not started by ``start``.
HOST, CHILD = "host", "child"
#: Results by the run's number.
EXPECTED: dict[int, list[Any]] = {
    1: [["a", "b", "c", "d1", "d2", "d3", "e"]],
    2: ["cancelled:cleanup"],
    3: ["linger"],
    4: ["sent"],
    5: ["child"],
    6: ["once", "interrupted"],
    7: [["a", "b", "c", "d1", "d2", "d3", "e"]],
    8: ["ballast"],
}
#: Steps of which one execution is no success.
TWICE = frozenset({"c"})
#: The run whose step begins at most once.
KEPT = 6
#: The run that the first process purges, if it comes to that.
PURGED = 8

#: Whether the step that waits for the next process returns at once.
_last = False
LIMITS = {"segment_bytes": 6_000, "rewrite_bytes": 12_000}


@step(semantics="at_most_once")
async def once(run: int, name: str) -> str:
    """Begins at most once."""
    note(run, name)
    return name


@step
async def linger(run: int, name: str) -> str:
    """Is cut off by the drain of the first process."""
    note(run, name)
    if not _last:
        await asyncio.sleep(PATIENCE)
    return name


@workflow
async def tour(run: int) -> list[str]:
    """Steps in a row and side by side, a retry, a sleep, and one that gets an item of its own."""
    found = [await quick(run, "a"), await threaded(run, "b"), await shaky(run, "c")]
    found += await asyncio.gather(quick(run, "d1"), quick(run, "d2"), by_queue(run, "d3"))
    await sleep(0.01)
    found.append(await long(run, "e"))
    return found


@workflow
async def cancelled(run: int) -> str:
    """Waits to be cancelled, and cleans up."""
    try:
        await sleep("1h")
    except asyncio.CancelledError:
        return "cancelled:" + await quick(run, "cleanup")
    return "slept"


@workflow
async def lingering(run: int) -> str:
    """One step that the first process does not end."""
    return await linger(run, "linger")


@workflow
async def sends(run: int) -> str:
    """Owes two deliveries from its start."""
    return await quick(run, "sent")


@workflow
async def child(run: int) -> str:
    """Is started by a delivery."""
    return await quick(run, "child")


@workflow
async def careful(run: int) -> str:
    """Has a step that begins at most once."""
    try:
        return await once(run, "once")
    except StepInterrupted:
        return "interrupted"


@workflow
async def ballast(run: int, text: str) -> str:
    """Leaves garbage behind when it is purged."""
    return await quick(run, "ballast")


@dataclass
class Order:
    """What a process is to do."""

    url: str
    namespace: str
    folder: str
    failpoints: str = ""
    last: bool = False
    """The last process: nothing is left when it ends."""

    @property
    def path(self) -> Path:
        """Where it leaves what it says."""
        return Path(self.folder)


@dataclass
class Told:
    """What became of a process."""

    status: int
    """As ``Popen.returncode``; minus SIGSTOP while it is stopped."""
    pid: int
    hits: dict[str, int] = field(default_factory=dict)


# --- in the forked process ------------------------------------------------------------------------


def _new(name: str, number: int, **others: Any) -> NewRun:
    return NewRun(workflow=name, version="1", args=f'{{"args":[{number}]}}', **others)


def _started(name: str, number: int) -> Event:
    data = {
        "workflow": name, "version": "1", "args": f'{{"args":[{number}]}}', "seed": "ab" * 16,
    }  # fmt: skip
    return Event("workflow.started", "I", data, None, "started")


async def _insist(call: Any) -> Any:
    """What the call answers, for a client that asks again."""
    for _ in range(20):
        try:
            return await call()
        except StorageError:
            await asyncio.sleep(0.05)
    return await call()


async def _start(storage: StorageBackend, wf: Any, number: int) -> str:
    async def call() -> str:
        bound = wf.options(idempotency_key=f"run-{number}")
        return await Operations(storage, None, None).start(wf, (number,), {}, bound.options)

    return str(await _insist(call))


async def _owe(storage: StorageBackend, waiting: str) -> None:
    """A run that owes a cancel to one run, and starts another."""
    parent = ParentRef(run_id=HOST, op="1#1:child")
    starts = run_payload(
        CHILD, _new("child", 5, parent=parent, root=HOST), _started("child", 5).data
    )
    cancels = event_payload(waiting, "cancel.requested", {"reason": "by message"})
    change = Change(
        run_id=HOST,
        key="start:host",
        create=_new("sends", 4),
        events=[_started("sends", 4)],
        put=[
            Put(item_id="turn", kind=ItemKind.TURN),
            Put(item_id="deliver:child", kind=ItemKind.DELIVER, payload=starts),
            Put(item_id="deliver:cancel", kind=ItemKind.DELIVER, payload=cancels),
        ],
    )

    async def call() -> None:
        try:
            await storage.commit_one(change)
        except RunExists:
            pass  # by the process before

    await _insist(call)


async def _work(order: Order) -> None:
    storage = make_storage(order.url, order.namespace)
    _make_small(storage)
    config = Settings(lease=LEASE, renew_every=timedelta(seconds=0.1))
    rung = asyncio.Event()
    worker = Worker(storage, config, notify=lambda _: rung.set())
    acks = (order.path / "acks").open("a", encoding="ascii")
    await _insist(worker.open)
    worker.serve()
    if not order.last:
        await _purge_one(storage)
    ids: dict[int, str] = {}
    starts = ((1, tour), (2, cancelled), (3, lingering), (6, careful), (7, tour))
    for number, wf in starts:
        ids[number] = await _start(storage, wf, number)
        print(number, ids[number], file=acks, flush=True)
    await _owe(storage, ids[2])
    ids |= {4: HOST, 5: CHILD}
    ops = Operations(storage, worker, None)
    for number, run_id in ids.items():
        if number == 3 and not order.last:
            continue
        if number == 5:
            await _until(lambda: storage.get_run(CHILD))

        async def call(run_id: str = run_id) -> Any:
            return await ops.result(run_id, PATIENCE)

        found = await _insist(call)
        assert found in EXPECTED[number], (number, found)
    if order.last:
        await _until(lambda: _all_over(storage))
    else:
        await _until(lambda: _lingers(order))
    await worker.drain(0.05)
    await worker.close()
    await storage.close()


async def _purge_one(storage: StorageBackend) -> None:
    """Start a run, wait for its end, and purge it, before any other run can have ended."""
    ops = Operations(storage, None, None)
    bound = ballast.options(idempotency_key=f"run-{PURGED}")
    args = (PURGED, "x" * LIMITS["rewrite_bytes"])
    run_id: Any = await _insist(lambda: ops.start(ballast, args, {}, bound.options))
    await _insist(lambda: ops.result(run_id, PATIENCE))
    page: Any = await _insist(lambda: storage.list_runs(RunQuery()))
    if len(page.items) == 1:  # no other process went on while this one was stopped
        before = await _insist(storage.now) + timedelta(seconds=1)
        await _insist(lambda: storage.purge(before=before))


async def _until(check: Callable[[], Awaitable[object]]) -> None:
    while not await _insist(check):  # noqa: ASYNC110 - another process, or a store, has no event
        await asyncio.sleep(0.01)


async def _all_over(storage: StorageBackend) -> bool:
    return all(run.status.is_terminal for run in (await storage.list_runs(RunQuery())).items)


async def _lingers(order: Order) -> bool:
    return "3 linger" in (order.path / "steps.log").read_text("ascii")


def _make_small(storage: Any) -> None:
    """Let a journal roll and be rewritten within a few runs."""
    if hasattr(storage, "_segment_bytes"):
        from pyworkflow_storage_file import _writer

        storage._segment_bytes = LIMITS["segment_bytes"]
        _writer._GARBAGE_BYTES = LIMITS["rewrite_bytes"]


def _run(order: Order) -> None:
    global _last
    _last = order.last
    signal.alarm(PATIENCE)
    log = os.open(order.path / "process.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    logging.basicConfig(level=logging.INFO, format="%(process)d %(name)s %(message)s")
    _program.LOG = str(order.path / "steps.log")
    failpoints.read(order.failpoints)
    asyncio.run(_work(order))
    if failpoints.active:
        (order.path / "hits").write_text(json.dumps(failpoints.hits()), encoding="ascii")


# --- the nursery ----------------------------------------------------------------------------------


def _child(order: Order) -> None:
    status = 1
    try:
        _run(order)
        status = 0
    except BaseException:  # noqa: BLE001 - a fork ends here, whatever comes
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wait(pid: int) -> int:
    _, status = os.waitpid(pid, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        return -signal.SIGSTOP
    return os.waitstatus_to_exitcode(status)


def main() -> None:
    """Fork for each order on standard input, and say what became of it."""
    # As `pyworkflow worker` has it: everything is imported before a store is opened.
    for scheme in ("file", "sqlite", "postgresql", "redis"):
        make_storage(f"{scheme}:///nowhere" if scheme in ("file", "sqlite") else f"{scheme}://h/0")
    for line in sys.stdin:
        asked = json.loads(line)
        pid = asked.get("wait", 0)
        if not pid:
            order = Order(**asked)
            pid = os.fork()
            if not pid:
                _child(order)
        told = Told(_wait(pid), pid)
        print(json.dumps(asdict(told)), flush=True)


class Nursery:
    """The process that forks, seen from a test."""

    def __init__(self, process: Any) -> None:
        self._process = process

    def run(self, order: Order) -> Told:
        """Have a process do what is ordered, to its end or until it is stopped."""
        return self._ask(json.dumps(asdict(order)))

    def wait(self, pid: int) -> Told:
        """See the process that was stopped to its end."""
        return self._ask(json.dumps({"wait": pid}))

    def _ask(self, line: str) -> Told:
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the nursery is gone"
        return Told(**json.loads(answer))


def command() -> Sequence[str]:
    """How a nursery is begun."""
    return [sys.executable, "-m", __name__]


if __name__ == "__main__":
    from tests.e2e import _crashes  # not as __main__: workflows are defined once

    _crashes.main()
