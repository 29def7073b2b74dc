"""What users of comparable software were bitten by: one test or more per promise.

The numbers are those of the list of promises. Kills of real processes (9, 10) are in
``tests/e2e/test_kill.py``; here the same is done to workers, at every commit.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import itertools
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pydantic
import pytest

from pyworkflow import (
    Client,
    FatalError,
    IdempotencyConflict,
    NonDeterminism,
    RetryableError,
    StepError,
    StepTimeout,
    WorkflowTimeout,
    now,
    sleep,
    start,
    step,
    step_context,
    workflow,
)
from pyworkflow.errors import StorageError
from pyworkflow.storage.file import FileStorageBackend
from pyworkflow.storage.memory import MemoryStorageBackend
from tests.core._driving import bench, eventually


class MhError(Exception):
    """An exception of a module that defines workflows."""

    def __init__(self, code: int, *, hint: str = "") -> None:
        super().__init__(f"code {code}")
        self.code = code
        self.hint = hint


class Colour(enum.Enum):
    RED = "red"


@dataclass(frozen=True)
class Point:
    x: int
    y: tuple[int, ...] = ()


class Order(pydantic.BaseModel):
    id: int
    lines: list[tuple[str, Decimal]]


@workflow
async def mh_registers_this_module() -> None:
    """A module-level definition: it makes this module's types portable."""


# --- 1 ------------------------------------------------------------------------------------------


def test_m01_the_same_step_with_equal_arguments_runs_each_time_it_is_called() -> None:
    calls: list[str] = []

    @step
    async def m01_greet(name: str) -> int:
        calls.append(name)
        return len(calls)

    @workflow
    async def m01_in_a_row() -> list[int]:
        return [await m01_greet("ann"), await m01_greet("ann"), await m01_greet("ann")]

    @workflow
    async def m01_at_once() -> list[int]:
        return sorted(await asyncio.gather(*(m01_greet("ann") for _ in range(3))))

    async def main() -> None:
        async with bench() as b:
            assert await b.run(m01_in_a_row) == [1, 2, 3]
            assert await b.run(m01_at_once) == [4, 5, 6]

    asyncio.run(main())


# --- 2 ------------------------------------------------------------------------------------------


def test_m02_try_finally_and_async_with_around_steps_behave_as_in_ordinary_python() -> None:
    order: list[str] = []

    @step(max_retries=0)
    async def m02_do(what: str) -> str:
        order.append(what)
        if what == "bad":
            raise ValueError(what)
        return what

    @contextlib.asynccontextmanager
    async def resource() -> Any:
        await m02_do("open")
        try:
            yield "resource"
        finally:
            await m02_do("close")

    @workflow
    async def m02_flow() -> list[Any]:
        seen: list[Any] = []
        try:
            await m02_do("bad")
        except Exception as exc:  # noqa: BLE001 - the very thing under test
            seen.append(repr(exc))
        else:
            seen.append("no error")
        finally:
            seen.append(await m02_do("finally"))
        try:
            async with resource():
                await m02_do("bad")
        except ValueError:
            seen.append("left")
        results = await asyncio.gather(
            m02_do("a"), m02_do("bad"), sleep("1h"), return_exceptions=True
        )
        return [*seen, [repr(r) for r in results]]

    async def main() -> None:
        async with bench() as b:
            run_id = await b.start(m02_flow)
            await b.asleep(run_id)
            await b.pass_time("1h")
            assert await b.result(run_id) == [
                "ValueError('bad')",
                "finally",
                "left",
                ["'a'", "ValueError('bad')", "None"],
            ]
        assert order == ["bad", "finally", "open", "bad", "close", "a", "bad"]

    asyncio.run(main())


