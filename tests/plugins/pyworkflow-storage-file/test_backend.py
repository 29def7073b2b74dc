"""The file backend in one process: life, sharing, clock, news, failing disks."""

import asyncio
import errno
import json
import os
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pyworkflow.spi import (
    Change,
    ClaimRequest,
    ConfigurationError,
    Event,
    Fenced,
    ItemKind,
    NewRun,
    RunExists,
    RunQuery,
    RunStatus,
    Settle,
    StorageError,
    StorageFull,
    StorageUnavailable,
)
from pyworkflow_storage_file import FileStorageBackend, _packing, _plugin, _writer
from pyworkflow_storage_file._calls import Calls

MINUTE = timedelta(minutes=1)


def create(run_id, **fields):
    return Change(
        run_id=run_id,
        key=f"start:{run_id}",
        create=NewRun(workflow="w", version="1", args="[]", **fields),
        events=[Event("workflow.started", "I", {"workflow": "w"}, key="started")],
    )


def note(run_id, text):
    return Change(
        run_id=run_id, key=f"note:{text}", events=[Event("log.info", "O", {"message": text})]
    )


def messages(events):
    return [event.data["message"] for event in events if event.type == "log.info"]


def run_python(code, *args, **options):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,
    )


class Failing(Calls):
    def __init__(self):
        self.codes = {}

    def _check(self, name):
        if name in self.codes:
            raise OSError(self.codes[name], os.strerror(self.codes[name]))

    def write(self, fd, data, offset):
        self._check("write")
        return super().write(fd, data, offset)

    def flush(self, fd):
        self._check("flush")
        super().flush(fd)


class Clock(Calls):
    """A machine whose clocks the test moves."""

    def __init__(self):
        self.wall = 1_800_000_000 * 10**9
        self.boot = 10**12

    def clocks(self):
        return self.wall, self.boot

    def advance(self, seconds):
        self.wall += seconds * 10**9
        self.boot += seconds * 10**9


# --- life -------------------------------------------------------------------------------------


def test_the_constructor_touches_nothing(tmp_path):
    backend = FileStorageBackend(tmp_path / "store")
    assert backend.info().location == str(tmp_path / "store")
    assert backend.info().capabilities.durable
    assert not FileStorageBackend(tmp_path, fsync=False).info().capabilities.durable
    assert not (tmp_path / "store").exists()


def test_the_first_call_opens_and_a_second_open_is_fine(tmp_path):
    async def main():
        async with FileStorageBackend(tmp_path / "store") as backend:
            await backend.open()
            assert await backend.get_run("none") is None
        assert (tmp_path / "store" / ".gitignore").read_text() == "*\n"

    asyncio.run(main())


def exists(path):
    return asyncio.run(FileStorageBackend(path).exists())


def make(path, namespace="default"):
    async def main():
        backend = FileStorageBackend(path, namespace=namespace)
        try:
            await backend.open()
        finally:
            await backend.close()

    asyncio.run(main())


@pytest.mark.parametrize("name", ["manifest.json", "data.jsonl", "lock", "000001-000001.jsonl/x"])
def test_a_directory_with_other_content_is_no_store_until_it_is_opened(tmp_path, name):
    file = tmp_path / "default" / name
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    assert not exists(tmp_path)
    assert not exists(tmp_path / "missing")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_store_exists_whichever_its_namespaces_and_however_damaged(tmp_path):
    make(tmp_path, "other")
    assert exists(tmp_path)
    folder = tmp_path / "other"
    manifest = (folder / "manifest.json").read_bytes()
    (folder / "manifest.json").unlink()
    assert exists(tmp_path)
    (segment,) = folder.glob("*.jsonl")
    segment.unlink()
    (folder / "manifest.json").write_bytes(manifest)
    assert exists(tmp_path)


def test_git_ignores_only_a_directory_that_was_the_stores_from_the_start(tmp_path):
    (tmp_path / "a.py").touch()
    make(tmp_path)
    make(tmp_path, "second")
    assert not (tmp_path / ".gitignore").exists()
    for name in ("made", "empty"):
        if name == "empty":
            (tmp_path / name).mkdir()
        make(tmp_path / name)
        assert (tmp_path / name / ".gitignore").read_text() == "*\n"


