"""What a store takes as JSON, at its limits."""

import pytest

from pyworkflow.errors import PayloadTooLarge, SerializationError
from pyworkflow.storekit._check import check_json


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"a": "x" * 10, "b": "y" * 10, "c": None, "d": True, "e": -(1 << 70)},
        {"name": "ü", "result": "x" * 10},
        {"text": "x" * 10, "digits": 10**4200},
        {"list": [1, "x", {"a": 2.5}]},
    ],
)
def test_each_text_may_have_the_limit(value: object) -> None:
    check_json(value, 10)


@pytest.mark.parametrize("value", ["x" * 11, "ü" * 6, ["x" * 11], {"a": "x" * 11}])
def test_a_longer_text_is_refused_wherever_it_is(value: object) -> None:
    with pytest.raises(PayloadTooLarge):
        check_json({"name": "x", "result": value}, 10)


@pytest.mark.parametrize(
    "value",
    [1 << 14_000, -(1 << 14_000), pytest.param(10**5000, id="long"), float("nan"), "\ud800"],
)
@pytest.mark.parametrize("limit", [10, 100_000])
def test_what_json_has_no_form_for_is_refused(value: object, limit: int) -> None:
    with pytest.raises(SerializationError):
        check_json({"name": "x", "result": value}, limit)


def test_a_key_that_is_no_text_is_refused() -> None:
    with pytest.raises(SerializationError, match="text keys"):
        check_json({1: "x"}, 10)
