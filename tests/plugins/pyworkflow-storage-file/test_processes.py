"""Several processes on one store at once."""

import asyncio
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from pyworkflow.spi import RunQuery
from pyworkflow.storekit import fsck
from pyworkflow_storage_file import FileStorageBackend

WORKER = Path(__file__).with_name("_worker.py")


def start(*args):
    return subprocess.Popen(
        [sys.executable, str(WORKER), *map(str, args)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(processes):
    outputs = []
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert (process.returncode, err) == (0, "")
        outputs.append(out.split("\n")[:-1])
    return outputs


def numbers(events, writer):
    """The numbers of a writer's pairs, each of which must be whole."""
    own = [e for e in events if e.type == "log.info" and e.data["writer"] == writer]
    first, second = own[::2], own[1::2]
    assert all(e.data["part"] == 1 for e in first)
    assert all(e.data["part"] == 2 for e in second)
    assert all(a.seq + 1 == b.seq for a, b in zip(first, second, strict=True))
    return [e.data["number"] for e in first]


def test_f32_six_writer_processes_are_serialised(tmp_path):
    names = [f"w{n}" for n in range(6)]
    finish([start("write", tmp_path, name, 60) for name in names])

    async def main():
        async with FileStorageBackend(tmp_path) as backend:
            shared = await backend.get_events("shared")
            assert [e.seq for e in shared] == list(range(1, 6 * 60 * 2 + 2))
            times = [e.timestamp for e in shared]
            assert times == sorted(times)
            for name in names:
                assert numbers(shared, name) == list(range(60))
                own = await backend.get_events(name)
                assert [e.seq for e in own] == list(range(1, 122))
                assert numbers(own, name) == list(range(60))
            assert await fsck(backend) == []

    asyncio.run(main())


def test_f32_an_idempotency_key_is_won_by_one_process(tmp_path):
    won = finish([start("keys", tmp_path, f"w{n}", 40) for n in range(4)])
    assert sorted(int(number) for each in won for number in each) == list(range(40))


def test_f32_no_item_is_claimed_twice(tmp_path):
    from pyworkflow.spi import Change, Event, NewRun

    async def main():
        async with FileStorageBackend(tmp_path) as backend:
            for n in range(100):
                new = NewRun(workflow="w", version="1", args="[]")
                started = Event("workflow.started", "I", {})
                await backend.commit_one(
                    Change(run_id=f"r{n}", key="k", create=new, events=[started])
                )

    asyncio.run(main())
    done = finish([start("work", tmp_path, f"w{n}") for n in range(4)])
    runs = Counter(line.split()[0] for each in done for line in each)
    tokens = [line.split()[1] for each in done for line in each]
    assert runs == Counter(f"r{n}" for n in range(100))
    assert len(set(tokens)) == len(tokens)


def test_mig04_processes_that_open_a_new_store_at_once_make_one(tmp_path):
    finish([start("write", tmp_path / "new" / "store", f"w{n}", 1) for n in range(6)])

    async def main():
        async with FileStorageBackend(tmp_path / "new" / "store") as backend:
            assert len((await backend.list_runs(RunQuery())).items) == 7

    asyncio.run(main())


def test_a_live_reader_follows_writers_in_other_processes(tmp_path):
    async def main():
        async with FileStorageBackend(tmp_path) as backend:
            await backend.open()
            processes = [start("write", tmp_path, f"w{n}", 30) for n in range(2)]
            last = 0
            while any(process.poll() is None for process in processes) or last == 0:
                events = await backend.get_events("shared")
                assert len(events) >= last
                assert [e.seq for e in events] == list(range(1, len(events) + 1))
                assert not events or len(events) % 2 == 1  # pairs are seen whole
                last = len(events)
                await asyncio.sleep(0)
            finish(processes)
            assert len(await backend.get_events("shared")) == 121

    asyncio.run(main())