def test_the_inside_of_a_store_is_refused_and_stays_as_it_is(tmp_path):
    make(tmp_path / "store")
    inside = tmp_path / "store" / "default"
    before = sorted(inside.rglob("*"))
    for call in (exists, make):
        with pytest.raises(ConfigurationError, match=r"inside a store.*above it: .*store$"):
            call(inside)
    with pytest.raises(ConfigurationError, match="inside a store"):
        make(inside, "other")
    assert sorted(inside.rglob("*")) == before


def test_a_store_that_0_1_0_made_inside_another_keeps_opening(tmp_path):
    make(tmp_path / "elsewhere")
    make(tmp_path / "store")
    inside = tmp_path / "store" / "default"
    (tmp_path / "elsewhere" / "default").rename(inside / "default")
    make(inside)
    assert exists(inside)
    make(tmp_path / "store")


def test_what_was_committed_is_there_for_other_objects_and_after_a_restart(tmp_path):
    async def main():
        async with FileStorageBackend(tmp_path) as one, FileStorageBackend(tmp_path) as two:
            await one.commit_one(create("r"))
            assert (await two.get_run("r")).workflow == "w"
            await two.commit_one(note("r", "hello"))
            assert messages(await one.get_events("r")) == ["hello"]
        async with FileStorageBackend(tmp_path) as again:
            assert [e.seq for e in await again.get_events("r")] == [1, 2]
            assert (await again.get_run("r")).history_length == 2

    asyncio.run(main())