@pytest.mark.parametrize("sessions", [0, 100])
def test_m02_nothing_is_thrown_into_waiting_code_to_suspend_it(sessions: int) -> None:
    thrown: list[str] = []

    @step
    async def m02_slow() -> None:
        await asyncio.sleep(0.15)  # long enough to be handed off

    @workflow
    async def m02_watchful() -> str:
        try:
            await m02_slow()
            await sleep("1h")
            await asyncio.sleep(3600)
            async with asyncio.timeout(7200):
                await sleep("1h")
        except GeneratorExit:
            raise  # closing a coroutine to free memory is no exception to catch
        except BaseException as exc:
            thrown.append(repr(exc))
            raise
        return "done"

    async def main() -> None:
        async with bench(sessions=sessions) as b:
            run_id = await b.start(m02_watchful)
            await b.has(run_id, "sleep.created")
            for _ in range(3):
                await b.asleep(run_id)
                await b.pass_time("1h")
            assert await b.result(run_id) == "done"
        assert thrown == []

    asyncio.run(main())


# --- 3 ------------------------------------------------------------------------------------------


def test_m03_gather_of_a_step_and_a_sleep_ends_with_the_sleep() -> None:
    @step
    async def m03_quick() -> str:
        return "quick"

    @workflow
    async def m03_flow() -> tuple[Any, float]:
        began = now()
        results = await asyncio.gather(m03_quick(), sleep("1h"))
        return results, (now() - began).total_seconds()

    async def main() -> None:
        async with bench() as b:
            run_id = await b.start(m03_flow)
            await b.asleep(run_id)
            await b.pass_time("59m50s")
            await b.restart()
            run = await b.asleep(run_id)
            assert run.status == "suspended"
            await b.pass_time("10s")
            results, took = await b.result(run_id)
            assert results == ["quick", None]
            assert 3600 <= took < 3630

    asyncio.run(main())


def test_m03_another_wake_up_completes_only_what_is_due() -> None:
    @workflow
    async def m03_two_sleeps() -> list[str]:
        ended: list[str] = []

        async def nap(duration: str) -> None:
            await sleep(duration)
            ended.append(duration)

        await asyncio.gather(nap("2h"), nap("1h"), nap("3h"))
        return ended

    async def main() -> None:
        async with bench() as b:
            run_id = await b.start(m03_two_sleeps)
            for count in (1, 2, 3):
                await b.asleep(run_id)
                await b.pass_time("1h")
                await b.has(run_id, "sleep.completed", count)
                assert len(await b.events(run_id, "sleep.completed")) == count
            assert await b.result(run_id) == ["1h", "2h", "3h"]

    asyncio.run(main())


# --- 4 ------------------------------------------------------------------------------------------


def test_m04_a_sleep_never_ends_early_and_its_lag_is_measured() -> None:
    @workflow
    async def m04_naps() -> list[float]:
        took: list[float] = []
        for seconds in (0.01, 0.03, 0.000_001, 0.05):
            began = now()
            await sleep(seconds)
            took.append((now() - began).total_seconds() - seconds)
        return took

    async def main() -> None:
        async with bench() as b:
            run_id = await b.start(m04_naps)
            assert all(late >= 0 for late in await b.result(run_id))
            events = await b.events(run_id)
            until = {
                e.op: datetime.fromisoformat(str(e.data["until"]))
                for e in events
                if e.type == "sleep.created"
            }
            completed = [e for e in events if e.type == "sleep.completed"]
            assert len(completed) == len(until) == 4
            for event in completed:
                assert event.timestamp is not None
                assert event.timestamp >= until[event.op]
                lag = event.data["lag"]
                assert isinstance(lag, float | int)
                assert 0 <= lag < 5

    asyncio.run(main())


def test_m04_sleeping_until_a_past_instant_returns_at_once() -> None:
    @workflow
    async def m04_past() -> float:
        began = now()
        await sleep(datetime(2001, 1, 1, tzinfo=UTC))
        await sleep(0)
        await sleep(began)
        return (now() - began).total_seconds()

    async def main() -> None:
        async with bench() as b:
            run_id = await b.start(m04_past)
            assert await b.result(run_id) == 0
            assert await b.types(run_id) == ["workflow.started", "workflow.completed"]

    asyncio.run(main())


