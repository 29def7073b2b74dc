from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from datetime import timedelta

import pytest

from pyworkflow import _memory
from pyworkflow._memory import MemoryStorageBackend
from pyworkflow.errors import SerializationError, StorageError
from pyworkflow.events import Event
from pyworkflow.runs import ItemKind
from pyworkflow.spi import Change, ClaimRequest, LeaseFor, NewRun, Put, Settle

MINUTE = timedelta(minutes=1)


def create(run_id="run"):
    return Change(
        run_id=run_id,
        key="start",
        create=NewRun(workflow="w", version="1", args="[]"),
        events=[Event("workflow.started", "I", {})],
    )


def note(key):
    return Change(run_id="run", key=key, events=[Event("log.info", "O", {})])


def test_two_stores_are_two_stores_and_clones_are_one():
    async def main():
        store = MemoryStorageBackend()
        await store.commit_one(create())
        assert await MemoryStorageBackend().get_run("run") is None
        clone = store.clone()
        await store.close()
        assert (await clone.get_run("run")).run_id == "run"

    asyncio.run(main())


def test_a_closed_store_says_so():
    async def main():
        store = MemoryStorageBackend()
        await store.close()
        for call in (store.open(), store.now(), store.claim(ClaimRequest(owner="o", lease=MINUTE))):
            with pytest.raises(StorageError):
                await call

    asyncio.run(main())


def test_watch_is_woken_from_another_thread_and_loop():
    store = MemoryStorageBackend()
    asyncio.run(store.commit_one(create()))
    found = []
    waiting = threading.Thread(
        target=lambda: found.append(asyncio.run(store.watch("run", after=1, timeout=MINUTE)))
    )
    waiting.start()
    while not store._shared.waiters:
        pass  # until it waits; the commit below would be seen without waiting
    asyncio.run(store.commit_one(note("k")))
    waiting.join(30)
    assert found == [True]
    assert not store._shared.waiters


def test_watch_gives_up_and_leaves_nothing_behind():
    async def main():
        store = MemoryStorageBackend()
        await store.commit_one(create())
        assert not await store.watch("run", after=1, timeout=timedelta(0))
        waiting = asyncio.ensure_future(store.watch("run", after=1, timeout=MINUTE))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert not store._shared.waiters

    asyncio.run(main())


def test_a_waiter_whose_loop_died_stops_nobody():
    store = MemoryStorageBackend()

    async def waiter():
        store._shared.add(_memory._Waiter("run", 0))

    asyncio.run(waiter())
    asyncio.run(store.commit_one(create()))


@pytest.mark.parametrize("what", ["commit", "release", "free", "shift"])
def test_workers_are_woken_by_whatever_makes_work(what):
    async def main():
        store = MemoryStorageBackend()
        worker = store.clone()
        await store.commit_one(create())
        (claim,) = (await worker.claim(ClaimRequest(owner="o", lease=MINUTE))).claims
        assert (await worker.claim(ClaimRequest(owner="o", lease=MINUTE))).claims == []
        waiting = asyncio.ensure_future(worker.watch(None, after=0, timeout=MINUTE))
        await asyncio.sleep(0)
        assert not waiting.done()
        if what == "commit":
            put = Put(item_id="step:1", kind=ItemKind.STEP)
            await store.commit_one(Change(run_id="run", key="k", put=[put]))
        elif what == "release":
            await store.release(claim.ref)
        elif what == "free":
            await store.free("o")
        else:
            await store.shift_clock(MINUTE)
        assert await asyncio.wait_for(waiting, 30)

    asyncio.run(main())


def test_claims_and_notes_wake_no_worker():
    async def main():
        store = MemoryStorageBackend()
        worker = store.clone()
        await store.commit_one(create())
        await worker.claim(ClaimRequest(owner="o", lease=MINUTE, limit=0))
        await store.commit_one(note("k"))
        (claim,) = (await store.claim(ClaimRequest(owner="o", lease=MINUTE))).claims
        await store.renew([claim.ref], MINUTE)
        assert not await worker.watch(None, after=0, timeout=timedelta(0))

    asyncio.run(main())


def test_a_run_that_is_created_with_a_lease_wakes_no_worker():
    async def main():
        store = MemoryStorageBackend()
        worker = store.clone()
        await worker.claim(ClaimRequest(owner="o", lease=MINUTE))
        held = Put(item_id="turn", kind=ItemKind.TURN, claimed=LeaseFor(owner="me", lease=MINUTE))
        change = replace(create(), put=[held])
        assert (await store.commit_one(change)).claims
        assert not await worker.watch(None, after=0, timeout=timedelta(0))
        await store.commit_one(create("free"))
        assert await worker.watch(None, after=0, timeout=timedelta(0))

    asyncio.run(main())


def test_the_clock_never_goes_back_by_itself(monkeypatch):
    async def main():
        store = MemoryStorageBackend()
        before = await store.now()
        monkeypatch.setattr(_memory, "utcnow", lambda: before - MINUTE)
        after = await store.now()
        assert before <= after
        await store.shift_clock(-MINUTE)
        assert after - MINUTE <= await store.now() < after

    asyncio.run(main())


def test_a_commit_with_something_that_cannot_be_stored_writes_nothing():
    async def main():
        store = MemoryStorageBackend()
        await store.commit_one(create())
        bad = Change(run_id="run", key="b", events=[Event("log.info", "O", {"a": float("nan")})])
        with pytest.raises(SerializationError):
            await store.commit([note("a"), bad])
        assert (await store.get_run("run")).history_length == 1

    asyncio.run(main())


def test_a_settled_run_owes_nothing():
    async def main():
        store = MemoryStorageBackend()
        await store.commit_one(create())
        (claim,) = (await store.claim(ClaimRequest(owner="o", lease=MINUTE))).claims
        await store.commit_one(
            Change(
                run_id="run", key=f"{claim.ref.token}:1", claim=claim.ref, seen=1, settle=Settle()
            )
        )
        assert await store.next_due() is None
        assert await store.holders() == []

    asyncio.run(main())


def test_the_clone_of_a_subclass_is_of_that_class_and_has_what_the_object_has():
    class Named(MemoryStorageBackend):
        name = ""

    async def main():
        store = Named(namespace="n")
        store.name = "mine"
        await store.commit_one(create())
        clone = store.clone()
        await store.close()
        assert type(clone) is Named
        assert clone.name == "mine"
        assert clone.info() == store.info()
        assert (await clone.get_run("run")).run_id == "run"

    asyncio.run(main())