def test_the_journal_is_json_lines(tmp_path):
    async def main():
        async with FileStorageBackend(tmp_path) as backend:
            for n in range(3):
                await backend.commit_one(create(f"r{n}"))

    asyncio.run(main())
    (path,) = (tmp_path / "default").glob("*.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["n"] for line in lines] == [1, 2, 3]
    assert [line["d"]["runs"][0]["id"] for line in lines] == ["r0", "r1", "r2"]


def test_use_after_close_raises_and_close_is_idempotent(tmp_path):
    async def main():
        backend = FileStorageBackend(tmp_path)
        await backend.open()
        await backend.close()
        await backend.close()
        with pytest.raises(StorageError, match="closed"):
            await backend.get_run("r")
        with pytest.raises(StorageError, match="closed"):
            await backend.open()
        unused = FileStorageBackend(tmp_path)
        await unused.close()

    asyncio.run(main())


def test_close_finishes_what_was_begun_and_ends_the_thread(tmp_path):
    async def main():
        backend = FileStorageBackend(tmp_path)
        begun = [asyncio.ensure_future(backend.commit_one(create(f"r{n}"))) for n in range(50)]
        await asyncio.sleep(0)
        await backend.close()
        await asyncio.gather(*begun)

    asyncio.run(main())
    assert not [t for t in threading.enumerate() if t.name == "pyworkflow-storage-file"]


def test_an_object_that_was_dropped_ends_its_thread(tmp_path):
    import gc

    async def main():
        await FileStorageBackend(tmp_path).open()

    asyncio.run(main())
    gc.collect()
    for thread in threading.enumerate():
        if thread.name == "pyworkflow-storage-file":
            thread.join(10)
            assert not thread.is_alive()


def test_another_loop_is_refused_and_clone_is_the_remedy(tmp_path):
    backend = FileStorageBackend(tmp_path, namespace="n")
    asyncio.run(backend.commit_one(create("r")))

    async def other():
        with pytest.raises(StorageError, match=r"clone\(\)"):
            await backend.get_run("r")
        async with backend.clone() as clone:
            assert await clone.get_run("r") is not None
        await backend.close()

    asyncio.run(other())


def test_an_exit_without_close_loses_nothing_and_hangs_nothing(tmp_path):
    code = """
import asyncio, sys
from pyworkflow.spi import Change, Event, NewRun
from pyworkflow_storage_file import FileStorageBackend
backend = FileStorageBackend(sys.argv[1])
async def main():
    for n in range(20):
        await backend.commit_one(Change(run_id=f"r{n}", key="k",
            create=NewRun(workflow="w", version="1", args="[]"),
            events=[Event("workflow.started", "I", {})]))
asyncio.run(main())
print("done")
"""
    done = run_python(code, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")

    async def main():
        async with FileStorageBackend(tmp_path) as backend:
            assert len((await backend.list_runs(RunQuery())).items) == 20

    asyncio.run(main())


def test_f48_parent_and_forked_child_go_on_with_files_of_their_own(tmp_path):
    code = """
import asyncio, os, sys
from pyworkflow.spi import Change, Event, NewRun
from pyworkflow_storage_file import FileStorageBackend
backend = FileStorageBackend(sys.argv[1])
def make(run_id):
    return Change(run_id=run_id, key="k", create=NewRun(workflow="w", version="1", args="[]"),
                  events=[Event("workflow.started", "I", {})])
async def child():
    for n in range(30):
        await backend.commit_one(make(f"child{n}"))
    await backend.close()
async def parent():
    await backend.commit_one(make("first"))
    pid = os.fork()
    if pid == 0:
        return None
    for n in range(30):
        await backend.commit_one(make(f"parent{n}"))
    return pid
import warnings; warnings.simplefilter("ignore")
loop = asyncio.new_event_loop()
pid = loop.run_until_complete(parent())
if pid is None:
    asyncio.run(child()); os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
async def check():
    async with backend.clone() as clone:
        from pyworkflow.spi import RunQuery
        runs = (await clone.list_runs(RunQuery(limit=1000))).items
        print(len(runs), open("/proc/self/stat") and len(os.listdir("/proc/self/fd")) < 30)
asyncio.run(check())
"""
    done = run_python(code, tmp_path)
    assert (done.returncode, done.stdout) == (0, "61 True\n"), done.stderr


# --- places -----------------------------------------------------------------------------------


def test_namespaces_are_isolated_whatever_they_are_called(tmp_path):
    names = ["default", "Default", "a/b", "..", ".", "", "é", "e\u0301", "x" * 500, "x" * 501, "%"]

    async def main():
        for name in names:
            async with FileStorageBackend(tmp_path, namespace=name) as backend:
                assert (await backend.list_runs(RunQuery())).items == []
                await backend.commit_one(create("same"))
        for name in names:
            async with FileStorageBackend(tmp_path, namespace=name) as backend:
                assert len(await backend.get_events("same")) == 1

    asyncio.run(main())
    folders = [p.name for p in tmp_path.iterdir() if p.is_dir()]
    assert len({f.casefold() for f in folders}) == len(names)
    with pytest.raises(ConfigurationError, match="namespace"):
        FileStorageBackend(tmp_path, namespace="\ud800")


def test_unusable_paths_are_named(tmp_path):
    (tmp_path / "file").write_text("")

    async def main():
        for path in (tmp_path / "file", tmp_path / "file" / "below", "/proc/none"):
            backend = FileStorageBackend(path)
            with pytest.raises((ConfigurationError, StorageError), match=str(path)):
                await backend.open()
            await backend.close()

    asyncio.run(main())


def test_a_path_that_becomes_usable_is_used(tmp_path):
    (tmp_path / "store").write_text("")

    async def main():
        async with FileStorageBackend(tmp_path / "clone") as backend:
            await backend.open()
        backend = FileStorageBackend(tmp_path / "store")
        with pytest.raises(ConfigurationError):
            await backend.open()
        (tmp_path / "store").unlink()
        await backend.commit_one(create("r"))
        await backend.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("file:data", "data"),
        ("file:./data/x", "./data/x"),
        ("file:///var/lib/x", "/var/lib/x"),
        ("file:/var/lib/x", "/var/lib/x"),
        ("FILE:///var/a%20b%3F", "/var/a b?"),
        ("file:///var/x?fsync=false&namespace=n", "/var/x"),
    ],
)
def test_the_plugin_serves_file_urls(url, path):
    options = {"namespace": "n", "fsync": "false"} if "?" in url else {}
    backend = _plugin.pyworkflow_make_storage(url, options)
    assert str(backend.path) == str(Path(path).absolute())
    assert backend.namespace == options.get("namespace", "default")
    assert backend.info().capabilities.durable is not bool(options)


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("file:", {}),
        ("file:///", {}),
        ("file://host/x", {}),
        ("file:x", {"colour": "red"}),
        ("file:x", {"fsync": "maybe"}),
    ],
)
def test_the_plugin_refuses_what_it_does_not_understand(url, options):
    with pytest.raises(ConfigurationError):
        _plugin.pyworkflow_make_storage(url, options)


