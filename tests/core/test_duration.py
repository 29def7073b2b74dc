"""Durations as people write them."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from subprocess import run
from sys import executable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyworkflow._duration import format_duration, parse_duration, resolve_instant

NOW = datetime(2024, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("5s", timedelta(seconds=5)),
        ("10m", timedelta(minutes=10)),
        ("2h", timedelta(hours=2)),
        ("3d", timedelta(days=3)),
        ("1w", timedelta(weeks=1)),
        ("250ms", timedelta(milliseconds=250)),
        ("7us", timedelta(microseconds=7)),
        ("1h30m", timedelta(minutes=90)),
        (" 1h 30m ", timedelta(minutes=90)),
        ("1w2d3h4m5s6ms", timedelta(9, 3 * 3600 + 4 * 60 + 5, 6000)),
        ("1.5h", timedelta(minutes=90)),
        ("0s", timedelta()),
        ("120", timedelta(seconds=120)),
        (90, timedelta(seconds=90)),
        (0, timedelta()),
        (0.1, timedelta(milliseconds=100)),
        (2.5, timedelta(seconds=2.5)),
        (timedelta(days=2), timedelta(days=2)),
    ],
)
def test_what_people_write_is_what_they_mean(written, meant):
    assert parse_duration(written) == meant


@pytest.mark.parametrize("tiny", [1e-9, 1e-300, "0.0001ms", "0.1us"])
def test_what_is_finer_than_a_microsecond_is_rounded_up(tiny):
    assert parse_duration(tiny) == timedelta(microseconds=1)


def test_rounding_never_shortens():
    assert parse_duration(1.0000001) == timedelta(seconds=1, microseconds=1)
    assert parse_duration("1.0000001s") == timedelta(seconds=1, microseconds=1)


@pytest.mark.parametrize(
    "wrong",
    [
        "", "  ", "-5s", "5 parsecs", "5M", "1m1h", "1h1h", "s", "1h30", "1e3s", "٣s", "5s!", "1,5s",
        "9" * 30 + "w", "9" * 400, "nan", "inf",
        -1, -0.001, float("nan"), float("inf"), float("-inf"), 10**30, 1e300, True, None, b"5s",
        Decimal(5), timedelta(seconds=-1),
    ],
)  # fmt: skip
def test_what_is_no_duration_is_refused_with_the_formats(wrong):
    with pytest.raises(ValueError, match=r"not a duration: .*write \"250ms\", \"5s\""):
        parse_duration(wrong)


@given(st.timedeltas(min_value=timedelta()))
def test_what_is_shown_is_read_back_exactly(duration):
    assert parse_duration(format_duration(duration)) == duration


@pytest.mark.parametrize(
    ("duration", "shown"),
    [
        (timedelta(), "0s"),
        (timedelta(minutes=90), "1h 30m"),
        (timedelta(days=9, seconds=1), "9d 1s"),
        (timedelta(milliseconds=250), "250ms"),
        (timedelta(milliseconds=1.5), "1.5ms"),
        (timedelta(microseconds=15), "15us"),
        (timedelta(seconds=62.5), "1m 2.5s"),
        (timedelta(seconds=-5), "-5s"),
    ],
)
def test_durations_are_shown_for_people(duration, shown):
    assert format_duration(duration) == shown


@given(st.floats(min_value=0, max_value=1e9, allow_nan=False))
def test_a_float_of_seconds_is_kept_within_a_microsecond_and_never_cut(seconds):
    micros = parse_duration(seconds) // timedelta(microseconds=1)
    assert 0 <= micros - Fraction(repr(seconds)) * 1_000_000 < 1


def test_an_instant_is_a_duration_from_now_or_a_datetime():
    assert resolve_instant("1h", NOW) == NOW + timedelta(hours=1)
    assert resolve_instant(5, NOW) == NOW + timedelta(seconds=5)
    past = NOW - timedelta(days=1)
    assert resolve_instant(past, NOW) == past
    with pytest.warns(UserWarning, match="taken as UTC") as caught:
        assert resolve_instant(datetime(2024, 1, 2), NOW) == NOW + timedelta(days=1)  # noqa: DTZ001
    assert caught[0].filename == __file__


def test_an_instant_after_the_last_year_is_refused():
    with pytest.raises(ValueError, match="9999"):
        resolve_instant("500000w", NOW)


def test_durations_and_clock_load_neither_pydantic_nor_asyncio():
    code = (
        "import sys, pyworkflow._duration, pyworkflow._clock, pyworkflow._retry;"
        "assert not {'pydantic', 'pydantic_core', 'asyncio'} & set(sys.modules)"
    )
    assert run([executable, "-c", code], check=False).returncode == 0
