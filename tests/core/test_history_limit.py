"""A history that reaches its limit: warnings in good time, and room to clean up."""

from __future__ import annotations

import asyncio
import itertools
import logging

import pytest

from pyworkflow import HistoryTooLong, sleep, step, workflow
from pyworkflow.testing import History, replay
from tests.core._driving import Bench, bench

cleaned: list[str] = []


@step
async def lim_poll(n: int) -> int:
    return n


@step
async def lim_release(what: str) -> None:
    cleaned.append(what)


@step(dispatch="queue")
async def lim_dispatched(what: str) -> None:
    cleaned.append(what)


@workflow
async def lim_cleans_up() -> None:
    try:
        for n in itertools.count():
            await lim_poll(n)
    except asyncio.CancelledError as exc:
        await lim_release(str(exc))
        raise
    finally:
        await asyncio.gather(lim_dispatched("stock"), lim_dispatched("card"))


@workflow
async def lim_swallows() -> None:
    for n in itertools.count():
        try:
            await lim_poll(n)
        except asyncio.CancelledError:
            cleaned.append("cancelled")


@workflow
async def lim_handles() -> str:
    try:
        while True:
            await sleep("1m")
    except asyncio.CancelledError:
        await lim_release("handled")
        return "partly"


@workflow
async def lim_wide() -> None:
    try:
        await asyncio.gather(*(lim_dispatched(str(n)) for n in range(100)))
    finally:
        await lim_release("after the wide part")


async def _failed(b: Bench, run_id: str) -> tuple[HistoryTooLong, History]:
    with pytest.raises(HistoryTooLong) as caught:
        await b.result(run_id)
    history = await History.fetch(run_id, b.storage)
    result = replay(history)
    result.check()
    assert result.status == "failed"
    return caught.value, history


def test_n03_the_limit_arrives_as_a_cancellation_with_room_to_clean_up() -> None:
    cleaned.clear()

    async def main() -> None:
        async with bench(max_history=200) as b:
            error, history = await _failed(b, await b.start(lim_cleans_up))
            assert error.limit == 200
            assert 200 <= error.length < 210
            assert len(cleaned) == 3
            assert "history is too long" in cleaned[0]
            assert sorted(cleaned[1:]) == ["card", "stock"]
            (limit,) = [e for e in history.events if e.type == "limit.reached"]
            assert limit.op == "0#limit"

    asyncio.run(main())


def test_n03_a_workflow_that_handles_the_limit_decides_its_end() -> None:
    cleaned.clear()

    async def main() -> None:
        async with bench(max_history=30, sessions=0) as b:
            run_id = await b.start(lim_handles)
            while not (await b.get(run_id)).status.is_terminal:
                await b.until(run_id, "suspended", "completed")
                await b.pass_time("1m")
            assert await b.result(run_id) == "partly"
            assert cleaned == ["handled"]
            replay(await History.fetch(run_id, b.storage)).check()

    asyncio.run(main())


@pytest.mark.parametrize("kept", [0, 100])
def test_n03_the_reserve_is_used_up_at_last(kept: int) -> None:
    cleaned.clear()

    async def main() -> None:
        async with bench(max_history=100, sessions=kept) as b:
            error, history = await _failed(b, await b.start(lim_swallows))
            assert "cancelled" in cleaned
            assert error.limit == 100
            assert 200 <= error.length < 215
            ops = [e.op for e in history.events if e.type == "limit.reached"]
            assert ops == ["0#limit", "0#reserve"]
            assert len(history.events) < 220

    asyncio.run(main())


def test_n03_a_worker_that_takes_over_after_the_limit_replays_it() -> None:
    cleaned.clear()

    @workflow
    async def lim_waits_in_cleanup() -> None:
        try:
            for n in itertools.count():
                await lim_poll(n)
        finally:
            await sleep("1h")
            await lim_release("after a restart")

    async def main() -> None:
        async with bench(max_history=60) as b:
            run_id = await b.start(lim_waits_in_cleanup)
            await b.has(run_id, "sleep.created")
            await b.asleep(run_id)
            await b.restart()
            await b.pass_time("1h")
            await _failed(b, run_id)
            assert cleaned == ["after a restart"]

    asyncio.run(main())


def test_n03_a_wide_run_gets_its_reserve_from_where_it_is() -> None:
    cleaned.clear()

    async def main() -> None:
        async with bench(max_history=50) as b:
            await _failed(b, await b.start(lim_wide))
            assert "after the wide part" in cleaned

    asyncio.run(main())


def test_n03_three_warnings_once_each_also_over_restarts(caplog: pytest.LogCaptureFixture) -> None:
    @workflow
    async def lim_sleeper() -> None:
        while True:
            await sleep("1m")

    async def main() -> None:
        async with bench(max_history=100, sessions=0) as b:
            run_id = await b.start(lim_sleeper)
            while not (await b.get(run_id)).status.is_terminal:
                await b.until(run_id, "suspended", "failed")
                await b.pass_time("1m")
            await _failed(b, run_id)
            keys = [e.key for e in await b.events(run_id, "log.warning")]
            assert keys == ["history:20", "history:50", "history:80"]

    with caplog.at_level(logging.WARNING, "pyworkflow.engine"):
        asyncio.run(main())
    said = [m for m in caplog.messages if "getting long" in m]
    assert [f"used={share}%" in m for share, m in zip((20, 50, 80), said, strict=True)] == [
        True
    ] * 3