def test_the_plugin_leaves_other_urls_alone():
    assert _plugin.pyworkflow_make_storage("memory://", {}) is None


# --- commits and claims -----------------------------------------------------------------------


def test_refusals_of_one_do_not_touch_the_others_in_a_batch(tmp_path):
    async def main():
        async with FileStorageBackend(tmp_path) as backend:
            other = create("a")
            other.key = "other"
            first, *answers = await asyncio.gather(
                backend.commit_one(create("a")),
                backend.commit_one(other),
                backend.commit_one(create("b")),
                return_exceptions=True,
            )
            assert first.last_seq == 1
            assert isinstance(answers[0], RunExists)
            assert answers[1].last_seq == 1
            answers = await backend.commit([create("c"), other, create("d")])
            assert isinstance(answers[1], RunExists)
        async with FileStorageBackend(tmp_path) as again:
            runs = (await again.list_runs(RunQuery())).items
            assert sorted(run.run_id for run in runs) == ["a", "b", "c", "d"]

    asyncio.run(main())


def test_a_change_sent_again_is_answered_as_it_was_after_a_restart(tmp_path):
    async def main():
        async with FileStorageBackend(tmp_path) as backend:
            first = await backend.commit_one(create("r"))
        async with FileStorageBackend(tmp_path) as backend:
            again = await backend.commit_one(create("r"))
        assert again.duplicate
        assert (again.last_seq, again.timestamp) == (first.last_seq, first.timestamp)

    asyncio.run(main())


def test_claims_are_seen_by_others_and_tokens_never_repeat(tmp_path):
    async def main():
        tokens = set()
        for n in range(3):
            async with FileStorageBackend(tmp_path) as one, FileStorageBackend(tmp_path) as two:
                await one.commit_one(create(f"r{n}"))
                request = ClaimRequest(owner="o", lease=MINUTE, items=[(f"r{n}", "turn")])
                (claim,) = (await one.claim(request)).claims
                assert (await two.claim(request)).claims == []
                assert await two.renew([claim.ref], MINUTE) == [True]
                assert await two.release(claim.ref)
                (again,) = (await two.claim(request)).claims
                assert await one.free("o") == n + 1 if n == 0 else True
                tokens |= {claim.ref.token, again.ref.token}
        assert len(tokens) == 6

    asyncio.run(main())


def test_a_claim_whose_caller_was_cancelled_is_given_back(tmp_path):
    async def main():
        async with FileStorageBackend(tmp_path) as backend:
            for n in range(20):
                run_id = f"r{n}"
                await backend.commit_one(create(run_id))
                request = ClaimRequest(owner="o", lease=MINUTE, items=[(run_id, "turn")])
                task = asyncio.ensure_future(backend.claim(request))
                for _ in range(n % 4):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task])
                if task.cancelled():
                    await backend.list_work(run_id)
                    await backend.list_work(run_id)
                    (claim,) = (await backend.claim(request)).claims
                    assert claim.item.claims <= 2

    asyncio.run(main())


