"""The limits of names."""

from __future__ import annotations

import asyncio
from hashlib import blake2b
from typing import Any

import pytest

from pyworkflow import Client, step, workflow
from pyworkflow._definitions import RunOptions
from pyworkflow._memory import MemoryStorageBackend
from pyworkflow._names import LONGEST_DERIVED, check_limit, derived_name, is_name
from pyworkflow.errors import ArgumentError
from pyworkflow.spi import Change, NewRun
from tests.core._driving import bench

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
