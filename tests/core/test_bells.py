"""Doorbells: what a worker makes of them, and what it rings for."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import pytest

from pyworkflow import _plugins, sleep, step, workflow
from pyworkflow._definitions import RunOptions
from pyworkflow._engine import bells as bells_module
from pyworkflow._engine.worker import Worker
from pyworkflow._operations import Operations
from pyworkflow._registry import WORKFLOWS
from pyworkflow.spi import Doorbell, Outcome, doorbell_headers, hookimpl
from pyworkflow.storage.memory import MemoryStorageBackend
from tests.core._driving import eventually, settings


class Ringer:
    """An executor that keeps what it is told."""

    name = "kept"

    def __init__(self) -> None:
        self.bells: list[Doorbell] = []

    async def notify(self, bells: Sequence[Doorbell]) -> None:
        self.bells += bells


class Fleet:
    """Workers on one store, and the doorbells that nobody has handled yet."""

    def __init__(self) -> None:
        self.storage = MemoryStorageBackend()
        self.ringer = Ringer()
        self.bells = self.ringer.bells
        self.ops = Operations(self.storage, None, self.ringer)  # type: ignore[arg-type]  # rings, which is all that is asked

    def worker(self) -> Worker:
        return Worker(self.storage, settings(), spread=True, notify=self.bells.extend)

    async def start(self, definition: Any, *args: Any, **options: Any) -> str:
        return await self.ops.start(definition, args, {}, RunOptions(**options))


@asynccontextmanager
async def fleet() -> AsyncIterator[tuple[Fleet, Worker]]:
    many = Fleet()
    worker = many.worker()
    await worker.open()
    try:
        yield many, worker
    finally:
        await worker.drain(0)
        await worker.close()


def test_a_start_rings_once_with_queue_priority_and_name() -> None:
    @workflow(name="mailing", queue="mails", priority=7)
    async def mailing() -> None: ...

    async def main() -> None:
        async with fleet() as (many, _):
            run_id = await many.start(mailing)
            (bell,) = many.bells
            assert (bell.run_id, bell.item_id, bell.v) == (run_id, "turn", 1)
            assert (bell.queue, bell.priority, bell.name) == ("mails", 7, "mailing")

    asyncio.run(main())


def test_one_doorbell_carries_a_run_of_short_steps_to_its_end() -> None:
    @step(name="bell_add")
    async def add(n: int) -> int:
        return n + 1

    @workflow(name="bell_chain")
    async def chain() -> int:
        n = 0
        for _ in range(10):
            n = await add(n)
        return n

    async def main() -> None:
        async with fleet() as (many, worker):
            run_id = await many.start(chain)
            assert await worker.handle(many.bells[0]) == Outcome.HANDLED
            assert (await many.ops.get_run(run_id)).result == 10
            assert len(many.bells) == 1
            assert await worker.handle(many.bells[0]) == Outcome.GONE

    asyncio.run(main())


def test_a_step_that_outlasts_its_turn_is_seen_through_by_the_same_doorbell() -> None:
    @step(name="bell_long")
    async def long() -> int:
        await asyncio.sleep(0.3)
        return 1

    @workflow(name="bell_longer")
    async def longer() -> int:
        return await long() + await long()

    async def main() -> None:
        async with fleet() as (many, worker):
            run_id = await many.start(longer)
            assert await worker.handle(many.bells[0]) == Outcome.HANDLED
            assert (await many.ops.get_run(run_id)).result == 2
            assert len(many.bells) == 1

    asyncio.run(main())


def test_branches_are_rung_for_by_step_name_and_queue() -> None:
    @step(name="bell_gpu", queue="gpu", priority=3)
    async def gpu() -> int:
        return 1

    @step(name="bell_cpu")
    async def cpu() -> int:
        return 2

    @workflow(name="bell_branches")
    async def branches() -> int:
        return sum(await asyncio.gather(gpu(), cpu(), cpu()))

    async def main() -> None:
        async with fleet() as (many, worker):
            run_id = await many.start(branches)
            await worker.handle(many.bells.pop())
            told = sorted((b.name, b.queue, b.priority) for b in many.bells)
            assert told == [("bell_cpu", "default", 0), ("bell_gpu", "gpu", 3)]
            for bell in list(many.bells):
                assert await worker.handle(bell) == Outcome.HANDLED
            assert (await many.ops.get_run(run_id)).result == 5

    asyncio.run(main())


def test_a_step_does_not_wait_for_the_other_branches() -> None:
    gate = asyncio.Event()

    @step(name="bell_quick", dispatch="queue")
    async def quick() -> int:
        return 1

    @step(name="bell_slow", dispatch="queue")
    async def slow() -> int:
        await gate.wait()
        return 2

    @workflow(name="bell_two_speeds")
    async def two_speeds() -> int:
        return sum(await asyncio.gather(slow(), quick()))

    async def main() -> None:
        async with fleet() as (many, worker):
            await many.start(two_speeds)
            await worker.handle(many.bells.pop())
            bells = {bell.name: bell for bell in many.bells}
            waiting = asyncio.create_task(worker.handle(bells["bell_slow"]))
            async with asyncio.timeout(10):
                assert await worker.handle(bells["bell_quick"]) == Outcome.HANDLED
            assert not waiting.done()
            assert await worker.handle(bells["bell_slow"]) == Outcome.BUSY
            gate.set()
            assert await waiting == Outcome.HANDLED

    asyncio.run(main())


def test_outcomes_of_doorbells_that_find_nothing_to_do() -> None:
    @workflow(name="bell_sleeper")
    async def sleeper() -> None:
        await sleep("1h")

    async def main() -> None:
        async with fleet() as (many, worker):
            run_id = await many.start(sleeper)
            await worker.handle(many.bells[0])
            assert await worker.handle(many.bells[0]) == Outcome.GONE  # not due
            assert await worker.handle(Doorbell(run_id, "step:none")) == Outcome.GONE
            assert await worker.handle(Doorbell("no-such-run", "turn")) == Outcome.GONE
            other = await many.start(sleeper)
            WORKFLOWS.local.remove("bell_sleeper")
            assert await worker.handle(Doorbell(other, "turn")) == Outcome.UNKNOWN_WORKFLOW
            assert (await many.ops.get_run(other)).status == "pending"
            await worker.drain(0)
            assert await worker.handle(Doorbell(other, "turn")) == Outcome.BUSY

    asyncio.run(main())


@step(name="bell_piece")
async def piece(n: int) -> int:
    return n


@workflow(name="bell_pieces")
async def pieces() -> int:
    return sum([await piece(1), await piece(2)])


def test_doorbells_for_runs_of_another_store_are_told_of_once_in_a_while(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> None:
        async with fleet() as (_, worker):
            for n in range(3):
                assert await worker.handle(Doorbell(f"run-{n}", "turn")) == Outcome.GONE

    asyncio.run(main())
    (line,) = [r.getMessage() for r in caplog.records if "another store" in r.getMessage()]
    assert "run_id=run-0 storage=memory" in line


def test_doorbells_that_waited_let_a_worker_drive_many_turns_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bells_module, "_BACK_TO_BACK", 60.0)
    monkeypatch.setattr(bells_module, "_HOOKS", ())  # another test's plugin may stand

    async def main() -> None:
        async with fleet() as (many, worker):
            runs = [await many.start(pieces) for _ in range(30)]
            others = [await many.start(pieces, queue="elsewhere") for _ in range(3)]
            came = [bell for bell in many.bells if bell.queue == "default"]
            outcomes = [await worker.handle(bell) for bell in came]
            assert set(outcomes) <= {Outcome.HANDLED, Outcome.BUSY, Outcome.GONE}
            assert 3 < outcomes.count(Outcome.HANDLED) < 15
            await worker.settle_down()
            assert {(await many.ops.get_run(run)).result for run in runs} == {3}
            # Their queue may be served by other workers alone.
            assert {(await many.ops.get_run(run)).status for run in others} == {"pending"}

    asyncio.run(main())


def test_a_doorbell_that_comes_alone_brings_its_own_run_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bells_module, "_BACK_TO_BACK", 0.0)

    async def main() -> None:
        async with fleet() as (many, worker):
            runs = [await many.start(pieces) for _ in range(20)]
            for bell in many.bells[:10]:
                assert await worker.handle(bell) == Outcome.HANDLED
            left = [(await many.ops.get_run(run)).status for run in runs[10:]]
            assert set(left) == {"pending"}  # for workers that have nothing to do

    asyncio.run(main())


def test_while_a_step_blocks_a_thread_turns_are_left_to_other_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bells_module, "_BACK_TO_BACK", 60.0)
    monkeypatch.setattr(bells_module, "_HOOKS", ())  # another test's plugin may stand
    gate = threading.Event()

    @step(name="bell_blocks")
    def blocks() -> bool:
        return gate.wait(30)

    @workflow(name="bell_blocked")
    async def blocked() -> bool:
        return await blocks()

    async def main() -> None:
        async with fleet() as (many, worker):
            for _ in range(5):
                await many.start(pieces)
                assert await worker.handle(many.bells.pop()) == Outcome.HANDLED
            await many.start(blocked)
            waiting = asyncio.create_task(worker.handle(many.bells.pop()))
            await eventually(worker.runner.in_threads)
            runs = [await many.start(pieces) for _ in range(5)]
            assert await worker.handle(many.bells.pop()) == Outcome.HANDLED
            left = [(await many.ops.get_run(run)).status for run in runs[:-1]]
            assert set(left) == {"pending"}
            gate.set()
            assert await waiting == Outcome.HANDLED

    asyncio.run(main())


def test_a_sweep_rings_once_for_what_was_not_rung_for() -> None:
    @workflow(name="bell_napper", queue="naps")
    async def napper() -> str:
        await sleep("1h")
        return "up"

    async def main() -> None:
        async with fleet() as (many, worker):
            run_id = await many.start(napper)
            assert await worker.sweep() == 0  # the client has just rung
            await worker.handle(many.bells.pop())
            await many.storage.shift_clock((await _due(many, run_id)) - (await many.storage.now()))
            assert await worker.sweep() == 1
            assert await worker.sweep() == 0
            (bell,) = many.bells
            assert (bell.name, bell.queue) == ("bell_napper", "naps")
            await worker.handle(bell)
            assert (await many.ops.get_run(run_id)).result == "up"

    async def _due(many: Fleet, run_id: str) -> Any:
        return (await many.storage.list_work(run_id))[0].due_at

    asyncio.run(main())


def test_plugins_choose_the_queue_and_send_headers_that_the_turn_sees() -> None:
    seen: list[dict[str, str]] = []
    of_the_caller = ContextVar("of_the_caller", default="unset")

    class Plugin:
        @hookimpl
        def pyworkflow_route(self, item: Any) -> str:
            return f"{item.queue}-eu"

        @hookimpl
        def pyworkflow_inject_headers(self, run_id: str, headers: dict[str, str]) -> None:
            headers["trace"] = f"of {run_id}"

        @hookimpl
        def pyworkflow_around_turn(self, run_id: str, workflow: str) -> None:
            seen.append(dict(doorbell_headers.get()))
            assert of_the_caller.get() == "unset"

    @step(name="bell_of_caller")
    async def seen_of_the_caller() -> str:
        return of_the_caller.get()

    @workflow(name="bell_traced")
    async def traced() -> str:
        return await seen_of_the_caller()

    async def main() -> None:
        async with fleet() as (many, worker):
            run_id = await many.start(traced)
            (bell,) = many.bells
            assert bell.queue == "default-eu"
            of_the_caller.set("a secret")
            await worker.handle(bell)
            assert [headers["trace"] for headers in seen] == [f"of {run_id}"]
            assert (await many.ops.get_run(run_id)).result == "unset"

    plugin = Plugin()
    _plugins.register(plugin, "bell-plugin")
    try:
        asyncio.run(main())
    finally:
        _plugins.unregister(plugin)


def test_an_executor_that_raises_does_not_hide_a_run_that_is_durable(
    caplog: pytest.LogCaptureFixture,
) -> None:
    @workflow(name="bell_unheard")
    async def unheard() -> None: ...

    async def refuse(_: object) -> None:
        raise OSError("no broker")

    async def main() -> None:
        async with fleet() as (many, _):
            many.ops = Operations(
                many.storage,
                None,
                SimpleNamespace(notify=refuse, name="broken"),  # type: ignore[arg-type]  # as above
            )
            run_id = await many.start(unheard)
            assert (await many.ops.get_run(run_id)).status == "pending"

    asyncio.run(main())
    assert "could not ring" in caplog.text
