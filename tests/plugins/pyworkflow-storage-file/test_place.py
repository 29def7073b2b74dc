"""A store whose files are deleted, moved or replaced while it is in use."""

import asyncio
import os
import shutil
from datetime import timedelta

import pytest

from pyworkflow.spi import (
    Change,
    ClaimRequest,
    Event,
    ItemKind,
    NewRun,
    Put,
    StorageDamaged,
    StorageError,
)
from pyworkflow_storage_file import FileStorageBackend
from pyworkflow_storage_file._calls import Calls

REQUEST = ClaimRequest(owner="o", lease=timedelta(minutes=1))
MESSAGE = "deleted, moved or replaced"


def create(run_id):
    return Change(
        run_id=run_id,
        key="start",
        create=NewRun(workflow="w", version="1", args="[]"),
        events=[Event("workflow.started", "I", {})],
        put=[Put(item_id="turn", kind=ItemKind.TURN)],
    )


def delete(root):
    shutil.rmtree(root)


def move(root):
    root.rename(root.with_name("moved"))


def replace_all(root):
    shutil.copytree(root, root.with_name("backup"))
    root.rename(root.with_name("moved"))
    root.with_name("backup").rename(root)


def replace_namespace(root):
    shutil.copytree(root / "default", root / "backup")
    (root / "default").rename(root / "moved")
    (root / "backup").rename(root / "default")


def replace_segment(root):
    (segment,) = (root / "default").glob("*.jsonl")
    copy = segment.with_name("copy")
    shutil.copy(segment, copy)
    copy.rename(segment)


def delete_segment(root):
    (segment,) = (root / "default").glob("*.jsonl")
    segment.unlink()


def move_segment(root):
    (segment,) = (root / "default").glob("*.jsonl")
    segment.rename(root / "moved")
    shutil.copy(root / "moved", segment)


HAPPENINGS = [
    delete,
    move,
    replace_all,
    replace_namespace,
    replace_segment,
    delete_segment,
    move_segment,
]


@pytest.mark.parametrize("happens", HAPPENINGS)
@pytest.mark.parametrize("call", ["commit", "claim", "renew"])
def test_found_h04_a_store_that_is_elsewhere_is_noticed_at_the_next_write(tmp_path, happens, call):
    root = tmp_path / "store"

    async def main():
        backend = FileStorageBackend(root)
        async with backend:
            await backend.commit_one(create("before"))
            (claim,) = (await backend.claim(REQUEST)).claims
            happens(root)
            calls = {
                "commit": lambda: backend.commit_one(create("after")),
                "claim": lambda: backend.claim(REQUEST),
                "renew": lambda: backend.renew([claim.ref], timedelta(minutes=1)),
            }
            # After the first error, the journal is read anew, from what the manifest names then.
            whole = happens not in {replace_segment, delete_segment, move_segment}
            for _ in range(3 if whole else 1):
                with pytest.raises(StorageError, match=MESSAGE) as caught:
                    await calls[call]()
                assert str(root) in str(caught.value)
                assert "restart this process" in str(caught.value)
            if happens is delete_segment:
                with pytest.raises(StorageDamaged, match="missing"):
                    await calls[call]()
        if happens in {replace_all, replace_namespace, replace_segment, move_segment}:
            async with FileStorageBackend(root) as again:
                assert await again.get_run("after") is None
                await again.commit_one(create("after"))
                assert await again.get_run("before") is not None

    asyncio.run(main())


def test_found_h04_nothing_is_written_to_a_store_that_was_moved_before(tmp_path):
    root = tmp_path / "store"

    async def main():
        async with FileStorageBackend(root) as backend:
            for number in range(3):  # until the loop writes by itself
                await backend.commit_one(create(f"r{number}"))
                await asyncio.sleep(0)
            (segment,) = (root / "default").glob("*.jsonl")
            length = segment.stat().st_size
            move(root)
            with pytest.raises(StorageError, match="nothing was written"):
                await backend.commit_one(create("after"))
            (segment,) = (tmp_path / "moved" / "default").glob("*.jsonl")
            assert segment.stat().st_size == length

    asyncio.run(main())


