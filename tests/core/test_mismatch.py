"""What a message about non-determinism says: where arguments differ, and what to do."""

from __future__ import annotations

import asyncio
import itertools
import logging
import pickle
from typing import Any

import pytest

from pyworkflow import NonDeterminism, sleep, step, workflow
from pyworkflow._replay.mismatch import first_difference
from pyworkflow._serialization import encode_arguments
from tests.core._driving import bench

numbers = itertools.count(1)
counted = {"on": True}


@step
async def mm_takes(order: dict[str, Any]) -> None: ...


@step(dispatch="queue")
async def mm_dispatched(order: dict[str, Any]) -> None: ...


def _clock() -> int:
    return next(numbers) if counted["on"] else 0


@workflow
async def mm_in_place() -> None:
    await mm_takes({"id": 7, "lines": [1, {"at": _clock()}]})
    await sleep("1h")


@workflow
async def mm_recorded() -> None:
    await mm_dispatched({"id": 7, "lines": [1, {"at": _clock()}]})
    await sleep("1h")


async def _stalled(workflow: Any, *, changes: bool) -> str:
    async with bench(work=False) as b:
        counted["on"] = True
        await b.work()
        run_id = await b.start(workflow)
        await b.asleep(run_id)
        counted["on"] = changes
        await b.restart()
        await b.pass_time("1h")
        run = await b.until(run_id, "stalled")
        return str(run.stalled)


@pytest.mark.parametrize("workflow", [mm_in_place, mm_recorded])
def test_r05_the_message_shows_the_path_of_the_first_difference(workflow: Any) -> None:
    reason = asyncio.run(_stalled(workflow, changes=True))
    known = "recorded" if workflow is mm_recorded else "first"
    assert f"args[0]['lines'][1]['at']: {known}=" in reason
    for named in ("Clocks, ids and random numbers", "now(), uuid4()", "check_args"):
        assert named in reason


def test_r05_a_change_of_the_code_is_told_apart_from_a_clock() -> None:
    reason = asyncio.run(_stalled(mm_in_place, changes=False))
    assert "a second replay gives this step the same arguments" in reason


@pytest.mark.parametrize(
    ("before", "after", "path"),
    [
        (((1,), {}), ((2,), {}), "args[0]: recorded=1 found=2"),
        (((1, 2), {}), ((1,), {}), "args[1]: recorded=2 found=nothing"),
        (((), {"a": 1}), ((), {"a": True}), "kwargs.a: recorded=1 found=true"),
        ((({"a": {"b c": 1}},), {}), (({"a": {"b c": 2}},), {}), "args[0]['a']['b c']"),
        ((({1, 2},), {}), (({1, 3},), {}), "args[0]"),
        (((b"x",), {}), ((b"y",), {}), "args[0]: recorded=bytes"),
    ],
)
def test_r05_paths_of_differences(before: Any, after: Any, path: str) -> None:
    said = first_difference(encode_arguments(*before), encode_arguments(*after))
    assert path in said
    assert first_difference(encode_arguments(*before), encode_arguments(*before)) == ""


def test_r05_values_of_encrypted_runs_are_not_shown() -> None:
    secret, other = encode_arguments(("s3cret",), {}), encode_arguments(("0ther",), {})
    said = first_difference(secret, other, values=False)
    assert "args[0]" in said
    assert "s3cret" not in said
    assert "0ther" not in said


def test_r05_the_error_pickles_with_its_remedy() -> None:
    for error in (NonDeterminism("a", "b", 3), NonDeterminism("a", "b", 3, "Do this")):
        again = pickle.loads(pickle.dumps(error))
        assert str(again) == str(error)
        assert again.remedy == error.remedy
    logging.getLogger(__name__).debug("%s", NonDeterminism("a", "b", 3))
