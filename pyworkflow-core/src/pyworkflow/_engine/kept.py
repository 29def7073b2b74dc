"""Coroutines that a worker keeps between the turns of their runs."""

from __future__ import annotations

from collections import OrderedDict

from pyworkflow._engine.eviction import Evictor
from pyworkflow._engine.live import LiveRun

__all__ = ["KeptRuns"]


class KeptRuns:
    """A bounded cache of live runs, the least recently used evicted first.

    Dropping a coroutine is always correct, since the history has everything.
    """

    def __init__(self, evictor: Evictor, limit: int) -> None:
        self._evictor = evictor
        self._limit = limit
        self.runs: OrderedDict[str, LiveRun] = OrderedDict()
        self.known: dict[str, int] = {}
        """Run id → seq up to which its kept coroutine has the history."""

    def take(self, run_id: str) -> LiveRun | None:
        """The kept coroutine of a run, which is kept no longer."""
        self.known.pop(run_id, None)
        return self.runs.pop(run_id, None)

    def keep(self, live: LiveRun) -> None:
        """Keep a coroutine until its run's next turn."""
        other = self.runs.pop(live.run_id, None)
        if other is not None and other is not live:
            # Two turns of the run overlapped here: the one that got further is kept.
            if other.replay.fed > live.replay.fed:
                live, other = other, live
            self.drop(other)
        self.runs[live.run_id] = live
        self.known[live.run_id] = live.replay.fed
        while len(self.runs) > self._limit:
            run_id, oldest = self.runs.popitem(last=False)
            self.known.pop(run_id, None)
            self.drop(oldest)

    def drop(self, live: LiveRun) -> None:
        """Close a coroutine."""
        self._evictor.close(live.replay)

    def evict(self, run_id: str | None = None) -> None:
        """Drop the kept coroutine of a run, or all of them."""
        for key in [run_id] if run_id is not None else list(self.runs):
            live = self.take(key)
            if live is not None:
                self.drop(live)
