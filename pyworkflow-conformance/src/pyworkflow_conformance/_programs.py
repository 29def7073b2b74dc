"""Thirty workflow programs for layer L7. Each ends alike whatever disturbs it.

Importing this module registers them, under names that begin with ``conformance.``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

from pyworkflow.errors import FatalError, RetryableError, StepInterrupted
from pyworkflow.testing.internals import (
    Workflow,
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

__all__ = ["PROGRAMS", "Program"]

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A workflow to start, and what a client does with it."""

    workflow: Workflow[..., Any]
    args: tuple[Any, ...] = ()
    cancels: bool = False
    """The run is cancelled once it waits."""
    twice: bool = False
    """It is started again under the same idempotency key."""
    uncertain: bool = False
    """An at-most-once step may end as interrupted where leases end or answers are lost."""


PROGRAMS: dict[str, Program] = {}


@dataclass(frozen=True)
class Point:
    """A value of a type of one's own."""

    x: int
    y: int
    tags: list[str] = field(default_factory=list[str])


# --- steps ------------------------------------------------------------------------------------


@step(name="conformance.add")
async def add(a: int, b: int = 0) -> int:
    """Quick."""
    return a + b


@step(name="conformance.slow")
async def slow(n: int) -> int:
    """Takes a moment."""
    await asyncio.sleep(0.002)
    return n


@step(name="conformance.never", max_retries=0)
async def never() -> None:
    """Ends only when it is given up."""
    await asyncio.sleep(600)


@step(name="conformance.sync")
def in_a_thread(n: int) -> int:
    """Not async."""
    return n * 2


@step(name="conformance.queued", dispatch="queue")
async def queued(n: int) -> int:
    """Always an item of its own."""
    return n + 1


@step(name="conformance.once", semantics="at_most_once", max_retries=0)
async def once(n: int) -> int:
    """Never twice."""
    return n


@step(name="conformance.flaky", max_retries=4, retry_delay="5s")
async def flaky(fails: int) -> str:
    """Succeeds in the end."""
    if step_context().attempt <= fails:
        raise ConnectionError("not yet")
    return "served"


@step(name="conformance.throttled", max_retries=4)
async def throttled() -> str:
    """Says when to come again."""
    if step_context().attempt == 1:
        raise RetryableError("busy", retry_after="30s")
    return "served"


@step(name="conformance.broken", max_retries=1, retry_delay="1s")
async def broken(n: int) -> None:
    """Fails always."""
    raise ValueError(f"step {n}")


@step(name="conformance.fatal")
async def fatal() -> None:
    """Fails at once."""
    raise FatalError("no")


@step(name="conformance.echo")
async def echo(value: Any) -> Any:
    """Gives back what it got."""
    return value


@step(name="conformance.move")
async def move(point: Point) -> Point:
    """A typed value in and out."""
    return Point(point.y, point.x, [*point.tags, "moved"])


# --- programs ---------------------------------------------------------------------------------


def _program(
    *args: Any,
    max_duration: str | None = None,
    cancels: bool = False,
    twice: bool = False,
    uncertain: bool = False,
) -> Callable[[Callable[P, Awaitable[R]]], Workflow[P, R]]:
    def add_program(fn: Callable[P, Awaitable[R]]) -> Workflow[P, R]:
        made = workflow(name=f"conformance.{fn.__name__}", max_duration=max_duration)(fn)
        PROGRAMS[fn.__name__] = Program(
            workflow=made, args=args, cancels=cancels, twice=twice, uncertain=uncertain
        )
        return made

    return add_program


@_program(5)
async def sequence(n: int) -> int:
    """One step after the other."""
    total = 0
    for i in range(n):
        total = await add(total, i)
    return total


@_program()
async def gathered() -> list[int]:
    """Branches side by side."""
    return list(await asyncio.gather(*(slow(n) for n in range(6))))


@_program()
async def gathered_failures() -> list[str]:
    """Some branches fail."""
    found = await asyncio.gather(add(1), broken(1), add(2), fatal(), return_exceptions=True)
    return [type(v).__name__ if isinstance(v, BaseException) else str(v) for v in found]


@_program()
async def race() -> list[int]:
    """The first counts, the others are given up."""
    tasks = [asyncio.create_task(sleep(f"{n}h")) for n in (3, 1, 2)]
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return [len(done), len(pending), tasks.index(next(iter(done)))]


@_program()
async def step_timeout() -> list[str]:
    """A step is given up."""
    try:
        async with asyncio.timeout(0.05):
            await never()
    except TimeoutError:
        return ["timeout", str(await add(1))]
    return []


@_program()
async def sleep_timeout() -> str:
    """A sleep is given up."""
    try:
        await asyncio.wait_for(sleep("1d"), 60)
    except TimeoutError:
        return "timeout"
    return "slept"


@_program(2)
async def retried(fails: int) -> str:
    """A step succeeds at last."""
    return await flaky(fails)


@_program()
async def retried_later() -> str:
    """A step names the time of its next try."""
    return await throttled()


@_program()
async def exhausted() -> str:
    """A step fails for good and is caught."""
    try:
        await broken(7)
    except ValueError as error:
        return str(error)
    return ""


@_program()
async def fails() -> None:
    """The run fails."""
    await add(1)
    await broken(8)


@_program()
async def finally_runs() -> list[str]:
    """Cleanup after a failure."""
    seen: list[str] = []
    try:
        try:
            await fatal()
        finally:
            seen.append(str(await add(1)))
    except FatalError as error:
        seen.append(str(error))
    return seen


@_program()
async def sleeps() -> int:
    """One sleep after the other."""
    began = now()
    for pause in ("1h", 90, timedelta(days=1), 0):
        await sleep(pause)
    return int((now() - began).total_seconds()) // 3600