# --- 5 ------------------------------------------------------------------------------------------

VALUES: list[Any] = [
    (1, (2, "three"), []),
    {1: "one", (2, 3): "pair", "plain": None},
    {"nested": ({"a", "b"}, frozenset({1}))},
    datetime(2030, 2, 3, 4, 5, 6, 789, tzinfo=UTC),
    date(2030, 2, 3),
    timedelta(days=2, microseconds=1),
    Decimal("1.10"),
    b"\x00\xff",
    uuid.UUID(int=7),
    Path("some/where"),
    complex(1, -2),
    Colour.RED,
    Point(1, (2, 3)),
    Order(id=7, lines=[("a", Decimal("0.10"))]),
    [Point(0), {"k": Order(id=1, lines=[])}],
    -0.0,
    2**80,
    "\u0000 ümlaut \U0001f600",
]


def shape(value: Any) -> Any:
    """The value with the types of everything in it."""
    if isinstance(value, dict):
        return ("dict", [(shape(k), shape(v)) for k, v in value.items()])
    if isinstance(value, list | tuple):
        return (type(value), [shape(v) for v in value])
    return (type(value), repr(value) if not isinstance(value, set | frozenset) else sorted(value))


def test_m05_results_have_equal_value_and_type_on_first_execution_and_on_replay() -> None:
    seen: list[list[Any]] = []

    @step
    async def m05_value(index: int) -> Any:
        return VALUES[index]

    @step
    def m05_typed(index: int) -> Order:
        return Order(id=index, lines=[("x", Decimal("1.0"))])

    @workflow
    async def m05_values() -> Any:
        values = [await m05_value(i) for i in range(len(VALUES))]
        values.append(await m05_typed(3))
        seen.append(values)
        await sleep("1h")
        return values

    async def main() -> None:
        async with bench() as b:
            run_id = await b.start(m05_values)
            await b.asleep(run_id)
            await b.restart()
            await b.pass_time("1h")
            result = await b.result(run_id)
            assert len(seen) == 2
            first, replayed = seen
            expected = [*VALUES, Order(id=3, lines=[("x", Decimal("1.0"))])]
            assert first == replayed == result == expected
            assert shape(first) == shape(replayed) == shape(result) == shape(expected)

    asyncio.run(main())


def test_m05_arguments_arrive_at_steps_and_workflow_with_equal_value_and_type() -> None:
    seen: list[Any] = []

    @step
    async def m05_take(*args: Any, **kwargs: Any) -> None:
        seen.append((args, kwargs))

    @workflow
    async def m05_arguments(values: list[Any]) -> None:
        await m05_take(*values, key=(1, 2))
        seen.append(values)

    async def main() -> None:
        async with bench() as b:
            await b.run(m05_arguments, VALUES)
        (args, kwargs), values = seen
        assert shape(list(args)) == shape(values) == shape(VALUES)
        assert kwargs == {"key": (1, 2)}

    asyncio.run(main())


