"""Processes that are killed: what was acknowledged is there, nothing is half there."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path

import pytest

from pyworkflow.spi import Change, ClaimRequest, Event, NewRun
from pyworkflow.storekit import fsck
from pyworkflow_storage_file import FileStorageBackend, _writer
from pyworkflow_storage_file._calls import Calls
from pyworkflow_storage_file._lock import Marker

WORKER = Path(__file__).with_name("_worker.py")


def start(*args, **environment):
    return subprocess.Popen(
        [sys.executable, str(WORKER), *map(str, args)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
        stdout=subprocess.PIPE,
        text=True,
    )


def kill_after(process, lines):
    """SIGKILL after so many acknowledgements; all that were given, the last one included."""
    with process:
        acknowledged = [process.stdout.readline() for _ in range(lines)]
        process.send_signal(signal.SIGKILL)
        acknowledged += process.stdout.readlines()
    return [int(line) for line in acknowledged if line.endswith("\n")]


def stored(path, run_id):
    """The numbers of the pairs that the run holds; each pair must be whole."""

    async def main():
        async with FileStorageBackend(path) as backend:
            assert await fsck(backend) == []
            events = await backend.get_events(run_id)
        assert [e.seq for e in events] == list(range(1, len(events) + 1))
        pairs = [(e.data["number"], e.data["part"]) for e in events if e.type == "log.info"]
        assert pairs == [(n, part) for n in range(len(pairs) // 2) for part in (1, 2)]
        return [number for number, part in pairs if part == 1]

    return asyncio.run(main())


@pytest.mark.parametrize("lines", [1, 7, 60])
def test_cra01_what_was_acknowledged_survives_a_kill_and_no_commit_is_torn(tmp_path, lines):
    for round_ in range(3):
        name = f"w{round_}"
        acknowledged = kill_after(start("endless", tmp_path, name), lines)
        there = stored(tmp_path, name)
        assert acknowledged == list(range(len(acknowledged)))
        assert len(acknowledged) <= len(there) <= len(acknowledged) + 1


def test_cra01_others_go_on_while_writers_are_killed(tmp_path):
    survivor = start("endless", tmp_path, "survivor")
    try:
        for round_ in range(5):
            acknowledged = kill_after(start("endless", tmp_path, f"w{round_}"), 5 + round_)
            assert set(acknowledged) <= set(stored(tmp_path, f"w{round_}"))
            assert survivor.poll() is None
    finally:
        acknowledged = kill_after(survivor, 1)
    assert len(acknowledged) > 5
    assert set(acknowledged) <= set(stored(tmp_path, "survivor"))


@pytest.mark.parametrize("lines", [3, 8, 13, 21])
def test_mig05_a_kill_while_the_journal_is_rewritten_loses_nothing(tmp_path, lines):
    acknowledged = kill_after(start("rewrite", tmp_path), lines)
    there = stored(tmp_path, "r")
    assert len(acknowledged) <= len(there) <= len(acknowledged) + 1


def test_cra03_after_a_kill_every_cut_of_the_last_line_is_recovered(tmp_path):
    acknowledged = kill_after(start("endless", tmp_path, "w"), 5)
    there = stored(tmp_path, "w")
    (path,) = (tmp_path / "default").glob("*.jsonl")
    content = path.read_bytes()
    begin = content[:-1].rfind(b"\n") + 1
    for length in range(begin, len(content), 7):
        path.write_bytes(content[:length])
        assert stored(tmp_path, "w") == there[:-1]
        assert path.read_bytes() == content[:begin]
    assert set(acknowledged) <= set(there)


def test_f28_a_file_size_limit_refuses_whole_changes(tmp_path):
    process = start("limited", tmp_path, "w", FSIZE="30000")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    *acknowledged, last = out.split()
    assert last == "full"
    assert len(acknowledged) > 20
    assert stored(tmp_path, "w") == [int(n) for n in acknowledged]
    # Without the limit the store goes on.
    assert kill_after(start("endless", tmp_path, "next"), 5)
    assert stored(tmp_path, "next")


def test_cra12_the_lock_of_a_stopped_and_killed_process_is_released(tmp_path):
    holder = start("endless", tmp_path, "stopped")
    holder.stdout.readline()
    holder.send_signal(signal.SIGSTOP)  # perhaps with the lock held
    other = start("endless", tmp_path, "other")
    acknowledged = kill_after(holder, 0)
    assert len(kill_after(other, 3)) >= 3
    assert set(acknowledged) <= set(stored(tmp_path, "stopped"))


# --- every point at which a process can die ---------------------------------------------------


class Dying(Calls):
    """Ends the process at its n-th call; a write is cut short then."""

    def __init__(self, left):
        self.left = left
        self.alive = threading.RLock()
        """Held by every call, and by the death of the machine: all threads die at once."""

    def clocks(self):
        with self.alive:
            return super().clocks()

    def at(self, name):
        self.left -= 1
        if self.left == 0:
            self.die()

    def die(self):
        os._exit(7)

    def write(self, fd, data, offset):
        with self.alive:
            if self.left == 1:
                super().write(fd, bytes(data)[: len(data) * 2 // 3], offset)
            self.at("write")
            return super().write(fd, data, offset)

    def truncate(self, fd, length):
        with self.alive:
            self.at("truncate")
            super().truncate(fd, length)

    def flush(self, fd):
        with self.alive:
            self.at("flush")
            super().flush(fd)

    def flush_directory(self, path):
        with self.alive:
            self.at("flush_directory")
            super().flush_directory(path)

    def replace(self, source, target):
        with self.alive:
            self.at("replace")
            super().replace(source, target)


class LosingPower(Dying):
    """At the n-th call the machine dies: of what was not flushed, anything may be on the disk."""

    def __init__(self, left, directory):
        super().__init__(left)
        self.directory = directory
        self.random = random.Random(left)
        self.durable = {}
        self.manifests = []

    def flush(self, fd):
        with self.alive:
            super().flush(fd)
            path = Path(f"/proc/self/fd/{fd}").readlink()
            self.durable[path.name] = path.read_bytes()

    def flush_directory(self, path):
        with self.alive:
            super().flush_directory(path)
            del self.manifests[:-1]

    def replace(self, source, target):
        with self.alive:
            super().replace(source, target)
            self.manifests.append(target.read_bytes())

    def die(self):
        for path in self.directory.glob("*.jsonl"):
            safe = self.durable.get(path.name, b"")
            lost = bytearray(path.read_bytes()[len(safe) :])
            for start in range(0, len(lost), 64):
                if self.random.random() < 0.4:
                    lost[start : start + 64] = bytes(len(lost[start : start + 64]))
            path.write_bytes(safe + lost[: self.random.randint(0, len(lost))])
        if self.manifests:
            (self.directory / "manifest.json").write_bytes(self.random.choice(self.manifests))
        lock = self.directory / "lock"
        marker = Marker.unpack(lock.read_bytes())
        if marker is None or self.random.random() < 0.3:
            lock.write_bytes(b"")
        else:
            lock.write_bytes(marker._replace(boot=bytes(range(16))).pack())
        os._exit(7)


def busy(path, calls, acknowledge):
    """Commit pairs, claim and release, with small segments and early rewrites."""
    _writer._GARBAGE_BYTES = 1_500
    backend = FileStorageBackend(path)
    backend._calls = calls
    backend._segment_bytes = 1_500

    async def main():
        async with backend:
            new = NewRun(workflow="w", version="1", args="[]")
            started = Event("workflow.started", "I", {})
            await backend.commit_one(Change(run_id="r", key="k", create=new, events=[started]))
            for number in range(5):
                events = [Event("log.info", "O", {"number": number, "part": p}) for p in (1, 2)]
                await backend.commit_one(Change(run_id="r", key=f"n{number}", events=events))
                with calls.alive:
                    os.write(acknowledge, b"%d\n" % number)
                for _ in range(3):
                    request = ClaimRequest(owner="o", lease=timedelta(minutes=1))
                    for claim in (await backend.claim(request)).claims:
                        await backend.release(claim.ref)

    asyncio.run(main())


def live_and_die(path, calls):
    """Run ``busy`` in a forked child; what it acknowledged, and whether it came to its end."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reading)
            busy(path, calls, writing)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as file:
        acknowledged = [int(line) for line in file]
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in {0, 7}
    return acknowledged, status == 0


