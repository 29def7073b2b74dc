"""Log lines of steps in the history: with the end of the attempt, bounded, the rest counted."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from pyworkflow import logger, step, step_context, workflow
from pyworkflow.event_schema import validate_event
from pyworkflow.spi import Event
from pyworkflow.testing import History, replay
from tests.core._driving import Bench, bench


async def _lines(b: Bench, run_id: str) -> list[Event]:
    history = await History.fetch(run_id, b.storage)
    replay(history).check()
    for event in history.events:
        validate_event(event)
    return [e for e in history.events if e.type.startswith("log.")]


@pytest.mark.parametrize("kind", ["async", "sync", "dispatched"])
def test_r10_lines_of_a_step_become_events_of_its_op(kind: str) -> None:
    def say() -> None:
        logger.debug("looking at %s", "P-7")
        logger.info("charged", extra={"amount": 5})
        logger.error("odd")

    if kind == "sync":

        @step
        def slog_step() -> None:
            say()
    else:

        @step(dispatch="queue" if kind == "dispatched" else "auto")
        async def slog_step() -> None:
            say()

    @workflow
    async def slog_run() -> None:
        await slog_step()

    async def main() -> None:
        async with bench() as b:
            run_id = await b.start(slog_run)
            await b.result(run_id)
            lines = await _lines(b, run_id)
            assert [(e.type, e.data["message"]) for e in lines] == [
                ("log.debug", "looking at P-7"), ("log.info", "charged"), ("log.error", "odd"),
            ]  # fmt: skip
            assert lines[1].data["fields"] == {"amount": 5}
            assert {e.op for e in lines} == {"1#1:step"}
            assert {(e.data["step"], e.data["attempt"]) for e in lines} == {("slog_step", 1)}
            (end,) = await b.events(run_id, "step.completed")
            assert lines[-1].seq == end.seq - 1
            assert lines[-1].timestamp == end.timestamp

    asyncio.run(main())


def test_r10_each_attempt_has_its_lines_and_handlers_get_them_at_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    @step(max_retries=1, retry_delay=0.01)
    async def slog_retried() -> None:
        attempt = step_context().attempt
        logger.info("attempt %d", attempt)
        if attempt == 1:
            raise OSError

    @workflow
    async def slog_retries() -> None:
        await slog_retried()

    async def main() -> None:
        async with bench() as b:
            run_id = await b.start(slog_retries)
            await b.result(run_id)
            lines = await _lines(b, run_id)
            assert [(e.data["message"], e.data["attempt"]) for e in lines] == [
                ("attempt 1", 1), ("attempt 2", 2),
            ]  # fmt: skip
            types = [e.type for e in await b.events(run_id)]
            assert types.index("step.retrying") == types.index("log.info") + 1

    with caplog.at_level(logging.INFO):
        asyncio.run(main())
    assert [m for m in caplog.messages if m.startswith("attempt")] == ["attempt 1", "attempt 2"]


@pytest.mark.parametrize(("lines", "size"), [(1000, 10), (30, 10_000), (3, 100_000)])
def test_r10_the_history_takes_200_lines_and_64_kib_of_an_attempt(lines: int, size: int) -> None:
    @step
    async def slog_talks() -> None:
        for _ in range(lines):
            logger.info("x" * size)

    @workflow
    async def slog_much() -> None:
        await slog_talks()

    async def main() -> None:
        async with bench() as b:
            run_id = await b.start(slog_much)
            await b.result(run_id)
            events = await _lines(b, run_id)
            said = [e for e in events if e.type == "log.info"]
            assert 0 < len(said) <= 200
            assert sum(len(str(e.data["message"])) for e in said) <= 64 * 1024
            if len(said) == lines:
                assert len(events) == lines
            else:
                (rest,) = [e for e in events if e.type == "log.warning"]
                assert rest.data["fields"] == {"left_out": lines - len(said)}

    asyncio.run(main())


def test_r10_many_steps_that_log_much_fit_into_small_changes() -> None:
    @step
    async def slog_one_of_many(n: int) -> int:
        for _ in range(100):
            logger.info("line of %d", n)
        return n

    @workflow
    async def slog_wide() -> int:
        return sum(await asyncio.gather(*(slog_one_of_many(n) for n in range(30))))

    async def main() -> None:
        async with bench(work=False) as b:
            from pyworkflow._engine.worker import Worker

            sizes: list[int] = []
            real: Any = b.storage.commit

            async def counted(changes: Any) -> Any:
                sizes.extend(len(c.events) for c in changes)
                return await real(changes)

            b.storage.commit = counted  # type: ignore[method-assign]  # counts what it passes on
            b.worker = Worker(b.storage, b.settings)
            b.worker.max_events = 100
            await b.worker.open()
            b.worker.serve()
            run_id = await b.start(slog_wide)
            assert await b.result(run_id) == sum(range(30))
            assert max(sizes) <= 100

    asyncio.run(main())
