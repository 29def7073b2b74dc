"""The edges of what users may write: far instants, odd keys, stored names, calls in workflow code."""

from __future__ import annotations

import asyncio
import json
import math
import sys
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from pyworkflow import (
    ArgumentError,
    Client,
    DefinitionError,
    IdempotencyConflict,
    RunCancelled,
    RunIdConflict,
    SerializationError,
    StorageError,
    WorkflowContextError,
    WorkflowTimeout,
    _operations,
    _results,
    cancel,
    get_run,
    list_runs,
    now,
    result,
    run,
    sleep,
    start,
    step,
    workflow,
)
from pyworkflow import _portable as portable
from pyworkflow._operations import Operations
from pyworkflow._portable import register_portable, resolve_type
from pyworkflow._serialization import decode
from pyworkflow._tagged import MARK
from pyworkflow.spi import RunQuery
from pyworkflow.storage.memory import MemoryStorageBackend
from tests.core._driving import Bench, bench, eventually

# --- far instants ---------------------------------------------------------------------------------


async def _waits_for_ever(b: Bench, run_id: str, *, year: int = 9999) -> None:
    """The run sleeps until the last of all days, over a restart, and can be cancelled."""
    await b.asleep(run_id)
    due = [i.due_at for i in (await b.items(run_id)).values()]
    assert [at.year for at in due if at is not None] == [year]
    await b.restart()
    await b.ops.cancel(run_id, "enough")
    with pytest.raises(RunCancelled):
        await b.result(run_id)


@pytest.mark.parametrize("seconds", [1e12, math.inf, sys.maxsize, 1e300])
def test_asyncio_sleep_for_ever_waits_for_ever(seconds: float) -> None:
    calls: list[int] = []

    @step
    async def rd_before() -> None:
        calls.append(1)

    @workflow
    async def rd_sleeps() -> None:
        await rd_before()
        await asyncio.sleep(seconds)

    async def main() -> None:
        async with bench() as b:
            await _waits_for_ever(b, await b.start(rd_sleeps))
        assert calls == [1]

    asyncio.run(main())


@pytest.mark.parametrize("seconds", [1e12, math.inf])
def test_timeouts_and_timers_far_ahead_do_not_matter_to_what_they_bound(seconds: float) -> None:
    @step(dispatch="queue")
    async def rd_step() -> str:
        return "in time"

    @workflow
    async def rd_bounded() -> list[Any]:
        found: list[Any] = []
        async with asyncio.timeout(seconds):
            found.append(await rd_step())
        found.append(await asyncio.wait_for(rd_step(), seconds))
        done, left = await asyncio.wait(
            [asyncio.create_task(rd_step()), asyncio.create_task(asyncio.sleep(seconds))],
            return_when=asyncio.FIRST_COMPLETED,
        )
        found.append([task.result() for task in done])
        for task in left:
            task.cancel()
        handle = asyncio.get_running_loop().call_later(seconds, print)
        await asyncio.sleep(0.01)
        handle.cancel()
        return found

    async def main() -> None:
        for sessions in (0, 100):
            async with bench(sessions=sessions) as b:
                assert await b.run(rd_bounded) == ["in time", "in time", ["in time"]]

    asyncio.run(main())


@pytest.mark.parametrize("delay", [timedelta.max, "3000000d", 1e11])
def test_a_retry_delay_beyond_the_last_day_is_recorded_and_waits(delay: Any) -> None:
    calls: list[int] = []

    @step(retry_delay=delay, max_retries=2)
    def rd_fails() -> None:
        calls.append(1)
        raise ConnectionError

    @workflow
    async def rd_retries() -> None:
        await rd_fails()

    async def main() -> None:
        async with bench() as b:
            run_id = await b.start(rd_retries)
            await b.has(run_id, "step.retrying")
            await _waits_for_ever(b, run_id, year=9999 if delay != 1e11 else 5195)
        assert calls == [1]

    asyncio.run(main())


@pytest.mark.parametrize("far", [timedelta.max, "3000000d"])
def test_a_max_duration_beyond_the_last_day_is_as_good_as_none(far: Any) -> None:
    @workflow(max_duration=far)
    async def rd_by_definition() -> str:
        await sleep(0.01)
        return "ended"

    @workflow
    async def rd_by_option() -> str:
        await sleep(0.01)
        return "ended"

    async def main() -> None:
        async with bench() as b:
            assert await b.run(rd_by_definition) == "ended"
            assert await b.run(rd_by_option, max_duration=far) == "ended"
            run_id = await b.start(rd_by_definition)
            deadline = (await b.get(run_id)).deadline
            assert deadline is not None
            assert deadline.year == 9999
            assert await b.result(run_id) == "ended"

    asyncio.run(main())


