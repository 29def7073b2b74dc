"""Files that a packer of another opener deletes between the reading of the manifest and their use.

What is read without the lock may be gone by the time it is opened. That is no damage as long as
the manifest has changed.
"""

import asyncio

import pytest

from pyworkflow._copy import copy_store
from pyworkflow.spi import (
    Change,
    Event,
    ItemKind,
    NewRun,
    Put,
    RunQuery,
    StorageDamaged,
)
from pyworkflow.storekit import fsck
from pyworkflow_storage_file import FileStorageBackend, _journal
from pyworkflow_storage_file._compact import pack
from pyworkflow_storage_file._files import Files
from pyworkflow_storage_file._lock import StoreLock
from pyworkflow_storage_file._packing import Packer, PackingLock
from pyworkflow_storage_file._reading import Reader

PLENTY = 1 << 40


def make(path, segment=PLENTY):
    backend = FileStorageBackend(path, fsync=False)
    backend._segment_bytes = segment
    return backend


def create(run_id):
    return Change(
        run_id=run_id,
        key="start",
        create=NewRun(workflow="w", version="1", args="[]"),
        events=[Event("workflow.started", "I", {"text": "x" * 100})],
        put=[Put(item_id="turn", kind=ItemKind.TURN)],
    )


def writer_of(backend):
    """From any thread; None before it is used."""
    dispatcher = backend._bound._value
    return None if dispatcher is None else dispatcher._writer


class Other:
    """Another opener, which changes the files in one step, as its packer's thread would."""

    def __init__(self, backend):
        self.backend = backend
        self.made = 0

    async def fill(self, runs=3):
        """Write some runs, and begin another segment."""
        for _ in range(runs):
            self.made += 1
            await self.backend.commit_one(create(f"r{self.made}"))
        self.seal()

    def seal(self):
        writer = writer_of(self.backend)
        with writer.mutex:
            writer._journal.acquire()
            try:
                writer._journal.seal()
            finally:
                writer._journal.release()

    def pack(self):
        """Pack what is sealed, name the packs, and delete what they replace."""
        writer = writer_of(self.backend)
        lock = PackingLock(writer._journal.directory)
        assert lock.try_acquire()
        try:
            files = writer._journal.make_files()
            plan = pack(files, files.read_manifest(), garbage=frozenset(), stop=lambda: False)
            assert plan is not None
            assert writer.install(plan, lambda: False)
        finally:
            lock.release()


@pytest.fixture
def little(monkeypatch):
    """However little is new, it is looked for without the lock."""
    monkeypatch.setattr(_journal, "_LITTLE", 0)


@pytest.fixture
def no_packer(monkeypatch):
    """Only tests pack."""
    monkeypatch.setattr(Packer, "is_ready", property(lambda self: False))


pytestmark = pytest.mark.usefixtures("little", "no_packer")


async def ids_of(backend):
    return sorted(run.run_id for run in (await backend.list_runs(RunQuery(limit=1000))).items)


async def all_of(backend):
    return {run_id: await backend.get_events(run_id) for run_id in await ids_of(backend)}


class Hook:
    """Calls ``act`` at a place of the reader, so many times, while nobody has the lock."""

    def __init__(self, monkeypatch, use, reader, act, times):
        owner, name, after = USES[use]
        original = getattr(owner, name)
        self.left = times

        def hooked(each, *args, **options):
            if not after:
                self.maybe(each, reader, act)
            result = original(each, *args, **options)
            if after:
                self.maybe(each, reader, act)
            return result

        monkeypatch.setattr(owner, name, hooked)

    def maybe(self, each, reader, act):
        writer = writer_of(reader)
        if self.left and writer is not None:
            journal = writer._journal
            if each in (journal._files, journal._at) and is_free(journal.directory):
                self.left -= 1
                act()


def is_free(directory):
    """Whether nobody has the store's lock."""
    lock = StoreLock(directory)
    lock.open()
    try:
        return lock.try_acquire()
    finally:
        lock.close()


