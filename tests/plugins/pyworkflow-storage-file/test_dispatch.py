"""Who does an operation, the loop or the thread; the answers are the same."""

import asyncio
import errno
import fcntl
import os
import threading
from datetime import timedelta

import pytest

from pyworkflow.spi import Change, ClaimRequest, Event, NewRun, RunExists, StorageError, StorageFull
from pyworkflow.storekit import fsck
from pyworkflow_storage_file import FileStorageBackend, _writer
from pyworkflow_storage_file._calls import Calls
from pyworkflow_storage_file._lock import StoreLock

MINUTE = timedelta(minutes=1)
FAST, SLOW = 150_000, 12_000_000


class Disk(Calls):
    """A disk whose flushes take what the test says; it notes which thread did what."""

    def __init__(self, takes=FAST):
        self.takes = takes
        self.time = 0
        self.by = []
        self.written_by = []
        self.others_by = set()
        self.fails = {}

    def ticks(self):
        return self.time

    def _fail(self, name):
        error = self.fails.pop(name, None)
        if error is not None:
            raise error

    def write(self, fd, data, offset):
        self._fail("write")
        self.written_by.append(who())
        return super().write(fd, data, offset)

    def flush(self, fd):
        self._fail("flush")
        super().flush(fd)
        self.time += self.takes
        self.by.append(who())
        self._fail("after the flush")

    def flush_directory(self, path):
        self.others_by.add(who())
        super().flush_directory(path)

    def replace(self, source, target):
        self.others_by.add(who())
        super().replace(source, target)

    def taken(self):
        """Who flushed since the last call."""
        by, self.by = self.by, []
        return by


def who():
    return "loop" if threading.current_thread() is threading.main_thread() else "thread"


def create(run_id):
    return Change(
        run_id=run_id,
        key=f"start:{run_id}",
        create=NewRun(workflow="w", version="1", args="[]"),
        events=[Event("workflow.started", "I", {"workflow": "w"}, key="started")],
    )


def note(run_id, text):
    return Change(
        run_id=run_id, key=f"note:{text}", events=[Event("log.info", "O", {"message": text})]
    )


def messages(events):
    return [event.data["message"] for event in events if event.type == "log.info"]


def opened(path, disk=None, **options):
    backend = FileStorageBackend(path, **options)
    backend._calls = Disk() if disk is None else disk
    return backend


def run(main):
    asyncio.run(asyncio.wait_for(main(), 60))


# --- the switch -------------------------------------------------------------------------------


def test_lone_commits_are_flushed_by_the_loop_once_flushes_are_known_to_be_fast(tmp_path):
    async def main():
        async with opened(tmp_path) as backend:
            disk = backend._calls
            await backend.commit_one(create("r"))
            assert set(disk.taken()) == {"thread"}
            for n in range(5):
                await backend.commit_one(note("r", str(n)))
                (answer,) = await backend.commit([note("r", f"{n} too")])
                assert answer.last_seq == 2 * n + 3
            assert disk.taken() == ["loop"] * 10
            assert disk.others_by == {"thread"}
            assert len(messages(await backend.get_events("r"))) == 10

    run(main)


def test_after_slow_flushes_the_thread_flushes_for_a_while(tmp_path):
    async def main():
        async with opened(tmp_path) as backend:
            disk = backend._calls
            await backend.commit_one(create("r"))
            await backend.commit_one(note("r", "fast"))
            disk.takes = SLOW
            await backend.commit_one(note("r", "slow"))
            await backend.commit_one(note("r", "slow again"))
            assert disk.taken()[-2:] == ["loop", "loop"]
            disk.takes = FAST
            for n in range(70):
                await backend.commit_one(note("r", str(n)))
            assert disk.taken() == ["thread"] * 64 + ["loop"] * 6

    run(main)


def test_the_loop_never_waits_for_a_slow_disk(tmp_path):
    async def main():
        async with opened(tmp_path, Disk(SLOW)) as backend:
            await backend.commit_one(create("r"))
            for n in range(150):
                await backend.commit_one(note("r", str(n)))
            assert set(backend._calls.taken()) == {"thread"}

    run(main)


def test_without_flushes_the_loop_writes(tmp_path):
    async def main():
        async with opened(tmp_path, fsync=False) as backend:
            await backend.commit_one(create("r"))
            await backend.commit_one(note("r", "here"))
            assert backend._calls.taken() == []
            assert backend._calls.written_by[-1] == "loop"

    run(main)


