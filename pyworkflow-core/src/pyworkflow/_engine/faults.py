"""Faults that no rule foresees while a run is driven: tried again after pauses, then a stall."""

from __future__ import annotations

from datetime import timedelta

__all__ = ["Faults"]

STALLS = 3
"""Faults in a row from which on the run is stalled: until then it may be the machine's bad moment."""
_LONGEST_S = 300
_REMEMBERED = 10_000


class Faults:
    """How often in a row the turns of which runs came to a fault in this worker."""

    def __init__(self) -> None:
        self._times: dict[str, int] = {}

    def count(self, run_id: str) -> tuple[timedelta, bool]:
        """For how long nothing should claim the turn now, and whether the run should stall."""
        times = self._times.pop(run_id, 0) + 1
        if len(self._times) >= _REMEMBERED:
            del self._times[next(iter(self._times))]
        self._times[run_id] = times
        return timedelta(seconds=min(2 ** min(times - 1, 10), _LONGEST_S)), times >= STALLS

    def over(self, run_id: str) -> None:
        """A turn of the run ended in order."""
        if self._times:
            self._times.pop(run_id, None)
