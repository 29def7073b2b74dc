"""Results that are too large are refused before they are encoded whole."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import tracemalloc
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyworkflow import PayloadTooLarge, step, workflow
from pyworkflow._least_size import least_size
from pyworkflow._serialization import encode
from tests.core._driving import bench

MIB = 1024 * 1024


@dataclasses.dataclass
class LargeRow:
    text: str


VALUES: dict[str, Any] = {
    "text": lambda: "x" * (32 * MIB),
    "text that is not ASCII": lambda: "ü" * (16 * MIB),
    "bytes": lambda: b"x" * (32 * MIB),
    "list of text": lambda: ["x" * 1024] * (32 * 1024),
    "numbers": lambda: list(range(3_000_000)),
    "dict": lambda: {str(n): n for n in range(500_000)},
    "dataclasses": lambda: [LargeRow(str(n) * 1000) for n in range(5_000)],
    "set": lambda: set(range(1_500_000)),
    "nested": lambda: {"a": [{"b": ("x" * (16 * MIB),)}]},
}


@pytest.mark.parametrize("kind", VALUES)
def test_found_m08_a_large_value_is_refused_before_its_text_is_made(kind: str) -> None:
    value = VALUES[kind]()
    tracemalloc.start()
    try:
        with pytest.raises(PayloadTooLarge) as caught:
            encode(value, limit=2 * MIB)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert caught.value.size > 2 * MIB
    assert peak < 20 * MIB


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text() | st.binary() | st.datetimes(timezones=st.just(UTC)),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    | st.lists(inner).map(tuple),
    max_leaves=20,
)  # fmt: skip


@given(json_values)
def test_found_m08_no_value_is_taken_for_larger_than_it_is(value: Any) -> None:
    try:
        text = encode(value)
    except TypeError:
        return  # text that no store takes
    size, _ = least_size(value, 10**9)
    assert size <= len(text.encode())
    assert encode(value, limit=len(text.encode())) == text


def test_found_m08_what_just_fits_is_stored() -> None:
    for value in ("x" * 1000, ["x"] * 300, {"k": 1, "l": [True, None]}, [datetime.now(UTC)]):
        text = encode(value)
        assert encode(value, limit=len(text)) == text
        json.loads(text)


@pytest.mark.parametrize("place", ["step", "workflow"])
def test_found_m08_large_results_of_steps_and_workflows(place: str) -> None:
    calls: list[int] = []

    @step
    async def large_made() -> list[str]:
        calls.append(1)
        return ["x" * 1000] * 10_000

    @workflow
    async def large_step() -> str:
        try:
            await large_made()
        except PayloadTooLarge as exc:
            return str(exc)
        return "stored"

    @workflow
    async def large_workflow() -> list[str]:
        return ["x" * 1000] * 10_000

    async def main() -> None:
        async with bench() as b:
            if place == "step":
                assert "the result of step 'large_made'" in await b.run(large_step)
                assert calls == [1]
                return
            with pytest.raises(PayloadTooLarge, match="the result of workflow 'large_workflow'"):
                await b.run(large_workflow)

    asyncio.run(main())
