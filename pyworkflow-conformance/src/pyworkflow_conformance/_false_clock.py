"""Starts ``_worker.py`` in a process whose clock is an hour ahead, before anything is imported."""

from __future__ import annotations

import datetime as dt
import runpy
import sys
import time
from pathlib import Path
from typing import Any

AHEAD = 3600
_time, _time_ns, _datetime = time.time, time.time_ns, dt.datetime


class _Kind(type):
    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, _datetime)


class _False(dt.datetime, metaclass=_Kind):
    """What ``datetime`` is called while the clock is false."""

    @classmethod
    def now(cls, tz: dt.tzinfo | None = None) -> Any:
        """An hour ahead."""
        return _datetime.now(tz) + dt.timedelta(seconds=AHEAD)


def main() -> None:
    """Falsify the clock and do the task of the command line."""
    time.time = lambda: _time() + AHEAD
    time.time_ns = lambda: _time_ns() + AHEAD * 10**9
    dt.datetime = _False  # type: ignore[misc]  # what this module is for
    worker = str(Path(__file__).with_name("_worker.py"))
    sys.argv[0] = worker
    runpy.run_path(worker, run_name="__main__")


if __name__ == "__main__":
    main()
