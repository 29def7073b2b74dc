"""Doorbells that a process had no room for: it takes them again when something is done with.

A process takes more doorbells than it runs steps when its pool has more threads than that, or when
a turn handed steps off to itself. What it refuses is rung for anew by a sweep, but much later.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable

from pyworkflow.errors import StorageError
from pyworkflow.spi import Doorbell, Outcome

__all__ = ["Refusals"]

_MOST = 10_000
_TRIES = 50
"""How often one is taken again. That it was refused may also mean that somebody else is at it."""
_IN_A_ROW = 3
"""How many are tried each time that something is done with."""


class Refusals:
    """Handles doorbells, and remembers the refused ones. All of it in one event loop."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, str], tuple[Doorbell, int]] = OrderedDict()
        self._under_way = 0
        self._done = 0
        """How many were not refused: each that is done with may leave room."""
        self._tasks: set[asyncio.Task[None]] = set()

    def forget(self) -> None:
        """The process takes nothing more: sweeps ring for what is kept here."""
        self._kept.clear()

    async def handle(
        self, handle: Callable[[Doorbell], Awaitable[Outcome]], bell: Doorbell, tries: int = 0
    ) -> Outcome:
        """What ``handle`` answers."""
        self._under_way += 1
        done = self._done
        try:
            outcome = await handle(bell)
        finally:
            self._under_way -= 1
        if outcome is not Outcome.BUSY:
            self._done += 1
            self._again(handle)
            return outcome
        # Whatever was done with while the store was asked has found nothing kept to begin.
        missed = self._done != done
        # Alone, there was room: somebody else is at it.
        if (missed or self._under_way) and tries < _TRIES and len(self._kept) < _MOST:
            self._kept[bell.run_id, bell.item_id] = bell, tries
        if missed or not self._under_way:
            self._again(handle)  # what is kept would wait for nobody here
        return outcome

    def _again(self, handle: Callable[[Doorbell], Awaitable[Outcome]]) -> None:
        if self._kept:
            task = asyncio.get_running_loop().create_task(self._take_again(handle))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _take_again(self, handle: Callable[[Doorbell], Awaitable[Outcome]]) -> None:
        for _ in range(_IN_A_ROW):
            if not self._kept:
                return
            _, (bell, tries) = self._kept.popitem(last=False)
            try:
                outcome = await self.handle(handle, bell, tries + 1)
            except StorageError:
                return  # a sweep rings for it
            if outcome is not Outcome.BUSY:
                return  # this has begun the next one
