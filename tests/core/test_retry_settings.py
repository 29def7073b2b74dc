"""What a step without settings does when it fails, and lists of delays."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from typing import Any

import pytest

from pyworkflow import DefinitionError, step, workflow
from pyworkflow._retry import RetryPolicy
from tests.core._driving import bench


def _seconds(policy: RetryPolicy, retries: int) -> list[float]:
    return [policy.delay_for(n).total_seconds() for n in range(1, retries + 1)]


async def _recorded(fn: Any, retries: int) -> tuple[list[float], list[Any], list[Any]]:
    """Delays of a failing step as its history has them, its policies, and its failures."""
    async with bench() as b:
        run_id = await b.start(fn)
        for number in range(1, retries + 1):
            await b.has(run_id, "step.retrying", number)
            await b.pass_time("10m")
        await b.until(run_id, "failed")
        events = await b.events(run_id)
    delays = [
        round((datetime.fromisoformat(str(e.data["retry_at"])) - e.timestamp).total_seconds())
        for e in events
        if e.type == "step.retrying"
    ]
    policies = [e.data["policy"] for e in events if e.type == "step.scheduled"]
    return delays, policies, [e for e in events if e.type == "step.failed"]


def test_n14_a_step_without_settings_retries_five_times_from_one_second() -> None:
    @step
    async def n14_plain() -> None:
        raise ConnectionError("away")

    @workflow
    async def n14_default() -> None:
        await n14_plain()

    delays, policies, failures = asyncio.run(_recorded(n14_default, 5))
    assert delays == [1, 2, 4, 8, 16]
    assert policies == [{"max_retries": 5, "delay": "exponential"}]
    assert [e.data["attempt"] for e in failures] == [6]


@pytest.mark.parametrize(
    ("settings", "retries", "expected"),
    [
        ({}, 5, [1, 2, 4, 8, 16]),
        ({"max_retries": 2}, 2, [1, 2]),
        ({"max_retries": 12}, 12, [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300]),
        ({"retry_delay": "fixed"}, 5, [60] * 5),
        ({"retry_delay": "5s"}, 5, [5] * 5),
        ({"retry_delay": [5, "30s", timedelta(minutes=5)]}, 5, [5, 30, 300, 300, 300]),
        ({"retry_delay": ("1m",), "max_retries": 2}, 2, [60, 60]),
        ({"retry_delay": [1, 2, 3, 4], "max_retries": 2}, 2, [1, 2]),
        ({"semantics": "at_most_once"}, 0, []),
    ],
)
def test_n14_the_settings_of_a_step_say_how_often_and_how_long(
    settings: dict[str, Any], retries: int, expected: list[int]
) -> None:
    @step(**settings)
    def n14_settings() -> None: ...

    assert n14_settings.policy.max_retries == retries
    assert _seconds(n14_settings.policy, retries) == expected


def test_n14_a_list_of_delays_is_kept_and_its_last_repeats() -> None:
    @step(retry_delay=[5, "30s", timedelta(minutes=5)], max_retries=4)
    async def n14_listed() -> None:
        raise ConnectionError("away")

    @workflow
    async def n14_list() -> None:
        await n14_listed()

    delays, policies, failures = asyncio.run(_recorded(n14_list, 4))
    assert delays == [5, 30, 300, 300]
    # Workers of 0.1 read `delay` alone, and leave out what they do not know.
    assert policies == [{"max_retries": 4, "delay": "5m", "delays": ["5s", "30s", "5m"]}]
    assert len(failures) == 1


@pytest.mark.parametrize("stored", ["fixed", "exponential", "5s", "1h 30m"])
def test_n14_a_policy_of_a_stored_run_stays_as_it_was_recorded(stored: str) -> None:
    data = {"max_retries": 3, "delay": stored}
    policy = RetryPolicy.from_json(data)
    assert policy.to_json() == data
    waits = {"fixed": 60, "exponential": 1, "5s": 5, "1h 30m": 5400}
    assert _seconds(policy, 1) == [waits[stored]]


@pytest.mark.parametrize("wrong", [[], [5, "soon"], ["fixed"], [-1], [None], {5: 30}, [[5]]])
def test_n14_a_list_that_is_no_list_of_delays_is_refused_when_defined(wrong: Any) -> None:
    with pytest.raises(DefinitionError, match=r"retry_delay=.*list of durations"):

        @step(retry_delay=wrong)
        def n14_wrong() -> None: ...


def test_n14_a_wrong_list_in_stored_data_is_refused() -> None:
    with pytest.raises(ValueError, match="list"):
        RetryPolicy.from_json({"max_retries": 3, "delay": "5s", "delays": []})
