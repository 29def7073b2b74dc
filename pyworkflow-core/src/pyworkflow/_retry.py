"""What follows a failed try of a step: another one, and when, or none. Pure."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from types import CodeType
from typing import Any, Literal, cast

from pyworkflow._clock import LAST
from pyworkflow._duration import D, format_duration, parse_duration, resolve_instant
from pyworkflow.errors import FatalError, RetryableError
from pyworkflow.events import Json

__all__ = [
    "RETRIES",
    "Delay",
    "GiveUp",
    "Retry",
    "RetryDelay",
    "RetryPolicy",
    "decide",
    "delay_of",
    "is_programming_error",
]

RetryDelay = Literal["fixed", "exponential"] | D | Sequence[D]
"""A delay as users write it."""
Delay = Literal["fixed", "exponential"] | timedelta | tuple[timedelta, ...]
"""A delay as a policy has it."""

RETRIES = 5
"""Retries of a step without settings: with the delays 1, 2, 4, 8 and 16 s, half a minute."""

FIXED = timedelta(seconds=60)
"""What ``"fixed"`` waits."""
LONGEST = timedelta(minutes=5)
"""What ``"exponential"`` waits at most."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often a step is tried again, and how long it waits before each new attempt."""

    max_retries: int = RETRIES
    """``n`` is at most ``n + 1`` attempts."""
    delay: Delay = "exponential"
    """``"fixed"`` 60 s; ``"exponential"`` 1, 2, 4, 8 … s, at most 5 min; that long; or one delay
    for each retry, the last of them for all further ones."""

    @classmethod
    def of(cls, max_retries: int = RETRIES, retry_delay: RetryDelay = "exponential") -> RetryPolicy:
        """The policy from what a user wrote.

        Raises:
            ValueError: ``max_retries`` is no whole number from 0 on, or the delay is none.
        """
        if type(max_retries) is not int or max_retries < 0:
            raise ValueError(f"not a number of retries: {max_retries!r}; write 0, 1, 2 …")
        return cls(max_retries, delay_of(retry_delay))

    def delay_for(self, attempt: int) -> timedelta:
        """How long to wait after the failure of this 1-based attempt."""
        if self.delay == "fixed":
            return FIXED
        if self.delay == "exponential":
            # The cap on the exponent keeps the thousandth try from computing 2 ** 999.
            return min(timedelta(seconds=2 ** min(max(attempt, 1) - 1, 16)), LONGEST)
        if isinstance(self.delay, tuple):
            return self.delay[min(max(attempt, 1), len(self.delay)) - 1]
        return self.delay

    def to_json(self) -> dict[str, Json]:
        """The policy as a JSON object; durations as people write them.

        A list of delays is ``delays``; ``delay`` is then the last of them, which is what workers
        of 0.1 wait, who do not know lists.
        """
        delay = self.delay
        if isinstance(delay, tuple):
            delays: list[Json] = [format_duration(one) for one in delay]
            return {"max_retries": self.max_retries, "delay": delays[-1], "delays": delays}
        text = delay if isinstance(delay, str) else format_duration(delay)
        return {"max_retries": self.max_retries, "delay": text}

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> RetryPolicy:
        """The inverse of ``to_json``.

        Raises:
            ValueError: the object is no policy.
        """
        max_retries, delay = data.get("max_retries"), data.get("delay")
        if not isinstance(max_retries, int) or not isinstance(delay, str):
            raise ValueError(f"not a retry policy: {dict(data)!r}")  # bad data
        return cls.of(max_retries, cast("Any", data.get("delays", delay)))


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
    if isinstance(exc, RetryableError):
        try:
            if exc.retry_after is not None:
                return Retry(max(now, resolve_instant(exc.retry_after, now)))
        except Exception as bad:  # noqa: BLE001 - no duration, or a property of the user's
            with contextlib.suppress(Exception):
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
    try:
        last = exc.__traceback__
    except Exception:  # noqa: BLE001 - a ``__getattribute__`` of the user's
        return False
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


def delay_of(value: RetryDelay) -> Delay:
    """The delay from what a user wrote.

    Raises:
        ValueError: it is no delay; the message lists the forms.
    """
    if value == "fixed":
        return "fixed"
    if value == "exponential":
        return "exponential"
    forms = '"fixed", or "exponential", or a list of durations: [5, "30s", "5m"]'
    try:
        if isinstance(value, list | tuple):
            if not value:
                raise ValueError("an empty list of delays; write one for each retry")
            return tuple(parse_duration(one) for one in value)
        return parse_duration(cast("D", value))
    except ValueError as bad:
        raise ValueError(f"{bad}; or {forms}") from None