def test_a_fenced_change_writes_nothing(tmp_path):
    async def main():
        async with FileStorageBackend(tmp_path) as backend:
            await backend.commit_one(create("r"))
            request = ClaimRequest(owner="o", lease=MINUTE)
            (claim,) = (await backend.claim(request)).claims
            await backend.release(claim.ref)
            change = Change(run_id="r", key=f"{claim.ref.token}:1", claim=claim.ref, seen=1)
            before = [p.read_bytes() for p in (tmp_path / "default").glob("*.jsonl")]
            with pytest.raises(Fenced):
                await backend.commit_one(change)
            assert [p.read_bytes() for p in (tmp_path / "default").glob("*.jsonl")] == before

    asyncio.run(main())


# --- clock ------------------------------------------------------------------------------------


def test_the_clock_is_shifted_for_all_and_for_good(tmp_path):
    async def main():
        async with FileStorageBackend(tmp_path) as one, FileStorageBackend(tmp_path) as two:
            await one.shift_clock(timedelta(days=3))
            await two.shift_clock(timedelta(hours=1))
            ahead = timedelta(days=3, hours=1)
            for each in (one, two):
                gap = await each.now() - datetime.now(UTC)
                assert abs(gap - ahead) < MINUTE
        async with FileStorageBackend(tmp_path) as again:
            assert abs(await again.now() - datetime.now(UTC) - ahead) < MINUTE

    asyncio.run(main())


@pytest.mark.parametrize("jump", [3600, -3600])
def test_h16_a_wall_clock_that_is_set_neither_ends_leases_nor_freezes_dead_ones(tmp_path, jump):
    async def main():
        clock = Clock()
        backend, other = FileStorageBackend(tmp_path), FileStorageBackend(tmp_path)
        backend._calls = other._calls = clock
        async with backend, other:
            await backend.commit_one(create("live"))
            await backend.commit_one(create("dead"))
            live = ClaimRequest(owner="a", lease=MINUTE, items=[("live", "turn")])
            dead = ClaimRequest(owner="b", lease=MINUTE / 6, items=[("dead", "turn")])
            assert (await backend.claim(dead)).claims
            assert (await backend.claim(live)).claims
            clock.advance(8)
            clock.wall += jump * 10**9
            for each in (backend, other):
                assert (await each.get_run("live")).status is RunStatus.RUNNING
                assert not (await each.claim(live)).claims
                assert not (await each.claim(dead)).claims
            clock.advance(3)
            assert (await other.claim(dead)).claims  # its ten seconds are over, not an hour later
            assert not (await backend.claim(live)).claims
            clock.advance(50)
            assert (await backend.claim(live)).claims

    asyncio.run(main())


# --- news -------------------------------------------------------------------------------------


@pytest.mark.parametrize("same", [True, False])
def test_watch_wakes_for_a_run(tmp_path, same):
    async def main():
        async with FileStorageBackend(tmp_path) as one, FileStorageBackend(tmp_path) as two:
            await one.commit_one(create("r"))
            assert await one.watch("r", after=0, timeout=timedelta(0))
            assert not await one.watch("r", after=1, timeout=timedelta(milliseconds=5))
            writer = one if same else two
            task = asyncio.ensure_future(one.watch("r", after=1, timeout=MINUTE))
            await asyncio.sleep(0)
            await writer.commit_one(note("r", "news"))
            assert await asyncio.wait_for(task, 10)
            late = asyncio.ensure_future(two.watch("later", after=0, timeout=MINUTE))
            await asyncio.sleep(0)
            await writer.commit_one(create("later"))
            assert await asyncio.wait_for(late, 10)

    asyncio.run(main())


