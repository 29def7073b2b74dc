"""The ops of every asyncio construct, the same on every supported Python.

An op is the identity of a step, sleep or timer in a history. If a construct named its ops otherwise
on another Python, upgrading a worker would stall every run that uses it.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Coroutine
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from pyworkflow import sleep, step
from pyworkflow._clock import from_micros
from pyworkflow._failures import encode_error
from pyworkflow._replay.commands import CancelStep, CompleteRun, RunStep
from pyworkflow._replay.replay import Replay
from pyworkflow._serialization import decode_arguments, encode
from pyworkflow.events import Event, EventType, event_class

Program = Callable[[], Awaitable[object]]
START = datetime(2025, 1, 1, tzinfo=UTC)
STARTED: dict[str, Any] = {"workflow": "w", "version": "1", "args": "{}", "seed": "5eed" * 8}
TABLE: list[tuple[Program, tuple[str, ...]]] = []


def ops(*expected: str) -> Callable[[Program], Program]:
    """Pin the ops of a program, in the order of their creation."""

    def add(program: Program) -> Program:
        TABLE.append((program, expected))
        return program

    return add


@step(name="ops.echo")
async def echo(value: int = 0) -> int:
    return value


@step(name="ops.fail")
async def fail() -> None:
    raise ValueError


@step(name="ops.never")
async def never() -> None:
    """A step that the driver below leaves running."""


# --- one branch -------------------------------------------------------------------------------


@ops("1#1:step", "1#2:step", "1#3:step")
async def steps_in_sequence() -> int:
    return await echo(1) + await echo(1) + await echo(1)


@ops("1#1:step", "1#1:sleep", "1#1:timer", "1#2:step", "1#2:sleep", "1#2:timer")
async def kinds_are_counted_apart() -> None:
    for _ in range(2):
        await echo()
        await sleep("1s")
        await asyncio.sleep(1)


@ops()
async def sleeping_for_nothing() -> None:
    await asyncio.sleep(0)
    await sleep(0)
    await asyncio.wait_for(asyncio.sleep(0), None)


@ops("1#1:step", "1#2:step")
async def a_step_that_is_called_and_awaited_later() -> None:
    first, second = echo(1), echo(2)
    assert await second == 2
    assert await first == 1


@ops("1#1:step", "1#2:step")
async def a_failed_step_that_is_caught() -> int:
    try:
        await fail()
    except ValueError:
        pass
    return await echo()


# --- gather -------------------------------------------------------------------------------------


@ops("1.1#1:step", "1.2#1:step", "1.3#1:step")
async def gather() -> list[int]:
    return await asyncio.gather(echo(1), echo(2), echo(3))


@ops("1.1#1:step", "1.2#1:step", "1#1:step")
async def gather_with_exceptions() -> int:
    found = await asyncio.gather(fail(), echo(1), return_exceptions=True)
    assert isinstance(found[0], ValueError)
    return await echo()


@ops("1.1#1:step", "1.2#1:step", "1#1:step")
async def gather_that_fails() -> int:
    with pytest.raises(ValueError, match="told to"):
        await asyncio.gather(fail(), never())
    return await echo()


@ops("1.1.1#1:step", "1.1.2#1:step", "1.2.1#1:step", "1.2.2#1:step")
async def gather_in_gather() -> None:
    async def pair() -> None:
        await asyncio.gather(echo(), echo())

    await asyncio.gather(pair(), pair())


@ops("1#1:step")
async def gather_of_nothing() -> None:
    assert await asyncio.gather() == []
    await echo()


@ops("1.1#1:step", "1.2#1:sleep")
async def gather_of_a_step_and_a_sleep() -> None:
    await asyncio.gather(echo(), sleep("1h"))


# --- wait ---------------------------------------------------------------------------------------


def _tasks(*coros: Coroutine[Any, Any, Any]) -> list[asyncio.Task[Any]]:
    return [asyncio.create_task(coro) for coro in coros]


@ops("1.1#1:step", "1.2#1:step", "1#1:step")
async def wait_for_all() -> None:
    _, pending = await asyncio.wait(_tasks(echo(), echo()))
    assert not pending
    await echo()


@ops("1.1#1:step", "1.2#1:step", "1#1:step")
async def wait_for_the_first() -> None:
    tasks = _tasks(echo(), never())
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    assert done == {tasks[0]}
    await echo()


@ops("1.1#1:step", "1.2#1:step", "1.3#1:step", "1#1:step")
async def wait_for_the_first_exception() -> None:
    tasks = _tasks(echo(), fail(), never())
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    assert done == set(tasks[:2])
    await echo()


@ops("1#1:timer", "1.1#1:step", "1#1:step")
async def wait_with_a_timeout() -> None:
    done, pending = await asyncio.wait(_tasks(never()), timeout=5)
    assert (len(done), len(pending)) == (0, 1)
    await echo()


@ops("1#1:timer", "1.1#1:step", "1#1:step")
async def wait_with_a_timeout_that_is_not_needed() -> None:
    done, pending = await asyncio.wait(_tasks(echo()), timeout=5)
    assert (len(done), len(pending)) == (1, 0)
    await echo()


@ops("1.1#1:step", "1.2#1:step", "1#1:step")
async def as_completed_of_tasks() -> int:
    for next_one in asyncio.as_completed(_tasks(echo(1), echo(2))):
        await next_one
    return await echo()


# --- timeouts -----------------------------------------------------------------------------------


@ops("1#1:timer", "1#1:step", "1#2:step")
async def wait_for_a_step() -> int:
    await asyncio.wait_for(echo(), 5)
    return await echo()


@ops("1#1:timer", "1#1:step", "1#2:step")
async def wait_for_that_times_out() -> int:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(never(), timeout=5)
    return await echo()


@ops("1#1:step", "1#2:step")
async def wait_for_without_a_limit() -> int:
    await asyncio.wait_for(echo(), None)
    return await echo()


@ops("1#1:step")
async def wait_for_no_time_at_all() -> int:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(never(), 0)
    return await echo()


@ops("1#1:timer", "1.1#1:step", "1#1:step")
async def wait_for_a_task() -> int:
    task = asyncio.create_task(echo(7))
    assert await asyncio.wait_for(task, 5) == 7
    return await echo()


@ops("1#1:timer", "1.1#1:step", "1.2#1:step", "1#1:step")
async def wait_for_a_gather() -> int:
    await asyncio.wait_for(asyncio.gather(echo(), echo()), 5)
    return await echo()


@ops("1#1:timer", "1#1:step", "1#2:step", "1#3:step")
async def timeout() -> int:
    async with asyncio.timeout(5):
        await echo()
        await echo()
    return await echo()


@ops("1#1:timer", "1#1:step", "1#2:step")
async def timeout_that_expires() -> int:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(5):
            await never()
    return await echo()


@ops("1#1:timer", "1#1:step", "1#2:timer", "1#2:step")
async def timeout_that_is_moved() -> None:
    async with asyncio.timeout(5) as limit:
        await echo()
        limit.reschedule(asyncio.get_running_loop().time() + 10)
        await echo()


@ops("1#1:timer", "1#2:timer", "1#1:step")
async def timeouts_in_each_other() -> None:
    async with asyncio.timeout(5), asyncio.timeout_at(asyncio.get_running_loop().time() + 9):
        await echo()


@ops("1#1:step")
async def timeout_without_a_limit() -> None:
    async with asyncio.timeout(None):
        await echo()


# --- tasks --------------------------------------------------------------------------------------


@ops("1.1#1:step", "1.2#1:step", "1#1:step")
async def task_group() -> int:
    async with asyncio.TaskGroup() as group:
        group.create_task(echo())
        group.create_task(echo())
    return await echo()


@ops("1.1#1:step", "1.2#1:step", "1.3#1:step", "1.3#2:step", "1.2#2:step", "1#1:step")
async def task_group_that_fails_and_cleans_up() -> int:
    async def cleaning() -> None:
        try:
            await never()
        finally:
            await echo()

    # The group cancels in the order of a set: the run's seed decides it, on every Python alike.
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(fail())
            group.create_task(cleaning())
            group.create_task(cleaning())
    except* ValueError:
        pass
    return await echo()


@ops("1#1:step", "1.1#1:step", "1.2#1:step")
async def tasks_begin_when_the_code_waits() -> None:
    tasks = _tasks(echo(), echo())
    await echo()
    await asyncio.gather(*tasks)


@ops("1.1#1:step", "1.1.1#1:step", "1.1.1.1#1:step", "1.1#2:step", "1#1:step")
async def tasks_in_tasks() -> None:
    async def inner(depth: int) -> None:
        await echo(depth)
        if depth:
            await asyncio.create_task(inner(depth - 1))
        if depth == 2:
            await echo()

    await asyncio.create_task(inner(2), name="a name of its own")
    await echo()


@ops("1#1:step", "1.1#1:step", "1#2:step")
async def ensure_future() -> None:
    task = asyncio.ensure_future(echo())
    await echo()
    await task
    await echo()


@ops("1.1#1:step", "1#1:step")
async def shield() -> None:
    await asyncio.shield(echo())
    await echo()


@ops("1#1:timer", "1.1#1:step", "1#1:step")
async def shield_in_a_timeout() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(5):
            await asyncio.shield(never())
    await echo()


@ops("1.1#1:step", "1.1#2:step", "1#1:step")
async def a_cancelled_task_that_cleans_up() -> None:
    async def cleaning() -> None:
        try:
            await never()
        finally:
            await echo()

    task = asyncio.create_task(cleaning())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    await echo()


# --- synchronisation ----------------------------------------------------------------------------


@ops("1.1#1:step", "1.2#1:step", "1.3#1:step")
async def event() -> None:
    ready = asyncio.Event()

    async def waiter() -> None:
        await ready.wait()
        await echo()

    async def setter() -> None:
        await echo()
        ready.set()

    await asyncio.gather(setter(), waiter(), waiter())


@ops("1.1#1:step", "1.2#1:step", "1.3#1:step")
async def lock() -> None:
    mutex = asyncio.Lock()

    async def locked() -> None:
        async with mutex:
            await echo()

    await asyncio.gather(locked(), locked(), locked())


@ops("1.1#1:step", "1.2#1:step", "1.3#1:step", "1.4#1:step")
async def semaphore() -> None:
    slots = asyncio.Semaphore(2)

    async def limited() -> None:
        async with slots:
            await echo()

    await asyncio.gather(*(limited() for _ in range(4)))


@ops("1.1#1:step", "1.1#2:step", "1.2#1:step", "1.1#3:step")
async def queue() -> None:
    items: asyncio.Queue[int] = asyncio.Queue(maxsize=1)

    async def producer() -> None:
        for number in range(3):
            await items.put(await echo(number))

    async def consumer() -> None:
        for number in range(3):
            assert await items.get() == number
            items.task_done()
            if number == 0:
                await echo()

    await asyncio.gather(producer(), consumer())
    await items.join()


@ops("1.1#1:step", "1.2#1:step", "1.3#1:step")
async def condition() -> None:
    changed = asyncio.Condition()

    async def waiter() -> None:
        async with changed:
            await changed.wait()
        await echo()

    async def notifier() -> None:
        await echo()
        async with changed:
            changed.notify_all()

    await asyncio.gather(notifier(), waiter(), waiter())


@ops("1.1#1:step", "1.1#2:step", "1.2#1:step")
async def barrier() -> None:
    both = asyncio.Barrier(2)

    async def party(first: bool) -> None:
        if first:
            await echo()
        async with both:
            await echo()

    await asyncio.gather(party(True), party(False))


# --- generators ---------------------------------------------------------------------------------


async def _numbers(count: int) -> Any:
    for number in range(count):
        yield await echo(number)


@ops("1#1:step", "1#2:step", "1#3:step", "1#4:step")
async def async_generator() -> int:
    total = 0
    async for number in _numbers(3):
        total += number
    await echo()
    return total


@ops("1#1:step", "1#2:step", "1#3:step", "1#4:step")
async def async_comprehensions() -> list[int]:
    doubled = {n: n * 2 async for n in _numbers(2)}
    return [await echo(n) for n in doubled]


@ops("1.1#1:step", "1.2#1:step", "1.1#2:step", "1.2#2:step")
async def async_generators_in_tasks() -> None:
    async def drain() -> list[int]:
        return [n async for n in _numbers(2)]

    await asyncio.gather(drain(), drain())


@ops("1#1:step", "1#2:step")
async def an_async_generator_that_is_left() -> None:
    async for _ in _numbers(3):
        break
    await echo()


# --- callbacks ----------------------------------------------------------------------------------


@ops("1.1#1:step", "1.2#1:step", "1#1:step")
async def a_done_callback_that_makes_a_task() -> None:
    made: list[asyncio.Task[int]] = []
    task = asyncio.create_task(echo())
    task.add_done_callback(lambda _: made.append(asyncio.create_task(echo())))
    await task
    await asyncio.sleep(0)
    await made[0]
    await echo()


@ops("1.1#1:step", "1.1.1#1:step", "1#1:step")
async def a_done_callback_that_a_task_registers() -> None:
    made: list[asyncio.Task[int]] = []

    async def registering() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(lambda _: made.append(asyncio.create_task(echo())))
        await echo()

    await asyncio.create_task(registering())
    await asyncio.sleep(0)
    await made[0]
    await echo()


@ops("1#1:timer", "1#2:timer", "1#3:timer", "1.1#1:step", "1.2#1:step")
async def call_later_and_call_at() -> None:
    loop = asyncio.get_running_loop()
    made: list[asyncio.Task[int]] = []
    loop.call_later(5, lambda: made.append(loop.create_task(echo())))
    loop.call_at(loop.time() + 2, lambda: made.append(loop.create_task(echo())))
    await asyncio.sleep(9)
    await asyncio.gather(*made)


@ops("1.1#1:timer", "1.1.1#1:step")
async def call_later_in_a_task() -> None:
    done = asyncio.get_running_loop().create_future()

    async def registering() -> None:
        def late() -> None:
            asyncio.create_task(echo()).add_done_callback(lambda _: done.set_result(None))

        asyncio.get_running_loop().call_later(5, late)

    await asyncio.create_task(registering())
    await done


@ops("1.1#1:step")
async def call_soon() -> None:
    made = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(lambda: made.set_result(asyncio.ensure_future(echo())))
    await (await made)


# --- driving ------------------------------------------------------------------------------------


class Spec:
    """A workflow's definition, as far as replay needs it."""

    check_args = "stall"

    def __init__(self, program: Program) -> None:
        self.name = program.__name__
        self._program = program

    def call(self, args: str) -> Coroutine[Any, Any, object]:
        coro = self._program()
        assert inspect.iscoroutine(coro)
        return coro

    def encode_result(self, value: object) -> str:
        return encode(value)


