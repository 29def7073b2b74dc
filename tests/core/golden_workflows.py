"""The workflows behind the checked-in histories (``histories/<release>/<name>.json``).

They are replayed for ever against the histories of every release, so they never change. What a
new release can do gets a workflow of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal

from pydantic import BaseModel

from pyworkflow import (
    FatalError,
    RetryableError,
    StepError,
    logger,
    now,
    patched,
    random,
    sleep,
    step,
    step_context,
    uuid4,
    workflow,
)

#: Set while the history of a run is recorded that began before ``patched`` was put in.
before_patch = False


class OutOfStock(Exception):
    """An exception of a registered module: it comes back as itself."""


@dataclass(frozen=True)
class Point:
    x: int
    y: int


class Order(BaseModel):
    number: str
    total: Decimal
    placed: datetime


# --- steps ------------------------------------------------------------------------------------


@step(name="golden.add")
async def add(a: int, b: int = 0) -> int:
    return a + b


@step(name="golden.slow")
async def slow(seconds: float) -> str:
    await asyncio.sleep(seconds)
    return "slept"


@step(name="golden.flaky", max_retries=3, retry_delay="5s")
async def flaky(fails: int) -> int:
    if step_context().attempt <= fails:
        raise ConnectionError("not yet")
    return step_context().attempt


@step(name="golden.throttled")
def throttled() -> str:
    if step_context().attempt == 1:
        raise RetryableError("too many requests", retry_after="30s")
    return "served"


@step(name="golden.reserve", max_retries=0)
async def reserve(item: str) -> str:
    if item == "book":
        raise OutOfStock(item)
    if item == "lamp":
        raise FatalError("no lamps")
    return item


@step(name="golden.note")
async def note(text: str) -> str:
    return text


@step(name="golden.queued", dispatch="queue")
async def queued(value: int) -> int:
    return value


@step(name="golden.once", semantics="at_most_once", max_retries=0)
async def once(value: int) -> int:
    return value


@step(name="golden.corner")
async def corner(point: Point) -> Point:
    return Point(point.y, point.x)


@step(name="golden.order")
async def order(number: str) -> Order:
    return Order(number=number, total=Decimal("9.90"), placed=datetime(2025, 1, 2, tzinfo=UTC))


@step(name="golden.mixed")
async def mixed(tags: set[str]) -> dict[str, object]:
    return {
        "pair": (1, "two"),
        "by_number": {1: "one", 2: "two"},
        "when": datetime(2025, 1, 2, 3, 4, 5, tzinfo=UTC),
        "span": timedelta(minutes=90),
        "tags": tags,
    }


# --- workflows --------------------------------------------------------------------------------


@workflow(name="golden.sequence")
async def sequence(n: int) -> int:
    total = 0
    for _ in range(n):
        total = await add(total, 2)
    return total + await add(1) + await add(1) + await add(1)


@workflow(name="golden.fan_out")
async def fan_out() -> tuple[list[int], str]:
    async def branch(n: int) -> int:
        first = await add(n)
        await sleep(timedelta(minutes=n))
        return await add(first, n)

    results = await asyncio.gather(*(branch(n) for n in (3, 1, 2)))
    failed = await asyncio.gather(reserve("book"), add(1), return_exceptions=True)
    return results, type(failed[0]).__name__


@workflow(name="golden.timeouts")
async def timeouts() -> list[str]:
    seen: list[str] = []
    try:
        async with asyncio.timeout(0.2):
            await slow(600)
    except TimeoutError:
        seen.append("the step was given up")
    try:
        await asyncio.wait_for(sleep("1d"), 60)
    except TimeoutError:
        seen.append("the sleep was given up")
    seen.append(await asyncio.wait_for(note("in time"), 60))
    done, pending = await asyncio.wait(
        [asyncio.create_task(sleep("1h")), asyncio.create_task(sleep("2h"))],
        return_when=asyncio.FIRST_COMPLETED,
    )
    seen.append(f"{len(done)} done, {len(pending)} pending")
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    return seen


@workflow(name="golden.task_group")
async def task_group() -> list[str]:
    seen: list[str] = []

    async def member(name: str) -> None:
        try:
            await sleep("1h")
        finally:
            seen.append(await note(name))

    async def failing() -> None:
        await add(1)
        await reserve("book")

    try:
        async with asyncio.TaskGroup() as group:
            for name in "abcd":
                group.create_task(member(name))
            group.create_task(failing())
    except* OutOfStock as problems:
        seen.append(repr(problems.exceptions))
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(add(n)) for n in range(3)]
    return [*seen, str([t.result() for t in tasks])]


@workflow(name="golden.retries")
async def retries() -> list[object]:
    return [await flaky(2), await throttled(), await asyncio.wait_for(flaky(1), 3600)]


@workflow(name="golden.caught")
async def caught() -> list[str]:
    seen: list[str] = []
    for item in ("pen", "book", "lamp"):
        try:
            seen.append(await reserve(item))
        except (OutOfStock, FatalError, StepError) as exc:
            seen.append(repr(exc))
        finally:
            await note(f"after {item}")
    return seen


@workflow(name="golden.failing")
async def failing() -> None:
    await add(1)
    try:
        await reserve("book")
    finally:
        await note("released")


@workflow(name="golden.sleeps")
async def sleeps() -> list[float]:
    began, seen = now(), []
    for pause in ("1d", timedelta(hours=2, minutes=30), datetime(2024, 1, 1, tzinfo=UTC), 0):
        await sleep(pause)
        seen.append((now() - began) // timedelta(minutes=1))
    await asyncio.sleep(1.5)
    await sleep(began + timedelta(days=30))
    return [*seen, (now() - began) // timedelta(days=1)]


@workflow(name="golden.open")
async def still_open() -> int:
    first = await add(1)
    await asyncio.gather(sleep("10d"), sleep("1d"))
    return first


@workflow(name="golden.cancelled")
async def cancelled() -> None:
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(sleep("30d"))
            group.create_task(sleep("60d"))
    except asyncio.CancelledError:
        await note("refunded")
        raise


@workflow(name="golden.cancel_refused")
async def cancel_refused() -> str:
    try:
        await sleep("30d")
    except asyncio.CancelledError:
        return await note("no, I end in order")
    return "slept"


@workflow(name="golden.overdue", max_duration="1h")
async def overdue() -> None:
    try:
        await sleep("1d")
    finally:
        await note("too late")


@workflow(name="golden.patched")
async def patched_twice() -> list[str]:
    seen = [await note("start")]
    await sleep("1h")
    if before_patch or not patched("greeting"):
        seen.append(await note("old"))
    else:
        seen += await asyncio.gather(note("new"), note("newer"))
    await sleep("1h")
    if not before_patch and patched("farewell"):
        seen.append(await note("bye"))
    return seen


@workflow(name="golden.logs")
async def logs() -> int:
    logger.info("begin %s", "well", extra={"n": 1})
    total = await add(1, 1)
    logger.warning("halfway")
    await sleep("1m")
    try:
        raise ValueError("shown")
    except ValueError:
        logger.exception("as expected")
    logger.debug("end")
    return total


@workflow(name="golden.generators")
async def generators() -> list[int]:
    async def pages(count: int) -> AsyncIterator[int]:
        try:
            for n in range(count):
                yield await add(n, 10)
        finally:
            logger.info("closed")

    async for page in pages(5):
        if page == 11:
            break
    listed = [page async for page in pages(2)]
    by_page = {page: await add(page) async for page in pages(2)}
    return [*listed, *by_page.values()]


@workflow(name="golden.values")
async def values(point: Point, when: datetime, tags: set[str]) -> tuple[Point, Order, list[str]]:
    swapped = await corner(point)
    bought = await order(number=f"{swapped.x}-{when:%Y}")
    found = await mixed(tags)
    kinds = [type(value).__name__ for value in found.values()]
    return swapped, bought, kinds


@workflow(name="golden.chance")
async def chance() -> list[str]:
    picked = random().sample(range(100), 5)
    await add(*picked[:2])
    return [str(uuid4()), str(picked), await note(str(uuid4())), now().isoformat()]


@workflow(name="golden.pipeline")
async def pipeline() -> list[int]:
    jobs: asyncio.Queue[int | None] = asyncio.Queue(maxsize=2)
    slots, done = asyncio.Semaphore(2), []

    async def produce() -> None:
        for n in range(4):
            await jobs.put(await add(n, 1))
        await jobs.put(None)

    async def work(n: int) -> None:
        async with slots:
            await sleep("1s")
            done.append(await add(n, 100))

    async with asyncio.TaskGroup() as group:
        group.create_task(produce())
        while (job := await jobs.get()) is not None:
            group.create_task(work(job))
    return done


@workflow(name="golden.dispatched")
async def dispatched() -> list[object]:
    slept, value = await asyncio.gather(slow(0.25), queued(3))
    return [slept, value, await once(4), await queued(5)]
