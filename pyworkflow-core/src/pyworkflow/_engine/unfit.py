"""Runs that newer code recorded, and that this worker therefore leaves to others."""

from __future__ import annotations

from datetime import timedelta
from time import monotonic

from pyworkflow.runs import Run

__all__ = ["UnfitRuns"]

_FIRST, _LONGEST = 0.1, 1.0
_REMEMBERED = 10_000


class UnfitRuns:
    """How long which runs are left to other workers, and since when.

    A run that others drive further in between has its whole grace time again.
    """

    def __init__(self, grace: timedelta) -> None:
        self._grace = grace.total_seconds()
        self._runs: dict[str, tuple[int, float, int]] = {}
        """Run id → its ``seen_seq``, when it was met first with that, and how often."""

    def leave(self, run: Run) -> tuple[timedelta | None, bool]:
        """For how long nothing claims it now, or None once the grace time is over; whether it is new.

        Each time longer: a worker that fits has the better chance to be the next.
        """
        now = monotonic()
        seen, since, times = self._runs.get(run.run_id, (-1, now, 0))
        if seen != run.seen_seq:
            since, times = now, 0
        if times and now - since > self._grace:
            return None, False
        self._runs.pop(run.run_id, None)
        if len(self._runs) >= _REMEMBERED:
            self._runs.pop(next(iter(self._runs)))
        self._runs[run.run_id] = run.seen_seq, since, times + 1
        return timedelta(seconds=min(_FIRST * 2 ** min(times, 10), _LONGEST)), not times

    def knows(self, run: Run) -> bool:
        """Whether this worker's code was found too old for the run as it is, and it may wait."""
        seen, since, _ = self._runs.get(run.run_id, (-1, 0.0, 0))
        return seen == run.seen_seq and monotonic() - since <= self._grace