def test_what_comes_together_goes_together_to_the_thread(tmp_path):
    async def main():
        async with opened(tmp_path) as backend:
            disk = backend._calls
            await backend.commit_one(create("r"))
            disk.taken()
            for round_ in range(3):
                notes = [note("r", f"{round_} {n}") for n in range(20)]
                answers = await asyncio.gather(*(backend.commit_one(each) for each in notes))
                assert sorted(a.last_seq for a in answers) == [a.last_seq for a in answers]
                flushes = disk.taken()
                # The first of the first crowd could not know; the next crowds are waited for.
                assert flushes.count("loop") == (1 if round_ == 0 else 0)
                assert 1 <= flushes.count("thread") <= 3
            await backend.commit_one(note("r", "alone"))
            await backend.commit_one(note("r", "again"))
            assert disk.taken() == ["loop", "loop"]

    run(main)


def test_many_changes_at_once_go_to_the_thread(tmp_path):
    async def main():
        async with opened(tmp_path) as backend:
            disk = backend._calls
            await backend.commit_one(create("r"))
            disk.taken()
            answers = await backend.commit([create(f"r{n}") for n in range(50)])
            assert len(answers) == 50
            assert disk.taken() == ["thread"]

    run(main)


def test_what_takes_the_lock_or_reads_others_records_is_for_the_thread(tmp_path):
    async def main():
        async with opened(tmp_path) as one, opened(tmp_path) as two:
            await one.commit_one(create("r"))
            await two.commit_one(create("s"))
            for each in (one, two):
                each._calls.taken()
            await one.commit_one(note("r", "one"))  # two's run is to be read first
            assert one._calls.taken() == ["thread"]
            await one.commit_one(note("r", "two"))
            assert one._calls.taken() == ["loop"]
            await two.commit_one(note("r", "three"))
            assert two._calls.taken() == ["thread"]
            assert messages(await one.get_events("r")) == ["one", "two", "three"]

    run(main)


def test_the_loop_goes_on_while_another_process_has_the_lock(tmp_path):
    async def main():
        async with opened(tmp_path) as backend:
            await backend.commit_one(create("r"))
            lock = StoreLock(tmp_path / "default")
            lock.open()
            lock.acquire()
            blocked = asyncio.ensure_future(backend.commit_one(note("r", "late")))
            for _ in range(20):
                await asyncio.sleep(0)
            assert not blocked.done()
            lock.release()
            lock.close()
            await blocked
            assert messages(await backend.get_events("r")) == ["late"]

    run(main)


def test_who_waits_for_the_lock_is_not_overtaken(tmp_path):
    lock, other = StoreLock(tmp_path), StoreLock(tmp_path)
    lock.open()
    other.open()
    assert lock.try_acquire()
    assert not other.try_acquire()
    lock.release()
    gate = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(gate, fcntl.LOCK_EX)
        assert not lock.try_acquire()  # the lock is free, and somebody is about to have it
    finally:
        os.close(gate)
    assert lock.try_acquire()
    lock.close()
    other.close()


def test_segments_and_rewrites_are_the_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(_writer, "_GARBAGE_BYTES", 5_000)

    async def main():
        backend = opened(tmp_path)
        backend._segment_bytes = 1_000
        async with backend:
            await backend.commit_one(create("r"))
            request = ClaimRequest(owner="o", lease=MINUTE)
            while not list((tmp_path / "default").glob("000003-*.jsonl")):
                (claim,) = (await backend.claim(request)).claims
                assert await backend.release(claim.ref)
                await backend.commit_one(note("r", claim.ref.token))
            assert backend._calls.others_by == {"thread"}
            assert "loop" in backend._calls.taken()
            assert await fsck(backend) == []

    run(main)


# --- the loop itself --------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["commit", "get_run", "claim"])
def test_who_calls_for_ever_does_not_keep_the_loop_from_turning(tmp_path, call):
    async def main():
        async with opened(tmp_path) as backend:
            await backend.commit_one(create("r"))
            stop = asyncio.Event()

            async def greedy():
                n = 0
                while not stop.is_set():
                    n += 1
                    if call == "commit":
                        await backend.commit_one(note("r", str(n)))
                    elif call == "get_run":
                        await backend.get_run("r")
                    else:
                        await backend.claim(ClaimRequest(owner="o", lease=MINUTE))
                return n

            task = asyncio.ensure_future(greedy())
            for _ in range(30):
                await asyncio.sleep(0)
            stop.set()
            assert 10 < await task < 100

    run(main)


