"""The limits of names."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from hashlib import blake2b
from typing import Any

import pytest

from pyworkflow import Client, sleep, step, workflow
from pyworkflow._definitions import RunOptions
from pyworkflow._engine.worker import Worker
from pyworkflow._memory import MemoryStorageBackend
from pyworkflow._names import LONGEST_DERIVED, check_limit, derived_name, is_name
from pyworkflow.errors import ArgumentError
from pyworkflow.spi import Change, NewRun
from tests.core._driving import Bench, bench, eventually

LONG = "é" * 128  # 256 bytes


@workflow
async def nm_flow() -> str:
    return "done"


@step
async def nm_step() -> str:
    return "done"


@step(name=LONG)
async def nm_long_step() -> str:
    return "done"


@workflow
async def nm_calls_long_step() -> str:
    try:
        return await nm_long_step()
    except ArgumentError as error:
        return str(error)


@workflow(name=LONG)
async def nm_long_flow() -> str:
    return await nm_step()


@pytest.mark.parametrize("good", ["x", "x" * 255, "é" * 127, "🙂" * 63, "\x01"])
def test_names_of_up_to_255_bytes_are_names(good: str) -> None:
    assert is_name(good)
    assert check_limit("queue", good) == good


@pytest.mark.parametrize("bad", ["", "x" * 256, LONG, "🙂" * 64, "a\x00b", None, 5, b"x"])
def test_other_names_are_refused_with_name_and_size(bad: object) -> None:
    assert not is_name(bad)
    with pytest.raises(ArgumentError, match=r"queue=.* is not text of 1 to 255 bytes of UTF-8"):
        check_limit("queue", bad)


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("run_id", {"run_id": LONG}),
        ("idempotency_key", {"idempotency_key": LONG}),
        ("idempotency_key", {"idempotency_key": "a\x00b"}),
        ("queue", {"queue": LONG}),
        ("tag", {"tags": ["fine", LONG]}),
    ],
)
def test_start_refuses_long_names(what: str, options: Any) -> None:
    async def main() -> None:
        async with bench() as b:
            with pytest.raises(ArgumentError, match=f"{what}=.*255 bytes"):
                await b.ops.start(nm_flow, (), {}, RunOptions(**options))

    asyncio.run(main())


def test_a_workflow_with_a_long_name_starts_no_new_run() -> None:
    async def main() -> None:
        async with Client(storage=MemoryStorageBackend()) as client:
            with pytest.raises(ArgumentError, match=r"workflow=.*255 bytes.*bytes=256"):
                await client.start(nm_long_flow)

    asyncio.run(main())


def test_a_step_with_a_long_name_is_refused_where_it_is_called_anew() -> None:
    async def main() -> None:
        async with bench() as b:
            assert "step=" in await b.run(nm_calls_long_step)

    asyncio.run(main())


def test_a_key_of_before_that_is_longer_still_finds_its_run() -> None:
    key = "k" * 1000

    async def main() -> None:
        async with bench() as b:
            run_id = await b.start(nm_flow)
            await b.result(run_id)
            run = await b.storage.get_run(run_id)
            new = NewRun(
                workflow=run.workflow, version=run.version, args=run.args_text, idempotency_key=key
            )
            await b.storage.commit_one(Change(run_id="old", key="start", create=new))
            options = RunOptions(idempotency_key=key)
            assert await b.ops.start(nm_flow, (), {}, options) == "old"

    asyncio.run(main())


def test_derived_names_are_the_parts_while_they_fit() -> None:
    assert derived_name("step", "1.3#2:charge") == "step:1.3#2:charge"
    longest = "x" * (LONGEST_DERIVED - 5)
    assert derived_name("step", longest) == f"step:{longest}"


def test_longer_derived_names_keep_the_short_parts_and_differ_in_the_last_byte() -> None:
    one, two = "é" * 300 + "1", "é" * 300 + "2"
    digest = blake2b(one.encode(), digest_size=16).hexdigest()
    assert derived_name("deliver", one, "turn") == f"deliver:{digest}:turn"
    assert derived_name("deliver", one, "turn") != derived_name("deliver", two, "turn")
    both = derived_name("deliver", one, two)
    assert len(both.encode()) <= LONGEST_DERIVED
    shorter = "y" * 300
    assert derived_name("deliver", one, shorter) == f"deliver:{digest}:{shorter}"


# --- ops of deeply nested tasks -------------------------------------------------------------------

DEPTH = 300  # an op of about 610 bytes


async def nm_nested(depth: int, inner: Callable[[], Awaitable[str]]) -> str:
    """``inner`` in a task in a task in a task: its op has the path of all of them."""
    if depth == 0:
        return await inner()
    return await asyncio.ensure_future(nm_nested(depth - 1, inner))


@step(queue="nm_elsewhere")
async def nm_elsewhere() -> str:
    return "done"


@step(max_retries=0)
async def nm_fails() -> str:
    raise LookupError("no")


@workflow
async def nm_deep() -> str:
    async def both() -> str:
        await sleep(60)
        with suppress(LookupError):
            await nm_fails()
        return await nm_elsewhere() + await nm_step()

    return await nm_nested(DEPTH, both)


@workflow
async def nm_race() -> str:
    loser = asyncio.ensure_future(nm_nested(DEPTH, nm_elsewhere))
    await sleep(60)
    loser.cancel()
    await sleep(60)
    return "over"


def is_derived(name: str, kind: str) -> bool:
    return len(name) == len(kind) + 33 and name.startswith(f"{kind}:")


async def work(b: Bench, *queues: str) -> None:
    """A worker of these queues takes over, with nothing but the history."""
    await b.rest()
    b.worker = Worker(b.storage, b.settings, queues=queues or None)
    await b.worker.open()
    b.worker.serve()


async def step_of(b: Bench, run_id: str) -> str:
    """The item of the run's one dispatched step, once it is there."""
    (found,) = await eventually(lambda: steps_of(b, run_id))
    return found


