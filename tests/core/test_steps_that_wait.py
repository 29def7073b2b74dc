"""Clients inside steps: which worker they talk to, and that waiting for a run never deadlocks."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import pytest

import pyworkflow
from pyworkflow import (
    Client,
    RunStalled,
    StepTimeout,
    WorkflowContextError,
    _config,
    configure,
    sleep,
    step,
    workflow,
)
from pyworkflow._config import Settings
from pyworkflow._engine.places import Place
from pyworkflow._engine.slots import Slots
from pyworkflow._engine.threads import StepThreads
from pyworkflow._engine.worker import Worker
from pyworkflow._local import reset_host
from pyworkflow._operations import Operations
from pyworkflow.storage.memory import MemoryStorageBackend
from pyworkflow.testing import TestEnvironment, start_local
from tests.core._driving import bench, eventually

PATIENCE = 120


@pytest.fixture
def few_slots(tmp_path: Path) -> Iterator[None]:
    """A process whose embedded worker runs two steps of each kind at once."""
    _config._reset_for_tests()
    reset_host()
    configure(storage=f"file://{tmp_path}/runs", concurrency=2)
    yield
    reset_host()
    _config._reset_for_tests()


@step
async def sw_async(n: int) -> int:
    return n


@step
def sw_sync(n: int) -> int:
    return n


@workflow
async def sw_leaf(n: int) -> int:
    return await sw_async(n) + await sw_sync(0)


@step
async def sw_waits_async(n: int) -> int:
    run_id = await pyworkflow.start_async(sw_leaf, n)
    found: int = await pyworkflow.result_async(run_id)
    return found


@step
async def sw_waits_with_client(n: int) -> int:
    async with Client() as client:
        return await client.run(sw_leaf, n)


@step
def sw_waits_sync(n: int) -> int:
    found: int = pyworkflow.result(pyworkflow.start(sw_leaf, n))
    return found


@step
def sw_runs(n: int) -> int:
    return pyworkflow.run(sw_leaf, n)


@step
def sw_waits_in_own_loop(n: int) -> int:
    async def main() -> int:
        async with Client() as client:
            return await client.run(sw_leaf, n)

    return asyncio.run(main())


WAITING = [sw_waits_async, sw_waits_with_client, sw_waits_sync, sw_runs, sw_waits_in_own_loop]


@workflow
async def sw_parent(kind: int, n: int) -> int:
    return await WAITING[kind](n)


@workflow
async def sw_deep(depth: int) -> int:
    return await sw_down(depth)


@step
def sw_down(depth: int) -> int:
    return 0 if depth == 0 else 1 + pyworkflow.run(sw_deep, depth - 1)


# --- R1: waiting never deadlocks ---------------------------------------------------------------------


@pytest.mark.usefixtures("few_slots")
@pytest.mark.parametrize("kind", range(len(WAITING)), ids=lambda n: WAITING[n].name)
def test_r01_more_steps_wait_than_there_are_slots(kind: int) -> None:
    ids = [pyworkflow.start(sw_parent, kind, n) for n in range(7)]
    assert [pyworkflow.result(i, timeout=PATIENCE) for i in ids] == list(range(7))


@pytest.mark.usefixtures("few_slots")
def test_r01_runs_wait_for_runs_to_any_depth() -> None:
    assert pyworkflow.run(sw_deep, 12, timeout=PATIENCE) == 12


def test_r01_a_worker_that_works_on_doorbells_helps_with_what_its_steps_wait_for() -> None:
    """As a pool child of Celery: it looks for nothing itself, and all others are busy, too."""

    async def main() -> None:
        storage = MemoryStorageBackend()
        bells: list[Any] = []
        config = Settings(concurrency=1, threads=1)
        worker = Worker(storage, config, spread=True, notify=bells.extend)
        await worker.open()
        client = Operations(storage, None, None)
        for kind in range(len(WAITING)):
            run_id = await client.start(sw_parent, (kind, 5), {}, sw_parent.options().options)
            await worker.claim_due([(run_id, "turn")])
            # No bell is ever answered but what the steps themselves see to.
            assert await client.result(run_id, PATIENCE, "wait") == 5
        assert any(bell.name == "sw_leaf" for bell in bells)  # others were told as well
        await worker.drain(1)
        await worker.close()
        await storage.close()

    asyncio.run(main())


def test_r01_a_worker_that_helps_leaves_queues_of_others_alone() -> None:
    @workflow
    async def sw_for_others() -> None:
        await sw_starts_elsewhere()

    @step(timeout="0.4s", max_retries=0)
    async def sw_starts_elsewhere() -> None:
        await Client().run(sw_leaf.options(run_id="elsewhere", queue="gpu"), 1)

    async def main() -> None:
        storage = MemoryStorageBackend()
        worker = Worker(storage, Settings(), spread=True, notify=lambda _: None, serves=["default"])
        await worker.open()
        client = Operations(storage, None, None)
        run_id = await client.start(sw_for_others, (), {}, sw_for_others.options().options)
        await worker.claim_due([(run_id, "turn")])
        with pytest.raises(StepTimeout):
            await client.result(run_id, PATIENCE, "wait")
        run = await storage.get_run("elsewhere")
        assert run is not None
        assert run.history_length == 1
        await worker.drain(1)
        await worker.close()
        await storage.close()

    asyncio.run(main())


def test_r01_the_lease_of_a_step_that_waits_is_renewed() -> None:
    started: list[int] = []

    @step
    async def sw_counts() -> int:
        started.append(1)
        found: int = await Client().run(sw_sleepy)
        return found

    @workflow
    async def sw_long() -> int:
        return await sw_counts()

    @workflow
    async def sw_sleepy() -> int:
        await sleep(1.5)
        return 3

    async def main() -> None:
        async with bench(lease=0.5) as b:
            assert await b.run(sw_long) == 3
            assert len(started) == 1

    asyncio.run(main())


def test_r01_a_step_that_is_cancelled_while_it_waits_leaves_its_slot_to_others() -> None:
    @workflow
    async def sw_forever() -> None:
        await sleep("1d")

    ended: list[str] = []

    @step
    async def sw_hangs() -> None:
        try:
            await Client().run(sw_forever)
        finally:
            ended.append("async")

    @step(timeout="0.3s", max_retries=0)
    def sw_hangs_in_a_thread() -> None:
        try:
            pyworkflow.run(sw_forever)
        except BaseException as exc:
            ended.append(f"{type(exc).__name__}: {exc}")
            raise

    @workflow
    async def sw_gives_up() -> str:
        try:
            async with asyncio.timeout(1):
                await sw_hangs()
        except TimeoutError:
            pass
        try:
            await sw_hangs_in_a_thread()
        except StepTimeout:
            return "given up"
        return "not"

    async def main() -> None:
        async with bench(concurrency=1, threads=1) as b:
            run_id = await b.start(sw_gives_up)
            assert b.worker is not None
            runner = b.worker.runner
            await eventually(lambda: len(runner.waiting) == 1)
            await b.pass_time(1)
            assert await b.result(run_id) == "given up"
            await eventually(lambda: len(ended) == 2, "the thread waits no longer")
            assert ended[0] == "async"
            assert "WorkflowContextError: result() waits no longer" in ended[1].replace(
                "run()", "result()"
            )
            await eventually(lambda: not runner.in_threads())
            assert not runner.waiting
            assert (runner._slots._free, runner._busy._free) == (1, 1)
            assert await b.run(sw_leaf, 4) == 4

    asyncio.run(main())


def test_r01_threads_that_wait_are_replaced_and_the_surplus_ends() -> None:
    async def main() -> None:
        threads = StepThreads(1)
        release = threading.Event()
        first = threads.submit(lambda: release.wait(PATIENCE))
        threads.lend()
        assert await threads.submit(lambda: "another") == ("another", None)
        assert threads._begun == 2
        threads.take_back()
        release.set()
        await first
        await asyncio.gather(*[threads.submit(lambda: None) for _ in range(4)])
        assert threads._begun == 1
        threads.close()

    asyncio.run(main())


def test_r01_too_many_waiting_threads_are_refused_with_the_alternative(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pyworkflow._engine.threads.MOST_WAITING", 1)

    async def main() -> None:
        threads = StepThreads(1)
        release = threading.Event()
        blocked = [threads.submit(lambda: release.wait(PATIENCE))]
        threads.lend()
        with pytest.raises(WorkflowContextError, match="await result_async"):
            threads.lend()
        release.set()
        await asyncio.gather(*blocked)
        threads.close()

    asyncio.run(main())


class _Owner:
    """As much of a worker as a place needs."""

    class runner:
        waiting: ClassVar[set[Any]] = set()

    def wake(self) -> None:
        """Nothing waits for that."""


def place(slots: Slots) -> Place:
    return Place(_Owner(), ("r", "1"), slots, None, is_over=False)  # type: ignore[arg-type]  # see there


def test_r01_slots_are_exact_whatever_ends_first() -> None:
    async def main() -> None:
        slots = Slots(1)
        assert slots.take()
        first = place(slots)
        await first.release()
        await first.release()  # two waits of one step at once
        assert slots.take()  # another step runs meanwhile
        await first.take_again()
        again = asyncio.ensure_future(first.take_again())
        queued = asyncio.ensure_future(slots.acquire())
        await asyncio.sleep(0)
        assert not again.done()  # the body resumes when a slot is free
        slots.release()
        await again  # before those that wait longer
        assert first.has_slot
        assert not queued.done()
        first.end()
        await queued
        assert not slots.take()
        slots.release()
        assert slots.take()
        # Cancelled while it waits for a slot: it has one more than there are, and makes up for it.
        second = place(slots)
        await second.release()
        assert slots.take()
        waiting = asyncio.ensure_future(second.take_again())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait({waiting})
        assert second.has_slot
        slots.release()
        assert not slots.take()
        second.end()
        assert slots.take()
        # A body that ends beside its own wait.
        third = place(slots)
        await third.release()
        third.end()
        assert slots.take()
        await third.take_again()
        slots.release()
        assert slots.take()
        assert not slots.take()

    asyncio.run(main())


def test_r01_sync_result_in_an_async_step_names_the_alternative() -> None:
    @step
    async def sw_blocks() -> str:
        with pytest.raises(WorkflowContextError, match=r"await result_async\(\.\.\.\)"):
            pyworkflow.result("x")
        with pytest.raises(WorkflowContextError, match=r"await run_async\(\.\.\.\)"):
            pyworkflow.run(sw_leaf, 1)
        return "named"

    @workflow
    async def sw_blocking() -> str:
        return await sw_blocks()

    async def main() -> None:
        async with TestEnvironment() as env:
            assert await env.run(sw_blocking) == "named"

    asyncio.run(main())


# --- R2: the ambient client is that of the worker ---------------------------------------------------


@step
async def sw_starts_async() -> list[str]:
    first = await pyworkflow.start_async(sw_leaf, 1)
    async with Client() as client:
        second = await client.start(sw_leaf, 2)
        assert (await client.get_run(first)).run_id == first
    third = await sw_leaf.start_async(3)
    fourth = await asyncio.to_thread(pyworkflow.start, sw_leaf, 4)
    page = await pyworkflow.list_runs_async(workflow="sw_leaf")
    assert {run.run_id for run in page.items} >= {first, second, third, fourth}
    return [first, second, third, fourth]


@step
def sw_starts_sync() -> list[str]:
    first = pyworkflow.start(sw_leaf, 1)
    second = sw_leaf.options(tags=["x"]).start(2)
    assert pyworkflow.get_run(first).run_id == first
    assert pyworkflow.get_events(second)[0].seq == 1
    return [first, second]


@step
async def sw_starts_blocking() -> list[str]:
    with pytest.warns(RuntimeWarning, match="start_async"):
        return [pyworkflow.start(sw_leaf, 1)]


STARTING = [sw_starts_async, sw_starts_sync, sw_starts_blocking]


@workflow
async def sw_starter(kind: int) -> list[str]:
    return await STARTING[kind]()


@pytest.fixture
def untouched(tmp_path: Path) -> Iterator[Path]:
    """A configured store that no test may touch."""
    _config._reset_for_tests()
    reset_host()
    configure(storage=f"file://{tmp_path}/configured")
    yield tmp_path
    reset_host()
    _config._reset_for_tests()
    assert not (tmp_path / "configured").exists()


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("kind", range(len(STARTING)), ids=lambda n: STARTING[n].name)
def test_r02_a_step_starts_runs_in_the_store_of_its_worker(kind: int) -> None:
    from pyworkflow import _routing

    _routing._warned.clear()

    async def main() -> None:
        async with TestEnvironment() as env:
            for run_id in await env.run(sw_starter, kind):
                assert await env.result(run_id) in {1, 2, 3, 4}
        storage = MemoryStorageBackend()
        _routing._warned.clear()
        run_id = await start_local(sw_starter, kind, storage=storage)
        runs = (await storage.list_runs(pyworkflow_query())).items
        assert {run.status for run in runs} == {"completed"}
        assert len(runs) > 1
        _routing._warned.clear()
        async with Client(storage=storage) as client:
            for run_id in await client.run(sw_starter, kind, timeout=PATIENCE):
                assert await client.result(run_id, timeout=PATIENCE) in {1, 2, 3, 4}

    asyncio.run(main())


def pyworkflow_query() -> Any:
    from pyworkflow.spi import RunQuery

    return RunQuery()


@pytest.mark.usefixtures("untouched")
def test_r02_the_namespace_is_that_of_the_worker(untouched: Path) -> None:
    async def main() -> None:
        url = f"file://{untouched}/other"
        async with Client(storage=url, namespace="shop") as client:
            for run_id in await client.run(sw_starter, 1, timeout=PATIENCE):
                assert await client.result(run_id, timeout=PATIENCE) in {1, 2}
        async with Client(storage=url, namespace="default") as client:
            assert (await client.list_runs()).items == []

    asyncio.run(main())


@pytest.mark.usefixtures("untouched")
def test_r02_steps_of_the_test_kit_wait_on_its_clock() -> None:
    @workflow
    async def sw_hour(n: int) -> int:
        await sleep("1h")
        return n

    @step
    async def sw_awaits_hour() -> int:
        found: int = await Client().run(sw_hour, 1)
        return found

    @step
    def sw_awaits_hour_in_a_thread() -> int:
        return pyworkflow.run(sw_hour, 2)

    @workflow
    async def sw_both() -> int:
        return sum(await asyncio.gather(sw_awaits_hour(), sw_awaits_hour_in_a_thread()))

    async def main() -> None:
        async with TestEnvironment() as env:
            began, before = time.monotonic(), await env.now()
            assert await env.run(sw_both) == 3
            passed = await env.now() - before
            assert timedelta(hours=1) <= passed < timedelta(hours=2)
            assert time.monotonic() - began < PATIENCE

    asyncio.run(main())


@pytest.mark.usefixtures("untouched")
def test_r06_a_step_of_the_test_kit_sees_that_its_run_stalls_on_its_clock() -> None:
    @workflow
    async def sw_stalls() -> None:
        await sleep("1h")
        Path("/dev/null").read_text()  # noqa: ASYNC240 - so that the run stalls, however often

    @step
    async def sw_sees() -> str:
        with pytest.raises(RunStalled) as caught:
            await Client().run(sw_stalls)
        return caught.value.cause

    @workflow
    async def sw_looks() -> str:
        return await sw_sees()

    async def main() -> None:
        async with TestEnvironment() as env:
            before = await env.now()
            assert "WorkflowContextError" in await env.run(sw_looks)
            assert timedelta(hours=1) < await env.now() - before < timedelta(hours=1, minutes=2)

    asyncio.run(main())


def test_r02_nothing_of_the_starting_step_is_seen_in_the_run_that_it_starts() -> None:
    seen: list[str] = []

    @workflow
    async def sw_child() -> None:
        seen.append("child")
        await sw_looks_around()

    @step
    async def sw_looks_around() -> None:
        seen.append(pyworkflow.step_context().workflow_name)

    @step
    async def sw_begins() -> str:
        return await Client().start(sw_child)

    @workflow
    async def sw_begetter() -> str:
        return await sw_begins()

    async def main() -> None:
        async with TestEnvironment() as env:
            await env.result(await env.run(sw_begetter))
            assert seen == ["child", "sw_child"]

    asyncio.run(main())
