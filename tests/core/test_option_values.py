"""Options whose values are out of range are refused, wherever they are given."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from pyworkflow import ArgumentError, DefinitionError, step, workflow
from pyworkflow._engine import owner
from pyworkflow._engine.owner import free_gone
from pyworkflow.storage.memory import MemoryStorageBackend


@workflow
async def opt_any() -> None: ...


PLACES = [{"priority": v} for v in (99, 10, -1, True, 1.0, "1")] + [
    {"queue": v} for v in ("", " ", 5)
]
TAGS = [{"tags": v} for v in ("abc", [1], [""], 5)]
TIMES = [{"max_duration": v} for v in (0, -1, "-1s", "soon", float("inf"))]


@pytest.mark.parametrize("options", [*PLACES, *TAGS, *TIMES], ids=str)
def test_r11_a_workflow_with_an_option_out_of_range_is_refused(options: Any) -> None:
    (name,) = options
    with pytest.raises(DefinitionError, match=name.rstrip("s")):

        @workflow(**options)
        async def opt_refused() -> None: ...

    with pytest.raises(ArgumentError, match=name.rstrip("s")):
        opt_any.options(**options)


@pytest.mark.parametrize("options", [*PLACES, {"timeout": 0}, {"timeout": "-1s"}], ids=str)
def test_r11_a_step_with_an_option_out_of_range_is_refused(options: Any) -> None:
    (name,) = options
    with pytest.raises(DefinitionError, match=name):

        @step(**options)
        async def opt_refused() -> None: ...


@pytest.mark.parametrize("attributes", [[1], [("a", 1)], "abc", 5, {1: 2}, False], ids=str)
def test_attributes_that_are_no_mapping_from_text_are_refused(attributes: Any) -> None:
    with pytest.raises(ArgumentError, match="attribute"):
        opt_any.options(attributes=attributes)
    assert opt_any.options(attributes={"a": 1}).options.attributes == {"a": 1}
    assert opt_any.options(attributes=None).options.attributes == {}


def test_two_functions_for_one_decorator_are_refused() -> None:
    async def opt_one() -> None: ...

    with pytest.raises(DefinitionError, match="@step takes one function by position"):
        step(opt_one, opt_one)  # type: ignore[call-overload]  # wrong
    with pytest.raises(DefinitionError, match="@workflow takes one function by position"):
        workflow(opt_one, "name")  # type: ignore[call-overload]  # wrong


def test_retries_without_number_are_refused() -> None:
    @step(max_retries=2**31 - 1)
    async def opt_many() -> None: ...

    assert opt_many.policy.max_retries == 2**31 - 1
    with pytest.raises(DefinitionError, match="is more than 2147483647"):

        @step(max_retries=2**31)
        async def opt_refused() -> None: ...


@pytest.mark.parametrize("value", ["yes", "", 1, 0, None])
def test_hard_timeout_is_true_or_false(value: Any) -> None:
    with pytest.raises(DefinitionError, match=f"hard_timeout={value!r} is neither True nor False"):

        @step(timeout=1, hard_timeout=value)
        def opt_hard() -> None: ...


@pytest.mark.parametrize("priority", range(10))
def test_r11_priorities_from_0_to_9_are_taken(priority: int) -> None:
    assert opt_any.options(priority=priority).options.priority == priority


async def _freed(counts: dict[str, int]) -> int:
    class Store(MemoryStorageBackend):
        async def holders(self) -> set[str]:  # type: ignore[override]  # any collection will do
            return set(counts)

        async def free(self, owner: str) -> int:
            return counts[owner]

    return await free_gone(Store())


def test_r11_each_owner_is_logged_with_its_own_count(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import asyncio

    monkeypatch.setattr(owner, "is_gone", lambda name: True)
    with caplog.at_level(logging.INFO, "pyworkflow.engine"):
        assert asyncio.run(_freed({"a": 2, "b": 3})) == 5
    assert sorted(m.partition("owner=")[2] for m in caplog.messages) == ["a items=2", "b items=3"]
