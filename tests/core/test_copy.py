"""`storage copy`: whatever one store has, another has afterwards, or the copy says why not."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from pyworkflow import sleep, step, workflow
from pyworkflow._copy import CopyConflict, copy_store
from pyworkflow._memory import MemoryStorageBackend
from pyworkflow.errors import PayloadTooLarge, StorageError
from pyworkflow.events import Event
from pyworkflow.runs import ItemKind, RunStatus
from pyworkflow.spi import (
    Change,
    ClaimRequest,
    Control,
    ControlKind,
    Delta,
    LeaseFor,
    NewRun,
    Put,
    RunDelta,
    RunQuery,
    StorageInfo,
)
from pyworkflow.storekit import fsck
from pyworkflow.testing import resume_local, start_local
from pyworkflow_storage_file import FileStorageBackend


@step
async def double(x: int) -> int:
    return 2 * x


@workflow
async def naps(x: int) -> int:
    y = await double(x)
    await sleep("1h")
    return await double(y)


@workflow
async def quick(x: int) -> int:
    return await double(x)


class Cut(Exception):
    """The connection is gone."""


class Interrupted(MemoryStorageBackend):
    """Takes so many parts, then breaks."""

    left = 10**9

    async def import_delta(self, delta: Delta) -> None:
        self.left -= 1
        if self.left < 0:
            raise Cut
        await super().import_delta(delta)


async def furnished(store) -> list[str]:
    """Ended, sleeping, purged and long runs, with keys."""
    async with store.clone() as other:
        for n in range(3):
            await start_local(quick, n, storage=other, idempotency_key=f"old-{n}")
        await other.purge(before=await other.now() + timedelta(seconds=1), limit=2)
        ids = [await start_local(quick, n, storage=other) for n in range(2)]
        ids.append(await start_local(naps, 5, storage=other, idempotency_key="nap"))
    await store.commit_one(
        Change(
            run_id="long",
            key="start",
            create=NewRun(workflow="nobody", version="1", args="[]"),
            events=[Event("workflow.started", "I", {"workflow": "nobody", "args": "[]"})],
        )
    )
    for n in range(4):
        notes = [Event("log.info", "O", {"message": "m" * 500, "n": m}) for m in range(400)]
        await store.commit_one(Change(run_id="long", key=f"k{n}", events=notes))
    return ids


async def listed(store) -> list[str]:
    return [run.run_id for run in (await store.list_runs(RunQuery(limit=1000))).items]


def test_every_run_key_and_answer_arrives_and_goes_on_there(tmp_path):
    async def main():
        async with MemoryStorageBackend() as first, FileStorageBackend(tmp_path / "s") as second:
            ids = await furnished(first)
            report = await copy_store(first, second)
            assert (report.runs, report.copied, report.keys) == (5, 5, 2)
            assert await listed(second) == await listed(first)
            assert await fsck(second) == []
            again = await copy_store(first, second)
            assert (again.runs, again.copied, again.events) == (5, 0, 0)
            # A change sent again is recognised by the answer that came along.
            notes = [Event("log.info", "O", {"message": "again"})]
            answer = await second.commit_one(Change(run_id="long", key="k3", events=notes))
            assert answer.duplicate
            await second.shift_clock(timedelta(hours=2))
            await resume_local(ids[-1], storage=second)
            assert (await second.get_run(ids[-1])).result == 20
            async with MemoryStorageBackend(namespace="third") as third:
                await copy_store(second, third)
                assert await listed(third) == await listed(second)
                assert await third.find_run("old-0") == await first.find_run("old-0") is not None

    asyncio.run(main())


def test_an_interrupted_copy_goes_on_and_owes_no_work_until_it_is_whole():
    async def main():
        async with MemoryStorageBackend() as first:
            await furnished(first)
            for cut in range(20):
                async with Interrupted(namespace="target") as second:
                    second.left = cut
                    try:
                        await copy_store(first, second)
                    except Cut:
                        pass
                    else:
                        return
                    run = await second.get_run("long")
                    assert await fsck(second) == []
                    if run is not None and run.history_length < 1601:
                        assert run.status == "stalled"
                        assert await second.list_work("long") == []
                    second.left = 10**9
                    report = await copy_store(first, second)
                    assert report.runs == 5
                    assert await fsck(second) == []
        raise AssertionError("the copy takes more parts than expected")

    asyncio.run(main())


async def cut_short(target: Interrupted) -> MemoryStorageBackend:
    """A store from which one part of a long run, and nothing else, has arrived in ``target``."""
    first = MemoryStorageBackend(namespace="first")
    await first.commit_one(
        Change(
            run_id="long",
            key="start",
            create=NewRun(workflow="nobody", version="1", args="[]"),
            events=[Event("workflow.started", "I", {"workflow": "nobody", "args": "[]"})],
        )
    )
    for n in range(4):
        notes = [Event("log.info", "O", {"message": "m" * 500, "n": m}) for m in range(400)]
        await first.commit_one(Change(run_id="long", key=f"k{n}", events=notes))
    control = Control(ControlKind.TERMINATE, "over")
    await first.commit_one(
        Change(run_id="long", key="end", control=control, final=RunStatus.TERMINATED)
    )
    target.left = 1
    with pytest.raises(Cut):
        await copy_store(first, target)
    target.left = 10**9
    return first


def test_a_part_is_no_source():
    async def main():
        async with Interrupted(namespace="part") as part, MemoryStorageBackend() as third:
            await cut_short(part)
            with pytest.raises(CopyConflict, match=r"run_id=long.*only a part"):
                await copy_store(part, third)
            assert await listed(third) == []

    asyncio.run(main())


def test_a_part_that_nothing_can_complete_is_told_and_can_be_removed():
    async def main():
        async with Interrupted(namespace="target") as second:
            first = await cut_short(second)
            assert await first.purge(before=await first.now() + timedelta(seconds=1)) == 1
            with pytest.raises(CopyConflict, match=r"run_id=long.*--abandon-parts"):
                await copy_store(first, second)
            assert (await second.get_run("long")).status == "stalled"
            await copy_store(first, second, abandon_parts=True)
            assert (await second.get_run("long")).status == "terminated"
            assert await fsck(second) == []
            assert await second.purge(before=await second.now() + timedelta(seconds=1)) == 1

    asyncio.run(main())


def test_one_directory_under_two_names_is_one_store(tmp_path):
    async def main():
        (tmp_path / "alias").symlink_to(tmp_path / "s")
        async with FileStorageBackend(tmp_path / "s") as first:
            await start_local(quick, 1, storage=first)
            async with FileStorageBackend(tmp_path / "alias") as second:
                with pytest.raises(StorageError, match="same store"):
                    await copy_store(first, second)

    asyncio.run(main())


def test_a_different_run_in_the_target_is_named_and_left_alone():
    async def main():
        async with MemoryStorageBackend() as first, MemoryStorageBackend(namespace="b") as second:
            await furnished(first)
            await copy_store(first, second)
            notes = [Event("log.info", "O", {"message": "only here"})]
            await second.commit_one(Change(run_id="long", key="mine", events=notes))
            before = await second.get_events("long")
            with pytest.raises(CopyConflict, match="run_id=long"):
                await copy_store(first, second)
            assert await second.get_events("long") == before

    asyncio.run(main())


def test_a_key_of_another_run_in_the_target_is_a_conflict():
    async def main():
        async with MemoryStorageBackend() as first, MemoryStorageBackend(namespace="b") as second:
            await start_local(quick, 1, storage=first, idempotency_key="order")
            await start_local(quick, 1, storage=second, idempotency_key="order")
            with pytest.raises(CopyConflict, match="'order'"):
                await copy_store(first, second)

    asyncio.run(main())


def test_a_store_in_use_is_refused_and_leases_stay_behind():
    async def main():
        async with MemoryStorageBackend() as first, MemoryStorageBackend(namespace="b") as second:
            await first.commit_one(
                Change(
                    run_id="run",
                    key="start",
                    create=NewRun(workflow="nobody", version="1", args="[]"),
                    events=[Event("workflow.started", "I", {})],
                    put=[
                        Put(
                            item_id="turn",
                            kind=ItemKind.TURN,
                            claimed=LeaseFor("w1", timedelta(minutes=1)),
                        )
                    ],
                )
            )
            with pytest.raises(StorageError, match="w1"):
                await copy_store(first, second)
            await copy_store(first, second, in_use=True)
            (item,) = await second.list_work("run")
            assert item.lease is None
            assert item.claims == 1
            request = ClaimRequest(owner="w2", lease=timedelta(minutes=1))
            assert len((await second.claim(request)).claims) == 1

    asyncio.run(main())


def test_the_same_store_twice_is_refused():
    async def main():
        async with MemoryStorageBackend() as store:
            with pytest.raises(StorageError, match="same store"):
                await copy_store(store, store.clone())

    asyncio.run(main())


def test_a_payload_too_large_for_the_target_is_refused_before_its_run_is_there():
    class Small(MemoryStorageBackend):
        def info(self) -> StorageInfo:
            info = super().info()
            return StorageInfo(
                contract_version=2,
                name=info.name,
                location="small",
                capabilities=info.capabilities,
                max_payload=100,
                max_events_per_commit=3,
            )

    async def main():
        async with MemoryStorageBackend() as first, Small(namespace="b") as second:
            await start_local(quick, 1, storage=first)
            await copy_store(first, second)
            await furnished(first)
            with pytest.raises(PayloadTooLarge):
                await copy_store(first, second)
            assert "long" not in await listed(second)

    asyncio.run(main())


def test_events_with_a_hole_before_them_are_refused():
    async def main():
        async with MemoryStorageBackend() as store:
            late = [Event("log.info", "O", {}, run_id="run", seq=2)]
            with pytest.raises(ValueError, match="missing"):
                await store.import_delta(Delta([RunDelta("run", {"workflow": "w"}, late)]))
            assert await store.get_run("run") is None

    asyncio.run(main())
