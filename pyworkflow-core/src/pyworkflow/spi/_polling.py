"""Waits on a store that only answers questions: they ask more and more seldom."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta

from pyworkflow.runs import Run

__all__ = ["DueWatch", "wait_for_run"]

QUICKEST_S = 0.02
SLOWEST_S = 0.5


def _longer(pause: float) -> float:
    return min(pause * 1.5, SLOWEST_S)


async def wait_for_run(
    get_run: Callable[[str], Awaitable[Run | None]], run_id: str, after: int, timeout: timedelta
) -> bool:
    """True when the run has an event after seq ``after``, or has ended; False on timeout."""
    loop = asyncio.get_running_loop()
    end = loop.time() + timeout.total_seconds()
    pause = QUICKEST_S
    while True:
        run = await get_run(run_id)
        if run is not None and (run.history_length > after or run.status.is_terminal):
            return True
        left = end - loop.time()
        if left <= 0:
            return False
        await asyncio.sleep(min(pause, left))
        pause = _longer(pause)


class DueWatch:
    """News for one worker: ``next_due`` is another than in the last look.

    The pause lives from call to call, since a worker waits for a second at most.
    """

    def __init__(self) -> None:
        self._pause = QUICKEST_S
        self._due: datetime | None = None
        self._looked = False

    async def wait(
        self, next_due: Callable[[], Awaitable[datetime | None]], timeout: timedelta
    ) -> bool:
        """True at the first change; False when ``timeout`` is over."""
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout.total_seconds()
        while True:
            due = await next_due()
            if not self._looked or due != self._due:
                self._looked, self._due = True, due
                self._pause = QUICKEST_S
                return True
            left = end - loop.time()
            if left <= 0:
                return False
            await asyncio.sleep(min(self._pause, left))
            self._pause = _longer(self._pause)