def append(path, number):
    async def main():
        async with FileStorageBackend(path) as backend:
            events = [Event("log.info", "O", {"number": number, "part": p}) for p in (1, 2)]
            await backend.commit_one(Change(run_id="r", key="appended", events=events))

    asyncio.run(main())


def die_everywhere(tmp_path, make_calls):
    """Die at the first call, at the second, and so on, until nothing is left to die at."""
    generations = set()
    for left in range(1, 1000):
        path = tmp_path / str(left)
        acknowledged, ended = live_and_die(path, make_calls(left, path / "default"))
        there = stored(path, "r")
        assert len(acknowledged) <= len(there) <= len(acknowledged) + 1, left
        generations |= {file.name[:6] for file in (path / "default").glob("*.jsonl")}
        if there:  # what was repaired is repaired for good, and can be written to
            append(path, len(there))
            assert stored(path, "r") == [*there, len(there)]
        if ended:
            break
    assert left > 50
    assert len(generations) > 2


@pytest.mark.parametrize("power", [False, True])
def test_cra01_death_at_any_point_keeps_what_was_acknowledged(tmp_path, power):
    die_everywhere(tmp_path, lambda left, path: LosingPower(left, path) if power else Dying(left))


@pytest.mark.parametrize("power", [False, True])
def test_cra01_death_at_any_point_of_the_loops_own_writes(tmp_path, power):
    class AtOnce:
        """Flushes seem to take no time: the loop writes all that it may."""

        def ticks(self):
            return 0

    class OnLoop(AtOnce, Dying):
        pass

    class OnLoopLosingPower(AtOnce, LosingPower):
        pass

    die_everywhere(
        tmp_path, lambda left, path: OnLoopLosingPower(left, path) if power else OnLoop(left)
    )


def test_cra01_death_while_repairing_keeps_what_was_acknowledged(tmp_path):
    path = tmp_path / "store"
    acknowledged, _ = live_and_die(path, Dying(30))
    for left in (1, 2, 3):
        live_and_die(path, Dying(left))
    there = stored(path, "r")
    assert len(acknowledged) <= len(there)