@pytest.mark.parametrize("same", [True, False])
def test_watch_wakes_a_worker_for_new_work_and_misses_none(tmp_path, same):
    async def main():
        async with FileStorageBackend(tmp_path) as one, FileStorageBackend(tmp_path) as two:
            writer = one if same else two
            request = ClaimRequest(owner="o", lease=MINUTE, limit=10)
            for n in range(5):
                assert not (await one.claim(request)).claims
                if n % 2:
                    await writer.commit_one(create(f"r{n}"))  # before the wait begins
                    assert await one.watch(None, after=0, timeout=MINUTE)
                else:
                    task = asyncio.ensure_future(one.watch(None, after=0, timeout=MINUTE))
                    await asyncio.sleep(0)
                    await writer.commit_one(create(f"r{n}"))
                    assert await asyncio.wait_for(task, 10)
                (claim,) = (await one.claim(request)).claims
                key = f"{claim.ref.token}:1"
                await one.commit_one(
                    Change(run_id=f"r{n}", key=key, claim=claim.ref, seen=1, settle=Settle())
                )
                while await one.watch(None, after=0, timeout=timedelta(0)):
                    pass

    asyncio.run(main())


# --- growth -----------------------------------------------------------------------------------


def test_a_journal_of_garbage_is_rewritten_and_followed(tmp_path, monkeypatch):
    monkeypatch.setattr(_writer, "_GARBAGE_BYTES", 20_000)

    async def main():
        async with FileStorageBackend(tmp_path) as one, FileStorageBackend(tmp_path) as two:
            await one.shift_clock(timedelta(days=1))
            await one.commit_one(create("r", idempotency_key="k"))
            request = ClaimRequest(owner="o", lease=MINUTE)
            while not list((tmp_path / "default").glob("000003-*.jsonl")):
                (claim,) = (await one.claim(request)).claims
                assert await two.release(claim.ref)
            for each in (one, two):
                assert len(await each.get_events("r")) == 1
                assert await each.find_run("k") == "r"
            await two.commit_one(note("r", "after"))
            assert messages(await one.get_events("r")) == ["after"]
        assert sum(p.stat().st_size for p in (tmp_path / "default").glob("*.jsonl")) < 25_000
        async with FileStorageBackend(tmp_path) as again:
            assert (await again.get_run("r")).history_length == 2
            assert await again.now() > datetime.now(UTC) + timedelta(hours=23)
            assert (await again.commit_one(create("r", idempotency_key="k"))).duplicate

    asyncio.run(main())


def test_a_purge_gives_the_room_back(tmp_path, monkeypatch):
    monkeypatch.setattr(_writer, "_GARBAGE_BYTES", 20_000)

    async def main():
        async with FileStorageBackend(tmp_path) as backend:
            for n in range(50):
                change = create(f"r{n}")
                change.events = [*change.events, Event("log.info", "O", {"message": "x" * 1000})]
                await backend.commit_one(change)
                request = ClaimRequest(owner="o", lease=MINUTE)
                (claim,) = (await backend.claim(request)).claims
                key = f"{claim.ref.token}:1"
                done = [Event("workflow.completed", "C", {"result": "1"})]
                await backend.commit_one(
                    Change(
                        run_id=f"r{n}",
                        key=key,
                        claim=claim.ref,
                        seen=1,
                        events=done,
                        final=RunStatus.COMPLETED,
                        settle=Settle(),
                    )
                )
            await backend.shift_clock(timedelta(days=2))
            before = await backend.now() - timedelta(days=1)
            assert await backend.purge(before=before) == 50
            assert await backend.purge(before=before) == 0
        size = sum(p.stat().st_size for p in (tmp_path / "default").glob("*.jsonl"))
        assert size < 20_000

    asyncio.run(main())


# --- failing disks ----------------------------------------------------------------------------


def test_f28_a_full_disk_refuses_whole_changes_and_the_same_change_goes_through_later(tmp_path):
    async def main():
        backend, other = FileStorageBackend(tmp_path), FileStorageBackend(tmp_path)
        backend._calls = Failing()
        async with backend, other:
            await backend.commit_one(create("r"))
            backend._calls.codes["write"] = errno.ENOSPC
            answers = await asyncio.gather(
                *(backend.commit_one(note("r", str(n))) for n in range(5)), return_exceptions=True
            )
            assert all(isinstance(answer, StorageFull) for answer in answers)
            assert messages(await backend.get_events("r")) == []
            backend._calls.codes.clear()
            await backend.commit_one(note("r", "0"))
            assert messages(await other.get_events("r")) == ["0"]

    asyncio.run(main())