@_program()
async def parallel_sleeps() -> list[int]:
    """Timers at different times and at the same one."""
    order: list[int] = []

    async def branch(n: int) -> None:
        await sleep(timedelta(minutes=n % 3))
        order.append(n % 3)

    await asyncio.gather(*(branch(n) for n in range(6)))
    return order


@_program(cancels=True)
async def cancelled() -> None:
    """Cancelled while it sleeps; cleans up."""
    try:
        await sleep("30d")
    finally:
        await add(1)


@_program(cancels=True)
async def cancel_refused() -> str:
    """Cancelled, and ends in order all the same."""
    try:
        await sleep("30d")
    except asyncio.CancelledError:
        return f"refused {await add(2)}"
    return "slept"


@_program(max_duration="1h")
async def overdue() -> None:
    """Takes longer than it may."""
    await sleep("1d")


@_program()
async def nested_tasks() -> list[int]:
    """Tasks that begin tasks."""

    async def branch(depth: int) -> int:
        if depth == 0:
            return await add(1)
        tasks = [asyncio.create_task(branch(depth - 1)) for _ in range(2)]
        return sum(await asyncio.gather(*tasks))

    return [await branch(n) for n in range(4)]


@_program()
async def task_group() -> list[str]:
    """One member fails, the others are cancelled."""
    seen: list[str] = []

    async def member(n: int) -> None:
        try:
            await sleep("1h")
        except asyncio.CancelledError:
            seen.append(f"cancelled {n}")
            raise

    try:
        async with asyncio.TaskGroup() as group:
            for n in range(3):
                group.create_task(member(n))
            group.create_task(fatal())
    except* FatalError:
        seen.append("failed")
    # A group keeps its tasks in a set: which is cancelled first is nobody's promise.
    return sorted(seen)


@_program()
async def pipeline() -> list[int]:
    """Producer, consumers, a queue between them."""
    queue: asyncio.Queue[int | None] = asyncio.Queue(2)
    found: list[int] = []

    async def consume() -> None:
        while (n := await queue.get()) is not None:
            found.append(await add(n, 10))

    async with asyncio.TaskGroup() as group:
        for _ in range(2):
            group.create_task(consume())
        for n in [*range(5), None, None]:
            await queue.put(n)
    return sorted(found)


@_program()
async def limited() -> list[int]:
    """No more than two at once."""
    slots = asyncio.Semaphore(2)

    async def one(n: int) -> int:
        async with slots:
            return await slow(n)

    return list(await asyncio.gather(*(one(n) for n in range(5))))


@_program()
async def generators() -> list[int]:
    """Steps inside an async generator."""

    async def pages(count: int) -> AsyncIterator[int]:
        for n in range(count):
            yield await add(n, 5)

    return [page async for page in pages(4)]


@_program()
async def big_payload() -> list[int]:
    """Half a megabyte through a step."""
    text = await echo("\u00e9" * 250_000)
    return [len(text), len(text.encode())]


@_program()
async def many_logs() -> int:
    """Log lines before, between and after."""
    for n in range(40):
        logger.info("line %d", n)
    await add(1)
    for n in range(40):
        logger.warning("line %d", n, extra={"n": n})
    await sleep("1m")
    logger.debug("end")
    return 80


@_program()
async def with_patch() -> list[str]:
    """A change of the code that is there from the start."""
    seen = ["new" if patched("one") else "old"]
    await sleep("1h")
    seen.append("new" if patched("two") else "old")
    return [*seen, "new" if patched("one") else "old"]


@_program(uncertain=True)
async def at_most_once() -> list[str]:
    """A step that is never run twice."""
    seen: list[str] = []
    for n in range(2):
        try:
            seen.append(str(await once(n)))
        except StepInterrupted:
            seen.append("interrupted")
    return seen


@_program()
async def dispatched() -> list[int]:
    """Steps that are items of their own."""
    first = await queued(1)
    return [first, *await asyncio.gather(*(queued(n) for n in range(4)))]


@_program()
async def sync_steps() -> list[int]:
    """Steps in threads."""
    return [await in_a_thread(1), *await asyncio.gather(in_a_thread(2), in_a_thread(3))]


@_program()
async def chance() -> list[bool]:
    """What is drawn is the same when it is replayed."""
    first, drawn, at = str(uuid4()), random().random(), now()
    await sleep("1h")
    again = await echo([first, drawn])
    return [again == [first, drawn], now() > at, str(uuid4()) != first]


@_program(Point(1, 2))
async def values(point: Point) -> list[Any]:
    """Values that are more than JSON."""
    moved = await move(point)
    mixed = await echo({"big": 2**80, "none": None, "deep": [[{"x": -0.5}]], "\u00e9": "\x00"})
    return [moved.x, moved.y, moved.tags, mixed]


@_program("order-1", twice=True)
async def idempotent(order: str) -> str:
    """Started twice under one key."""
    await sleep("1m")
    return order


@_program()
async def branches_and_waits() -> list[Any]:
    """An event, a shield and a handler that waits."""
    event, seen = asyncio.Event(), list[str]()

    async def first() -> None:
        await sleep("10m")
        seen.append("first")
        event.set()

    async def second() -> None:
        await event.wait()
        seen.append(str(await add(3)))

    await asyncio.gather(second(), first())
    task = asyncio.create_task(add(4))
    return [*seen, await asyncio.shield(task)]


@_program(25)
async def long_history(n: int) -> int:
    """Many turns."""
    total = 0
    for i in range(n):
        total += await add(i)
        if i % 5 == 0:
            await sleep(1)
    return total
