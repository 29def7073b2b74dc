"""The renewal of leases from outside of a starved process, and its fences."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import psutil
import pytest

from pyworkflow._config import Settings
from pyworkflow._engine import keeper as keeper_module
from pyworkflow._engine.keeper import LeaseKeeper
from pyworkflow._engine.lease_table import LeaseTable, shared_memory
from pyworkflow._engine.outages import Outages
from pyworkflow._engine.renewals import RenewalProcess
from pyworkflow._plugins import make_storage
from pyworkflow.spi import (
    Change,
    ClaimRef,
    ClaimRequest,
    Event,
    EventClass,
    ItemKind,
    NewRun,
    Put,
    StorageBackend,
)
from pyworkflow.storage.memory import MemoryStorageBackend
from tests.core._driving import eventually

LEASE = timedelta(seconds=2)


def table() -> tuple[LeaseTable, LeaseTable]:
    """A table as its worker has it, and as the process beside it does."""
    fd = shared_memory()
    try:
        return LeaseTable(fd), LeaseTable(fd)
    finally:
        os.close(fd)


def test_a_claim_is_seen_by_the_other_process_until_it_is_over() -> None:
    worker, outside = table()
    refs = [ClaimRef("run-ü", "turn", "t1"), ClaimRef("run\ud800", "step:1", "t2")]
    for number, ref in enumerate(refs):
        worker.add(ref, float(number))
    assert outside.claims(10.0) == refs
    assert outside.claims(0.5) == refs[:1]
    worker.discard(refs[0])
    worker.discard(refs[0])
    assert outside.claims(10.0) == refs[1:]
    worker.beat(7.0)
    worker.renewed(8.0)
    outside.renewed_outside(9.0)
    assert (outside.beat_at, outside.renewed_at, worker.outside_at) == (7.0, 8.0, 9.0)


def test_a_table_has_room_for_many_and_leaves_out_what_does_not_fit() -> None:
    worker, outside = table()
    refs = [ClaimRef(f"run-{number}", "turn", f"t{number}") for number in range(2100)]
    worker.add(ClaimRef("x" * 2000, "turn", "t"), 0.0)
    for ref in refs:
        worker.add(ref, 0.0)
    assert set(outside.claims(1.0)) == set(refs[:2048])
    for ref in refs:
        worker.discard(ref)
    assert outside.claims(1.0) == []


def test_a_record_that_is_being_written_is_read_later() -> None:
    worker, outside = table()
    ref = ClaimRef("run", "turn", "token")
    worker.add(ref, 0.0)
    worker._memory[64 + 30] ^= 1  # a byte of the first record
    assert outside.claims(1.0) == []
    worker._memory[64 + 30] ^= 1
    assert outside.claims(1.0) == [ref]


async def claimed(storage: StorageBackend) -> ClaimRef:
    """A claim of a fresh run."""
    started = Event("workflow.started", EventClass.INPUT, {}, None, "started")
    change = Change(
        run_id="run",
        key="start",
        create=NewRun(workflow="w", version="1", args="[]"),
        events=[started],
        put=[Put(item_id="turn", kind=ItemKind.TURN)],
    )
    await storage.commit([change])
    answer = await storage.claim(ClaimRequest(owner="me", lease=LEASE))
    return answer.claims[0].ref


def begin(url: str, storage: StorageBackend, every: float = 0.4) -> RenewalProcess:
    config = Settings(storage=url, lease=LEASE, renew_every=timedelta(seconds=every))
    process = RenewalProcess.start(config, storage)
    assert process is not None
    return process


def test_a_process_renews_while_the_loop_answers_and_stops_when_it_hangs(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s.db"

    async def main() -> None:
        async with make_storage(url, "default") as storage:
            ref = await claimed(storage)
            process = begin(url, storage)
            try:
                process.table.add(ref, time.monotonic())

                async def renewed() -> bool:
                    process.table.beat(time.monotonic())
                    return process.table.outside_at > 0

                await eventually(renewed)
                before = process.table.outside_at

                async def again() -> bool:
                    process.table.beat(time.monotonic())
                    return process.table.outside_at > before

                await eventually(again)
                assert await storage.renew([ref], LEASE) == [True]

                # The loop hangs: its lease ends, and another worker has the item.
                async def lost() -> bool:
                    request = ClaimRequest(owner="you", lease=timedelta(seconds=60))
                    return bool((await storage.claim(request)).claims)

                await eventually(lost)
                assert await storage.renew([ref], LEASE) == [False]
            finally:
                process.close()
            assert process.has_ended

    asyncio.run(main())


def test_a_released_claim_is_not_renewed(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s.db"

    async def main() -> None:
        async with make_storage(url, "default") as storage:
            ref = await claimed(storage)
            process = begin(url, storage)
            try:
                process.table.add(ref, time.monotonic())
                assert await storage.release(ref)  # and the worker had no time to say so

                async def asked() -> bool:
                    process.table.beat(time.monotonic())
                    return process.table.outside_at > 0

                await eventually(asked)
                (item,) = await storage.list_work("run")
                assert item.lease is None
            finally:
                process.close()

    asyncio.run(main())


def test_there_is_no_process_for_a_store_within_one_process() -> None:
    storage = MemoryStorageBackend()
    assert RenewalProcess.start(Settings(storage=storage), storage) is None
    assert RenewalProcess.start(Settings(storage="memory://"), storage) is None


PROGRAM = """
import os, sys, time
from pyworkflow._config import Settings
from pyworkflow._engine.renewals import RenewalProcess
from pyworkflow._plugins import make_storage
url, forks = sys.argv[1], sys.argv[2] == "fork"
process = RenewalProcess.start(Settings(storage=url), make_storage(url, "default"))
child = 0
if forks:
    child = os.fork()  # it outlives this process, and has its descriptors
    if child == 0:
        time.sleep(60)
        os._exit(0)
print(process.pid, child, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("how", ["alone", "fork"])
def test_a_process_ends_with_its_worker_however_that_ends(tmp_path: Path, how: str) -> None:
    worker = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, f"sqlite:///{tmp_path}/s.db", how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert worker.stdout is not None
    assert worker.stdin is not None
    pid, child = map(int, worker.stdout.readline().split())
    try:
        assert psutil.pid_exists(pid)
        worker.kill()
        worker.wait()
        asyncio.run(eventually(lambda: _is_gone(pid)))
    finally:
        worker.stdin.close()
        worker.stdout.close()
        if child:
            psutil.Process(child).kill()


def _is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_starved_thread_renews_before_it_starts_the_process_beside_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The start takes as long as a lease when each call of the system waits for the lock."""
    happened: list[str] = []

    class Noting(MemoryStorageBackend):
        def clone(self) -> Noting:
            return self

        async def renew(self, refs: Sequence[ClaimRef], lease: timedelta) -> list[bool]:
            happened.append("renewal")
            return [True] * len(refs)

        async def close(self) -> None: ...

    def start() -> None:
        happened.append("process")

    async def main() -> None:
        storage = Noting()
        minute = timedelta(minutes=1)
        outages = Outages(storage.now, "me")
        keeper = LeaseKeeper(
            storage, minute, 60 * minute, print, outages=outages, start_process=start
        )
        keeper.add(ClaimRef("run", "turn", "t"))
        keeper._begin()  # the next renewal is due in half an hour
        await eventually(lambda: "process" in happened)
        keeper.close()
        await keeper.closed(60)

    monkeypatch.setattr(keeper_module, "_LATE", 1e12)  # each wake-up is late
    asyncio.run(main())
    assert happened == ["renewal", "process"]