def test_reads_come_after_the_writes_before_them(tmp_path):
    async def main():
        async with opened(tmp_path) as backend:
            await backend.commit_one(create("r"))
            for n in range(20):
                written = asyncio.ensure_future(backend.commit_one(note("r", str(n))))
                read = asyncio.ensure_future(backend.get_events("r"))
                assert len(messages(await read)) == n + 1
                assert written.done()

    run(main)


def test_a_commit_by_the_loop_wakes_who_watches(tmp_path):
    async def main():
        async with opened(tmp_path) as backend:
            await backend.commit_one(create("r"))
            backend._calls.taken()
            task = asyncio.ensure_future(backend.watch("r", after=1, timeout=MINUTE))
            for _ in range(5):
                await asyncio.sleep(0)
            await backend.commit_one(note("r", "news"))
            assert backend._calls.taken() == ["loop"]
            assert await task

    run(main)


# --- what goes wrong on the loop --------------------------------------------------------------


def test_a_refusal_by_the_loop_changes_nothing(tmp_path):
    async def main():
        async with opened(tmp_path) as backend:
            await backend.commit_one(create("r"))
            again = create("r")
            again.key = "other"
            before = (tmp_path / "default" / "000001-000001.jsonl").read_bytes()
            with pytest.raises(RunExists):
                await backend.commit_one(again)
            assert (tmp_path / "default" / "000001-000001.jsonl").read_bytes() == before
            await backend.commit_one(note("r", "next"))
            assert backend._calls.taken()[-1] == "loop"

    run(main)


def test_f28_a_full_disk_on_the_loop_refuses_and_heals(tmp_path):
    async def main():
        async with opened(tmp_path) as backend, opened(tmp_path) as other:
            await backend.commit_one(create("r"))
            for _ in range(3):
                backend._calls.fails["write"] = OSError(errno.ENOSPC, "full")
                with pytest.raises(StorageFull):
                    await backend.commit_one(note("r", "refused"))
                assert messages(await backend.get_events("r")) == []
            await backend.commit_one(note("r", "through"))
            assert messages(await other.get_events("r")) == ["through"]

    run(main)


def test_f29_a_failing_flush_on_the_loop_poisons_for_all(tmp_path):
    class Broken(Disk):
        broken = False

        def flush(self, fd):
            if self.broken:
                raise OSError(errno.EIO, "broken")
            super().flush(fd)

    async def main():
        async with opened(tmp_path, Broken()) as backend, opened(tmp_path) as other:
            await backend.commit_one(create("r"))
            await backend.commit_one(note("r", "good"))
            assert backend._calls.taken()[-1] == "loop"
            backend._calls.broken = True
            with pytest.raises(StorageError, match="poisoned"):
                await backend.commit_one(note("r", "lost"))
            backend._calls.broken = False
            for each in (backend, other):
                for _ in range(2):
                    with pytest.raises(StorageError, match="poisoned"):
                        await each.commit_one(note("r", "more"))
                    with pytest.raises(StorageError, match="poisoned"):
                        await each.get_events("r")

    run(main)


class Thrown(BaseException):
    """What the handler of a signal raises."""


@pytest.mark.parametrize("where", ["write", "flush", "after the flush"])
@pytest.mark.parametrize("kind", [Thrown, TimeoutError])
def test_what_a_signal_throws_into_a_batch_leaves_a_store_that_is_whole(tmp_path, where, kind):
    async def main():
        async with opened(tmp_path) as backend, opened(tmp_path) as other:
            await backend.commit_one(create("r"))
            await backend.commit_one(note("r", "before"))
            assert backend._calls.taken()[-1] == "loop"
            backend._calls.fails[where] = kind()
            with pytest.raises((kind, StorageError)):
                await backend.commit_one(note("r", "perhaps"))
            # Nobody is locked out, and everybody sees the same.
            seen = messages(await other.get_events("r"))
            assert seen in (["before"], ["before", "perhaps"])
            assert messages(await backend.get_events("r")) == seen
            await backend.commit_one(note("r", "perhaps"))  # the same change again
            await other.commit_one(note("r", "after"))
            for each in (backend, other):
                assert messages(await each.get_events("r")) == ["before", "perhaps", "after"]
                assert await fsck(each) == []

    run(main)
