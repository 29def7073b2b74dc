"""What follows a failed try of a step: another one, and when, or none. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from types import CodeType
from typing import Literal

from pyworkflow._clock import LAST
from pyworkflow._duration import D, format_duration, parse_duration, resolve_instant
from pyworkflow.errors import FatalError, RetryableError

__all__ = ["GiveUp", "Retry", "RetryPolicy", "decide", "is_programming_error"]

FIXED = timedelta(seconds=60)
"""What ``"fixed"`` waits."""
LONGEST = timedelta(minutes=5)
"""What ``"exponential"`` waits at most."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often a step is tried again, and how long it waits before each new try."""

    max_retries: int = 3
    """``n`` is at most ``n + 1`` tries."""
    delay: Literal["fixed", "exponential"] | timedelta = "fixed"
    """``"fixed"`` 60 s; ``"exponential"`` 1, 2, 4, 8 … s, at most 5 min; or that long."""

    @classmethod
    def of(
        cls, max_retries: int = 3, retry_delay: Literal["fixed", "exponential"] | D = "fixed"
    ) -> RetryPolicy:
        """The policy from what a user wrote.

        Raises:
            ValueError: ``max_retries`` is no whole number from 0 on, or the delay is none.
        """
        if type(max_retries) is not int or max_retries < 0:
            raise ValueError(f"not a number of retries: {max_retries!r}; write 0, 1, 2 …")
        return cls(max_retries, _delay(retry_delay))

    def delay_for(self, attempt: int) -> timedelta:
        """How long to wait after the failure of this 1-based attempt."""
        if self.delay == "fixed":
            return FIXED
        if self.delay == "exponential":
            # The cap on the exponent keeps the thousandth try from computing 2 ** 999.
            return min(timedelta(seconds=2 ** min(max(attempt, 1) - 1, 16)), LONGEST)
        return self.delay

    def to_json(self) -> dict[str, int | str]:
        """The policy as a JSON object; durations as people write them."""
        delay = self.delay if isinstance(self.delay, str) else format_duration(self.delay)
        return {"max_retries": self.max_retries, "delay": delay}

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> RetryPolicy:
        """The inverse of ``to_json``.

        Raises:
            ValueError: the object is no policy.
        """
        max_retries, delay = data.get("max_retries"), data.get("delay")
        if not isinstance(max_retries, int) or not isinstance(delay, str):
            raise ValueError(f"not a retry policy: {dict(data)!r}")  # bad data
        return cls.of(max_retries, delay)


@dataclass(frozen=True, slots=True)
class Retry:
    """Try again, not before ``at``."""

    at: datetime


@dataclass(frozen=True, slots=True)
class GiveUp:
    """No further try; the exception goes to the workflow."""

    reason: Literal["fatal", "exhausted"]


def decide(
    policy: RetryPolicy,
    attempt: int,
    exc: BaseException,
    now: datetime,
    *,
    opinion: Literal["retry", "fatal"] | None = None,
) -> Retry | GiveUp:
    """What follows the failure of the 1-based ``attempt`` with ``exc``.

    ``FatalError`` is final, also inside an exception group, and so is what is no ``Exception``.
    ``RetryableError.retry_after`` beats the policy's delay; one that is no duration is noted on
    the exception and ignored. ``opinion`` is a plugin's (hook ``pyworkflow_error_class``) and
    beats the exception's type. Never raises.
    """
    if opinion == "fatal" or (opinion is None and _is_fatal(exc)):
        return GiveUp("fatal")
    if attempt > policy.max_retries:
        return GiveUp("exhausted")
    if isinstance(exc, RetryableError) and exc.retry_after is not None:
        try:
            return Retry(max(now, resolve_instant(exc.retry_after, now)))
        except (ValueError, OverflowError) as bad:
            exc.add_note(f"retry_after is ignored: {bad}")
    try:
        return Retry(now + policy.delay_for(attempt))
    except OverflowError:
        return Retry(LAST)


def is_programming_error(exc: BaseException, code: CodeType | None = None) -> bool:
    """Whether the step's own code is wrong: a name, attribute or type error of its own frame.

    ``code`` is the step function's; without it the step's frame is taken to be the second, the
    first being the caller's that caught the exception.
    """
    if not isinstance(exc, (TypeError, NameError, AttributeError)):
        return False
    frames = 0
    last = exc.__traceback__
    if last is None:
        return False
    while last.tb_next is not None:
        last, frames = last.tb_next, frames + 1
    return last.tb_frame.f_code is code if code is not None else frames <= 1


def _is_fatal(exc: BaseException) -> bool:
    if isinstance(exc, BaseExceptionGroup):
        members: tuple[BaseException, ...] = exc.exceptions  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType] # a bare group has no type argument
        return any(_is_fatal(member) for member in members)
    return isinstance(exc, FatalError) or not isinstance(exc, Exception)


def _delay(
    value: Literal["fixed", "exponential"] | D,
) -> Literal["fixed", "exponential"] | timedelta:
    if value == "fixed":
        return "fixed"
    if value == "exponential":
        return "exponential"
    try:
        return parse_duration(value)
    except ValueError as bad:
        raise ValueError(f'{bad}; or "fixed", or "exponential"') from None
