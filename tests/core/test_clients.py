"""Starting runs and asking about them: workflows with options, run ids, stalled runs, event loops."""

from __future__ import annotations

import asyncio
import pickle
import threading
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

import pyworkflow
from pyworkflow import (
    ArgumentError,
    Client,
    IdempotencyConflict,
    RunIdConflict,
    RunStalled,
    WorkflowError,
    _config,
    configure,
    declare_workflow,
    patched,
    sleep,
    step,
    workflow,
)
from pyworkflow._local import reset_host
from pyworkflow.storage.memory import MemoryStorageBackend
from pyworkflow.testing import TestEnvironment, start_local
from tests.core._driving import bench, eventually


@pytest.fixture
def configured(tmp_path: Path) -> Iterator[None]:
    """A process with a store of its own, and nothing in use yet."""
    _config._reset_for_tests()
    reset_host()
    configure(storage=f"file://{tmp_path}/runs")
    yield
    reset_host()
    _config._reset_for_tests()


@workflow
async def cl_add(a: int, b: int = 1) -> int:
    return a + b


@workflow(queue="elsewhere", tags=("t",))
async def cl_settings(n: int) -> int:
    return n


# --- N10: workflows with options ------------------------------------------------------------------


def test_n10_a_client_starts_a_workflow_with_options() -> None:
    async def main() -> None:
        async with Client(storage=MemoryStorageBackend()) as client:
            bound = cl_add.options(
                run_id="order-1",
                idempotency_key="k-1",
                tags=["x"],
                attributes={"order": 7},
                queue="q",
                priority=3,
                max_duration="1h",
            )
            assert await client.start(bound, 1, b=2) == "order-1"
            run = await client.get_run("order-1")
            assert (run.idempotency_key, run.tags, run.attributes) == ("k-1", ("x",), {"order": 7})
            assert (run.queue, run.priority) == ("q", 3)
            assert run.deadline is not None
            assert abs(run.deadline - run.created_at - timedelta(hours=1)) < timedelta(minutes=5)
            assert await client.result("order-1") == 3
            assert await client.run(cl_add.options(run_id="order-2"), 5) == 6
            assert (await client.get_run("order-2")).status == "completed"

    asyncio.run(main())


def test_n10_a_key_beside_options_is_the_runs_key() -> None:
    async def main() -> None:
        async with Client(storage=MemoryStorageBackend()) as client:
            bound = cl_add.options(run_id="order-3", tags=["x"])
            run_id = await client.start(bound, 1, idempotency_key="k")
            run = await client.get_run(run_id)
            assert (run_id, run.idempotency_key, run.tags) == ("order-3", "k", ("x",))
            with pytest.raises(ArgumentError, match="two idempotency keys"):
                await client.start(cl_add.options(idempotency_key="a"), 1, idempotency_key="b")

    asyncio.run(main())


@pytest.mark.usefixtures("configured")
def test_n10_the_functions_take_a_workflow_with_options() -> None:
    assert pyworkflow.start(cl_add.options(run_id="f-1"), 1) == "f-1"
    assert pyworkflow.result("f-1", timeout=60) == 2
    assert pyworkflow.run(cl_add.options(run_id="f-2"), 2, timeout=60) == 3
    assert cl_add.options(run_id="f-3").start(3) == "f-3"
    assert cl_add.options(run_id="f-4").run(4) == 5
    assert cl_add.run(5) == 6

    async def main() -> None:
        assert await pyworkflow.start_async(cl_add.options(run_id="f-5"), 1) == "f-5"
        assert await pyworkflow.run_async(cl_add.options(run_id="f-6"), 1, timeout=60) == 2
        assert await cl_add.options(run_id="f-7").start_async(1) == "f-7"
        assert await cl_add.options(run_id="f-8").run_async(1) == 2
        assert await cl_add.run_async(8) == 9

    asyncio.run(main())


