"""Code that holds its worker up: steps that block the loop, workflows that spin, finalizers."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
import weakref
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from pyworkflow import step, workflow
from pyworkflow._engine.guard import shared_guard
from tests.core._driving import Bench, bench, eventually


def _named(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [m for m in caplog.messages if "blocks the event loop" in m]


@pytest.mark.parametrize("dispatch", ["auto", "queue"])
def test_r08_an_async_step_that_blocks_the_loop_is_named(
    caplog: pytest.LogCaptureFixture, dispatch: Any
) -> None:
    @step(dispatch=dispatch)
    async def blk_holds_the_loop() -> int:
        end = time.monotonic() + 60
        while not _named(caplog) and time.monotonic() < end:
            time.sleep(0.01)  # noqa: ASYNC251 - this is what blocks the loop
        return len(_named(caplog))

    @workflow
    async def blk_run() -> int:
        return await blk_holds_the_loop()

    async def main() -> None:
        async with bench() as b:
            run_id = await b.start(blk_run)
            assert await b.result(run_id, timeout=90) == 1
            (said,) = _named(caplog)
            assert "blk_holds_the_loop" in said
            assert run_id in said
            assert Path(__file__).name in said
            assert "sync step" in said
            assert "asyncio.to_thread" in said

    with caplog.at_level(logging.WARNING, "pyworkflow.engine"):
        asyncio.run(main())


def test_r08_steps_that_wait_or_run_in_threads_are_not_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    @step
    async def blk_computes_in_slices() -> None:
        end = time.monotonic() + 1.6
        while time.monotonic() < end:
            for _ in range(1000):
                pass
            await asyncio.sleep(0)

    @step
    def blk_in_a_thread() -> None:
        end = time.monotonic() + 1.6
        while time.monotonic() < end:
            threading.Event().wait(0.01)

    @workflow
    async def blk_both() -> None:
        await asyncio.gather(blk_computes_in_slices(), blk_in_a_thread())

    async def main() -> None:
        async with bench() as b:
            await b.run(blk_both)

    with caplog.at_level(logging.WARNING, "pyworkflow.engine"):
        asyncio.run(main())
    assert _named(caplog) == []


class _Closes:
    """Its finalizer does what workflow code may not."""

    done: list[str]

    def __init__(self, done: list[str], path: Path) -> None:
        self.done, self.path = done, path
        self.me = self  # only the collector finds it

    def __del__(self) -> None:
        with self.path.open("a") as file:
            file.write("closed\n")
        thread = threading.Thread(target=lambda: None)
        thread.start()
        thread.join()
        self.done.append("finalized")


def test_r09_a_finalizer_that_the_collector_runs_is_not_the_workflows(tmp_path: Path) -> None:
    done: list[str] = []
    garbage = _Closes(done, tmp_path / "finalized")
    weakref.finalize(garbage, lambda: (tmp_path / "callback").open("w").close())
    kept = {"garbage": garbage}
    del garbage

    @workflow
    async def blk_collects() -> str:
        kept.clear()
        gc.collect()
        return "fine"

    async def main() -> None:
        async with bench() as b:
            assert await b.run(blk_collects) == "fine"

    asyncio.run(main())
    assert done == ["finalized"]
    assert (tmp_path / "callback").exists()


def test_r09_a_generator_that_the_collector_closes_is_not_the_workflows(tmp_path: Path) -> None:
    def closes() -> Any:
        try:
            yield
        finally:
            (tmp_path / "closed").open("w").close()

    cycle: list[Any] = [closes()]
    next(cycle[0])
    cycle.append(cycle)
    kept = {"cycle": cycle}
    del cycle

    @workflow
    async def blk_collects_generator() -> str:
        kept.clear()
        gc.collect()
        return "fine"

    async def main() -> None:
        async with bench() as b:
            assert await b.run(blk_collects_generator) == "fine"

    asyncio.run(main())
    assert (tmp_path / "closed").exists()


def test_r09_workflow_code_itself_is_still_refused(tmp_path: Path) -> None:
    @workflow
    async def blk_opens() -> None:
        gc.collect()
        (tmp_path / "x").open("w").close()

    async def main() -> None:
        async with bench() as b:
            run_id = await b.start(blk_opens)
            run = await b.until(run_id, "stalled")
            assert "opening a file" in str(run.stalled)

    asyncio.run(main())
    assert not (tmp_path / "x").exists()


# --- L7 -----------------------------------------------------------------------------------------


def test_l07_a_spinning_workflow_is_tried_again_after_minutes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shared_guard(), "_limit", 0.1)

    @workflow
    async def blk_spins() -> None:
        while True:
            pass

    async def next_try(b: Bench, run_id: str) -> timedelta:
        async def waits() -> Any:
            item = (await b.items(run_id)).get("turn")
            free = item is not None and item.lease is None and item.claims > 0
            now = await b.storage.now()
            return item if free and item is not None and item.due_at > now else None

        item = await eventually(waits, "the turn waits for its next try")
        return item.due_at - await b.storage.now()

    async def main() -> None:
        async with bench() as b:
            run_id = await b.start(blk_spins)
            await b.until(run_id, "stalled")
            pauses = []
            for _ in range(8):
                left = (await next_try(b, run_id)).total_seconds()
                pauses.append(round(left))
                claims = (await b.items(run_id))["turn"].claims
                await b.pass_time(left + 0.01)

                async def tried(before: int = claims) -> bool:
                    item = (await b.items(run_id))["turn"]
                    return item.claims > before and item.lease is None

                await eventually(tried, "tried again")
            assert pauses == [5, 10, 20, 40, 80, 160, 300, 300]

    asyncio.run(main())


def test_l07_the_limit_of_the_watchdog_is_a_setting() -> None:
    @workflow
    async def blk_spins_shortly() -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            pass

    async def main() -> None:
        async with bench(watchdog=timedelta(seconds=0.1)) as b:
            run_id = await b.start(blk_spins_shortly)
            began = time.monotonic()
            run = await b.until(run_id, "stalled")
            assert time.monotonic() - began < 30
            assert "watchdog" in str(run.stalled)

    asyncio.run(main())
