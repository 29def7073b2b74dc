"""How long a worker waits for what is due next."""

from __future__ import annotations

from datetime import datetime

__all__ = ["Awaited"]

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
