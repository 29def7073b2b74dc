"""A database that is deleted, moved or replaced while it is open: noticed at the next write."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from pyworkflow.spi import (
    Change,
    ClaimRequest,
    Event,
    ItemKind,
    NewRun,
    Put,
    RunQuery,
    StorageError,
)
from pyworkflow.storekit.embedded import Pace
from pyworkflow_storage_sql import SQLiteStorageBackend


def create(run_id: str) -> Change:
    return Change(
        run_id=run_id,
        key=f"start-{run_id}",
        create=NewRun(workflow="w", version="1", args="[]"),
        events=[Event("workflow.started", "I", {}, key="started")],
        put=[Put(item_id="turn", kind=ItemKind.TURN)],
    )


def deleted(path: Path) -> None:
    path.unlink()


def moved(path: Path) -> None:
    path.rename(path.with_name("elsewhere.db"))


def replaced(path: Path) -> None:
    """A restored backup, put in place."""
    backup = path.with_name("backup.db")
    shutil.copy(path, backup)
    backup.replace(path)


@pytest.mark.parametrize("happens", [deleted, moved, replaced])
def test_found_h04_neither_a_commit_nor_a_claim_uses_a_file_that_is_not_at_the_path(
    happens: Callable[[Path], None], tmp_path: Path
) -> None:
    path = tmp_path / "store.db"
    request = ClaimRequest(owner="o", lease=timedelta(minutes=1))

    async def main() -> None:
        async with SQLiteStorageBackend(path) as storage:
            await storage.commit_one(create("first"))
            happens(path)
            for _ in range(2):  # it stays so
                with pytest.raises(StorageError, match="deleted, moved or replaced"):
                    await storage.claim(request)
                with pytest.raises(StorageError, match=f"path={path}"):
                    await storage.commit_one(create("second"))
            if happens is not replaced:
                assert not path.exists()

    asyncio.run(main())


def test_found_h04_a_file_that_is_put_back_is_used_again(tmp_path: Path) -> None:
    path, away = tmp_path / "store.db", tmp_path / "away.db"

    async def main() -> None:
        async with SQLiteStorageBackend(path) as storage:
            await storage.commit_one(create("first"))
            path.rename(away)
            with pytest.raises(StorageError):
                await storage.commit_one(create("second"))
            away.rename(path)
            again = await storage.commit_one(create("second"))
            assert again.duplicate  # the file that was moved had it
            page = await storage.list_runs(RunQuery())
            assert {run.run_id for run in page.items} == {"first", "second"}

    asyncio.run(main())


def test_found_h04_a_commit_is_acknowledged_only_when_the_path_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "store.db"

    async def main() -> None:
        async with SQLiteStorageBackend(path) as storage:
            await storage.commit_one(create("first"))
            flushed = Pace.flushed

            def moves_now(self: Pace, took: int) -> None:  # called between commit and answer
                path.rename(tmp_path / "elsewhere.db")
                flushed(self, took)

            monkeypatch.setattr(Pace, "flushed", moves_now)
            with pytest.raises(StorageError, match="deleted, moved or replaced"):
                await storage.commit_one(create("second"))

    asyncio.run(main())