def test_m05_exceptions_keep_their_type_on_first_execution_and_on_replay() -> None:
    class Local(Exception):
        """No other worker can import it."""

    seen: list[list[Any]] = []
    raised: list[Exception] = [
        ValueError("v", 1),
        KeyError("k"),
        FileNotFoundError(2, "no such file", "/nowhere"),
        MhError(7, hint="look"),
        FatalError("fatal"),
        RetryableError("again", retry_after="1s"),
        Local("local"),
        ExceptionGroup("group", [ValueError("a"), MhError(8)]),
    ]

    @step(max_retries=0)
    async def m05_raise(index: int) -> None:
        raise raised[index]

    @workflow
    async def m05_errors() -> None:
        found: list[Any] = []
        for index in range(len(raised)):
            try:
                await m05_raise(index)
            except Exception as exc:  # noqa: BLE001 - whatever comes is looked at
                found.append((type(exc), str(exc), getattr(exc, "args", None)))
                if isinstance(exc, MhError):
                    found.append((exc.code, exc.hint))
        seen.append(found)
        await sleep("1h")
        raise MhError(9, hint="end")

    async def main() -> None:
        async with bench() as b:
            run_id = await b.start(m05_errors)
            await b.asleep(run_id)
            await b.restart()
            await b.pass_time("1h")
            with pytest.raises(MhError) as caught:
                await b.result(run_id)
            assert (caught.value.code, caught.value.hint) == (9, "end")
        first, replayed = seen
        assert [f[0] for f in first] == [
            ValueError, KeyError, FileNotFoundError, MhError, 7, FatalError, RetryableError,
            StepError, ExceptionGroup,
        ]  # fmt: skip
        assert [f[:2] for f in first] == [f[:2] for f in replayed]
        assert first[4] == replayed[4] == (7, "look")
        assert first[0][2] == ("v", 1)

    asyncio.run(main())


# --- 6 ------------------------------------------------------------------------------------------


def retry_delays(events: list[Any]) -> list[float]:
    """Seconds from each failed try to the next, as the history says."""
    return [
        (datetime.fromisoformat(str(e.data["retry_at"])) - e.timestamp).total_seconds()
        for e in events
        if e.type == "step.retrying"
    ]


@pytest.mark.parametrize(
    ("delay", "expected"),
    [
        ("fixed", [60, 60, 60]),
        ("exponential", [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]),
        ("5s", [5, 5]),
        (timedelta(minutes=3), [180]),
        ("0s", [0, 0, 0, 0, 0, 0]),
    ],
)
def test_m06_retry_delay_and_max_retries_do_what_they_say(delay: Any, expected: list[int]) -> None:
    tries: list[int] = []

    @step(max_retries=len(expected), retry_delay=delay)
    async def m06_failing() -> None:
        tries.append(step_context().attempt)
        raise ConnectionError("no")

    @workflow
    async def m06_retries() -> None:
        await m06_failing()

    async def main() -> None:
        async with bench() as b:
            run_id = await b.start(m06_retries)
            for number, seconds in enumerate(expected, 1):
                await b.has(run_id, "step.retrying", number)
                await b.pass_time(seconds)
            with pytest.raises(ConnectionError, match=r"^no$"):
                await b.result(run_id)
            assert tries == list(range(1, len(expected) + 2))
            for found, wanted in zip(retry_delays(await b.events(run_id)), expected, strict=True):
                # The delay counts from the failure, the event comes with the commit after it.
                assert wanted - 5 < found <= wanted

    asyncio.run(main())


@pytest.mark.parametrize("after", ["30s", 30, timedelta(seconds=30)])
def test_m06_retry_after_overrides_the_delay_and_the_step_waits_for_it(after: Any) -> None:
    tries: list[int] = []

    @step(retry_delay="2h")
    def m06_busy() -> str:
        tries.append(1)
        if len(tries) == 1:
            raise RetryableError("busy", retry_after=after)
        return "served"

    @workflow
    async def m06_retry_after() -> str:
        return await m06_busy()

    async def main() -> None:
        async with bench() as b:
            run_id = await b.start(m06_retry_after)
            await b.has(run_id, "step.retrying")
            (item,) = (i for i in (await b.items(run_id)).values() if i.item_id != "turn")
            (event,) = await b.events(run_id, "step.retrying")
            assert event.timestamp is not None
            assert timedelta(seconds=25) < item.due_at - event.timestamp <= timedelta(seconds=30)
            await b.pass_time("20s")
            await b.restart()
            assert len(tries) == 1
            await b.pass_time("10s")
            assert await b.result(run_id) == "served"

    asyncio.run(main())


