"""The few operating-system calls whose failures the journal must survive: the seam of its tests.

Everything else (opening, locking, reading) goes to ``os`` directly.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

__all__ = ["Calls"]


#: Goes on while the machine sleeps, and nobody can set it.
_SINCE_BOOT: int = getattr(time, "CLOCK_BOOTTIME", getattr(time, "CLOCK_MONOTONIC", 0))


class Calls:
    """Writes, flushes and clocks of the operating system. Tests override single methods."""

    def clocks(self) -> tuple[int, int]:
        """The wall clock and the time since boot, ns."""
        while True:
            wall = time.time_ns()
            # Read second: a pause in between must not look like a wall clock that is ahead.
            boottime = time.clock_gettime_ns(_SINCE_BOOT)
            # After a long one the store's clock would be behind for once.
            if time.time_ns() - wall < 10_000_000:
                return wall, boottime

    def ticks(self) -> int:
        """What tells how long something took, ns."""
        return time.perf_counter_ns()

    def write(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        """Write at ``offset``; returns how many bytes were taken."""
        return os.pwrite(fd, data, offset)

    def truncate(self, fd: int, length: int) -> None:
        """Cut the file off."""
        os.ftruncate(fd, length)

    def flush(self, fd: int) -> None:
        """Return when the file's bytes and length survive power loss."""
        if sys.platform == "darwin":
            import fcntl

            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)  # fsync there stops at the drive's cache
        elif hasattr(os, "fdatasync"):
            os.fdatasync(fd)
        else:
            os.fsync(fd)

    def flush_directory(self, path: Path) -> None:
        """Return when the names in a directory survive power loss."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def replace(self, source: Path, target: Path) -> None:
        """Give a file the name of another, in one step."""
        os.replace(source, target)
