"""When the event loop may write by itself instead of waking the thread. No clock, no I/O.

Waking a thread and being woken costs about as much as a fast disk's flush. A loop that stands still
for a flush is only right while flushes are fast, so their times decide.
"""

from __future__ import annotations

from typing import Final

__all__ = ["Pace"]

#: With flushes slower than this, the loop does not wait for any, ns.
_SLOW: Final = 1_000_000
#: Counts as no more than this: one stall alone, of whatever length, says nothing of the next flush.
_STALL: Final = 3 * _SLOW
#: So many flushes are left to the thread after the mean became slow; then the mean is asked again.
_REST: Final = 64


class Pace:
    """A moving mean of what flushes took, wherever they were done."""

    __slots__ = ("_mean", "_rest")

    def __init__(self) -> None:
        self._mean: int | None = None
        self._rest = 0

    @property
    def is_fast(self) -> bool:
        """Whether the next flush is expected to take no time worth a switch of threads.

        False as long as nothing was flushed.
        """
        return self._mean is not None and not self._rest

    def flushed(self, took: int) -> None:
        """A flush took so many ns."""
        took = min(took, _STALL)
        mean = took if self._mean is None else self._mean + (took - self._mean) // 4
        self._mean = mean
        if self._rest:
            self._rest -= 1
        if not self._rest and mean > _SLOW:
            self._rest = _REST
