"""Workers of two versions side by side, stalls that end, and histories that no code can read."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from datetime import timedelta
from typing import Any

import pytest

from pyworkflow import patched, sleep, step, workflow
from pyworkflow._engine import worker as worker_module
from pyworkflow._engine.worker import Worker
from pyworkflow.runs import ItemKind
from pyworkflow.spi import Change, Event, NewRun, Put
from tests.core._driving import Bench, bench, eventually


@step
async def roll_old() -> str:
    return "old"


@step
async def roll_new() -> str:
    return "new"


def _old() -> Any:
    @workflow(name="roll_order_before")
    async def roll_order() -> str:
        said = await roll_old()
        await sleep("1h")
        return said + await roll_old()

    return roll_order


def _new() -> Any:
    @workflow(name="roll_order")
    async def roll_order() -> str:
        said = await (roll_new() if patched("new") else roll_old())
        await sleep("1h")
        return said + await (roll_new() if patched("new") else roll_old())

    return roll_order


def _two_versions(monkeypatch: pytest.MonkeyPatch, old: Any, new: Any) -> None:
    real = worker_module.find_workflow
    by_loop = {"old": old, "new": new}

    def find(name: str) -> Any:
        if name != "roll_order":
            return real(name)
        task = asyncio.current_task()
        return by_loop["old" if task is not None and task in _old_tasks else "new"]

    monkeypatch.setattr(worker_module, "find_workflow", find)


_old_tasks: set[asyncio.Task[Any]] = set()


class _OldWorker(Worker):
    """A worker whose tasks find the older code."""

    def spawn(self, coro: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = super().spawn(coro)
        _old_tasks.add(task)
        return task


async def _begin(b: Bench, *, old: bool) -> Worker:
    worker = (_OldWorker if old else Worker)(b.storage, b.settings)
    await worker.open()
    worker.serve()
    return worker


def test_n13_a_rolling_deploy_raises_no_alarm(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    new, old = _new(), _old()
    _two_versions(monkeypatch, old, new)

    async def main() -> None:
        async with bench(work=False, sessions=0, version_grace=timedelta(hours=1)) as b:
            first = await _begin(b, old=False)
            run_ids = [await b.start(new) for _ in range(20)]
            for run_id in run_ids:
                await b.asleep(run_id)
            await first.drain(0)
            await first.close()
            workers = [await _begin(b, old=True), await _begin(b, old=False)]
            await b.pass_time("1h")
            for run_id in run_ids:
                assert await b.result(run_id) == "newnew"
                assert await b.events(run_id, "workflow.stalled") == []
            for worker in workers:
                await worker.drain(0)
                await worker.close()

    with caplog.at_level(logging.INFO, "pyworkflow.engine"):
        asyncio.run(main())
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []
    left = [r for r in caplog.records if "newer code recorded the run" in r.getMessage()]
    assert all(r.levelno == logging.INFO for r in left)
    assert len(left) <= 20


def test_n13_without_a_worker_that_fits_the_run_stalls_after_the_grace_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    new, old = _new(), _old()
    _two_versions(monkeypatch, old, new)

    async def main() -> None:
        async with bench(work=False, version_grace=timedelta(seconds=0.5)) as b:
            first = await _begin(b, old=False)
            run_id = await b.start(new)
            await b.asleep(run_id)
            await first.drain(0)
            await first.close()
            second = await _begin(b, old=True)
            await b.pass_time("1h")
            run = await b.until(run_id, "stalled")
            assert "patched('new')" in str(run.stalled)
            await second.drain(0)
            await second.close()
            third = await _begin(b, old=False)
            await b.pass_time("1m")
            assert await b.result(run_id) == "newnew"
            await third.drain(0)
            await third.close()

    with caplog.at_level(logging.INFO, "pyworkflow.engine"):
        asyncio.run(main())
    said = [m for m in caplog.messages if "newer code recorded the run" in m]
    assert len(said) == 1
    (resumed,) = [r for r in caplog.records if r.getMessage().startswith("the run resumes")]
    assert resumed.levelno == logging.INFO
    assert "stalled_for=6" in resumed.getMessage()  # a minute and what passed meanwhile


def test_n13_events_of_a_newer_version_are_left_to_others() -> None:
    @workflow
    async def roll_waits() -> None:
        await sleep("1h")

    async def main() -> None:
        async with bench(work=False, version_grace=timedelta(seconds=0.3), sessions=0) as b:
            await b.work()
            run_id = await b.start(roll_waits)
            await b.asleep(run_id)
            later = Event("message.sent", "I", {}, None, "later")
            await b.storage.commit_one(Change(run_id=run_id, key="later", events=[later]))
            run = await b.until(run_id, "stalled")
            assert "upgrade the worker" in str(run.stalled)

    asyncio.run(main())


def test_n34_a_run_that_resumes_says_how_long_it_was_stalled(
    caplog: pytest.LogCaptureFixture,
) -> None:
    @workflow(name="roll_fixed")
    async def broken() -> str:
        open("/dev/null").close()  # noqa: ASYNC230, PTH123 - what workflow code may not do
        return ""

    async def main() -> None:
        async with bench() as b:
            run_id = await b.start(broken)
            await b.until(run_id, "stalled")

            @workflow(name="roll_fixed")
            async def fixed() -> str:
                return await roll_new()

            await b.pass_time("90s")
            assert await b.result(run_id) == "new"
            lines = [r for r in caplog.records if r.getMessage().startswith("the run resumes")]
            (line,) = lines
            assert line.levelno == logging.INFO
            assert run_id in line.getMessage()
            assert "stalled_for=9" in line.getMessage()
            assert getattr(line, "run_id", None) == run_id

    with caplog.at_level(logging.INFO, "pyworkflow.engine"):
        asyncio.run(main())


# --- L6 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["workflow", "seed", "args"])
def test_l06_a_start_without_its_fields_stalls_and_is_named(
    caplog: pytest.LogCaptureFixture, missing: str
) -> None:
    @workflow
    async def roll_damaged() -> None: ...

    async def main() -> None:
        async with bench() as b:
            data: dict[str, Any] = {"workflow": "roll_damaged", "seed": "0" * 32, "args": "{}"}
            data |= {"version": "1", "profile": 1}
            del data[missing]
            await b.storage.commit_one(
                Change(
                    run_id="damaged",
                    key="start:damaged",
                    create=NewRun(workflow="roll_damaged", version="1", args="{}"),
                    events=[Event("workflow.started", "I", data, None, "started")],
                    put=[Put(item_id="turn", kind=ItemKind.TURN)],
                )
            )
            run = await b.until("damaged", "stalled")
            assert "type=workflow.started" in str(run.stalled)
            assert f"missing='{missing}'" in str(run.stalled)

    asyncio.run(main())
    assert "KeyError" not in caplog.text
    assert "Traceback" not in caplog.text


def test_l06_other_events_without_their_fields_stall_too() -> None:
    @step(queue="elsewhere")
    async def roll_elsewhere() -> None: ...

    @workflow
    async def roll_waits_for_it() -> None:
        await roll_elsewhere()

    async def main() -> None:
        async with bench(work=False) as b:
            b.worker = Worker(b.storage, b.settings, queues=["default"])
            await b.worker.open()
            b.worker.serve()
            run_id = await b.start(roll_waits_for_it)
            await b.has(run_id, "step.scheduled")
            wrong = Event("step.failed", "I", {"name": "roll_elsewhere"}, "1#1:step", "wrong")
            await b.storage.commit_one(Change(run_id=run_id, key="wrong", events=[wrong]))
            run = await b.until(run_id, "stalled")
            assert "type=step.failed" in str(run.stalled)
            await eventually(lambda: "missing='error'" in str(run.stalled))

    asyncio.run(main())