def test_n10_the_test_kit_takes_a_workflow_with_options() -> None:
    async def main() -> None:
        async with TestEnvironment() as env:
            assert await env.start(cl_add.options(run_id="e-1"), 1) == "e-1"
            assert await env.run(cl_add.options(run_id="e-2", tags=["x"]), 1) == 2
            run = await env.storage.get_run("e-2")
            assert run is not None
            assert run.tags == ("x",)
        storage = MemoryStorageBackend()
        assert await start_local(cl_add.options(run_id="l-1"), 1, storage=storage) == "l-1"

    asyncio.run(main())


@pytest.mark.parametrize("given", [5, None, len, "cl_add"])
def test_n10_what_is_no_workflow_is_refused_by_its_right_remedy(given: Any) -> None:
    async def main() -> None:
        async with TestEnvironment() as env:
            for start in (Client().start, env.start, pyworkflow.start_async):
                with pytest.raises(
                    ArgumentError, match=r"workflow\.options\(\.\.\.\), not .*@workflow"
                ):
                    await start(given)

    asyncio.run(main())


# --- N17: the same run id twice -------------------------------------------------------------------


@workflow
async def cl_other(a: int, b: int = 1) -> int:
    return a * b


def test_n17_the_same_run_id_with_equal_arguments_attaches() -> None:
    async def main() -> None:
        async with Client(storage=MemoryStorageBackend()) as client:
            bound = cl_add.options(run_id="same")
            assert await client.start(bound, 1) == "same"
            assert await client.start(bound, 1) == "same"
            assert await client.start(bound, a=1) == "same"
            assert await client.run(bound, 1) == 2  # of an ended run, too
            assert await client.start(bound, 1) == "same"
            assert len((await client.list_runs()).items) == 1

    asyncio.run(main())


def test_n17_the_same_run_id_with_other_arguments_conflicts() -> None:
    async def main() -> None:
        async with Client(storage=MemoryStorageBackend()) as client:
            await client.start(cl_add.options(run_id="same"), 1)
            with pytest.raises(RunIdConflict, match="a: existing 1, asked for 2") as caught:
                await client.start(cl_add.options(run_id="same"), 2)
            assert caught.value.run_id == "same"
            assert caught.value.differences == {"a": ("1", "2")}
            copy = pickle.loads(pickle.dumps(caught.value))
            assert (copy.run_id, copy.differences, str(copy)) == (
                *("same", caught.value.differences, str(caught.value)),
            )
            with pytest.raises(
                RunIdConflict, match="workflow: existing cl_add, asked for cl_other"
            ):
                await client.start(cl_other.options(run_id="same"), 1)
            assert isinstance(caught.value, WorkflowError)

    asyncio.run(main())


def test_n17_a_run_id_and_a_key_that_disagree_conflict_and_a_key_alone_decides() -> None:
    async def main() -> None:
        async with Client(storage=MemoryStorageBackend()) as client:
            await client.start(cl_add.options(run_id="one", idempotency_key="k"), 1)
            # The id is there, with another key or with none.
            with pytest.raises(RunIdConflict) as caught:
                await client.start(cl_add.options(run_id="one", idempotency_key="other"), 1)
            assert caught.value.differences == {"idempotency_key": ("'k'", "'other'")}
            assert await client.start(cl_add.options(run_id="one"), 1) == "one"
            await client.start(cl_add.options(run_id="two"), 1)
            with pytest.raises(RunIdConflict) as caught:
                await client.start(cl_add.options(run_id="two", idempotency_key="new"), 1)
            assert caught.value.differences == {"idempotency_key": ("None", "'new'")}
            # The id is new, the key is not: the key names its run.
            assert await client.start(cl_add.options(run_id="3", idempotency_key="k"), 1) == "one"
            with pytest.raises(IdempotencyConflict) as conflict:
                await client.start(cl_add.options(run_id="3", idempotency_key="k"), 2)
            assert conflict.value.run_id == "one"
            # Both are there and belong together: the arguments decide.
            both = cl_add.options(run_id="one", idempotency_key="k")
            assert await client.start(both, 1) == "one"
            with pytest.raises(IdempotencyConflict):
                await client.start(both, 2)

    asyncio.run(main())


