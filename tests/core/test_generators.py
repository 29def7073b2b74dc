"""Async generators that are put aside end there, wherever they are suspended."""

from __future__ import annotations

import asyncio
import contextlib
import gc

import pytest

from pyworkflow import is_evicting, sleep, workflow
from pyworkflow._replay.replay import Replay
from pyworkflow.events import Event
from pyworkflow.storage.memory import MemoryStorageBackend
from pyworkflow.testing import start_local

seen: list[object] = []
went_on: list[str] = []


async def numbers():
    try:
        await asyncio.sleep(0)
        yield 1
        await sleep("1h")
        yield 2
    finally:
        try:
            await sleep("1h")
        finally:
            went_on.append("finally")


async def outer():
    inner = numbers()
    seen.append(inner)
    async for number in inner:
        yield number


@workflow
async def closes_in_the_middle() -> None:
    generator = numbers()
    seen.append(generator)
    async with contextlib.aclosing(generator):
        async for _ in generator:
            break


@workflow
async def waits_for_a_value() -> None:
    generator = numbers()
    seen.append(generator)
    async for _ in generator:
        pass


@workflow
async def waits_in_a_nested_one() -> None:
    generator = outer()
    seen.append(generator)
    async for _ in generator:
        pass


@workflow
async def leaves_one_behind() -> None:
    generator = numbers()
    seen.append(generator)
    async for _ in generator:
        break
    await sleep("1h")


@pytest.mark.parametrize(
    "flow", [closes_in_the_middle, waits_for_a_value, waits_in_a_nested_one, leaves_one_behind]
)
def test_h21_a_generator_ends_when_its_run_is_put_aside(flow):
    seen.clear()
    went_on.clear()

    async def main():
        async with MemoryStorageBackend() as store:
            await start_local(flow, storage=store)

    asyncio.run(main())
    assert seen
    assert [g for g in seen if g.ag_frame is not None] == []
    ended = len(went_on)
    assert ended == 1
    seen.clear()
    gc.collect()
    assert len(went_on) == ended, "code of a closed run went on when it was freed"


def test_a_generator_that_is_being_closed_is_not_called_stubborn() -> None:
    @workflow
    async def closing() -> int:
        async def values():
            try:
                yield 1
            finally:
                if not is_evicting():
                    await asyncio.sleep(10)

        async with contextlib.aclosing(values()) as generator:
            async for _ in generator:
                break
        return 1

    arguments = closing.encode_call((), {})
    data = {
        "workflow": closing.name,
        "version": "1",
        "args": arguments,
        "seed": "ab" * 16,
        "profile": 1,
    }
    replay = Replay(closing, "r")
    replay.feed([Event("workflow.started", "I", data, run_id="r", seq=1)])
    assert replay.outcome is None
    assert replay.close() == []
