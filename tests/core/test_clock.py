"""Instants and the integers that stand for them."""

from datetime import UTC, datetime, timedelta, timezone
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyworkflow._clock import EPOCH, ensure_utc, from_micros, to_micros, utcnow

instants = st.datetimes(timezones=st.just(UTC))


@given(instants)
def test_micros_are_exact_both_ways(instant):
    assert from_micros(to_micros(instant)) == instant
    assert from_micros(to_micros(instant)).tzinfo is UTC


@given(instants, instants)
def test_micros_keep_the_order_of_instants(first, second):
    assert (to_micros(first) < to_micros(second)) == (first < second)


def test_micros_of_known_instants():
    assert to_micros(EPOCH) == 0
    assert to_micros(EPOCH - timedelta(microseconds=1)) == -1
    assert to_micros(datetime(2024, 1, 1, 1, tzinfo=timezone(timedelta(hours=1)))) == (
        1_704_067_200_000_000
    )


def test_a_naive_datetime_has_no_micros():
    with pytest.raises(ValueError, match="timezone"):
        to_micros(datetime(2024, 1, 1))  # noqa: DTZ001


def test_a_naive_datetime_is_taken_as_utc_with_a_warning_that_points_at_the_caller():
    with pytest.warns(UserWarning, match="taken as UTC.*tzinfo=timezone.utc") as caught:
        instant = ensure_utc(datetime(2024, 1, 1, 12))  # noqa: DTZ001
    assert instant == datetime(2024, 1, 1, 12, tzinfo=UTC)
    assert caught[0].filename == __file__


def test_other_zones_become_utc():
    local = datetime(2024, 7, 1, 12, tzinfo=ZoneInfo("Europe/Paris"))
    assert ensure_utc(local) == local
    assert ensure_utc(local).tzinfo is UTC
    now = utcnow()
    assert ensure_utc(now) is now
