"""What makes a step cheap, and must stay true while it does."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import AsyncIterator

from pyworkflow import step, workflow
from pyworkflow._engine.slots import Slots
from pyworkflow._replay._cpython import Batch
from pyworkflow._replay.context import RunContext
from tests.core._driving import bench


def test_a_slot_that_is_given_back_goes_to_whoever_waits_longest() -> None:
    async def main() -> None:
        slots = Slots(1)
        order: list[int] = []

        async def wait(number: int) -> None:
            await slots.acquire()
            order.append(number)

        assert slots.take()
        assert not slots.take()
        waiting = [asyncio.create_task(wait(n)) for n in range(3)]
        await asyncio.sleep(0)
        slots.release()
        assert not slots.take()  # it is the first one's already
        await asyncio.sleep(0)
        slots.release()
        slots.release()
        await asyncio.gather(*waiting)
        assert order == [0, 1, 2]

    asyncio.run(main())


def test_a_slot_is_not_lost_when_its_waiter_is_cancelled() -> None:
    async def main() -> None:
        slots = Slots(1)
        assert slots.take()
        early, late = (asyncio.create_task(slots.acquire()) for _ in range(2))
        await asyncio.sleep(0)
        early.cancel()
        await asyncio.sleep(0)
        slots.release()  # passes over the one that is gone
        late.cancel()  # it has been given the slot, and does not know yet
        await asyncio.gather(early, late, return_exceptions=True)
        assert slots.take()

    asyncio.run(main())


def test_async_generators_of_the_outer_loop_stay_its_own_within_a_batch() -> None:
    closed: list[str] = []

    async def numbers(name: str) -> AsyncIterator[int]:
        try:
            yield 1
            yield 2
        finally:
            closed.append(name)

    async def main() -> None:
        before = sys.get_asyncgen_hooks()
        with Batch():
            kept = numbers("kept")
            assert await anext(kept) == 1
            await asyncio.sleep(0)  # a batch may last over awaits
        assert sys.get_asyncgen_hooks() == before
        await asyncio.get_running_loop().shutdown_asyncgens()
        assert closed == ["kept"]

    asyncio.run(main())


def test_a_batch_leaves_alone_hooks_that_others_set_since() -> None:
    before = sys.get_asyncgen_hooks()
    try:
        with Batch():
            sys.set_asyncgen_hooks(print, print)
        assert sys.get_asyncgen_hooks().firstiter is print
    finally:
        sys.set_asyncgen_hooks(*before)


def test_a_run_that_has_ended_leaves_nothing_for_the_garbage_collector() -> None:
    @step
    async def pr_step(n: int) -> int:
        return n

    @workflow
    async def pr_flow() -> int:
        return sum(await asyncio.gather(pr_step(1), pr_step(2))) + await pr_step(3)

    def contexts() -> int:
        return sum(isinstance(found, RunContext) for found in gc.get_objects())

    async def main() -> None:
        async with bench() as b:
            assert b.worker is not None
            await b.run(pr_flow)
            await b.worker.settle_down()
            gc.collect()
            gc.disable()
            try:
                before = contexts()
                assert await b.run(pr_flow) == 6
                await b.worker.settle_down()
                assert contexts() == before
            finally:
                gc.enable()

    asyncio.run(main())
