"""Work that failed in a way that no rule foresees: it is left alone, longer each time."""

from __future__ import annotations

from collections.abc import Hashable
from datetime import timedelta

__all__ = ["Faults"]

STALLS = 3
"""Faults in a row that stall a run; fewer may be a bad moment of the machine."""
_LONGEST_S = 300
_REMEMBERED = 10_000


class Faults:
    """How often in a row which turns or items failed in this worker."""

    def __init__(self) -> None:
        self._times: dict[Hashable, int] = {}

    def count(self, key: Hashable) -> tuple[timedelta, bool]:
        """For how long nothing should claim it now, and whether its run should stall."""
        times = self._times.pop(key, 0) + 1
        if len(self._times) >= _REMEMBERED:
            del self._times[next(iter(self._times))]
        self._times[key] = times
        return timedelta(seconds=min(2 ** min(times - 1, 10), _LONGEST_S)), times >= STALLS

    def over(self, key: Hashable) -> None:
        """It ended without a fault."""
        if self._times:
            self._times.pop(key, None)
