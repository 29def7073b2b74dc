"""Wide runs on SQL stores: what is read grows with the number of dispatched steps, not its square."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import pytest

from pyworkflow import Client, step, workflow
from pyworkflow.spi import StorageBackend
from pyworkflow_storage_sql import PostgresStorageBackend, SQLiteStorageBackend
from pyworkflow_storage_sql.sqlite import _writer
from tests.core._driving import eventually
from tests.servers import GivenServer, PostgresServer

FEW, MANY = 200, 800
INSTRUCTIONS = 100
"""SQLite counts its instructions by so many."""


@step(dispatch="queue")
async def sql_wide_step(n: int) -> int:
    return n


@workflow
async def sql_wide(number: int) -> int:
    return sum(await asyncio.gather(*(sql_wide_step(n) for n in range(number))))


async def run_wide(store: StorageBackend, steps: int) -> None:
    async with store, Client(storage=store, executor="local://") as client:
        assert await client.result(await client.start(sql_wide, steps)) == sum(range(steps))


def test_o04_a_wide_run_on_sqlite_costs_in_proportion_to_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = 0
    connect = _writer.connect

    def count() -> int:
        nonlocal counted
        counted += 1
        return 0

    def connected(path: Path) -> sqlite3.Connection:
        conn = connect(path)
        conn.set_progress_handler(count, INSTRUCTIONS)
        return conn

    monkeypatch.setattr(_writer, "connect", connected)
    asyncio.run(run_wide(SQLiteStorageBackend(tmp_path / "few.db"), FEW))
    few, counted = counted, 0
    asyncio.run(run_wide(SQLiteStorageBackend(tmp_path / "many.db"), MANY))
    assert counted <= 1.5 * MANY / FEW * few


def test_o04_a_wide_run_on_postgres_reads_in_proportion_to_its_steps(
    postgres: PostgresServer | GivenServer,
) -> None:
    def read(steps: int) -> dict[str, int]:
        """Rows that were fetched from each table."""
        url = postgres.database()
        asyncio.run(run_wide(PostgresStorageBackend(url), steps))
        database = url.rpartition("/")[2].partition("?")[0]
        others = (
            "select count(*) from pg_stat_activity where pid <> pg_backend_pid() "
            f"and backend_type = 'client backend' and datname = '{database}'"
        )
        # A session counts what it read when it ends.
        asyncio.run(eventually(lambda: postgres.sql(others, url=url).strip() == "0"))
        said = postgres.sql(
            "select string_agg(relname || '=' || idx_tup_fetch, ' ') from pg_stat_user_tables "
            "where relname in ('events', 'work_items')",
            url=url,
        )
        return {name: int(n) for name, n in (word.split("=") for word in said.split())}

    few, many = read(FEW), read(MANY)
    assert set(few) == {"events", "work_items"}
    for table, rows in many.items():
        # How changes meet in a batch varies; what is quadratic reads sixteen times as much.
        assert rows <= 2.2 * MANY / FEW * few[table], table
