"""Migrations of the SQLite backend, several processes at once, and its documented tables."""

from __future__ import annotations

import asyncio
import contextlib
import re
import sqlite3
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from pyworkflow.spi import (
    Change,
    ClaimRequest,
    ConfigurationError,
    ErrorInfo,
    Event,
    ItemKind,
    LeaseFor,
    NewRun,
    Put,
    RunStatus,
    StorageDamaged,
    Update,
)
from pyworkflow_storage_sql import SQLiteStorageBackend
from pyworkflow_storage_sql.sqlite import _schema as schema

_TABLES = Path(__file__).parents[3] / "docs" / "reference" / "tables-sqlite.md"
MIGRATIONS = [name for _, name, _ in schema._migrations()]
_RACER = """
import asyncio, sys
from datetime import timedelta
from pyworkflow.spi import Change, ClaimRequest, Event, LeaseFor, NewRun
from pyworkflow_storage_sql import SQLiteStorageBackend

async def main(path, name):
    async with SQLiteStorageBackend(path) as storage:
        create = NewRun(workflow="w", version="1", args="[]")
        try:
            await storage.commit_one(Change(run_id="shared", key="start", create=create))
        except Exception as error:
            sys.exit(repr(error))
        for number in range(25):
            key = f"{name}-{number}"
            own = Change(run_id="shared", key=key, events=[Event("x.y", "I", {}, key=key)])
            await storage.commit_one(own)
            request = ClaimRequest(owner=name, lease=timedelta(minutes=1), limit=5)
            for claim in (await storage.claim(request)).claims:
                print(claim.item.lease.token, flush=True)
                await storage.release(claim.ref)

sys.stdin.readline()
asyncio.run(main(*sys.argv[1:]))
"""


def test_eight_processes_make_and_use_one_database(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", _RACER, str(path), f"p{number}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(8)
    ]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    tokens: list[str] = []
    for racer in racers:
        out, err = racer.communicate(timeout=120)
        assert (racer.returncode, err) == (0, "")
        tokens += out.split()
    assert len(tokens) == len(set(tokens))

    async def check() -> None:
        async with SQLiteStorageBackend(path) as storage:
            events = await storage.get_events("shared")
            assert [event.seq for event in events] == list(range(1, 201))
            for number in range(8):
                keys = [e.key for e in events if e.key and e.key.startswith(f"p{number}-")]
                assert keys == [f"p{number}-{n}" for n in range(25)]

    asyncio.run(check())


def test_migrations_are_numbered_without_gaps() -> None:
    assert [int(name[:4]) for name in MIGRATIONS] == list(range(1, len(MIGRATIONS) + 1))


def test_a_dry_run_names_what_is_to_do_and_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.db"

    async def main() -> None:
        storage = SQLiteStorageBackend(path)
        names = [*MIGRATIONS, "namespace default"]
        assert await storage.pending_migrations() == names
        assert await storage.pending_migrations() == names
        await storage.migrate()
        assert await storage.pending_migrations() == []
        await storage.migrate()
        await storage.close()

    async def ask(namespace: str) -> list[str]:
        return await SQLiteStorageBackend(path, namespace=namespace).pending_migrations()

    nowhere = SQLiteStorageBackend(tmp_path / "b.db").pending_migrations()
    assert asyncio.run(nowhere) == [*MIGRATIONS, "namespace default"]
    assert list(tmp_path.iterdir()) == []
    asyncio.run(main())
    before = path.read_bytes()
    assert asyncio.run(ask("default")) == []
    assert asyncio.run(ask("other")) == ["namespace other"]
    assert path.read_bytes() == before


def test_a_file_is_a_store_when_it_has_the_tables_and_asking_writes_nothing(tmp_path: Path) -> None:
    def exists(name: str) -> bool:
        return asyncio.run(SQLiteStorageBackend(tmp_path / name).exists())

    async def make() -> None:
        async with SQLiteStorageBackend(tmp_path / "made.db", namespace="other"):
            # While it is open, the tables are in the write-ahead log alone.
            assert await SQLiteStorageBackend(tmp_path / "made.db").exists()

    (tmp_path / "empty.db").touch()
    (tmp_path / "text.db").write_text("no database" * 100)
    assert not exists("missing.db")
    assert not exists("empty.db")
    with pytest.raises(StorageDamaged):
        exists("text.db")
    with pytest.raises(ConfigurationError, match="is a directory"):
        exists(".")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.db", "text.db"]
    assert (tmp_path / "empty.db").read_bytes() == b""
    asyncio.run(make())
    assert exists("made.db")


