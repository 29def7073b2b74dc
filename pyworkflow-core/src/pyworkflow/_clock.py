"""Instants: aware UTC datetimes of whole microseconds, and the integers that stand for them.

Nothing here reads a clock but ``utcnow`` and ``ticks``; what decides is the storage's clock, never this one.
"""

from __future__ import annotations

import time
import warnings
from datetime import UTC, datetime, timedelta

__all__ = ["AHEAD", "EPOCH", "ensure_utc", "from_micros", "ticks", "to_micros", "utcnow"]

#: 1970-01-01T00:00:00Z, the zero of ``to_micros``.
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
#: What a store whose clock is ahead of a machine's means, and what is to be done.
AHEAD = (
    "the store's clock is ahead by as much: instants given as a date and time fire that much early; "
    "delays and leases keep their length. If this machine's clock is right, stop the workers and run "
    "'pyworkflow storage set-clock --to-now'; else set this machine's clock"
)
FIRST = datetime(1, 1, 1, tzinfo=UTC)
LAST = datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)


def utcnow() -> datetime:
    """This machine's idea of now, as an aware UTC datetime."""
    return datetime.now(UTC)


if hasattr(time, "clock_gettime_ns"):
    #: Continues while the machine sleeps, where there is such a clock.
    _SINCE_BOOT: int = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)

    def ticks() -> int:
        """Microseconds since the machine was started. No setting of a clock changes it."""
        return time.clock_gettime_ns(_SINCE_BOOT) // 1000

else:

    def ticks() -> int:
        """Microseconds since some instant. No setting of a clock changes it."""
        return time.monotonic_ns() // 1000


def to_micros(instant: datetime) -> int:
    """Microseconds since ``EPOCH``, exact; negative before it.

    Raises:
        ValueError: the datetime is naive.
    """
    if instant.tzinfo is None:
        raise ValueError(
            f"a naive datetime names no instant: value={instant!r}; give it a timezone, for "
            "example datetime.now(timezone.utc)"
        )
    gap = instant - EPOCH
    # Not gap.total_seconds(): a float of 1.7e9 s is only exact to a quarter of a microsecond.
    return (gap.days * 86_400 + gap.seconds) * 1_000_000 + gap.microseconds


def from_micros(micros: int) -> datetime:
    """The aware UTC datetime that ``to_micros`` turns into ``micros``."""
    return EPOCH + timedelta(0, 0, micros)  # by position: several times as fast


def ensure_utc(instant: datetime, *, stacklevel: int = 2) -> datetime:
    """The same instant in UTC. A naive datetime is taken as UTC, with a warning."""
    if instant.tzinfo is UTC:
        return instant
    if instant.tzinfo is None:
        warnings.warn(
            f"the naive datetime {instant.isoformat(sep=' ')} is taken as UTC; give it a "
            "timezone, for example datetime(..., tzinfo=timezone.utc)",
            UserWarning,
            stacklevel=stacklevel,
        )
        return instant.replace(tzinfo=UTC)
    try:
        return instant.astimezone(UTC)
    except OverflowError:  # within a day of the first or the last instant there is
        return LAST if instant.year > 1 else FIRST
