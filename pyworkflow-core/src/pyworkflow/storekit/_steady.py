"""The clock of a store that has only machines' clocks."""

from __future__ import annotations

import time
from pathlib import Path

from pyworkflow import _clock

__all__ = ["SteadyClock", "boot_id", "machine_clocks"]

#: A pause of so many ns between the readings of two clocks makes them worthless.
_PAUSE = 10_000_000


def boot_id() -> bytes:
    """Sixteen bytes that change when the machine starts again; zeros where that is not known."""
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        return bytes.fromhex(text.strip().replace("-", ""))
    except (OSError, ValueError):
        return bytes(16)


def machine_clocks() -> tuple[int, int]:
    """The wall clock and the time since boot, microseconds, as ``SteadyClock`` wants them."""
    while True:
        wall = time.time_ns()
        since_boot = _clock.ticks()
        if time.time_ns() - wall < _PAUSE:
            return wall // 1000, since_boot


class SteadyClock:
    """A clock that never stops and never goes back, made of a wall clock that may do both.

    It shows the wall clock. When that is set back, or is behind what another process once read from
    the store's clock, it continues from the latest reading at the pace of the time since boot, so
    that durations stay right. When the wall clock is set forward it follows.

    Pure: the caller reads the machine's clocks, the wall clock *first* (a pause between the two
    must not look like a wall clock that is ahead), all in one unit of the caller's choice. ``ticks``
    is the time since boot (``pyworkflow.spi.ticks`` in microseconds): it continues while the
    machine sleeps, and cannot be set.

    The state is one integer, ``base``: what the store's clock shows when ``ticks`` is zero. It only
    grows. Keep it beside the data together with an id of the boot: processes of the same boot
    ``resume`` it before they read. After another boot its ticks mean nothing; there, ``resume`` the
    latest reading that was stored minus the ticks of now.
    """

    __slots__ = ("base",)

    def __init__(self) -> None:
        self.base: int | None = None
        """The instant at which ``ticks`` was zero; None before the first reading."""

    def resume(self, base: int) -> None:
        """Be no earlier than a clock with this base, which another process or boot has shown."""
        if self.base is None or base > self.base:
            self.base = base

    def read(self, wall: int, ticks: int) -> int:
        """What the store's clock shows."""
        base = wall - ticks
        if self.base is None or base > self.base:
            self.base = base
        return ticks + self.base

    def lead(self, wall: int, ticks: int) -> int:
        """By how much the store's clock is ahead of the wall clock; negative while it is behind.

        Behind it is only until the next ``read``: by as much the wall clock was set forward.
        """
        return 0 if self.base is None else self.base - (wall - ticks)
