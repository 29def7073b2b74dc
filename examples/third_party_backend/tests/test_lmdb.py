"""What is LMDB's own: URLs, forks, growth, processes, cancelled callers."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import lmdb
import pytest
from pyworkflow_storage_lmdb import LmdbStorageBackend
from pyworkflow_storage_lmdb._plugin import pyworkflow_make_storage

from pyworkflow.spi import (
    Change,
    Committed,
    ConfigurationError,
    Event,
    NewRun,
    RunQuery,
    SchemaTooNew,
    StorageDamaged,
    StorageError,
    StorageFull,
)
from pyworkflow.storekit import fsck


def start(run_id: str, args: str = "[]") -> Change:
    return Change(
        run_id=run_id,
        key="start",
        create=NewRun(workflow="flow", version="1", args=args),
        events=[Event("workflow.started", "I", {"workflow": "flow", "args": "[]"})],
    )


def python(code: str, *arguments: object, **environment: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | environment,
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("lmdb:relative", {}, "absolute path"),
        ("lmdb:///", {}, "absolute path"),
        ("lmdb://user:secret@host/path", {}, "absolute path"),
        ("lmdb:///srv/app?fast=yes", {"fast": "yes"}, "options=fast"),
        ("lmdb:///srv/app?max_size=1G", {"max_size": "1G"}, "max_size='1G'"),
        ("lmdb:///srv/app?max_size=1000", {"max_size": "1000"}, "too small for a store"),
    ],
)
def test_a_wrong_url_is_refused_without_its_secrets(
    url: str, options: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        pyworkflow_make_storage(url=url, options={**options, "namespace": "default"})
    assert "secret" not in str(caught.value)


def test_a_url_names_the_directory() -> None:
    store = pyworkflow_make_storage(url="lmdb:///srv/my%20app", options={"namespace": "a"})
    assert store is not None
    assert (store.info().location, store.info().namespace) == ("/srv/my app", "a")
    assert pyworkflow_make_storage(url="file:///srv", options={"namespace": "a"}) is None


def test_an_object_belongs_to_the_loop_that_used_it(tmp_path: Path) -> None:
    store = LmdbStorageBackend(tmp_path)
    asyncio.run(store.open())

    async def elsewhere() -> None:
        with pytest.raises(StorageError, match="clone"):
            await store.get_run("run")
        async with store.clone() as clone:
            assert await clone.get_run("run") is None
        await store.close()

    asyncio.run(elsewhere())


def test_a_forked_child_goes_on_with_the_objects_of_its_parent(tmp_path: Path) -> None:
    code = """
import asyncio, os, sys
from pyworkflow.spi import Change, NewRun
from pyworkflow_storage_lmdb import LmdbStorageBackend

store = LmdbStorageBackend(sys.argv[1])

async def work(run_id):
    new = NewRun(workflow="flow", version="1", args="[]")
    await store.commit_one(Change(run_id=run_id, key="start", create=new))

asyncio.run(work("before"))
child = os.fork()
asyncio.run(work("child")) if child == 0 else os.waitpid(child, 0)
"""
    python(code, tmp_path)

    async def look() -> None:
        async with LmdbStorageBackend(tmp_path) as store:
            assert {run.run_id for run in (await store.list_runs(RunQuery())).items} == {
                "before",
                "child",
            }

    asyncio.run(look())


def test_a_full_store_says_so_and_takes_the_change_when_it_may_grow(tmp_path: Path) -> None:
    async def fill() -> None:
        large = '"' + "x" * 1_000_000 + '"'
        async with LmdbStorageBackend(tmp_path, max_size=8 << 20) as small:
            changes = [start(f"run-{n}", large) for n in range(20)]
            with pytest.raises(StorageFull, match="max_size=8388608"):
                await small.commit(changes)
            assert (await small.stats())["runs"] == 0
            for change in changes[:5]:
                await small.commit_one(change)
            # Other objects of the process share the file; each has its own bound.
            async with LmdbStorageBackend(tmp_path) as wide:
                answers = await wide.commit(changes)
                assert [isinstance(a, Committed) and a.duplicate for a in answers] == (
                    [True] * 5 + [False] * 15
                )
            assert (await small.stats())["runs"] == 20
            assert not await fsck(small)

    asyncio.run(fill())


def test_what_another_process_made_larger_is_read(tmp_path: Path) -> None:
    code = """
import asyncio, sys
from pyworkflow.spi import Change, NewRun
from pyworkflow_storage_lmdb import LmdbStorageBackend

async def fill():
    async with LmdbStorageBackend(sys.argv[1]) as store:
        new = NewRun(workflow="flow", version="1", args="x" * 10_000_000)
        await store.commit_one(Change(run_id="large", key="start", create=new))

