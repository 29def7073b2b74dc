"""Calls of a store behind a network whose callers are cancelled."""

import asyncio

import pytest

from pyworkflow.errors import StorageUnavailable
from pyworkflow.storekit.remote import Calls


def test_a_call_is_carried_out_when_its_caller_is_cancelled():
    async def main():
        calls, gate, done = Calls(), asyncio.Event(), []

        async def work():
            await gate.wait()
            done.append("work")
            return "answer"

        async def unwanted(answer):
            done.append(f"unwanted {answer}")

        caller = asyncio.create_task(calls.run(work, unwanted=unwanted))
        await asyncio.sleep(0)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        gate.set()
        await calls.close()
        assert done == ["work", "unwanted answer"]

    asyncio.run(main())


def test_a_later_call_does_not_overtake_a_cancelled_one():
    async def main():
        calls, gate, order = Calls(), asyncio.Event(), []

        async def first():
            await gate.wait()
            order.append("claim")

        async def second():
            order.append("free")

        async def released(_):
            await calls.run(third)

        async def third():
            order.append("release")

        caller = asyncio.create_task(calls.run(first, unwanted=released))
        await asyncio.sleep(0)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        later = asyncio.create_task(calls.run(second))
        for _ in range(5):
            await asyncio.sleep(0)
        assert order == []
        gate.set()
        await later
        await calls.close()
        assert sorted(order) == ["claim", "free", "release"]
        assert order[0] == "claim"

    asyncio.run(main())


def test_calls_run_beside_each_other_and_errors_reach_their_callers():
    async def main():
        calls, meeting = Calls(), asyncio.Barrier(2)

        async def work():
            await meeting.wait()
            raise StorageUnavailable("the server has gone")

        answers = await asyncio.gather(calls.run(work), calls.run(work), return_exceptions=True)
        assert [type(each) for each in answers] == [StorageUnavailable] * 2
        await calls.close()

    asyncio.run(main())


def test_an_answer_that_nobody_wants_and_cannot_be_released_is_dropped():
    async def main():
        calls, gate = Calls(), asyncio.Event()

        async def unwanted(_):
            raise StorageUnavailable("the server has gone")

        caller = asyncio.create_task(calls.run(gate.wait, unwanted=unwanted))
        await asyncio.sleep(0)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        gate.set()
        await calls.close()

    asyncio.run(main())
