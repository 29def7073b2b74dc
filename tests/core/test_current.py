"""``current()`` and ``step_context()``: where the running code is, asked from anywhere."""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import hashlib
import logging
import pickle
import re
import threading
from typing import Any

import pytest

from pyworkflow import (
    Current,
    StepContext,
    WorkflowContextError,
    current,
    step,
    step_context,
    workflow,
)
from pyworkflow import logger as workflow_logger
from tests.core._driving import bench


def _in_a_thread(call: Any) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]


def test_n08_current_is_none_outside_of_runs() -> None:
    async def main() -> Current | None:
        return current()

    assert current() is None
    assert asyncio.run(main()) is None
    assert _in_a_thread(current) is None


def test_n08_current_names_run_workflow_step_and_attempt() -> None:
    seen: dict[str, list[Any]] = {}

    def look(place: str) -> None:
        seen.setdefault(place, []).append(current())

    @step(name="n08.async", retry_delay=0)
    async def in_async() -> None:
        look("async")
        await asyncio.create_task(_look_later())
        await asyncio.to_thread(look, "to_thread")
        seen.setdefault("thread", []).append(_in_a_thread(current))
        copied = contextvars.copy_context()
        seen.setdefault("copied", []).append(_in_a_thread(lambda: copied.run(current)))
        if step_context().attempt == 1:
            raise ConnectionError("once more")

    async def _look_later() -> None:
        await asyncio.sleep(0)
        look("task")

    @step(name="n08.sync")
    def in_sync() -> None:
        look("sync")
        asyncio.run(_look_in_own_loop())

    async def _look_in_own_loop() -> None:
        look("own loop")

    async def branch() -> None:
        look("branch")

    @workflow(name="n08")
    async def n08_places() -> None:
        look("workflow")
        await asyncio.create_task(branch())
        await in_async()
        look("workflow")
        await in_sync()

    async def main() -> str:
        async with bench() as b:
            run_id = await b.start(n08_places)
            await b.result(run_id)
            assert current() is None
            return run_id

    run_id = asyncio.run(main())
    run = Current(run_id=run_id, workflow="n08")
    first, second = (
        dataclasses.replace(run, step="n08.async", step_id="1#0:step", attempt=n) for n in (1, 2)
    )
    first = dataclasses.replace(first, step_id=seen["async"][0].step_id)
    second = dataclasses.replace(second, step_id=first.step_id)
    for place in ("async", "task", "to_thread", "copied"):
        assert seen[place] == [first, second], place
    assert seen["thread"] == [None, None]
    sync = dataclasses.replace(run, step="n08.sync", step_id=seen["sync"][0].step_id, attempt=1)
    assert seen["sync"] == seen["own loop"] == [sync]
    assert seen["workflow"][0] == run
    assert set(seen["branch"]) <= {run, dataclasses.replace(run, is_replaying=True)}


def test_n08_current_says_that_replay_repeats() -> None:
    seen: list[Current | None] = []

    @step
    async def n08_one() -> None: ...

    @workflow
    async def n08_replayed() -> None:
        seen.append(current())
        await asyncio.sleep(60)
        seen.append(current())
        await n08_one()

    async def main() -> None:
        async with bench() as b:
            run_id = await b.start(n08_replayed)
            await b.until(run_id, "suspended")
            await b.restart()
            await b.pass_time("61s")
            await b.result(run_id)

    asyncio.run(main())
    assert [one is not None and one.is_replaying for one in seen] == [False, True, False]


def test_n08_current_is_a_frozen_value() -> None:
    value = Current(run_id="r", workflow="w", step="s", step_id="1#0:step", attempt=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        value.run_id = "other"  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(value)) == value
    assert hash(value) == hash(dataclasses.replace(value))


