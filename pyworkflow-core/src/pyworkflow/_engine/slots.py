"""How many steps run at once."""

from __future__ import annotations

import asyncio
from collections import deque

__all__ = ["Slots"]


class Slots:
    """A semaphore of one event loop whose free slot costs neither a coroutine nor a turn.

    A slot that is given back goes to whoever has waited longest.
    """

    def __init__(self, number: int) -> None:
        self._free = self._number = number
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def in_use(self) -> int:
        """How many slots are taken."""
        return self._number - self._free

    def take(self) -> bool:
        """Take a free slot; False when all are taken."""
        if self._free <= 0:
            return False
        self._free -= 1
        return True

    async def acquire(self, *, first: bool = False) -> None:
        """Wait for a slot; ``first`` before all that wait for one now."""
        if self.take():
            return
        slot: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if first:
            self._waiting.appendleft(slot)
        else:
            self._waiting.append(slot)
        try:
            await slot
        except asyncio.CancelledError:
            if not slot.cancelled():
                self.release()  # it was given just before
            raise

    def force(self) -> None:
        """Take a slot although none is free: the next ones that are released make up for it."""
        self._free -= 1

    def release(self) -> None:
        """Give a slot back."""
        if self._free < 0:
            self._free += 1
            return
        waiting = self._waiting
        while waiting:
            slot = waiting.popleft()
            if not slot.done():
                slot.set_result(None)
                return
        self._free += 1