async def steps_of(b: Bench, run_id: str) -> list[str]:
    return [item_id for item_id in await b.items(run_id) if item_id.startswith("step:")]


def test_the_names_of_deep_ops_are_short_and_the_run_ends() -> None:
    async def main() -> None:
        async with bench(work=False) as b:
            await work(b, "default")
            run_id = await b.start(nm_deep)
            await b.asleep(run_id)
            await b.pass_time("1m")
            assert is_derived(await step_of(b, run_id), "step")
            await work(b)
            assert await b.result(run_id) == "donedone"
            keys = {e.type: e.key for e in await b.events(run_id) if e.op and "#" in e.op and e.key}
            assert keys.keys() >= {"sleep.completed", "step.failed", "step.completed"}
            assert all(is_derived(k, "step") or is_derived(k, "timer") for k in keys.values())

    asyncio.run(main())


@pytest.mark.parametrize("before", [True, False], ids=["of 0.1.0", "of today"])
def test_a_step_with_a_deep_op_that_was_dispatched_before_ends(
    monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    async def main() -> None:
        async with bench(work=False) as b:
            with monkeypatch.context() as patch:
                if before:
                    patch.setattr("pyworkflow._names.LONGEST_DERIVED", 10**6)
                await work(b, "default")
                run_id = await b.start(nm_deep)
                await b.asleep(run_id)
                await b.pass_time("1m")
                assert (len(await step_of(b, run_id)) > LONGEST_DERIVED) is before
                await b.rest()
            await work(b)
            assert await b.result(run_id) == "donedone"

    asyncio.run(main())


@pytest.mark.parametrize("before", [True, False], ids=["of 0.1.0", "of today"])
def test_a_cancelled_step_with_a_deep_op_leaves_no_item(
    monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    async def main() -> None:
        async with bench(work=False) as b:
            with monkeypatch.context() as patch:
                if before:
                    patch.setattr("pyworkflow._names.LONGEST_DERIVED", 10**6)
                await work(b, "default")
                run_id = await b.start(nm_race)
                assert (len(await step_of(b, run_id)) > LONGEST_DERIVED) is before
                await b.rest()
            await work(b, "default")
            await b.pass_time("1m")
            await b.has(run_id, "step.cancelled")
            assert await steps_of(b, run_id) == []
            await b.pass_time("1m")
            assert await b.result(run_id) == "over"

    asyncio.run(main())