def test_a_max_duration_of_zero_is_refused_and_the_shortest_is_not_taken_for_none() -> None:
    @workflow(max_duration="1h")
    async def rd_no_time() -> None:
        await sleep("10m")

    async def main() -> None:
        async with bench() as b:
            with pytest.raises(ArgumentError, match="max_duration=0 leaves no time at all"):
                await b.run(rd_no_time, max_duration=0)
            with pytest.raises(WorkflowTimeout):
                await b.run(rd_no_time, max_duration=timedelta(microseconds=1))

    asyncio.run(main())


def test_sleeping_until_the_first_and_the_last_instant_in_any_time_zone() -> None:
    hours = [timezone(timedelta(hours=h)) for h in (-12, -5, 0, 5, 14)]

    @workflow
    async def rd_past() -> bool:
        began = now()
        for zone in hours:
            await sleep(datetime.min.replace(tzinfo=zone))
        return now() == began

    @workflow
    async def rd_future(hour: int) -> None:
        await sleep(datetime.max.replace(tzinfo=hours[hour]))

    async def main() -> None:
        async with bench() as b:
            assert await b.run(rd_past) is True
            for n in range(len(hours)):
                await _waits_for_ever(b, await b.start(rd_future, n))

    asyncio.run(main())


# --- stored names ---------------------------------------------------------------------------------

_DO_SOMETHING = [
    "unittest.__main__", "venv.__main__", "ensurepip.__main__", "lib2to3.__main__", "antigravity",
    "this", "idlelib.idle", "test.support", "ctypes.test.__main__", "turtledemo.clock",
    "sqlite3.__main__", "re_not_a_module",
]  # fmt: skip


@pytest.mark.parametrize("module", _DO_SOMETHING)
@pytest.mark.parametrize("tag", ["dataclass", "enum", "model"])
def test_a_stored_name_imports_nothing_that_does_something_when_imported(
    module: str, tag: str, capfd: pytest.CaptureFixture[str]
) -> None:
    before = set(sys.modules)
    with pytest.raises(SerializationError, match=module.replace(".", r"\.")):
        resolve_type(f"{module}:X")
    with pytest.raises(SerializationError):
        decode(json.dumps({MARK: tag, "t": f"{module}:X", "v": {}}))
    assert module not in sys.modules
    assert not {name for name in set(sys.modules) - before if name.endswith("__main__")}
    assert capfd.readouterr() == ("", "")


def test_no_module_of_a_package_with_workflows_is_imported_by_a_stored_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "rd_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    for name in ("__main__", "exits", "good"):
        (package / f"{name}.py").write_text("raise RuntimeError('it was run')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(portable, "_registered", set(portable._registered))
    register_portable("rd_package.flows")
    for name in ("good:Good", "exits:X", "__main__:X"):
        with pytest.raises(SerializationError, match=rf"not imported here.*rd_package\.{name}"):
            resolve_type(f"rd_package.{name}")
    assert not [name for name in sys.modules if name.partition(".")[0] == "rd_package"]


# --- what a caller may pass -----------------------------------------------------------------------


@pytest.mark.parametrize("key", [5, 0, b"key", "", ["a"], object(), True, "k" * 256])
def test_an_idempotency_key_that_is_no_text_or_empty_is_refused(key: Any) -> None:
    @workflow
    async def rd_keyed() -> None:
        return None

    async def main() -> None:
        async with bench() as b:
            for _ in range(2):
                with pytest.raises(ArgumentError, match="idempotency_key"):
                    await b.start(rd_keyed, key=key)
            async with Client(storage=b.storage) as client:
                with pytest.raises(ArgumentError, match="idempotency_key"):
                    await client.start(rd_keyed, idempotency_key=key)
            assert (await b.ops.list_runs(None, None, 10, None)).items == []
            assert await b.run(rd_keyed, key="k" * 255) is None
            assert await b.run(rd_keyed, key=" ") is None

    asyncio.run(main())


def test_the_same_start_with_a_run_id_and_a_key_again_gives_the_same_run() -> None:
    @workflow
    async def rd_both(n: int) -> int:
        return n

    async def main() -> None:
        async with bench() as b:
            for _ in range(2):
                assert await b.start(rd_both, 1, key="k", run_id="rd-one") == "rd-one"
            with pytest.raises(IdempotencyConflict, match="rd-one"):
                await b.start(rd_both, 2, key="k", run_id="rd-one")
            with pytest.raises(RunIdConflict, match="idempotency_key"):
                await b.start(rd_both, 1, key="other", run_id="rd-one")
            assert await b.start(rd_both, 1, run_id="rd-one") == "rd-one"

    asyncio.run(main())


@pytest.mark.parametrize("version", [2, 1.0, None, b"1", True])
def test_a_version_that_is_no_text_is_refused_when_decorated(version: Any) -> None:
    with pytest.raises(DefinitionError, match="version="):

        @workflow(version=version)
        async def rd_version() -> None:
            return None


@pytest.mark.parametrize("name", ["", 7, b"name", False])
@pytest.mark.parametrize("decorator", [workflow, step])
def test_a_name_that_is_no_text_or_empty_is_refused_when_decorated(
    decorator: Any, name: Any
) -> None:
    async def rd_name() -> None:
        return None

    with pytest.raises(DefinitionError, match="name="):
        decorator(name=name)(rd_name)


# --- calls in workflow code -----------------------------------------------------------------------


@workflow
async def rd_child() -> str:
    """Started, or wrongly called, by others."""
    return "child"


@workflow
async def rd_waits() -> None:
    await sleep("1d")


@pytest.mark.parametrize("storage", ["memory", "file", "its own"])
def test_who_waits_for_a_result_learns_at_once_that_the_client_was_closed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, storage: str
) -> None:
    monkeypatch.setattr(_operations, "POLL", timedelta(days=1))
    monkeypatch.setattr(_results, "POLL", timedelta(days=1))

    async def main() -> None:
        stores = {
            "memory": "memory:",
            "file": f"file:{tmp_path}",
            "its own": MemoryStorageBackend(),
        }
        async with Client(storage=stores[storage]) as own:
            waiter = asyncio.create_task(own.result(await own.start(rd_waits)))
            await eventually(lambda: own._own is not None and own._own._watches)
        with pytest.raises(StorageError, match="closed"):
            await waiter

    asyncio.run(main())


