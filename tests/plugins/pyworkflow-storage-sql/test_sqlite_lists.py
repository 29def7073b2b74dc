"""Listings on SQLite: what a page reads does not grow with the number of open runs."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from pyworkflow import RunStatus
from pyworkflow.spi import ClaimRequest, ItemKind, RunQuery
from pyworkflow_storage_sql import SQLiteStorageBackend
from pyworkflow_storage_sql.sqlite import _reader, _reads, _work, _writer
from tests.statuses import MINUTE, check_listings, created, make_every_status, sleepers


@pytest.fixture
def instructions(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """SQLite's instructions so far, in tens."""
    counted = 0

    def count() -> int:
        nonlocal counted
        counted += 1
        return 0

    connect, execute = _writer.connect, _reader._Connection.execute

    def connected(path: Path) -> sqlite3.Connection:
        conn = connect(path)
        conn.set_progress_handler(count, 10)
        return conn

    def executed(self: _reader._Connection, sql: str, values: Any = (), /) -> Any:
        self.set_progress_handler(count, 10)
        return execute(self, sql, values)

    monkeypatch.setattr(_writer, "connect", connected)
    monkeypatch.setattr(_reader._Connection, "execute", executed)
    return lambda: counted


def test_found_m03_a_page_of_an_open_status_reads_no_more_in_a_larger_store(
    tmp_path: Path, instructions: Callable[[], int]
) -> None:
    stalled, pending, running = RunStatus.STALLED, RunStatus.PENDING, RunStatus.RUNNING
    suspended = RunStatus.SUSPENDED
    asked: list[tuple[list[RunStatus], str | None]] = [
        ([stalled], None),
        ([RunStatus.PAUSED], None),
        ([running], None),
        ([stalled, running, RunStatus.FAILED], None),
        ([pending], "flow"),
        ([running], "later"),
        ([suspended], "later"),
        ([suspended, running], "later"),
    ]

    async def main() -> None:
        async with SQLiteStorageBackend(tmp_path / "store.db") as store:
            far = await store.now() + timedelta(days=9)

            async def cost(statuses: list[RunStatus], workflow: str | None) -> int:
                query = RunQuery(status=frozenset(statuses), workflow=workflow)
                before = instructions()
                assert (await store.list_runs(query)).items == []
                return instructions() - before

            found = []
            for size in (100, 2000):
                await sleepers(store, [f"r{size}-{n}" for n in range(size)])
                await store.commit(
                    [created(f"p{size}-{n}", workflow="later", due_at=far) for n in range(size)]
                )
                found.append([await cost(*filters) for filters in asked])
            for few, many in zip(*found, strict=True):
                assert many <= 1.5 * few + 50

    asyncio.run(main())


def test_found_m04_a_look_for_work_reads_nothing_of_what_waits_for_others(
    tmp_path: Path, instructions: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_work, "_MOST_RUNG", 50)
    queues, workflows = frozenset({"other"}), frozenset({"other"})
    due = [
        ClaimRequest(owner="w", lease=MINUTE, limit=10, queues=queues),
        ClaimRequest(owner="w", lease=MINUTE, limit=10, workflows=workflows),
        ClaimRequest(owner="w", lease=MINUTE, limit=10, kinds=frozenset({ItemKind.STEP})),
    ]

    async def main() -> None:
        async with SQLiteStorageBackend(tmp_path / "store.db") as store:

            async def cost(ask: Callable[[], Awaitable[object]]) -> int:
                await ask()
                before = instructions()
                await ask()
                return instructions() - before

            found = []
            for size in (100, 2000):
                await sleepers(store, [f"r{size}-{n}" for n in range(size)])
                await store.commit([created(f"p{size}-{n}") for n in range(size)])
                await store.announce(5000, MINUTE)
                found.append(
                    [
                        *[
                            await cost(lambda request=request: store.claim(request))
                            for request in due
                        ],
                        await cost(store.next_due),
                        await cost(lambda: store.next_due(queues=queues)),
                        await cost(lambda: store.next_due(workflows=workflows)),
                        await cost(lambda: store.announce(10, MINUTE)),
                        await cost(store.holders),
                        await cost(lambda: store.leases("w")),
                    ]
                )
            assert [many for _, many in zip(*found, strict=True)] == [
                pytest.approx(few, rel=0.5, abs=10) for few in found[0]
            ]

    asyncio.run(main())


def test_found_h01_a_deep_page_of_keys_reads_none_before_it(
    tmp_path: Path, instructions: Callable[[], int]
) -> None:
    async def main() -> None:
        async with SQLiteStorageBackend(tmp_path / "store.db") as store:
            await store.commit([created(f"r{n}", idempotency_key=f"k{n}") for n in range(3001)])
            costs, cursor = [], None
            for _ in range(3):
                before = instructions()
                page = await store.export_keys(cursor)
                assert len(page.items) == 1000
                costs.append(instructions() - before)
                cursor = page.cursor
            assert max(costs) <= 1.1 * costs[0] + 10

    asyncio.run(main())


@pytest.mark.parametrize("most", [1000, 2], ids=["few awake", "many awake"])
def test_found_m03_open_statuses_are_those_of_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(_reads, "_MOST_AWAKE", most)

    async def main() -> None:
        async with SQLiteStorageBackend(tmp_path / "store.db") as store:
            await make_every_status(store)
            await check_listings(store)

    asyncio.run(main())
