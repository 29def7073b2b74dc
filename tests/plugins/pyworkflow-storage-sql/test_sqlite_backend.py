"""The SQLite backend: bad input, locks, cancellation, clocks, forks, processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from pyworkflow.spi import (
    Change,
    ClaimRequest,
    ConfigurationError,
    Event,
    ItemKind,
    LeaseFor,
    NewRun,
    Put,
    RunClosed,
    RunNotFound,
    SchemaTooNew,
    StorageDamaged,
    StorageError,
    StorageFull,
    StorageUnavailable,
)
from pyworkflow_storage_sql import SQLiteStorageBackend
from pyworkflow_storage_sql.sqlite._schema import storage_error
from pyworkflow_storage_sql.sqlite._url import make

LEASE = timedelta(seconds=30)


def create(run_id: str, **more: Any) -> Change:
    return Change(
        run_id=run_id,
        key=f"start-{run_id}",
        create=NewRun(workflow="w", version="1", args='{"a":1}'),
        events=[Event("workflow.started", "I", {"n": 1}, key="started")],
        **more,
    )


def note(run_id: str, key: str, data: Any = None) -> Change:
    return Change(run_id=run_id, key=key, events=[Event("x", "O", {"d": data}, key=key)])


def use(path: Path, body: Callable[[SQLiteStorageBackend], Awaitable[Any]], **more: Any) -> Any:
    async def main() -> Any:
        storage = SQLiteStorageBackend(path, **more)
        storage._lock_timeout = 0.2
        async with storage:
            return await body(storage)

    return asyncio.run(main())


def fill(path: Path, count: int = 3) -> None:
    async def body(storage: SQLiteStorageBackend) -> None:
        for number in range(count):
            await storage.commit_one(create(f"r{number}"))

    use(path, body)


# --- URLs -------------------------------------------------------------------------------------


def test_urls_name_relative_and_absolute_files() -> None:
    relative = make("sqlite:///a%20b.db", {})
    absolute = make("sqlite:////data/a.db", {"namespace": "n"})
    assert relative.info().location == str(Path.cwd() / "a b.db")
    assert absolute.info().location == "/data/a.db"
    assert absolute.info().namespace == "n"


@pytest.mark.parametrize(
    "url", ["sqlite:a.db", "sqlite://", "sqlite:///", "sqlite://host/a.db", "sqlite:///:memory:"]
)
def test_a_wrong_url_is_refused_with_the_right_forms(url: str) -> None:
    with pytest.raises(ConfigurationError, match="sqlite:///"):
        make(url, {})


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="options=color"):
        make("sqlite:///a.db", {"color": "red"})


def test_a_missing_driver_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiosqlite", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'pyworkflow-storage-sql\[sqlite\]'"):
        make("sqlite:///a.db", {})


# --- bad files --------------------------------------------------------------------------------


async def _nothing(storage: SQLiteStorageBackend) -> None:
    await storage.now()


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="make it first"):
        use(tmp_path / "gone" / "a.db", _nothing)


def test_a_directory_is_no_database(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="is a directory"):
        use(tmp_path, _nothing)


def test_a_file_that_is_no_database_is_damaged_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    path.write_text("hello " * 400)
    with pytest.raises(StorageDamaged, match=r"a\.db"):
        use(path, _nothing)
    assert path.read_text() == "hello " * 400


def test_a_database_of_something_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with contextlib.closing(sqlite3.connect(path)) as conn:
        conn.execute("create table mine (a)")
    with pytest.raises(ConfigurationError, match="something else"):
        use(path, _nothing)


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    fill(path)
    with contextlib.closing(sqlite3.connect(path)) as conn:
        conn.execute("pragma user_version = 99")
    with pytest.raises(SchemaTooNew, match="version=99"):
        use(path, _nothing)


def test_a_changed_event_is_found_and_named(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    fill(path)
    with contextlib.closing(sqlite3.connect(path)) as conn:
        conn.execute("""update events set data = '{"n":2}' where run = 2""")
        conn.commit()

    async def body(storage: SQLiteStorageBackend) -> None:
        assert len(await storage.get_events("r0")) == 1
        with pytest.raises(StorageDamaged, match="run_id=r1 seq=1"):
            await storage.get_events("r1")

    use(path, body)


def test_a_full_disk_refuses_whole_changes_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.db"

    async def body(storage: SQLiteStorageBackend) -> None:
        await storage.commit_one(create("r"))
        conn = storage._started()._writer._conn
        assert conn is not None
        pages = conn.execute("pragma page_count").fetchone()[0]
        conn.execute(f"pragma max_page_count = {pages + 4}")
        with pytest.raises(StorageFull, match="make room"):
            await storage.commit_one(note("r", "big", "x" * 100_000))
        assert len(await storage.get_events("r")) == 1
        conn.execute("pragma max_page_count = 1000000")
        assert (await storage.commit_one(note("r", "big", "x" * 100_000))).seqs == [2]

    use(path, body)


SIZE_LIMIT = """
import asyncio, resource, sys
from pyworkflow.spi import Change, Event, NewRun, StorageFull
from pyworkflow_storage_sql import SQLiteStorageBackend