async def _client() -> object:
    return await Client(storage=MemoryStorageBackend()).list_runs()


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: start(rd_child), "start()"),
        (lambda: rd_child.start(), "start()"),
        (lambda: rd_child.options(queue="q").start(), "start()"),
        (lambda: rd_child.start_async(), "start_async()"),
        (lambda: run(rd_child), "run()"),
        (lambda: rd_child.options(queue="q").run(), "run()"),
        (lambda: result("run_x"), "result()"),
        (lambda: get_run("run_x"), "get_run()"),
        (lambda: list_runs(), "list_runs()"),
        (lambda: cancel("run_x"), "cancel()"),
        (lambda: _client(), "Client"),
        (lambda: rd_child(), "called inside a workflow"),
    ],
    ids=[
        "start", "method", "bound", "async", "run", "bound-run", "result", "get_run", "list_runs",
        "cancel", "client", "call",
    ],
)  # fmt: skip
@pytest.mark.parametrize("swallows", [False, True])
def test_calls_that_belong_outside_of_workflow_code_stall_the_run_and_heal(
    call: Callable[[], Any], told: str, swallows: bool
) -> None:
    def make(wrong: bool) -> Any:
        @workflow
        async def rd_calls() -> str:
            if wrong:
                try:
                    found = call()
                    if asyncio.iscoroutine(found):
                        await found
                except Exception:
                    if not swallows:
                        raise
            return "healed"

        return rd_calls

    async def main() -> None:
        async with bench() as b:
            wrong = make(wrong=True)
            run_id = await b.start(wrong)
            stalled = await b.until(run_id, "stalled")
            assert told in str(stalled.stalled)
            del wrong
            right = make(wrong=False)
            await b.pass_time("30s")
            assert await b.result(run_id) == "healed"
            del right

    asyncio.run(main())


def test_waiting_for_a_stalled_run_names_the_reason_when_time_is_up(tmp_path: Path) -> None:
    @workflow
    async def rd_stalls() -> None:
        (tmp_path / "x").touch()

    @workflow
    async def rd_sleeps_on() -> None:
        await sleep("1h")

    async def main() -> None:
        async with bench() as b:
            run_id = await b.start(rd_stalls)
            await b.until(run_id, "stalled")
            with pytest.raises(TimeoutError) as caught:
                await b.result(run_id, 0.01)
            message = str(caught.value)
            assert "stalled" in message
            assert "opening a file" in message
            assert f"pyworkflow runs show {run_id}" in message
            assert "ask again later" not in message
            other = await b.start(rd_sleeps_on)
            with pytest.raises(TimeoutError, match="ask again later"):
                await b.result(other, 0.01)

    asyncio.run(main())


def test_a_definition_that_is_called_outside_of_workflows_names_the_remedy() -> None:
    with pytest.raises(WorkflowContextError, match=r"start\(rd_child"):
        rd_child()


@pytest.mark.parametrize("run_id", [5, "", b"run", "x" * 1025])
def test_a_run_id_is_text_and_not_empty(run_id: Any) -> None:
    @workflow
    async def re_with_an_id() -> None: ...

    async def main() -> None:
        storage = MemoryStorageBackend()
        operations = Operations(storage, None, None)
        with pytest.raises(ArgumentError, match="run_id="):
            await operations.start(
                re_with_an_id, (), {}, re_with_an_id.options(run_id=run_id).options
            )
        assert (await storage.list_runs(RunQuery())).items == []

    asyncio.run(main())