class Driver:
    """Answers what a program asks for: steps in the order of their emission, then the next timer."""

    def __init__(self, program: Program) -> None:
        self.replay = Replay(Spec(program), "run")
        self.history: list[Event] = []
        self._now = START
        self._steps: dict[str, RunStep] = {}

    def run(self) -> None:
        self._feed(EventType.WORKFLOW_STARTED, None, STARTED)
        while self.replay.outcome is None and self.replay.problem is None:
            self._answer()

    def _answer(self) -> None:
        for command in self.replay.take():
            if isinstance(command, RunStep):
                self._steps[command.op] = command
            elif isinstance(command, CancelStep):
                self._steps.pop(command.op, None)
        for name, command in self._steps.items():
            if command.step.name == "ops.never":
                continue
            del self._steps[name]
            data: dict[str, Any] = {"name": command.step.name, "digest": command.digest}
            if command.step.name == "ops.fail":
                data["error"] = encode_error(ValueError("told to"))
                self._feed(EventType.STEP_FAILED, name, data)
            else:
                args, _ = decode_arguments(command.args)
                data["result"] = encode(args[0] if args else 0)
                self._feed(EventType.STEP_COMPLETED, name, data)
            return
        due = self.replay.next_timer()
        assert due is not None, "the program waits for nothing that the driver gives"
        self._now = max(self._now, from_micros(due))
        name, kind, _ = self.replay.due_timers(due)[0]
        self._feed(EventType(kind), name, {"until": from_micros(due).isoformat()})

    def _feed(self, kind: EventType, op: str | None, data: dict[str, Any]) -> None:
        self._now += timedelta(milliseconds=1)
        seq = len(self.history) + 1
        event = Event(kind, event_class(kind), data, op, None, "run", seq, self._now)
        self.history.append(event)
        self.replay.feed([event])


def created(replay: Replay) -> tuple[str, ...]:
    assert replay.context is not None
    return tuple(replay.context.ops)


@pytest.mark.parametrize(("program", "expected"), TABLE, ids=[p.__name__ for p, _ in TABLE])
def test_ops_are_the_same_on_every_python(program: Program, expected: tuple[str, ...]) -> None:
    driver = Driver(program)
    driver.run()
    replay = driver.replay
    assert replay.problem is None
    assert isinstance(replay.outcome, CompleteRun), replay.outcome
    assert created(replay) == expected
    again = Replay(Spec(program), "run")
    again.acknowledge(len(driver.history))
    again.feed(driver.history)
    assert again.problem is None
    assert again.outcome == replay.outcome
    assert created(again) == expected