def test_m06_fatal_errors_and_exhausted_retries_reach_the_workflow() -> None:
    tries: Counter[str] = Counter()

    @step(max_retries=5)
    async def m06_fatal() -> None:
        tries["fatal"] += 1
        raise FatalError("never again")

    @step(max_retries=0)
    async def m06_once() -> None:
        tries["once"] += 1
        raise OSError("once")

    @workflow
    async def m06_gives_up() -> list[str]:
        found: list[str] = []
        for work in (m06_fatal, m06_once):
            try:
                await work()
            except Exception as exc:  # noqa: BLE001 - whatever comes is looked at
                found.append(repr(exc))
        return found

    async def main() -> None:
        async with bench() as b:
            assert await b.run(m06_gives_up) == ["FatalError('never again')", "OSError('once')"]
        assert tries == {"fatal": 1, "once": 1}

    asyncio.run(main())


def test_m06_timeout_ends_a_try_of_async_and_sync_steps() -> None:
    ended = threading.Event()

    @step(timeout="50ms", max_retries=0)
    async def m06_slow() -> None:
        await asyncio.sleep(60)

    @step(timeout="50ms", max_retries=0)
    def m06_slow_thread() -> None:
        ended.wait(30)

    @workflow
    async def m06_timeouts() -> list[str]:
        found: list[str] = []
        for work in (m06_slow, m06_slow_thread):
            try:
                await work()
            except TimeoutError as exc:
                found.append(type(exc).__name__)
        return found

    async def main() -> None:
        async with bench() as b:
            try:
                run_id = await b.start(m06_timeouts)
                assert await b.result(run_id) == ["StepTimeout", "StepTimeout"]
                failed = await b.events(run_id, "step.failed")
                assert [e.data["kind"] for e in failed] == ["timeout", "timeout"]
            finally:
                ended.set()

    asyncio.run(main())
    assert issubclass(StepTimeout, TimeoutError)


def test_m06_max_duration_ends_the_run() -> None:
    @workflow(max_duration="1h")
    async def m06_endless() -> None:
        while True:
            await sleep("40m")

    async def main() -> None:
        async with bench() as b:
            run_id = await b.start(m06_endless)
            await b.asleep(run_id)
            await b.pass_time("40m")
            await b.has(run_id, "sleep.created", 2)
            await b.asleep(run_id)
            await b.pass_time("20m")
            with pytest.raises(WorkflowTimeout):
                await b.result(run_id)
            assert len(await b.events(run_id, "workflow.deadline")) == 1

    asyncio.run(main())


# --- 7 ------------------------------------------------------------------------------------------


def test_m07_sync_steps_work_everywhere() -> None:
    threads: set[int] = set()
    together = threading.Barrier(3, timeout=60)

    @step
    def m07_plus(a: int, b: int = 1) -> int:
        threads.add(threading.get_ident())
        return a + b

    @step
    def m07_meet() -> str:
        together.wait()
        return step_context().step_name

    @step
    async def m07_outer(n: int) -> int:
        return await m07_plus(n) + m07_plus.fn(n)

    @workflow
    async def m07_flow() -> list[Any]:
        found: list[Any] = [await m07_plus(1, b=2)]
        found.extend(await asyncio.gather(m07_meet(), m07_meet(), m07_meet()))
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(m07_plus(n)) for n in (10, 20)]
        found.extend(t.result() for t in tasks)
        found.append(await asyncio.wait_for(m07_plus(5), 60))
        found.append(await m07_outer(7))
        return found

    async def main() -> None:
        assert await m07_plus(1) == 2  # outside of a run the body just runs
        threads.clear()
        async with bench() as b:
            name = "m07_meet"
            assert await b.run(m07_flow) == [3, name, name, name, 11, 21, 6, 16]

    asyncio.run(main())