asyncio.run(fill())
"""

    async def look() -> None:
        async with LmdbStorageBackend(tmp_path) as store:
            await asyncio.to_thread(python, code, tmp_path)
            run = await store.get_run("large")
            assert run is not None
            assert run.args_text == "x" * 10_000_000
            await store.commit_one(start("next"))

    asyncio.run(look())


def test_a_cancelled_caller_leaves_no_lock_and_no_half_of_a_change(tmp_path: Path) -> None:
    async def cancel() -> None:
        async with LmdbStorageBackend(tmp_path) as store:
            calls = [asyncio.ensure_future(store.commit_one(start(f"run-{n}"))) for n in range(50)]
            await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
            for n in range(50):  # unknown whether it was written: the same change again
                await store.commit_one(start(f"run-{n}"))
            assert (await store.stats())["events"] == 50
            assert not await fsck(store)

    asyncio.run(cancel())


def test_a_newer_layout_and_a_foreign_file_are_refused(tmp_path: Path) -> None:
    async def use(path: Path) -> None:
        async with LmdbStorageBackend(path):
            pass

    asyncio.run(use(tmp_path / "newer"))
    path = str(tmp_path / "newer" / "default")
    with lmdb.open(path) as environment, environment.begin(write=True) as txn:
        txn.put(b"mschema", b"2")
    with pytest.raises(SchemaTooNew):
        asyncio.run(use(tmp_path / "newer"))

    (tmp_path / "foreign" / "default").mkdir(parents=True)
    (tmp_path / "foreign" / "default" / "data.mdb").write_bytes(b"not LMDB" * 2000)
    with pytest.raises(StorageDamaged, match=r"data\.mdb"):
        asyncio.run(use(tmp_path / "foreign"))


def test_a_file_that_was_cut_is_told_at_whatever_length(tmp_path: Path) -> None:
    async def fill() -> None:
        async with LmdbStorageBackend(tmp_path / "whole") as store:
            for n in range(20):
                await store.commit_one(
                    start(f"run-{n}", '"' + "x" * (300_000 if n == 7 else 50) + '"')
                )
            await store.commit_one(start("last"))

    asyncio.run(fill())
    whole = (tmp_path / "whole" / "default" / "data.mdb").read_bytes()
    code = """
import asyncio, sys
from pathlib import Path
from pyworkflow.spi import Change, NewRun, StorageDamaged
from pyworkflow.storekit import fsck
from pyworkflow_storage_lmdb import LmdbStorageBackend

async def look(path):
    try:
        async with LmdbStorageBackend(path) as store:
            if await fsck(store):
                return "damaged"
            new = NewRun(workflow="flow", version="1", args="x" * 100_000)
            await store.commit_one(Change(run_id="new", key="start", create=new))
            return "sound"
    except StorageDamaged:
        return "damaged"

for path in sys.argv[1:]:
    print(asyncio.run(look(Path(path))))
"""
    ends = [4096 * n for n in range(0, len(whole) // 4096, 6)]
    lengths = [*ends, 1, 5000, 8193, len(whole) // 2 + 100, len(whole) - 4096]
    places = [tmp_path / str(length) for length in lengths]
    for place, length in zip(places, lengths, strict=True):
        (place / "default").mkdir(parents=True)
        (place / "default" / "made").touch()
        (place / "default" / "data.mdb").write_bytes(whole[:length])
    answers = dict(zip(lengths, python(code, *places).split(), strict=True))
    assert set(answers.values()) == {"damaged"}, answers
    os.truncate(tmp_path / "whole" / "default" / "data.mdb", 0)
    assert python(code, tmp_path / "whole").split() == ["damaged"]


def test_a_short_file_with_nothing_behind_it_is_sound(tmp_path: Path) -> None:
    """LMDB does not write free pages at the end."""
    path = tmp_path / "default"
    path.mkdir()
    with lmdb.open(str(path)) as environment:
        for n in range(6):
            with environment.begin(write=True) as txn:
                txn.put(b"%d" % n, b"z" * 10_000 * n)
                if n in {0, 5}:
                    txn.put(b"x", b"y" * 400_000)
                    txn.delete(b"x")
        needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    assert (path / "data.mdb").stat().st_size < needed

    async def use() -> None:
        async with LmdbStorageBackend(tmp_path) as store:
            await store.commit_one(start("run", '"' + "x" * 500_000 + '"'))
            assert not await fsck(store)

    asyncio.run(use())


def test_a_path_that_cannot_be_a_directory_is_a_wrong_setting(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigurationError, match="directory cannot be used"):
            asyncio.run(LmdbStorageBackend(place).open())


def test_the_clock_never_goes_back_and_is_moved_for_all(tmp_path: Path) -> None:
    async def both() -> None:
        async with LmdbStorageBackend(tmp_path) as store, store.clone() as other:
            before = await other.now()
            await store.shift_clock(timedelta(days=1))
            assert await other.now() - before >= timedelta(days=1)

    asyncio.run(both())


def test_a_program_and_the_command_line_find_the_plugin_by_its_url(tmp_path: Path) -> None:
    program = """
from pyworkflow import run, step, workflow

@step
async def double(x: int) -> int:
    return 2 * x

@workflow
async def twice(x: int) -> int:
    return await double(await double(x))

print(run(twice, 5))
"""
    place = {"PYWORKFLOW_STORAGE": f"lmdb://{tmp_path}/store"}
    assert python(program, **place) == "20\n"
    cli = "from pyworkflow.cli import main; main()"
    assert "twice" in python(cli, "runs", "list", **place)
    assert "sound" in python(cli, "storage", "check", **place)
    assert "pyworkflow-storage-lmdb" in python(cli, "plugins")
