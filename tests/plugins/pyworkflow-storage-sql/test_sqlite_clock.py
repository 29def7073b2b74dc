"""The clock of SQLite stores: it never stops, never goes back, and keeps the pace of real time."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pytest

from pyworkflow.errors import RunExists
from pyworkflow.spi import Change, ClaimRequest, ItemKind, NewRun, Put, RunQuery, RunStatus
from pyworkflow_storage_sql import SQLiteStorageBackend
from pyworkflow_storage_sql.sqlite import _writer

MINUTE = timedelta(minutes=1)
DAY = 86_400
FIRST = datetime.fromtimestamp(1_800_000_000, UTC)
REQUEST = ClaimRequest(owner="o", lease=MINUTE, limit=9)


class Machine:
    """A machine whose clocks the test moves."""

    def __init__(self, ahead: int = 0) -> None:
        self.wall = (1_800_000_000 + ahead) * 10**6
        self.ticks = 10**9

    def clocks(self) -> tuple[int, int]:
        return self.wall, self.ticks

    def advance(self, seconds: float) -> None:
        self.wall += int(seconds * 10**6)
        self.ticks += int(seconds * 10**6)


def on(machine: Machine, path: Path) -> SQLiteStorageBackend:
    backend = SQLiteStorageBackend(path / "runs.db")
    backend._clocks = machine.clocks
    return backend


def create(run_id: str, due: timedelta = timedelta(0), now: datetime = FIRST) -> Change:
    return Change(
        run_id=run_id,
        key="start",
        create=NewRun(workflow="w", version="1", args="[]"),
        put=[Put(item_id="turn", kind=ItemKind.TURN, due_at=now + due)],
    )


def shown(backend: SQLiteStorageBackend) -> datetime:
    async def main() -> datetime:
        async with backend:
            return await backend.now()

    return asyncio.run(main())


def test_found_h05_after_a_wall_clock_that_was_ahead_time_passes_at_its_pace(
    tmp_path: Path,
) -> None:
    wrong, right = Machine(ahead=2 * DAY), Machine()

    async def main() -> None:
        async with on(wrong, tmp_path) as backend:
            ahead = await backend.now()
            await backend.commit_one(create("r", due=timedelta(seconds=1), now=ahead))
        assert ahead == FIRST + timedelta(days=2)
        right.advance(0.5)
        async with on(right, tmp_path) as backend:
            assert await backend.now() == ahead + timedelta(seconds=0.5)
            assert not (await backend.claim(REQUEST)).claims
            (run,) = (await backend.list_runs(RunQuery())).items
            assert run.status is RunStatus.PENDING
            right.advance(0.5)
            assert (await backend.claim(REQUEST)).claims  # after one second, not after two days
            (run,) = (await backend.list_runs(RunQuery())).items
            assert run.status is RunStatus.RUNNING
            right.advance(61)
            assert (await backend.claim(REQUEST)).claims  # so do leases end

    asyncio.run(main())


def test_found_h05_processes_with_different_clocks_agree_and_do_not_drive_time_ahead(
    tmp_path: Path,
) -> None:
    wrong, right = Machine(ahead=2 * DAY), Machine()

    async def main() -> None:
        async with on(wrong, tmp_path) as one, on(right, tmp_path) as two:
            for n in range(20):
                await one.commit_one(create(f"a{n}"))
                await two.commit_one(create(f"b{n}"))
                for machine in (wrong, right):
                    machine.advance(1)
                expected = FIRST + timedelta(days=2, seconds=n + 1)
                assert await two.now() == await one.now() == expected
            times: list[datetime] = []
            for n in range(20):
                run = await two.get_run(f"b{n}")
                assert run is not None
                times.append(run.created_at)
            assert {b - a for a, b in pairwise(times)} == {timedelta(seconds=1)}

    asyncio.run(main())


@pytest.mark.parametrize("boot", ["another boot", None])
def test_found_h05_the_clock_does_not_go_back_over_a_restart_of_the_machine(
    tmp_path: Path, boot: str | None
) -> None:
    async def main(machine: Machine) -> datetime:
        async with on(machine, tmp_path) as backend:
            await backend.commit_one(create(f"r{machine.ticks}", now=await backend.now()))
            return await backend.now()

    before = asyncio.run(main(Machine(ahead=2 * DAY)))
    with closing(sqlite3.connect(tmp_path / "runs.db")) as conn, conn:
        # Without a boot: as a store of 0.1.0 that was migrated.
        conn.execute("update namespaces set boot = ?, clock_base = clock_base + ?", (boot, 10**12))
    again = Machine(ahead=60)
    again.ticks = 7 * 10**6
    after = asyncio.run(main(again))
    assert before <= after < before + timedelta(seconds=5)
    again.advance(100)
    assert shown(on(again, tmp_path)) == after + timedelta(seconds=100)


def test_found_h05_a_clock_set_back_while_in_use_stops_nothing(tmp_path: Path) -> None:
    machine = Machine()

    async def main() -> None:
        async with on(machine, tmp_path) as backend:
            await backend.commit_one(create("r", due=timedelta(seconds=10)))
            machine.wall -= 3600 * 10**6
            machine.advance(9)
            assert await backend.now() == FIRST + timedelta(seconds=9)
            assert not (await backend.claim(REQUEST)).claims
            machine.advance(1)
            assert (await backend.claim(REQUEST)).claims

    asyncio.run(main())


@pytest.mark.parametrize("first", ["read", "claim"])
def test_found_l08_a_clock_set_forward_is_followed_and_leases_keep_their_time(
    tmp_path: Path, first: str
) -> None:
    machine = Machine()

    async def main() -> None:
        async with on(machine, tmp_path) as backend, on(machine, tmp_path) as other:
            await backend.commit_one(create("held"))
            await backend.commit_one(create("timer", due=timedelta(hours=1)))
            assert (await backend.claim(REQUEST)).claims
            machine.wall += 2 * 3600 * 10**6
            machine.advance(1)
            if first == "read":
                assert await other.now() == FIRST + timedelta(hours=2, seconds=1)
            (claim,) = (await other.claim(REQUEST)).claims
            assert claim.item.run_id == "timer"
            assert await other.now() == FIRST + timedelta(hours=2, seconds=1)
            assert await backend.now() == FIRST + timedelta(hours=2, seconds=1)
            (item,) = await backend.list_work("held")
            assert item.lease is not None
            assert item.lease.until == FIRST + timedelta(hours=2, seconds=60)
            machine.advance(60)
            claims = (await other.claim(REQUEST)).claims
            assert "held" in {claim.item.run_id for claim in claims}

    asyncio.run(main())


def test_found_l08_a_read_shows_the_old_pace_while_another_process_writes(tmp_path: Path) -> None:
    machine = Machine()

    async def main() -> None:
        async with on(machine, tmp_path) as backend:
            await backend.commit_one(create("r"))
            with closing(sqlite3.connect(tmp_path / "runs.db", isolation_level=None)) as conn:
                conn.execute("begin immediate")
                machine.wall += 3600 * 10**6
                machine.advance(1)
                assert await backend.now() == FIRST + timedelta(seconds=1)
                conn.execute("rollback")
            assert await backend.now() == FIRST + timedelta(hours=1, seconds=1)

    asyncio.run(main())


def test_the_row_of_the_clock_is_read_when_another_process_may_have_changed_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    connect = _writer.connect

    def traced(path: Path) -> sqlite3.Connection:
        conn = connect(path)
        conn.set_trace_callback(lambda sql: read.append(sql) if "from namespaces" in sql else None)
        return conn

    machine = Machine()

    async def main() -> None:
        async with on(machine, tmp_path) as one, on(machine, tmp_path) as other:
            await one.commit_one(create("a"))
            await other.now()
            monkeypatch.setattr(_writer, "connect", connect)
            read.clear()
            for n in range(3):
                await one.commit_one(create(f"b{n}"))
            assert read == []  # nobody else has written
            await other.shift_clock(MINUTE)
            assert (await one.commit_one(create("c"))).timestamp == FIRST + MINUTE
            await one.shift_clock(MINUTE)
            assert (await one.commit_one(create("d"))).timestamp == FIRST + 2 * MINUTE
            with pytest.raises(RunExists):
                await one.commit_one(replace(create("d"), key="again"))
            await one.commit_one(create("e"))
            await other.commit_one(create("f"))
            machine.advance(DAY)  # set forward while nobody looked
            assert (await one.commit_one(create("g"))).timestamp == FIRST + 2 * MINUTE + timedelta(
                1
            )

    monkeypatch.setattr(_writer, "connect", traced)
    asyncio.run(main())