# --- 8 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_m08_concurrent_starts_with_one_key_give_one_run(kind: str, tmp_path: Path) -> None:
    runs: list[int] = []

    @step
    async def m08_count(n: int) -> int:
        runs.append(n)
        return n

    @workflow
    async def m08_flow(n: int, tags: dict[str, int]) -> int:
        return await m08_count(n) + len(tags)

    @workflow
    async def m08_other(n: int, tags: dict[str, int]) -> int:
        return n + len(tags)

    async def main() -> None:
        first = (
            MemoryStorageBackend()
            if kind == "memory"
            else FileStorageBackend(tmp_path, fsync=False)
        )
        second = first.clone()
        async with first, second, bench(first) as b:
            clients = [Client(storage=s) for s in (first, second, first)]
            try:
                ids = await asyncio.gather(
                    *(
                        clients[i % 3].start(
                            m08_flow, 1, {"a": 1, "b": 2}, idempotency_key="order-7"
                        )
                        for i in range(5)
                    )
                )
                assert len(set(ids)) == 1
                assert await clients[0].result(ids[0], timeout=60) == 3
                # The order of a dict's keys makes no other arguments.
                again = await clients[1].start(
                    m08_flow, 1, {"b": 2, "a": 1}, idempotency_key="order-7"
                )
                assert again == ids[0]
                with pytest.raises(IdempotencyConflict) as caught:
                    await clients[1].start(m08_flow, 2, {"a": 1, "b": 2}, idempotency_key="order-7")
                assert caught.value.run_id == ids[0]
                assert caught.value.differences == {"n": ("1", "2")}
                assert "order-7" in str(caught.value)
                assert "n: existing 1, asked for 2" in str(caught.value)
                with pytest.raises(IdempotencyConflict, match="m08_other"):
                    await clients[0].start(
                        m08_other, 1, {"a": 1, "b": 2}, idempotency_key="order-7"
                    )
                page = await clients[0].list_runs()
                assert [r.run_id for r in page.items] == [ids[0]]
            finally:
                for client in clients:
                    await client.close()
            assert runs == [1]
            await b.check()

    asyncio.run(main())


# --- 9 ------------------------------------------------------------------------------------------


class DyingStorage(MemoryStorageBackend):
    """The view of a process that dies at its ``last`` commit, before or after it is made."""

    last: int = -1
    after: bool = False
    dead = False

    async def commit(self, changes: Any) -> Any:
        if self.dead:
            raise StorageError("dead")
        self.last -= 1
        if self.last >= 0:
            return await super().commit(changes)
        self.dead = True
        if self.after:
            await super().commit(changes)
        raise StorageError("dead")

    async def claim(self, request: Any) -> Any:
        if self.dead:
            raise StorageError("dead")
        return await super().claim(request)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_m09_a_worker_may_die_at_any_commit_and_every_run_continues(after: bool) -> None:
    calls: list[str] = []

    @step
    async def m09_work(name: str) -> str:
        calls.append(name)
        return name

    @step(retry_delay="0s")
    def m09_shaky(name: str) -> str:
        calls.append(name)
        if calls.count(name) == 1:
            raise OSError("first try")
        return name

    @step(dispatch="queue")
    async def m09_queued(name: str) -> str:
        calls.append(name)
        return name

    @workflow
    async def m09_flow() -> list[str]:
        found = [await m09_work("a"), await m09_shaky("b")]
        found.extend(await asyncio.gather(m09_work("c"), m09_queued("d"), m09_work("e")))
        await sleep(0.001)
        found.append(await m09_work("f"))
        return found

    async def attempt(dies_at: int) -> bool:
        """False when the worker got to the end before it could die."""
        calls.clear()
        base = MemoryStorageBackend()
        dying = DyingStorage()
        dying._shared = base._shared
        dying.last, dying.after = dies_at, after
        async with bench(base, work=False, lease=30) as b:
            run_id = await b.start(m09_flow)
            b.storage = dying
            await b.work()

            async def over() -> bool:
                return dying.dead or (await b.get(run_id)).status.is_terminal

            await eventually(over)
            died = dying.dead
            dead, b.worker, b.storage = b.worker, None, base
            assert dead is not None
            await dead.close()
            completed = {str(e.op) for e in await b.events(run_id, "step.completed")}
            before = Counter(calls)
            await b.pass_time(31)
            await b.work()
            assert await b.result(run_id) == ["a", "b", "c", "d", "e", "f"]
            events = await b.events(run_id)
            assert [e.seq for e in events] == list(range(1, len(events) + 1))
            for event in events:
                if event.type == "step.completed" and event.op in completed:
                    name = str(event.data["result"]).strip('"')
                    assert calls.count(name) == before[name], f"{name} ran again"
            return died

    async def main() -> None:
        dies_at = 0
        while await attempt(dies_at):
            dies_at += 1
        assert dies_at > 8

    asyncio.run(main())


