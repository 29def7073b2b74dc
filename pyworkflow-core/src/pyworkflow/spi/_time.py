"""The clocks for stores whose clock is the machine's."""

from __future__ import annotations

from datetime import datetime

from pyworkflow import _clock

__all__ = ["ticks", "utcnow"]


def utcnow() -> datetime:
    """Now, aware, in UTC; in a simulation the simulated time of the process that asks.

    A store of one machine that takes its time from here can be simulated.
    """
    return _clock.utcnow()


def ticks() -> int:
    """Microseconds since the machine was started, for ``SteadyClock``; in a simulation, simulated."""
    return _clock.ticks()