def delete_lock(root):
    (root / "default" / "lock").unlink()


def move_lock(root):
    (root / "default" / "lock").rename(root / "moved")


def replace_lock(root):
    copy = root / "copy"
    shutil.copy(root / "default" / "lock", copy)
    copy.rename(root / "default" / "lock")


@pytest.mark.parametrize("happens", [delete_lock, move_lock, replace_lock])
def test_found_h04_a_lock_that_others_do_not_take_is_noticed_at_the_next_write(tmp_path, happens):
    async def main():
        async with FileStorageBackend(tmp_path) as backend:
            await backend.commit_one(create("before"))
            happens(tmp_path)
            for _ in range(3):
                with pytest.raises(StorageError, match=MESSAGE):
                    await backend.commit_one(create("after"))
        async with FileStorageBackend(tmp_path) as again:
            await again.commit_one(create("after"))
            assert await again.get_run("before") is not None

    asyncio.run(main())


def test_a_lone_commit_asks_for_its_files_twice_and_for_the_clocks_once(tmp_path, monkeypatch):
    class Counting(Calls):
        clocks_read = 0

        def clocks(self):
            self.clocks_read += 1
            return super().clocks()

    asked = []

    def count(name):
        original = getattr(os, name)

        def counted(*args, **options):
            asked.append(name)
            return original(*args, **options)

        monkeypatch.setattr(os, name, counted)

    async def main():
        backend = FileStorageBackend(tmp_path, fsync=False)
        backend._calls = calls = Counting()
        async with backend:
            for number in range(3):  # until the loop writes by itself
                await backend.commit_one(create(f"r{number}"))
                await asyncio.sleep(0)
            for name in ("stat", "fstat", "lstat"):
                count(name)
            calls.clocks_read = 0
            await backend.commit_one(create("lone"))
            assert asked == ["stat", "stat"]
            assert calls.clocks_read == 1
            await asyncio.sleep(0)
            assert await backend.get_run("lone") is not None
            assert asked == ["stat"] * 3

    asyncio.run(main())


@pytest.mark.parametrize("happens", [move, replace_all])
def test_found_h04_a_reader_notices_it_too(tmp_path, happens):
    root = tmp_path / "store"

    async def main():
        async with FileStorageBackend(root) as backend:
            await backend.commit_one(create("r"))
            assert await backend.get_run("r") is not None
            happens(root)
            with pytest.raises(StorageError, match=MESSAGE):
                await backend.get_run("r")

    asyncio.run(main())


def test_found_h04_what_is_moved_back_is_used_again(tmp_path):
    root, other = tmp_path / "store", tmp_path / "elsewhere"

    async def main():
        async with FileStorageBackend(root) as backend:
            await backend.commit_one(create("a"))
            root.rename(other)
            with pytest.raises(StorageError, match=MESSAGE):
                await backend.commit_one(create("b"))
            other.rename(root)
            await backend.commit_one(create("b"))
        async with FileStorageBackend(root) as again:
            assert await again.get_run("b") is not None

    asyncio.run(main())


def test_found_h04_a_store_that_moves_during_a_commit_is_not_written_to_in_silence(tmp_path):
    root = tmp_path / "store"

    class Moving(Calls):
        moves = False

        def flush(self, fd):
            super().flush(fd)
            if self.moves:
                self.moves = False
                replace_all(root)

    async def main():
        backend = FileStorageBackend(root)
        backend._calls = calls = Moving()
        async with backend:
            await backend.commit_one(create("a"))
            calls.moves = True
            with pytest.raises(StorageError, match=MESSAGE):
                await backend.commit_one(create("b"))

    asyncio.run(main())