# --- 10 -----------------------------------------------------------------------------------------


def test_m10_several_workers_on_one_file_store_run_every_step_once(tmp_path: Path) -> None:
    calls: Counter[tuple[int, int]] = Counter()

    @step
    async def m10_work(run: int, n: int) -> int:
        calls[run, n] += 1
        await asyncio.sleep(0.001)
        return n

    @workflow
    async def m10_flow(run: int) -> int:
        total = 0
        for n in range(3):
            total += await m10_work(run, n)
        total += sum(await asyncio.gather(*(m10_work(run, n) for n in (10, 20))))
        await sleep(0.001)
        return total + await m10_work(run, 30)

    async def main() -> None:
        stores = [FileStorageBackend(tmp_path, fsync=False) for _ in range(3)]
        async with contextlib.AsyncExitStack() as stack:
            benches = [await stack.enter_async_context(bench(s)) for s in stores]
            ids = [await benches[i % 3].start(m10_flow, i) for i in range(30)]
            results = await asyncio.gather(*(benches[0].result(i, 30) for i in ids))
            assert set(results) == {63}
            assert set(calls.values()) == {1}
        for store in stores:
            await store.close()

    asyncio.run(main())


# --- 11 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [MemoryStorageBackend, FileStorageBackend])
def test_m11_a_storage_without_runs_is_true_and_the_one_passed_in_is_used(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @workflow
    async def m11_flow() -> int:
        return 11

    monkeypatch.chdir(tmp_path)

    async def main() -> None:
        storage = make() if make is MemoryStorageBackend else make(tmp_path / "mine", fsync=False)
        assert storage
        assert not hasattr(type(storage), "__len__")
        assert "__bool__" not in dir(type(storage))
        async with Client(storage=storage) as client:
            assert storage
            run_id = await client.start(m11_flow)
            assert await client.result(run_id, timeout=60) == 11
        assert await storage.get_run(run_id) is not None
        await storage.close()

    asyncio.run(main())
    assert not (tmp_path / ".pyworkflow").exists()


# --- 12 -----------------------------------------------------------------------------------------


def test_m12_a_changed_workflow_stalls_its_runs_and_continues_when_put_back() -> None:
    def define(changed: bool) -> Any:
        @step
        async def m12_charge(user: str) -> str:
            return user

        @step
        async def m12_refund(user: str) -> str:
            return user

        @workflow
        async def m12_flow() -> str:
            found = await (m12_refund if changed else m12_charge)("ann")
            await sleep("1h")
            return found + await m12_charge("!")

        return m12_flow, m12_charge, m12_refund

    async def main() -> None:
        async with bench() as b:
            old = define(changed=False)
            run_id = await b.start(old[0])
            await b.asleep(run_id)
            new = define(changed=True)
            await b.pass_time("1h")
            run = await b.until(run_id, "stalled")
            assert run.stalled is not None
            assert "NonDeterminism" in run.stalled
            assert "expected step.completed op=1#1:step name=m12_charge" in run.stalled
            assert "found step op=1#1:step name=m12_refund" in run.stalled
            assert "event 2" in run.stalled or "event 3" in run.stalled
            history = len(await b.events(run_id))
            await b.pass_time("10s")
            await eventually(lambda: _claims(b, run_id, 2))
            stalled = await b.events(run_id, "workflow.stalled")
            assert len(stalled) == 1  # once per cause, however often it is tried
            assert len(await b.events(run_id)) == history
            del new
            back = define(changed=False)
            await b.pass_time("30s")
            assert await b.result(run_id) == "ann!"
            assert len(await b.events(run_id, "workflow.unstalled")) == 1
            del old, back

    async def _claims(b: Any, run_id: str, count: int) -> bool:
        turn = (await b.items(run_id)).get("turn")
        return turn is not None and turn.claims >= count

    asyncio.run(main())
    assert issubclass(NonDeterminism, Exception)


# --- 13 -----------------------------------------------------------------------------------------


def test_m13_a_run_of_5000_steps_costs_time_linear_in_its_steps() -> None:
    count = 5000
    marks: list[float] = []

    @step
    async def m13_one(i: int) -> int:
        if i % 1000 == 0:
            marks.append(time.process_time())
        return i

    @workflow
    async def m13_long() -> int:
        total = 0
        for i in range(count + 1):
            total += await m13_one(i)
        await sleep("1h")
        return total

    async def main() -> bool:
        marks.clear()
        async with bench() as b:
            run_id = await b.start(m13_long)
            await b.until(run_id, "suspended", timeout=60)
            thousands = [b - a for a, b in itertools.pairwise(marks)]
            assert len(thousands) == 5
            await b.restart()  # and all of it is replayed once
            began = time.process_time()
            await b.pass_time("1h")
            assert await b.result(run_id, 60) == count * (count + 1) // 2
            replay = time.process_time() - began
            # Quadratic cost would make the last thousand nine times the first.
            return thousands[-1] < 3 * min(thousands[:2]) and replay < 2 * sum(thousands)

    # A busy machine may disturb one measurement, it does not make the same point every time.
    assert any(asyncio.run(main()) for _ in range(3))


# --- 14 -----------------------------------------------------------------------------------------

_MODULE = """
import asyncio
from pyworkflow import configure_logging, sleep, start, step, workflow

@step(timeout="5s", retry_delay="exponential")
async def one(x: int) -> int:
    return x

@workflow(max_duration="1h", tags=["t"])
async def flow(x: int) -> int:
    return await one(x)
"""

_WATCHER = """
import logging, os, sys, threading
writes = []
def hook(event, args):
    if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        writes.append(args)
    elif event == "open" and args[1] is None and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        writes.append(args)
    elif event in ("os.mkdir", "os.remove", "socket.connect", "socket.bind"):
        writes.append((event, args))
sys.addaudithook(hook)
sys.dont_write_bytecode = True
import asyncio
made = []
plain = asyncio.new_event_loop
asyncio.new_event_loop = lambda: made.append(1) or plain()
level = logging.root.level
import defines_workflows
assert writes == [], writes
assert made == []
assert logging.root.handlers == [] and logging.root.level == level
assert all(not getattr(l, "handlers", []) or all(isinstance(h, logging.NullHandler) for h in l.handlers)
           for l in logging.Logger.manager.loggerDict.values())
assert threading.active_count() == 1
assert sorted(os.listdir()) == ["defines_workflows.py"]
print("ok")
"""


def test_m14_importing_definitions_touches_no_file_no_logging_and_no_loop(tmp_path: Path) -> None:
    (tmp_path / "defines_workflows.py").write_text(_MODULE)
    path = [str(tmp_path), *(p for p in sys.path if p)]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{_WATCHER}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


def test_m14_import_pyworkflow_loads_neither_pydantic_nor_asyncio_nor_pluggy() -> None:
    code = (
        f"import sys; sys.path[:0] = {[p for p in sys.path if p]!r}\n"
        "import pyworkflow\n"
        "print([m for m in ('pydantic', 'asyncio', 'pluggy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]")


def test_m14_the_start_of_a_module_function_is_what_begins_everything() -> None:
    assert callable(start)
