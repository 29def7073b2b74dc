"""Query plans on SQLite: no statement of a hot or listed path reads a whole table.

Growth is decided by plans: a statement that scans costs nothing in a test and stops writers for
seconds in a store of a million runs.
"""

from __future__ import annotations

import asyncio
import re
import sqlite3
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from pyworkflow import Client, RunStatus, sleep, step, workflow
from pyworkflow.spi import RunQuery
from pyworkflow_storage_sql import SQLiteStorageBackend
from pyworkflow_storage_sql.sqlite import _reader, _writer

#: Every use of a table with few rows, or whose rows are all wanted.
MAY_SCAN = {"namespaces", "n", "json_each", "sqlite_master", "p"}
#: What a statement makes for itself: the clock, queues, heads of buckets, up to 1,001 runs.
MAY_SCAN |= {"CONSTANT", "clock", "q", "heads", "h", "awake", "tried", "a"}
INDEXES = {
    "answers_by_key",
    "answers_by_token",
    "events_by_key",
    "events_by_seq",
    "keys_by_end",
    "runs_by_end",
    "runs_by_state",
    "runs_by_workflow_state",
    "work_free",
    "work_held",
    "work_tried",
}


@step
async def plan_double(x: int) -> int:
    return 2 * x


@step(dispatch="queue")
async def plan_dispatched(x: int) -> int:
    return 2 * x


@workflow
async def plan_run(x: int) -> int:
    await asyncio.gather(plan_dispatched(x), plan_dispatched(x + 1))
    await sleep("10ms")
    return await plan_double(x)


@workflow
async def plan_sleeper() -> None:
    await sleep("1d")


class Statements:
    """What was executed: the text of each statement, once, with values that it had."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[str, Any]] = {}

    def add(self, sql: str, values: Any = ()) -> None:
        if re.match(r"\s*(select|insert|update|delete|with)\b", sql, re.IGNORECASE):
            shape = re.sub(r"'(?:[^']|'')*'|\b\d+\b", "?", sql)
            self.found.setdefault(re.sub(r"(\?, )+\?", "?", shape), (sql, values))


@pytest.fixture
def statements(monkeypatch: pytest.MonkeyPatch) -> Statements:
    """Collects from every connection that is made from now on."""
    seen = Statements()
    connect, execute = _writer.connect, _reader._Connection.execute

    def connected(path: Path) -> sqlite3.Connection:
        conn = connect(path)
        conn.set_trace_callback(seen.add)
        return conn

    def executed(self: _reader._Connection, sql: str, values: Any = (), /) -> Any:
        seen.add(sql, values)
        return execute(self, sql, values)

    monkeypatch.setattr(_writer, "connect", connected)
    monkeypatch.setattr(_reader._Connection, "execute", executed)
    return seen


async def use_everything(path: Path) -> None:
    """Each operation of the contract, and runs that end, sleep and are purged."""
    async with SQLiteStorageBackend(path) as storage:
        async with Client(storage=storage, executor="local://") as client:
            first = await client.start(plan_run, 1, idempotency_key="first")
            assert await client.result(first) == 2
            sleeper = await client.start(plan_sleeper, idempotency_key="sleeper")
            assert await client.start(plan_sleeper, idempotency_key="sleeper") == sleeper
            second = await client.start(plan_run, 2)
            assert await client.result(second) == 4
            await client.cancel(sleeper)
        statuses: list[frozenset[RunStatus] | None] = [None, frozenset({RunStatus.FAILED})]
        statuses += [frozenset({RunStatus.FAILED, RunStatus.COMPLETED})]
        statuses += [frozenset({RunStatus.FAILED, RunStatus.STALLED, RunStatus.SUSPENDED})]
        statuses += [frozenset({status}) for status in RunStatus if not status.is_terminal]
        for status in statuses:
            for name in (None, "plan_run"):
                query = RunQuery(status=status, workflow=name, limit=1)
                page = await storage.list_runs(query)
                if page.cursor is not None:
                    await storage.list_runs(query, page.cursor)
        await storage.find_run("first")
        await storage.next_due()
        await storage.next_due(queues=frozenset({"default"}), workflows=frozenset({"plan_run"}))
        await storage.holders()
        await storage.announce(10, timedelta(seconds=30))
        await storage.free("nobody")
        await storage.list_work(sleeper)
        await storage.export_run(first)
        page_of_keys = await storage.export_keys()
        assert page_of_keys.items
        assert await storage.purge(before=await storage.now(), limit=2) == 2


def plans(path: Path, found: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, list[str]]]:
    conn = sqlite3.connect(path)
    try:
        for sql, values in found:
            try:
                rows = conn.execute(f"explain query plan {sql}", values).fetchall()
            except sqlite3.OperationalError as error:
                # "indexed by" an index that is not there.
                assert "no such index" in str(error), (sql, error)  # noqa: PT017 - of no statement here
                rows = []
            yield sql, [row[3] for row in rows]
    finally:
        conn.close()


#: Indexes of which all entries of a namespace may be read: few items are leased, or were claimed in
#: vain; of free ones the first alone.
MAY_RANGE = {"work_held", "work_tried", "work_free"}


def scanned(plan: list[str]) -> set[str]:
    """Tables and indexes that a plan reads from end to end, or all of a namespace."""
    tables = {m[1] for line in plan if (m := re.match(r"SCAN (\w+)(?! \()", line))}
    whole = {m[1] for line in plan if (m := re.search(r"INDEX (\w+) \(namespace=\?\)", line))}
    return tables - MAY_SCAN | whole - MAY_RANGE


def test_found_h01_no_statement_scans_a_table(tmp_path: Path, statements: Statements) -> None:
    path = tmp_path / "store.db"
    asyncio.run(use_everything(path))
    assert len(statements.found) > 30
    scans = {sql: plan for sql, plan in plans(path, statements.found.values()) if scanned(plan)}
    assert not scans


@pytest.mark.parametrize("index", sorted(INDEXES))
def test_found_h01_a_dropped_index_would_be_noticed(
    index: str, tmp_path: Path, statements: Statements
) -> None:
    path = tmp_path / "store.db"
    asyncio.run(use_everything(path))
    with_it = [plan for _, plan in plans(path, statements.found.values())]
    assert any(re.search(rf"INDEX {index}\b", line) for plan in with_it for line in plan)
    conn = sqlite3.connect(path)
    assert {
        name
        for (name,) in conn.execute(
            "select name from sqlite_master where type = 'index' and sql is not null"
        )
    } == INDEXES
    conn.execute(f"drop index {index}")
    conn.close()
    without = [plan for _, plan in plans(path, statements.found.values())]
    assert without != with_it
