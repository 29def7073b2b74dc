"""What the engine writes into the log of a worker: failed tries, and the ends of runs."""

from __future__ import annotations

import asyncio
import logging

import pytest

from pyworkflow import RetryableError, step, workflow
from tests.core._driving import bench


@step(name="logged.flaky", max_retries=1)
async def flaky() -> None:
    raise RetryableError("no good", retry_after="1s")


@workflow(name="logged")
async def logged() -> None:
    await flaky()


@workflow(name="logged.fine")
async def fine() -> None: ...


def _lines(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [r for r in caplog.records if r.name == "pyworkflow.engine"]


def test_a_failed_try_and_a_failed_run_are_each_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> str:
        async with bench() as b:
            run_id = await b.start(logged)
            await b.has(run_id, "step.retrying")
            await b.pass_time("2s")
            await b.until(run_id, "failed")
            await b.restart()  # nothing of it is said again
            return run_id

    run_id = asyncio.run(main())
    first, second, end = _lines(caplog)
    at = f"step=logged.flaky try=%d workflow=logged run_id={run_id}: RetryableError: no good"
    assert first.getMessage().startswith("step failed, next try at 2")
    assert first.getMessage().endswith(at % 1)
    assert second.getMessage() == f"step failed, no further try: {at % 2}"
    assert end.getMessage().startswith(f"run failed: workflow=logged run_id={run_id}: ")
    assert [r.levelname for r in (first, second, end)] == ["WARNING", "WARNING", "ERROR"]
    assert vars(first)["step_name"] == "logged.flaky"
    assert {vars(r)["run_id"] for r in (first, second, end)} == {run_id}


def test_a_run_that_ends_well_is_one_line_for_information(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> str:
        async with bench() as b:
            run_id = await b.start(fine)
            await b.result(run_id)
            return run_id

    with caplog.at_level(logging.INFO, logger="pyworkflow.engine"):
        run_id = asyncio.run(main())
    (line,) = [r for r in _lines(caplog) if r.getMessage().startswith("run ")]
    assert line.getMessage() == f"run completed: workflow=logged.fine run_id={run_id}"
    assert line.levelname == "INFO"


@workflow(name="logged.hangs")
async def hangs() -> None:
    await asyncio.Event().wait()


@workflow(name="logged.wakes")
async def wakes() -> None:
    event = asyncio.Event()
    asyncio.get_running_loop().call_later(3600, event.set)
    await event.wait()


def test_a_run_that_nothing_can_wake_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> str:
        async with bench() as b:
            other = await b.start(wakes)
            await b.asleep(other)
            run_id = await b.start(hangs)
            await b.has(run_id, "workflow.suspended")
            await b.rest()
            await b.work()
            for each in (run_id, other):
                await b.ops.cancel(each, "enough")
                await b.until(each, "cancelled")
            return run_id

    run_id = asyncio.run(main())
    (line,) = [r for r in _lines(caplog) if "nothing can wake" in r.getMessage()]
    assert line.levelno == logging.WARNING
    assert f"workflow=logged.hangs run_id={run_id};" in line.getMessage()