#: The places between a manifest and the use of its files: class, method, whether behind it.
USES = {
    "manifest": (Files, "read_manifest", True),
    "restart": (Reader, "restart", False),
    "adopt": (Reader, "adopt", False),
    "sealed": (Reader, "read_sealed", False),
    "segment": (Files, "open_segment", False),
}
TIMES = pytest.mark.parametrize("times", [1, 2, 20])
PACKS = pytest.mark.parametrize("packs", [0, 2])


async def prepare(other, packs):
    await other.fill()
    for _ in range(packs):
        other.pack()
        await other.fill()


def packs_meanwhile(other):
    """From the reader's thread: the other opener writes and packs."""
    loop = asyncio.get_running_loop()

    def act():
        asyncio.run_coroutine_threadsafe(other.fill(), loop).result(60)
        other.pack()

    return act


@PACKS
@TIMES
@pytest.mark.parametrize("use", ["manifest", "adopt", "sealed", "segment"])
def test_v05_a_reader_follows_files_that_are_packed_before_it_uses_them(
    tmp_path, monkeypatch, use, times, packs
):
    async def main():
        async with make(tmp_path) as one, make(tmp_path) as two:
            other = Other(two)
            await prepare(other, packs)
            assert len(await ids_of(one)) == other.made  # which has read up to here
            await other.fill()
            await other.fill()
            hook = Hook(monkeypatch, use, one, packs_meanwhile(other), times)
            await one.commit_one(create("mine"))
            assert hook.left < times
            assert await all_of(one) == await all_of(two)
            assert len(await ids_of(one)) == other.made + 1
            assert await fsck(one) == []

    asyncio.run(main())


@PACKS
@TIMES
@pytest.mark.parametrize("use", ["manifest", "restart", "sealed", "segment"])
def test_v05_a_store_opens_while_its_files_are_packed(tmp_path, monkeypatch, use, times, packs):
    async def main():
        async with make(tmp_path) as two:
            other = Other(two)
            await prepare(other, packs)
            await other.fill()
            packing = PackingLock(tmp_path / "default")
            assert packing.try_acquire()  # it does not pack itself while it opens
            one = make(tmp_path)
            act = packs_meanwhile(other)

            def release_and_act():
                packing.release()
                act()

            hook = Hook(monkeypatch, use, one, release_and_act, times)
            async with one:
                assert hook.left < times
                assert await all_of(one) == await all_of(two)
                assert len(await ids_of(one)) == other.made
                assert await fsck(one) == []

    asyncio.run(main())


@pytest.mark.parametrize("use", ["fsck", "copy"])
def test_v05_a_store_is_checked_and_copied_while_its_files_are_packed(tmp_path, monkeypatch, use):
    """Between any two histories that are read, there is more, and it is packed meanwhile."""

    async def main():
        async with make(tmp_path / "a") as one, make(tmp_path / "a") as two:
            other = Other(two)
            await prepare(other, 1)
            before = other.made
            hook = Hook(monkeypatch, "manifest", one, packs_meanwhile(other), 0)
            get_events = one.get_events
            calls = 0

            async def fills_and_gets(*args, **options):
                nonlocal calls
                calls += 1
                if calls <= 2 * before:
                    await other.fill()
                    hook.left = 1 - calls % 2  # what is sealed is read, then packed as well
                return await get_events(*args, **options)

            monkeypatch.setattr(one, "get_events", fills_and_gets)
            if use == "fsck":
                assert await fsck(one) == []
            else:
                async with make(tmp_path / "b") as target:
                    report = await copy_store(one, target)
                    assert report.runs == len(await ids_of(target)) >= before
            assert hook.left == 0
            assert calls >= before

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["segments", "packs"])
def test_v05_a_missing_file_is_reported_when_the_manifest_stays(tmp_path, kind):
    async def main():
        async with make(tmp_path) as one, make(tmp_path) as two:
            other = Other(two)
            await other.fill()
            await one.open()
            await other.fill()
            await other.fill()
            if kind == "packs":
                other.pack()
            manifest = writer_of(two)._journal._files.read_manifest()
            named = manifest.packs or manifest.segments[2:]
            path = tmp_path / "default" / named[0]
            path.unlink()
            with pytest.raises(StorageDamaged, match="missing") as caught:
                await one.commit_one(create("mine"))
            assert caught.value.file == str(path)

    asyncio.run(main())