def change(run_id, size):
    made = NewRun(workflow="w", version="1", args=f'["{"x" * size}"]')
    event = Event("workflow.started", "I", {}, key="started")
    return Change(run_id=run_id, key=run_id, create=made, events=[event])

async def main():
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    async with SQLiteStorageBackend(sys.argv[1]) as storage:
        await storage.commit_one(change("small", 1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
        for _ in range(2):
            try:
                await storage.commit_one(change("large", 300_000))
            except StorageFull as error:
                print(error)
        assert await storage.get_run("large") is None
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        answer = await storage.commit_one(change("large", 300_000))
        assert not answer.duplicate

asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of the size of files")
def test_f28_a_limit_of_the_size_of_files_is_a_full_disk(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SIZE_LIMIT, str(tmp_path / "a.db")],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert done.stdout.count("Nothing was written") == 2
    assert all(file.name.startswith("a.db") for file in tmp_path.iterdir()), "a probe stays"


def test_a_write_that_fails_though_there_is_room_may_be_sent_again(tmp_path: Path) -> None:
    path = tmp_path / "a.db"

    async def body(storage: SQLiteStorageBackend) -> None:
        await storage.commit_one(create("r"))
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode = sqlite3.SQLITE_IOERR_WRITE
        assert type(storage_error(error, path)) is StorageUnavailable

    use(path, body)


# --- locks and batches ------------------------------------------------------------------------


def test_f27_a_held_lock_ends_in_a_retryable_error_and_heals(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    fill(path)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("begin immediate")

    async def body(storage: SQLiteStorageBackend) -> None:
        with pytest.raises(StorageUnavailable, match="another process holds"):
            await storage.commit_one(note("r0", "a"))
        assert await storage.get_run("r0") is not None, "reads go on"
        other.execute("rollback")
        assert (await storage.commit_one(note("r0", "a"))).duplicate is False

    try:
        use(path, body)
    finally:
        other.close()


def test_a_batch_answers_each_change_alone(tmp_path: Path) -> None:
    async def body(storage: SQLiteStorageBackend) -> None:
        await storage.commit_one(create("r0"))
        first = await storage.commit_one(note("r0", "a"))
        answers = await storage.commit(
            [note("r0", "a"), note("gone", "b"), note("r0", "c"), note("r0", "d")]
        )
        kinds = [type(answer).__name__ for answer in answers]
        assert kinds == ["Committed", "RunNotFound", "Committed", "Committed"]
        again, _, third, fourth = answers
        assert not isinstance(again, (RunNotFound, RunClosed, Exception))
        assert again.duplicate
        assert again.seqs == first.seqs
        assert [getattr(third, "seqs", None), getattr(fourth, "seqs", None)] == [[3], [4]]

    use(tmp_path / "a.db", body)


def test_one_broken_operation_fails_alone_in_its_batch(tmp_path: Path) -> None:
    async def body(storage: SQLiteStorageBackend) -> None:
        await storage.commit_one(create("r0"))
        bad = note("r0", "bad")
        bad.put = [Put(item_id="step:1", kind=ItemKind.STEP, priority=2**70)]
        answers = await asyncio.gather(
            storage.commit_one(note("r0", "a")),
            storage.commit_one(bad),
            storage.commit_one(note("r0", "b")),
            return_exceptions=True,
        )
        assert [type(answer).__name__ for answer in answers] == [
            "Committed",
            "SerializationError",
            "Committed",
        ]
        events = await storage.get_events("r0")
        assert [event.key for event in events] == ["started", "a", "b"]
        assert [event.seq for event in events] == [1, 2, 3]

    use(tmp_path / "a.db", body)


def test_a_cancelled_caller_leaves_no_lock_and_no_claim(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    fill(path)

    async def body(storage: SQLiteStorageBackend) -> None:
        for number in range(20):
            task = asyncio.create_task(
                storage.claim(ClaimRequest(owner="gone", lease=LEASE, limit=50))
            )
            for _ in range(number % 4):
                await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                claimed = await task
                for claim in claimed.claims:
                    await storage.release(claim.ref)
        while await storage.holders():  # noqa: ASYNC110 - the last ones are on their way back
            await asyncio.sleep(0.001)
        clone = storage.clone()
        async with clone:
            claimed = await clone.claim(ClaimRequest(owner="me", lease=LEASE, limit=50))
            assert len(claimed.claims) == 3
            assert {claim.item.claims for claim in claimed.claims} == {1}

    use(path, body)


def test_values_come_back_exactly(tmp_path: Path) -> None:
    value = {"big": 10**30, "huge": 1e308, "zero": -0.0, "nul": "a\0b", "\0": ["😀", "e\u0301"]}

    async def body(storage: SQLiteStorageBackend) -> None:
        await storage.commit_one(create("r\0/../0"))
        await storage.commit_one(note("r\0/../0", "k\0", value))
        event = (await storage.get_events("r\0/../0"))[1]
        assert event.data == {"d": value}
        assert str(event.data["d"]["zero"]) == "-0.0"  # type: ignore[index,call-overload] - JSON
        assert event.key == "k\0"
        assert await storage.get_run("r") is None

    use(tmp_path / "a.db", body)


def test_the_clock_stands_still_when_the_machines_is_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.db"
    real = time.time_ns

    async def first(storage: SQLiteStorageBackend) -> Any:
        await storage.commit_one(create("r0"))
        return await storage.now()

    before = use(path, first)
    monkeypatch.setattr(time, "time_ns", lambda: real() - 600 * 10**9)

    async def second(storage: SQLiteStorageBackend) -> Any:
        return await storage.now()

    assert use(path, second) >= before - timedelta(seconds=0.2)


# --- watching ---------------------------------------------------------------------------------


def test_a_clone_in_another_thread_is_woken(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    fill(path)
    waiting = threading.Event()

    def write() -> None:
        async def body(storage: SQLiteStorageBackend) -> None:
            await storage.commit_one(note("r0", "a"))

        waiting.wait(10)
        use(path, body)

    thread = threading.Thread(target=write)
    thread.start()

    async def body(storage: SQLiteStorageBackend) -> None:
        asyncio.get_running_loop().call_soon(waiting.set)
        assert await storage.watch("r0", after=1, timeout=timedelta(seconds=20))

    use(path, body)
    thread.join()


def test_another_process_is_heard(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    fill(path)
    code = (
        "import asyncio, sys\n"
        "from pyworkflow.spi import Change, Event\n"
        "from pyworkflow_storage_sql import SQLiteStorageBackend\n"
        "async def main():\n"
        "    async with SQLiteStorageBackend(sys.argv[1]) as storage:\n"
        "        await storage.commit_one(Change(run_id='r0', key='a', events=[Event('x', 'O', {})]))\n"
        "asyncio.run(main())\n"
    )

    async def body(storage: SQLiteStorageBackend) -> None:
        child = await asyncio.create_subprocess_exec(sys.executable, "-c", code, str(path))
        assert await storage.watch("r0", after=1, timeout=timedelta(seconds=30))
        assert await child.wait() == 0

    use(path, body)


# --- processes --------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_after_a_fork_parent_and_child_go_on(tmp_path: Path) -> None:
    path = tmp_path / "a.db"

    async def child(storage: SQLiteStorageBackend) -> None:
        await storage.commit_one(note("r0", "child"))
        assert await storage.get_run("r0") is not None
        async with storage.clone() as clone:
            await clone.commit_one(note("r0", "clone"))
        await storage.close()

    async def parent() -> None:
        storage = SQLiteStorageBackend(path)
        await storage.commit_one(create("r0"))
        assert await storage.get_run("r0") is not None
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                asyncio.run(asyncio.wait_for(child(storage), 30))
                status = 0
            finally:
                os._exit(status)
        await storage.commit_one(note("r0", "parent"))
        assert await storage.get_run("r0") is not None
        _, status = await asyncio.to_thread(os.waitpid, pid, 0)
        assert status == 0
        keys = {event.key for event in await storage.get_events("r0")}
        assert keys == {"started", "parent", "child", "clone"}
        await storage.close()

    asyncio.run(parent())


def test_a_process_that_never_closes_ends(tmp_path: Path) -> None:
    code = (
        "import asyncio, sys\n"
        "from pyworkflow_storage_sql import SQLiteStorageBackend\n"
        "storage = SQLiteStorageBackend(sys.argv[1])\n"
        "async def main():\n"
        "    await storage.get_run('r')\n"
        "asyncio.run(main())\n"
    )
    path = str(tmp_path / "a.db")
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_an_object_that_nobody_closed_goes_quietly(tmp_path: Path) -> None:
    async def main() -> None:
        storage = SQLiteStorageBackend(tmp_path / "a.db")
        await storage.commit_one(create("r0"))
        assert await storage.get_run("r0") is not None

    asyncio.run(main())
    use(tmp_path / "a.db", _nothing)


def test_a_process_killed_inside_a_transaction_leaves_nothing_of_it(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    fill(path, 1)
    code = (
        "import asyncio, os, signal, sys\n"
        "from pyworkflow.spi import Change, Event\n"
        "from pyworkflow_storage_sql import SQLiteStorageBackend\n"
        "from pyworkflow_storage_sql.sqlite._writer import Writer\n"
        "Writer._commit = lambda self, conn, batch: os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(SQLiteStorageBackend(sys.argv[1]).commit_one(\n"
        "    Change(run_id='r0', key='a', events=[Event('x', 'O', {})])))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], timeout=60, check=False)
    assert done.returncode == -9

    async def body(storage: SQLiteStorageBackend) -> None:
        assert len(await storage.get_events("r0")) == 1
        assert (await storage.commit_one(note("r0", "a"))).seqs == [2]

    use(path, body)


def test_use_after_close_and_in_another_loop_is_refused(tmp_path: Path) -> None:
    storage = SQLiteStorageBackend(tmp_path / "a.db")
    asyncio.run(_nothing(storage))
    with pytest.raises(StorageError, match=r"clone\(\)"):
        asyncio.run(_nothing(storage))
    asyncio.run(storage.close())
    with pytest.raises(StorageError, match="closed"):
        asyncio.run(_nothing(storage))


def test_born_claimed_items_are_held_across_objects(tmp_path: Path) -> None:
    async def body(storage: SQLiteStorageBackend) -> None:
        committed = await storage.commit_one(create("r0", take_turn=LeaseFor("me", LEASE)))
        assert [item.item_id for item in committed.claims] == ["turn"]
        async with storage.clone() as clone:
            claimed = await clone.claim(ClaimRequest(owner="you", lease=LEASE))
            assert claimed.claims == []
            assert await clone.holders() == ["me"]

    use(tmp_path / "a.db", body)