def test_n08_log_processors_that_ask_have_no_effect_on_the_run() -> None:
    """A filter that asks in all ways, with a logger of workflow code, of steps, and outside."""
    asked: list[Any] = []

    class Processor(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            asked.append((record.getMessage(), current()))
            try:
                step_context()
            except WorkflowContextError:
                pass
            return True

    log = logging.getLogger("n08.shop")
    handler = logging.StreamHandler()
    handler.addFilter(Processor())

    @step
    def n08_work() -> None:
        log.warning("in the step")

    async def _flow() -> str:
        log.warning("plain")
        workflow_logger.warning("durable")
        await n08_work()
        log.warning("after")
        return "done"

    quiet = workflow(name="n08.quiet")(_flow)

    async def main() -> tuple[str, list[str]]:
        async with bench() as b:
            run_id = await b.start(quiet)
            assert await b.result(run_id) == "done"
            # A step that takes a while is recorded when it is scheduled too, a quick one is not.
            types = [e.type for e in await b.events(run_id)]
            return run_id, [each for each in types if each != "step.scheduled"]

    _, without = asyncio.run(main())
    for name in ("n08.shop", "pyworkflow.workflow"):
        logging.getLogger(name).addHandler(handler)
    try:
        run_id, types = asyncio.run(main())
        log.warning("outside")
    finally:
        for name in ("n08.shop", "pyworkflow.workflow"):
            logging.getLogger(name).removeHandler(handler)
    assert types == without
    found = dict(asked)
    run = Current(run_id=run_id, workflow="n08.quiet")
    assert found["plain"] == found["durable"] == found["after"] == run
    assert (found["in the step"].step, found["in the step"].attempt) == ("n08_work", 1)
    assert found["outside"] is None


def test_n08_step_context_that_workflow_code_catches_stalls_nothing() -> None:
    @step
    async def n08_fine() -> str:
        return step_context().step_name

    @workflow
    async def n08_catches() -> list[str]:
        said = []
        for _ in range(2):
            try:
                step_context()
            except WorkflowContextError as error:
                said.append(str(error))
            said.append(await n08_fine())
        return said

    async def main() -> list[str]:
        async with bench() as b:
            run_id = await b.start(n08_catches)
            found: list[str] = await b.result(run_id)
            assert not await b.events(run_id, "workflow.stalled")
            return found

    said = asyncio.run(main())
    assert said[1::2] == ["n08_fine", "n08_fine"]
    assert all("current()" in one for one in said[::2])


def test_n08_the_engine_names_no_step_once_it_has_ended(caplog: pytest.LogCaptureFixture) -> None:
    """A turn that a step's end began is not that step, and neither is what it logs."""
    ended: list[Any] = []

    class Ask(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            if record.getMessage().startswith("run "):
                ended.append(current())
            return True

    @step
    async def n08_long() -> None:
        await asyncio.sleep(0.3)  # long enough to be handed off: its end brings the next turn

    @workflow
    async def n08_handed_off() -> None:
        await n08_long()

    log = logging.getLogger("pyworkflow.engine")
    ask = Ask()
    log.addFilter(ask)
    try:
        with caplog.at_level(logging.INFO, logger="pyworkflow.engine"):

            async def main() -> None:
                async with bench() as b:
                    await b.result(await b.start(n08_handed_off))

            asyncio.run(main())
    finally:
        log.removeFilter(ask)
    assert ended == [None]


# --- keys -----------------------------------------------------------------------------------------


def _context(run_id: str, op: str = "1.3#2:step", attempt: int = 1) -> StepContext:
    return StepContext(run_id=run_id, step_id=op, step_name="s", workflow_name="w", attempt=attempt)


@pytest.mark.parametrize("run_id", ["run_0123456789abcdef01234567", "Ä order: 5/7\r\n", "x" * 1024])
def test_n33_the_header_key_is_32_hex_digits_of_the_idempotency_key(run_id: str) -> None:
    context = _context(run_id)
    assert re.fullmatch(r"[0-9a-f]{32}", context.header_key)
    key = f"{run_id}/1.3#2:step"
    assert context.idempotency_key == key
    assert context.header_key == hashlib.sha256(key.encode()).hexdigest()[:32]
    assert _context(run_id, attempt=2).header_key == context.header_key
    assert _context(run_id, "1.3#3:step").header_key != context.header_key


def test_n33_the_idempotency_key_of_a_generated_run_id_has_the_documented_alphabet() -> None:
    keys: list[str] = []

    @step(retry_delay=0)
    async def n33_charge() -> None:
        keys.append(step_context().idempotency_key)
        if step_context().attempt == 1:
            raise ConnectionError("once more")

    async def nested(depth: int) -> None:
        if depth:
            async with asyncio.TaskGroup() as group:
                group.create_task(nested(depth - 1))
        await n33_charge()

    @workflow
    async def n33_keys() -> None:
        await nested(5)

    async def main() -> None:
        async with bench() as b:
            await b.result(await b.start(n33_keys))

    asyncio.run(main())
    assert len(keys) == 12
    assert len(set(keys)) == 6
    for key in keys:
        assert re.fullmatch(r"run_[0-9a-f]{24}/[0-9a-z.#:]{8,40}", key), key
