"""A database that is deleted, moved, replaced or truncated while it is open: noticed at once."""

from __future__ import annotations

import asyncio
import os
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


def truncated(path: Path) -> None:
    """As ``: > store.db`` and logrotate's ``copytruncate`` do."""
    os.truncate(path, 0)


def log_of(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")


def log_deleted(path: Path) -> None:
    """As somebody does who takes ``-wal`` and ``-shm`` for stale files."""
    log_of(path).unlink()
    path.with_name(f"{path.name}-shm").unlink()


def log_moved(path: Path) -> None:
    moved(log_of(path))


def log_replaced(path: Path) -> None:
    replaced(log_of(path))


LOST = {
    deleted: "the database was deleted, moved or replaced",
    moved: "the database was deleted, moved or replaced",
    replaced: "the database was deleted, moved or replaced",
    truncated: "the database was truncated",
    log_deleted: "the write-ahead log of the database was deleted, moved or replaced",
    log_moved: "the write-ahead log of the database was deleted, moved or replaced",
    log_replaced: "the write-ahead log of the database was deleted, moved or replaced",
}


@pytest.mark.parametrize("happens", LOST)
def test_found_h04_neither_a_commit_nor_a_claim_uses_a_file_that_is_not_at_the_path(
    happens: Callable[[Path], None], tmp_path: Path
) -> None:
    path = tmp_path / "store.db"
    message = LOST[happens]
    request = ClaimRequest(owner="o", lease=timedelta(minutes=1))

    async def main() -> None:
        async with SQLiteStorageBackend(path) as storage:
            await storage.commit_one(create("first"))
            happens(path)
            for _ in range(2):  # it stays so
                with pytest.raises(StorageError, match=message):
                    await storage.claim(request)
                with pytest.raises(StorageError, match=f"{message}.* path={path}"):
                    await storage.commit_one(create("second"))
            if happens in {deleted, moved}:
                assert not path.exists()

    asyncio.run(main())


@pytest.mark.parametrize("is_reader_open", [True, False])
@pytest.mark.parametrize("happens", LOST)
def test_found_h04_no_read_is_answered_from_a_file_that_is_not_at_the_path(
    happens: Callable[[Path], None], is_reader_open: bool, tmp_path: Path
) -> None:
    path = tmp_path / "store.db"

    async def main() -> None:
        async with SQLiteStorageBackend(path) as storage:
            await storage.commit_one(create("first"))
            if is_reader_open:
                await storage.list_runs(RunQuery())
            happens(path)
            for _ in range(2):
                with pytest.raises(StorageError, match=LOST[happens]):
                    await storage.list_runs(RunQuery())
                with pytest.raises(StorageError, match=LOST[happens]):
                    await storage.get_events("first")
                with pytest.raises(StorageError, match=LOST[happens]):
                    await storage.stats()
                with pytest.raises(StorageError, match=LOST[happens]):
                    await storage.get_run("first")
            if happens in {deleted, moved}:
                assert not path.exists()

    asyncio.run(main())


def test_found_h04_the_log_of_a_database_behind_a_link_is_looked_for_beside_the_database(
    tmp_path: Path,
) -> None:
    (tmp_path / "data").mkdir()
    path = tmp_path / "link.db"
    path.symlink_to(tmp_path / "data" / "store.db")

    async def main() -> None:
        async with SQLiteStorageBackend(path) as storage:
            await storage.commit_one(create("first"))
            assert (await storage.list_runs(RunQuery())).items
            log_deleted(tmp_path / "data" / "store.db")
            with pytest.raises(StorageError, match="write-ahead log"):
                await storage.commit_one(create("second"))

    asyncio.run(main())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_found_h04_a_log_that_is_made_again_after_all_have_closed_is_no_loss(
    tmp_path: Path,
) -> None:
    path = tmp_path / "store.db"

    async def main() -> None:
        async with SQLiteStorageBackend(path) as storage:
            await storage.commit_one(create("first"))
            await storage.list_runs(RunQuery())
            pid = os.fork()  # it closes all connections, and the last one deletes the log
            if pid == 0:
                os._exit(0 if not log_of(path).exists() else 1)
            _, status = await asyncio.to_thread(os.waitpid, pid, 0)
            assert status == 0
            assert len((await storage.list_runs(RunQuery())).items) == 1
            await storage.commit_one(create("second"))
            assert len((await storage.list_runs(RunQuery())).items) == 2

    asyncio.run(main())


def test_found_h04_a_log_that_was_lost_is_not_made_again_by_a_process_that_used_it(
    tmp_path: Path,
) -> None:
    path = tmp_path / "store.db"

    async def main() -> None:
        async with SQLiteStorageBackend(path) as storage:
            await storage.commit_one(create("first"))
            log_deleted(path)
            with pytest.raises(StorageError, match="write-ahead log"):
                await storage.commit_one(create("second"))
            dispatcher = storage._started()
            dispatcher._writer.close()  # as after a rollback that failed
            with pytest.raises(StorageError, match="write-ahead log"):
                await storage.commit_one(create("third"))
            assert not log_of(path).exists()

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