def test_a_migration_that_breaks_midway_is_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.db"
    (number, name, text) = schema._migrations()[0]
    monkeypatch.setattr(schema, "_migrations", lambda: [(number, name, text + "\nnonsense;")])
    with contextlib.closing(schema.connect(path)) as conn:
        with pytest.raises(sqlite3.OperationalError, match="nonsense"):
            schema.migrate(conn, path)
        assert conn.execute("select count(*) from sqlite_master").fetchone() == (0,)
    monkeypatch.undo()
    with contextlib.closing(schema.connect(path)) as conn:
        schema.migrate(conn, path)
        assert conn.execute("pragma user_version").fetchone() == (len(MIGRATIONS),)


async def _fill(path: Path) -> None:
    async with SQLiteStorageBackend(path) as storage:
        await storage.shift_clock(-timedelta(days=1))
        for number in range(3):
            await storage.commit_one(
                Change(
                    run_id=f"r{number}",
                    key="start",
                    create=NewRun(workflow="order", version="1", args="[]", tags=("eu",)),
                    events=[Event("workflow.started", "I", {"args": "[]"})],
                    take_turn=LeaseFor("me", timedelta(hours=1)),
                    put=[Put(item_id="step:1", kind=ItemKind.STEP, queue="slow")],
                )
            )
        claims = (
            await storage.claim(ClaimRequest(owner="me", lease=timedelta(hours=1), limit=9))
        ).claims
        assert len(claims) == 3
        (turn,) = [i for i in await storage.list_work("r0") if i.item_id == "turn"]
        assert turn.lease is not None
        from pyworkflow.spi import ClaimRef

        await storage.commit_one(
            Change(
                run_id="r0",
                key=f"{turn.lease.token}:1",
                claim=ClaimRef("r0", "turn", turn.lease.token),
                seen=1,
                final=RunStatus.FAILED,
                update=Update(error=ErrorInfo(type="builtins:ValueError", message="no such order")),
                events=[Event("workflow.failed", "C", {})],
            )
        )
        await storage.shift_clock(timedelta(days=1))


def test_the_documented_questions_are_answered_in_plain_sql(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    asyncio.run(_fill(path))
    questions = re.findall(
        r"^### (.+?)\n.*?```sql\n(.*?)```",
        _TABLES.read_text(encoding="utf-8"),
        re.DOTALL | re.MULTILINE,
    )
    answers: dict[str, list[tuple[object, ...]]] = {}
    with contextlib.closing(sqlite3.connect(path)) as conn:
        for question, sql in questions:
            answers[question] = conn.execute(sql).fetchall()
    assert [(row[0], row[3]) for row in answers["Which runs failed yesterday?"]] == [
        ("r0", "no such order")
    ]
    assert answers["How many runs are there, by workflow and status?"] == [
        ("order", "failed", 1),
        ("order", "running", 2),
    ]
    assert {row[:2] for row in answers["What is owed, and who holds it?"]} == {
        ("r1", "step:1"),
        ("r1", "turn"),
        ("r2", "step:1"),
        ("r2", "turn"),
    }
    assert [row[1] for row in answers["What happened in one run?"]] == ["workflow.started"]
    assert len(answers["What is due, and nobody took it?"]) == 4
    assert answers["Which runs have a tag?"] == [
        ("r2", "running"),
        ("r1", "running"),
        ("r0", "failed"),
    ]
    assert answers["Which runs are the largest?"]


def test_every_table_and_view_is_documented(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    asyncio.run(_fill(path))
    text = _TABLES.read_text(encoding="utf-8")
    with contextlib.closing(sqlite3.connect(path)) as conn:
        names = conn.execute(
            "select name from sqlite_master where type in ('table', 'view') "
            "and name not like 'sqlite_%'"
        ).fetchall()
    for (name,) in names:
        assert f"`{name}`" in text