def test_n17_of_many_starts_at_once_one_begins_the_run_and_all_get_its_id(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/runs"
    found: list[str] = []
    refused: list[RunIdConflict] = []

    def body(n: int) -> None:
        async def main() -> None:
            async with Client(storage=url) as client:
                bound = cl_add.options(run_id="raced")
                starts = [client.start(bound, 1 if i % 2 else n) for i in range(6)]
                for each in await asyncio.gather(*starts, return_exceptions=True):
                    if isinstance(each, RunIdConflict):
                        refused.append(each)
                    else:
                        assert isinstance(each, str), each
                        found.append(each)

        asyncio.run(main())

    threads = [threading.Thread(target=body, args=(1 + i % 2,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) + len(refused) == 24
    assert set(found) == {"raced"}
    assert {e.run_id for e in refused} <= {"raced"}


# --- R6: stalled runs -------------------------------------------------------------------------------


_code = {"patched": True}


@workflow
async def cl_stalls(n: int) -> int:
    if _code["patched"]:
        patched("cl-new")
    for _ in range(3):
        await sleep("1m")
    return n


@pytest.fixture
def stalling() -> Iterator[None]:
    _code["patched"] = True
    yield
    _code["patched"] = True


@pytest.mark.usefixtures("stalling")
def test_r06_result_raises_once_the_run_has_been_stalled_for_ten_seconds() -> None:
    async def main() -> None:
        async with bench() as b:
            run_id = await b.start(cl_stalls, 1)
            await b.asleep(run_id)
            await b.rest()
            _code["patched"] = False
            await b.work()
            await b.pass_time(60)
            await b.until(run_id, "stalled")
            waiting = asyncio.ensure_future(b.ops.result(run_id, None))
            await asyncio.sleep(0.05)
            assert not waiting.done()  # for ten seconds it may be a deploy
            await b.pass_time(9.9)
            with pytest.raises(RunStalled) as caught:
                await waiting
            assert caught.value.run_id == run_id
            assert "NonDeterminism" in caught.value.cause
            assert 'if_stalled="wait"' in str(caught.value)
            assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
            # From now on at once; a timeout that is shorter is one.
            with pytest.raises(RunStalled):
                await b.ops.result(run_id, 60)
            with pytest.raises(TimeoutError, match="stalled"):
                await b.ops.result(run_id, 0)
            # Waiting on sees the run through.
            waiting = asyncio.ensure_future(b.ops.result(run_id, 60, "wait"))
            await b.rest()
            _code["patched"] = True
            await b.work()
            await b.pass_time(10)
            for _ in range(2):
                await b.asleep(run_id)
                await b.pass_time(70)
            assert await waiting == 1

    asyncio.run(main())


@pytest.mark.usefixtures("stalling")
def test_r06_a_run_that_resumed_meanwhile_begins_its_ten_seconds_again() -> None:
    async def main() -> None:
        async with bench() as b:
            run_id = await b.start(cl_stalls, 1)
            for times in (1, 2):  # stalled for 8 s, healed, stalled again for 8 s
                await b.asleep(run_id)
                await b.rest()
                _code["patched"] = False
                await b.work()
                await b.pass_time(60)
                await b.until(run_id, "stalled")
                waiting = asyncio.ensure_future(b.ops.result(run_id, 0.3))
                await b.pass_time(8)
                with pytest.raises(TimeoutError, match="stalled"):
                    await waiting
                await b.rest()
                _code["patched"] = True
                await b.work()
                await b.pass_time(10)
                await b.has(run_id, "workflow.unstalled", times)
            assert len(await b.events(run_id, "workflow.stalled")) == 2

    asyncio.run(main())


@pytest.mark.usefixtures("stalling")
def test_r06_the_time_is_a_setting_and_the_client_has_it_too() -> None:
    async def main() -> None:
        async with bench(stalled_after=timedelta(hours=1)) as b:
            run_id = await b.start(cl_stalls, 1)
            await b.asleep(run_id)
            await b.rest()
            _code["patched"] = False
            await b.work()
            await b.pass_time(60)
            await b.until(run_id, "stalled")
            await b.pass_time(3000)
            with pytest.raises(TimeoutError):
                await b.ops.result(run_id, 0.1)
            async with Client(storage=b.storage) as client:  # ten seconds there
                with pytest.raises(RunStalled):
                    await client.result(run_id, timeout=60)
                with pytest.raises(TimeoutError):
                    await client.result(run_id, timeout=0.1, if_stalled="wait")
                with pytest.raises(ArgumentError, match="if_stalled='no'"):
                    await client.result(run_id, if_stalled="no")  # type: ignore[arg-type]  # wrong

    asyncio.run(main())


class Watched(MemoryStorageBackend):
    """Notes how long each watch may take."""

    def __init__(self) -> None:
        super().__init__()
        self.timeouts: list[timedelta] = []

    async def watch(self, run_id: str, *, after: int, timeout: timedelta) -> bool:
        self.timeouts.append(timeout)
        return await super().watch(run_id, after=after, timeout=timeout)


@pytest.mark.usefixtures("stalling")
def test_a_run_that_may_stall_is_looked_at_within_stalled_after() -> None:
    async def main() -> None:
        storage = Watched()
        async with bench(storage, stalled_after=timedelta(seconds=0.5)) as b:
            run_id = await b.start(cl_stalls, 1)
            await b.asleep(run_id)
            await b.rest()
            for if_stalled, expected in ((None, 0.5), ("raise", 0.5), ("wait", 5)):
                storage.timeouts.clear()
                waiting = asyncio.ensure_future(b.ops.result(run_id, None, if_stalled))
                await eventually(lambda: bool(storage.timeouts))
                waiting.cancel()
                assert storage.timeouts == [timedelta(seconds=expected)]

    asyncio.run(main())


def test_a_wait_for_a_run_that_no_worker_here_can_run_warns_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    typo = declare_workflow("cl_typo")

    async def main() -> None:
        storage = Watched()
        async with bench(storage, stalled_after=timedelta(seconds=0.05)) as b:
            run_id = await b.start(typo)
            waiting = asyncio.ensure_future(b.ops.result(run_id, None))
            await eventually(lambda: "no worker has taken" in caplog.text)
            looks = len(storage.timeouts)
            await eventually(lambda: len(storage.timeouts) >= looks + 3)
            waiting.cancel()
            await b.ops.cancel(run_id, "")

    asyncio.run(main())
    (line,) = [m for m in caplog.messages if "no worker has taken" in m]
    assert "workflow=cl_typo queue=default; this process only declares that workflow" in line
    assert "set worker=False" in line


# --- what a question cannot mean ---------------------------------------------------------------------


def test_runs_are_listed_by_a_workflow_or_its_name() -> None:
    async def main() -> None:
        async with bench(work=False) as b:
            run_id = await b.start(cl_stalls, 1)
            await b.start(cl_add, 1)
            for wanted in (cl_stalls, cl_stalls.options(priority=3), "cl_stalls"):
                page = await b.ops.list_runs(None, wanted, 100, None)
                assert [found.run_id for found in page.items] == [run_id]
            with pytest.raises(ArgumentError, match="workflow=5 is neither a workflow nor"):
                await b.ops.list_runs(None, 5, 100, None)  # type: ignore[arg-type]  # wrong

    asyncio.run(main())


@pytest.mark.parametrize(
    "wrong",
    [{"limit": 0}, {"limit": True}, {"limit": "5"}, {"cursor": "x"}, {"cursor": 5}],
    ids=str,
)
def test_a_page_that_cannot_be_asked_for_is_refused(wrong: Any) -> None:
    (name,) = wrong

    async def main() -> None:
        async with Client(storage=MemoryStorageBackend()) as client:
            with pytest.raises(ArgumentError, match=f"{name}="):
                await client.list_runs(**wrong)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("name", "ask"),
    [
        ("run_id", lambda client: client.get_run(None)),
        ("run_id", lambda client: client.get_run(cl_add)),
        ("run_id", lambda client: client.result(5)),
        ("run_id", lambda client: client.cancel(cl_add)),
        ("run_id", lambda client: client.get_events(None)),
        ("after", lambda client: client.get_events("r", after=-1)),
        ("after", lambda client: client.get_events("r", after="1")),
        ("limit", lambda client: client.get_events("r", limit=-1)),
        ("limit", lambda client: client.get_events("r", limit=1.5)),
        ("reason", lambda client: client.cancel("r", reason=5)),
        ("status", lambda client: client.list_runs(status=5)),
    ],
)
def test_a_question_about_what_is_no_run_is_refused(name: str, ask: Any) -> None:
    async def main() -> None:
        async with Client(storage=MemoryStorageBackend()) as client:
            with pytest.raises(ArgumentError, match=f"{name}="):
                await ask(client)

    asyncio.run(main())


@pytest.mark.parametrize("timeout", [-1, "soon", float("nan"), []], ids=str)
def test_a_timeout_that_is_no_duration_is_refused_and_starts_nothing(timeout: Any) -> None:
    async def main() -> None:
        async with Client(storage=MemoryStorageBackend()) as client:
            with pytest.raises(ArgumentError, match="timeout="):
                await client.result("run_none", timeout=timeout)
            with pytest.raises(ArgumentError, match="timeout="):
                await client.run(cl_add, 1, timeout=timeout)
            assert not (await client.list_runs()).items

    asyncio.run(main())


# --- N15: sync functions where an event loop runs -----------------------------------------------------


@pytest.mark.usefixtures("configured")
def test_n15_a_sync_function_warns_once_per_line_where_a_loop_runs() -> None:
    async def main() -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for n in range(3):
                run_id = pyworkflow.start(cl_add, n)
            assert pyworkflow.result(run_id, timeout=60) == 3
            assert pyworkflow.run(cl_add, 5, timeout=60) == 6
            assert cl_add.start(1)
            assert cl_add.options(tags=["x"]).run(1) == 2
            pyworkflow.get_run(run_id)
            pyworkflow.list_runs()
            pyworkflow.get_events(run_id)
            with pytest.raises(pyworkflow.RunClosed):
                pyworkflow.cancel(run_id)
        assert {w.category for w in caught} == {RuntimeWarning}
        assert {w.filename for w in caught} == {__file__}
        return [str(w.message) for w in caught]

    said = asyncio.run(main())
    forms = ["start", "result", "run", "start", "run", "get_run", "list_runs", "get_events"]
    assert [m.partition("()")[0] for m in said] == [*forms, "cancel"]
    for message in said:
        name = message.partition("()")[0]
        assert f"await {name}_async(...)" in message


@pytest.mark.usefixtures("configured")
def test_n15_a_sync_function_does_not_warn_without_a_loop_or_in_a_thread() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_id = pyworkflow.start(cl_add, 1)

        async def main() -> None:
            assert await asyncio.to_thread(pyworkflow.result, run_id, timeout=60) == 2

        asyncio.run(main())


@pytest.mark.usefixtures("configured")
def test_n15_each_sync_function_has_its_async_form() -> None:
    async def main() -> None:
        run_id = await pyworkflow.start_async(cl_add, 1, b=4)
        assert await pyworkflow.result_async(run_id, timeout=60, if_stalled="wait") == 5
        assert await pyworkflow.run_async(cl_add, 2, timeout=60) == 3
        assert (await pyworkflow.get_run_async(run_id)).status == "completed"
        page = await pyworkflow.list_runs_async(status="completed", workflow="cl_add", limit=1)
        assert len(page.items) == 1
        events = await pyworkflow.get_events_async(run_id, after=1)
        assert events[0].seq == 2
        with pytest.raises(pyworkflow.RunClosed):
            await pyworkflow.cancel_async(run_id, reason="late")

    asyncio.run(main())


def test_n15_async_forms_are_refused_in_workflow_code_too() -> None:
    @workflow
    async def cl_inside() -> None:
        await pyworkflow.result_async("x")

    async def main() -> None:
        async with TestEnvironment() as env:
            with pytest.raises(pyworkflow.WorkflowContextError, match=r"result_async\(\) cannot"):
                await env.run(cl_inside)

    asyncio.run(main())


@step
async def cl_nothing() -> None: ...
