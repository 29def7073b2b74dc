"""Leases that their own worker does not know of are released at once (found.md M1, M10)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import timedelta

from pyworkflow import sleep, step, workflow
from pyworkflow.errors import StorageFull, StorageUnavailable
from pyworkflow.spi import (
    Answer,
    Change,
    Claimed,
    ClaimRef,
    ClaimRequest,
    StorageBackend,
)
from pyworkflow.storage.memory import MemoryStorageBackend
from tests.core._driving import bench, eventually

LEASE = 600.0
"""Seconds that no test waits for."""


class Watched(MemoryStorageBackend):
    """A store that loses answers, or answers late, and notes what is released."""

    loses = 0
    full = False
    late: asyncio.Event | None = None
    asked: asyncio.Event | None = None
    released: list[ClaimRef]
    looks = 0

    def __init__(self) -> None:
        super().__init__()
        self.released = []

    async def claim(self, request: ClaimRequest) -> Claimed:
        answer = await super().claim(request)
        if answer.claims and self.loses:
            self.loses -= 1
            raise StorageUnavailable("the connection was reset before the answer")
        if answer.claims and self.late is not None:
            assert self.asked is not None
            self.asked.set()
            await self.late.wait()
        return answer

    async def commit(self, changes: Sequence[Change]) -> list[Answer]:
        if self.full:
            raise StorageFull("no space is left")
        return await super().commit(changes)

    async def release(self, ref: ClaimRef, *, delay: timedelta | None = None) -> bool:
        done = await super().release(ref, delay=delay)
        if done:
            self.released.append(ref)
        return done

    async def leases(self, owner: str) -> list[ClaimRef]:
        self.looks += 1
        return await super().leases(owner)


begun: list[str] = []
gates: dict[str, asyncio.Event] = {}


@step(name="rc_step", max_retries=0)
async def rc_step(tag: str) -> str:
    begun.append(tag)
    if tag in gates:
        await gates[tag].wait()
    return tag


@workflow(name="rc_flow")
async def rc_flow(tag: str) -> str:
    await sleep(0.7)  # a claim finds its end
    return await rc_step(tag)


def test_found_m01_a_claim_whose_answer_is_lost_is_recovered_at_once() -> None:
    async def main() -> None:
        store = Watched()
        store.loses = 2
        async with bench(store, lease=LEASE) as b:
            run_id = await b.start(rc_flow, "lost")
            assert await b.result(run_id, timeout=60) == "lost"
            assert store.loses == 0
            assert begun.count("lost") == 1
            assert len(store.released) == 2

    asyncio.run(main())


def test_found_m01_a_claim_that_the_store_did_after_the_failure_is_found_when_idle() -> None:
    async def main() -> None:
        store = Watched()
        async with bench(store, lease=LEASE, renew_every=timedelta(seconds=0.5)) as b:
            worker = b.worker
            assert worker is not None
            assert await b.result(await b.start(rc_flow, "first"), timeout=60) == "first"
            worker.suspects.alone = ("none", "none")  # the worker claims nothing for a moment
            worker.suspects._since = float("inf")
            run_id = await b.start(rc_flow, "late")
            request = ClaimRequest(owner=worker.owner, lease=worker.settings.lease, limit=10)

            async def taken() -> bool:
                return bool((await MemoryStorageBackend.claim(store, request)).claims)

            await eventually(taken)
            worker.suspects._end()
            assert await b.result(run_id, timeout=60) == "late"
            assert len(store.released) == 1

    asyncio.run(main())


def test_found_m01_a_claim_that_is_under_way_is_not_released() -> None:
    async def main() -> None:
        store = Watched()
        async with bench(store, lease=LEASE) as b:
            worker = b.worker
            assert worker is not None
            store.late, store.asked = asyncio.Event(), asyncio.Event()
            run_id = await b.start(rc_flow, "under way")
            await store.asked.wait()
            looks = store.looks
            worker.recovery.wanted()
            await eventually(lambda: store.looks > looks)
            for _ in range(20):
                await asyncio.sleep(0)
            store.late.set()
            assert await b.result(run_id, timeout=60) == "under way"
            assert store.released == []
            assert begun.count("under way") == 1

    asyncio.run(main())


def test_found_m01_steps_that_were_handed_off_are_known() -> None:
    async def main() -> None:
        store = Watched()
        gates["long"] = asyncio.Event()
        async with bench(store, lease=LEASE) as b:
            worker = b.worker
            assert worker is not None
            run_id = await b.start(rc_flow, "long")
            await eventually(lambda: worker._steps.adopted(run_id))
            for _ in range(3):
                looks = store.looks
                worker.recovery.wanted()
                await eventually(lambda at=looks: store.looks > at)
            gates["long"].set()
            assert await b.result(run_id, timeout=60) == "long"
            assert store.released == []
            assert begun.count("long") == 1

    asyncio.run(main())


def test_found_m10_what_was_given_up_on_a_full_disk_resumes_when_there_is_space() -> None:
    async def main() -> None:
        store = Watched()
        gates["full"] = asyncio.Event()
        async with bench(store, lease=LEASE) as b:
            worker = b.worker
            assert worker is not None
            run_id = await b.start(rc_flow, "full")
            await eventually(lambda: worker._steps.adopted(run_id))
            store.full = True
            gates["full"].set()
            await eventually(lambda: not worker.is_busy)
            store.full = False
            assert await b.result(run_id, timeout=60) == "full"

    asyncio.run(main())


def test_the_default_lists_the_leases_of_one_owner() -> None:
    class Plain(MemoryStorageBackend):
        leases = StorageBackend.leases

    async def main() -> None:
        store = Plain()
        async with bench(store, work=False, lease=LEASE) as b:
            await b.start(rc_flow, "one")
            await b.start(rc_flow, "two")
            lease = timedelta(seconds=60)
            mine = await store.claim(ClaimRequest(owner="me", lease=lease))
            await store.claim(ClaimRequest(owner="you", lease=lease))
            assert await store.leases("me") == [mine.claims[0].ref]
            assert await store.leases("nobody") == []
            await store.release(mine.claims[0].ref)
            assert await store.leases("me") == []

    asyncio.run(main())
