"""What follows a failed try."""

import dataclasses
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyworkflow._retry import GiveUp, Retry, RetryPolicy, decide, is_programming_error
from pyworkflow.errors import FatalError, RetryableError

NOW = datetime(2024, 1, 1, tzinfo=UTC)


def waited(outcome):
    assert isinstance(outcome, Retry)
    return outcome.at - NOW


def test_fixed_waits_a_minute_each_time():
    policy = RetryPolicy.of(retry_delay="fixed")
    assert {policy.delay_for(n) for n in range(1, 10)} == {timedelta(seconds=60)}


def test_exponential_doubles_up_to_five_minutes():
    policy = RetryPolicy.of(100, "exponential")
    delays = [policy.delay_for(n).total_seconds() for n in (*range(1, 12), 10**9)]
    assert delays == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300]


def test_a_duration_waits_that_long():
    assert RetryPolicy.of(1, "5s").delay_for(1) == timedelta(seconds=5)
    assert RetryPolicy.of(1, 0).delay_for(1) == timedelta()


@pytest.mark.parametrize("wrong", [-1, 1.5, True, "3", None])
def test_a_wrong_number_of_retries_is_refused(wrong):
    with pytest.raises(ValueError, match="not a number of retries"):
        RetryPolicy.of(wrong)


def test_a_wrong_delay_is_refused_with_every_form():
    with pytest.raises(ValueError, match=r'"5s".*"fixed", or "exponential"'):
        RetryPolicy.of(1, "linear")


@given(
    st.integers(0, 1000),
    st.sampled_from(["fixed", "exponential"])
    | st.timedeltas(min_value=timedelta())
    | st.lists(st.timedeltas(min_value=timedelta()), min_size=1).map(tuple),
)
def test_a_policy_comes_back_from_its_json(retries, delay):
    policy = RetryPolicy(retries, delay)
    assert RetryPolicy.from_json(policy.to_json()) == policy


@pytest.mark.parametrize("wrong", [{}, {"max_retries": 1}, {"max_retries": "1", "delay": "5s"}])
def test_json_that_is_no_policy_is_refused(wrong):
    with pytest.raises(ValueError, match="retry policy"):
        RetryPolicy.from_json(wrong)


def test_a_policy_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RetryPolicy.of().max_retries = 5


def test_m06_n_retries_are_at_most_n_plus_one_tries():
    policy = RetryPolicy.of(3, "1s")
    outcomes = [decide(policy, attempt, OSError(), NOW) for attempt in range(1, 6)]
    retry = Retry(NOW + timedelta(seconds=1))
    assert outcomes == [retry, retry, retry, GiveUp("exhausted"), GiveUp("exhausted")]
    assert decide(RetryPolicy.of(0), 1, OSError(), NOW) == GiveUp("exhausted")


def test_m06_a_fatal_error_is_never_tried_again():
    class Declined(FatalError):
        pass

    for exc in (FatalError("no"), Declined("no"), ExceptionGroup("g", [OSError(), FatalError()])):
        assert decide(RetryPolicy.of(5), 1, exc, NOW) == GiveUp("fatal")


def test_what_is_no_exception_is_never_tried_again():
    assert decide(RetryPolicy.of(5), 1, SystemExit(1), NOW) == GiveUp("fatal")


@pytest.mark.parametrize(
    "after",
    ["30s", 30, 30.0, "30", timedelta(seconds=30), NOW + timedelta(seconds=30)],
)
def test_m06_retry_after_beats_the_policy(after):
    error = RetryableError("busy", retry_after=after)
    assert waited(decide(RetryPolicy.of(1, "5s"), 1, error, NOW)) == timedelta(seconds=30)
    assert decide(RetryPolicy.of(1, "5s"), 2, error, NOW) == GiveUp("exhausted")


def test_retry_after_zero_is_at_once_and_none_is_the_policy():
    policy = RetryPolicy.of(1, "5s")
    assert waited(decide(policy, 1, RetryableError("x", retry_after=0), NOW)) == timedelta()
    assert waited(decide(policy, 1, RetryableError("x"), NOW)) == timedelta(seconds=5)


def test_retry_after_a_past_instant_is_at_once():
    error = RetryableError("x", retry_after=NOW - timedelta(days=1))
    assert waited(decide(RetryPolicy.of(1), 1, error, NOW)) == timedelta()


def test_a_wrong_retry_after_is_noted_and_the_policy_holds():
    error = RetryableError("x", retry_after="soon")
    assert waited(decide(RetryPolicy.of(1, "5s"), 1, error, NOW)) == timedelta(seconds=5)
    assert "retry_after is ignored" in error.__notes__[0]


def test_the_opinion_of_a_plugin_beats_the_type():
    policy = RetryPolicy.of(1, "5s")
    assert decide(policy, 1, OSError(), NOW, opinion="fatal") == GiveUp("fatal")
    assert isinstance(decide(policy, 1, FatalError(), NOW, opinion="retry"), Retry)
    assert decide(policy, 2, FatalError(), NOW, opinion="retry") == GiveUp("exhausted")


def _raised(fn):
    try:
        fn()
    except Exception as exc:  # noqa: BLE001
        return exc
    raise AssertionError


def _own_type_error():
    return 1 + "1"


def _own_name_error():
    return undefined_name  # noqa: F821


def _of_a_library():
    return sorted([1], key=lambda item: item.missing)


def _other_error():
    raise ValueError


def test_an_error_of_the_steps_own_code_is_a_programming_error():
    for fn in (_own_type_error, _own_name_error):
        assert is_programming_error(_raised(fn))
        assert is_programming_error(_raised(fn), fn.__code__)


def test_errors_from_deeper_and_other_errors_are_none():
    assert not is_programming_error(_raised(_of_a_library))
    assert not is_programming_error(_raised(_of_a_library), _of_a_library.__code__)
    assert not is_programming_error(_raised(_other_error), _other_error.__code__)
    assert not is_programming_error(TypeError("never raised"))
