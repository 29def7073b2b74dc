"""Durations as people write them: ``"5s"``, ``"1h30m"``, seconds, ``timedelta``.

Exact to the microsecond: what is finer is rounded up, so that no wait ends early.
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from fractions import Fraction
from functools import lru_cache
from math import ceil

from pyworkflow._clock import ensure_utc

__all__ = ["D", "format_duration", "parse_duration", "resolve_instant"]

#: What is taken as a duration. Numbers, and strings without a unit, are seconds.
D = str | int | float | timedelta

_FORMATS = (
    'write "250ms", "5s", "10m", "2h", "3d", "1w", a compound like "1h30m", a number of seconds, '
    "or a timedelta"
)
_UNITS = {
    "w": 604_800_000_000,
    "d": 86_400_000_000,
    "h": 3_600_000_000,
    "m": 60_000_000,
    "s": 1_000_000,
    "ms": 1_000,
    "us": 1,
}
_RANK = {unit: rank for rank, unit in enumerate(_UNITS)}
_NUMBER = re.compile(r"\d+(?:\.\d+)?", re.ASCII)
_PART = re.compile(r"(\d+(?:\.\d+)?)\s*([^\W\d_]+)\s*", re.ASCII)
_ZERO = timedelta()


def parse_duration(value: D) -> timedelta:
    """The duration as a timedelta, never negative; fractions of a microsecond are rounded up.

    Raises:
        ValueError: it is negative, not finite, empty, or in no known format.
    """
    if isinstance(value, timedelta):
        if value < _ZERO:
            raise _bad(value, "is negative")
        return value
    if isinstance(value, str):
        return _parse_text(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):  # pyright: ignore[reportUnnecessaryIsInstance] # callers pass what users wrote
        raise _bad(value, f"is of type {type(value).__name__}")
    if value < 0:
        raise _bad(value, "is negative")
    if isinstance(value, int):
        try:
            return timedelta(value // 86_400, value % 86_400)
        except OverflowError:
            raise _bad(value, "is too long") from None
    if not value < float("inf"):
        raise _bad(value, "is not a finite number")
    # The shortest decimal that names the float, not its binary value: 0.1 is 100000 us, not 100001.
    return _from_micros(ceil(Fraction(repr(float(value))) * 1_000_000), value)


def resolve_instant(value: D | datetime, now: datetime, *, stacklevel: int = 2) -> datetime:
    """The instant meant by a duration from ``now`` or by a datetime (naive: UTC, with a warning).

    Raises:
        ValueError: not a duration, or beyond the year 9999.
    """
    if isinstance(value, datetime):
        return ensure_utc(value, stacklevel=stacklevel + 1)
    try:
        return now + parse_duration(value)
    except OverflowError:
        raise _bad(value, "ends after the year 9999") from None


def format_duration(duration: timedelta) -> str:
    """The duration for people, ``"1h 30m"``; ``parse_duration`` reads it back exactly."""
    if duration < _ZERO:
        return f"-{format_duration(-duration)}"
    seconds, micros = duration.seconds, duration.microseconds
    if micros and not duration.days and not seconds:
        return f"{micros}us" if micros < 1000 else f"{_decimal(micros, 1000)}ms"
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    parts = [
        f"{count}{unit}"
        for count, unit in ((duration.days, "d"), (hours, "h"), (minutes, "m"))
        if count
    ]
    if seconds or micros or not parts:
        parts.append(f"{_decimal(seconds * 1_000_000 + micros, 1_000_000)}s")
    return " ".join(parts)


@lru_cache(maxsize=256)
def _parse_text(text: str) -> timedelta:
    stripped = text.strip()
    if _NUMBER.fullmatch(stripped):
        # As in an HTTP Retry-After header or an environment variable.
        return _from_micros(ceil(Fraction(stripped) * 1_000_000), text)
    if not stripped:
        raise _bad(text, "is empty")
    if stripped.startswith("-"):
        raise _bad(text, "is negative")
    total = Fraction(0)
    rank, position = -1, 0
    while position < len(stripped):
        part = _PART.match(stripped, position)
        if part is None:
            raise _bad(text, "is not understood")
        number, unit = part.groups()
        if unit not in _UNITS:
            raise _bad(text, f"has the unknown unit {unit!r}")
        if _RANK[unit] <= rank:
            raise _bad(text, f"has {unit!r} out of order")
        rank, position = _RANK[unit], part.end()
        total += Fraction(number) * _UNITS[unit]
    return _from_micros(ceil(total), text)


def _from_micros(micros: int, value: object) -> timedelta:
    try:
        return timedelta(microseconds=micros)
    except OverflowError:
        raise _bad(value, "is too long") from None


def _decimal(amount: int, unit: int) -> str:
    whole, rest = divmod(amount, unit)
    if not rest:
        return str(whole)
    return f"{whole}.{rest:0{len(str(unit)) - 1}d}".rstrip("0")


def _bad(value: object, why: str) -> ValueError:
    return ValueError(f"not a duration: {value!r} {why}; {_FORMATS}")