def test_found_m10_what_a_full_disk_kept_from_being_released_is_free_when_there_is_room(tmp_path):
    async def main():
        backend = FileStorageBackend(tmp_path)
        backend._calls = Failing()
        async with backend:
            for run_id in ("a", "b"):
                await backend.commit_one(create(run_id))
            request = ClaimRequest(owner="o", lease=MINUTE, limit=2)
            first, second = (await backend.claim(request)).claims
            backend._calls.codes["write"] = errno.ENOSPC
            for claim in (first, second):
                with pytest.raises(StorageFull):
                    await backend.release(claim.ref)
            with pytest.raises(StorageFull):
                await backend.claim(request)
            backend._calls.codes.clear()
            assert await backend.renew([second.ref], MINUTE) == [True]  # it is needed after all
            (again,) = (await backend.claim(request)).claims
            assert (again.item.run_id, again.item.claims) == (first.item.run_id, 1)

    asyncio.run(main())


def test_f29_a_failing_flush_reports_no_success_and_poisons_for_all(tmp_path):
    async def main():
        backend, other = FileStorageBackend(tmp_path), FileStorageBackend(tmp_path)
        backend._calls = Failing()
        async with backend, other:
            await backend.commit_one(create("r"))
            backend._calls.codes["flush"] = errno.EIO
            with pytest.raises(StorageError, match="poisoned"):
                await backend.commit_one(note("r", "lost"))
            backend._calls.codes.clear()
            for each in (backend, other):
                with pytest.raises(StorageError, match="poisoned"):
                    await each.commit_one(note("r", "more"))
                with pytest.raises(StorageError, match="poisoned"):
                    await each.get_events("r")

    asyncio.run(main())


def test_a_lock_that_is_held_for_too_long_is_reported(tmp_path):
    from pyworkflow_storage_file._lock import StoreLock

    async def main():
        backend = FileStorageBackend(tmp_path)
        backend._lock_timeout = 0.2
        await backend.commit_one(create("r"))
        lock = StoreLock(tmp_path / "default")
        lock.open()
        lock.acquire()
        with pytest.raises(StorageUnavailable, match="lock"):
            await backend.commit_one(note("r", "blocked"))
        lock.release()
        lock.close()
        await backend.commit_one(note("r", "free"))
        assert messages(await backend.get_events("r")) == ["free"]
        await backend.close()

    asyncio.run(main())


def test_the_kinds_of_items_survive_a_restart(tmp_path):
    async def main():
        async with FileStorageBackend(tmp_path) as backend:
            await backend.commit_one(create("r", queue="q", priority=3))
        async with FileStorageBackend(tmp_path) as backend:
            (item,) = await backend.list_work("r")
            assert (item.kind, item.queue, item.priority) == (ItemKind.TURN, "q", 3)
            assert await backend.next_due() is not None
            assert await backend.next_due(queues=frozenset({"other"})) is None

    asyncio.run(main())


def test_a_rewrite_that_fails_is_tried_later_and_hurts_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(_writer, "_GARBAGE_BYTES", 5_000)
    monkeypatch.setattr(_packing, "_PAUSE_S", 0.0)  # a minute after each failure

    class NoReplace(Calls):
        failed = 0

        def replace(self, source, target):
            if '"generation": 1,' not in source.read_text() and self.failed < 2:
                self.failed += 1
                raise OSError(errno.ENOSPC, "no room")
            super().replace(source, target)

    async def main():
        backend, other = FileStorageBackend(tmp_path), FileStorageBackend(tmp_path)
        backend._calls = NoReplace()
        async with backend, other:
            await backend.commit_one(create("r"))
            request = ClaimRequest(owner="o", lease=MINUTE)
            manifest = tmp_path / "default" / "manifest.json"
            while json.loads(manifest.read_text())["generation"] == 1:
                (claim,) = (await backend.claim(request)).claims
                assert await backend.release(claim.ref)
            assert backend._calls.failed == 2
            assert len(await other.get_events("r")) == 1

    asyncio.run(main())
