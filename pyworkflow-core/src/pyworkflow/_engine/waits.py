"""How long a worker waits: for what is due next, and for a storage that does not answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from time import monotonic
from typing import ParamSpec, TypeVar

from pyworkflow.errors import StorageUnavailable

__all__ = ["Awaited", "answered"]

P = ParamSpec("P")
T = TypeVar("T")

_SOON = 0.01
_LONGEST = 1.0
_SHORTEST = 0.0005
_DOUBLINGS = 8


class Awaited:
    """The pause before the next look: as long as the storage says, and longer when that is vain.

    What is due by the storage and cannot be claimed was somebody else's, or the clock is a little
    behind. It may also stand still, for as long as the machine's was set back.
    """

    def __init__(self) -> None:
        self._last: tuple[datetime | None, float] = (None, 0.0)
        self._vain = 0

    def came(self) -> None:
        """Something was claimed."""
        self._vain = 0

    def seconds(self, due: datetime, left: float) -> float:
        """Until the next look; ``left`` seconds are missing until ``due``."""
        stands = self._last[0] == due and left >= self._last[1]
        self._last = due, left
        self._vain = min(self._vain + 1, _DOUBLINGS) if left < _SOON or stands else 0
        return min(max(left, _SHORTEST * (1 << self._vain)), _LONGEST)


async def answered(
    patience: timedelta, ask: Callable[P, Awaitable[T]], *args: P.args, **named: P.kwargs
) -> T:
    """The storage's answer; while it is unavailable it is asked again, for so long.

    A claim whose worker gives up runs out only when its lease does.
    """
    end = monotonic() + patience.total_seconds()
    pause = 0.05
    while True:
        try:
            return await ask(*args, **named)
        except StorageUnavailable:
            if monotonic() + pause > end:
                raise
        await asyncio.sleep(pause)
        pause = min(pause * 2, 1.0)
