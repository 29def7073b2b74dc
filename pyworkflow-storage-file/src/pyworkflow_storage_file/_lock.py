"""The lock of one namespace, and the marker in its file that says how the last holder left.

Two locks, so that waiting is fair: who wants the store takes the *gate* (on the directory), then
the *lock* (on the file ``lock``), then lets go of the gate. A holder that comes back at once finds
the gate taken by whoever waits. Both are ``flock`` on files of their own opening, so that several
objects in one process exclude each other, and both end with their process.
"""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

from pyworkflow.spi import ConfigurationError, StorageError
from pyworkflow.storekit import boot_id

try:
    from fcntl import LOCK_EX, LOCK_NB, LOCK_UN, flock
except ModuleNotFoundError as error:
    raise ConfigurationError(
        "the file backend needs POSIX file locks, which this system lacks; use sqlite"
    ) from error

__all__ = [
    "CLEAN",
    "DIRTY",
    "POISONED",
    "Marker",
    "Place",
    "StoreLock",
    "boot_id",
    "elsewhere",
]

CLEAN, DIRTY, POISONED = 0, 1, 2
_LAYOUT = struct.Struct("<4sB3x16sQQQQQIqq")
_CHECK = struct.Struct("<I")
_MAGIC = b"pwf1"
_SIZE = _LAYOUT.size + _CHECK.size


class Marker(NamedTuple):
    """What the last holder of the lock left behind.

    Never flushed: it speaks to processes of the same boot. After a restart of the machine its
    ``boot`` is another and only ``synced`` still counts, which is true whenever it was written.
    """

    state: int
    """``CLEAN``; ``DIRTY`` while files change in ways their length does not show; ``POISONED``."""
    boot: bytes
    generation: int
    segments: int
    """How many segments the generation had."""
    cuts: int
    """Grows each time bytes were cut off that others may have read."""
    end: int
    """Length of the last segment. Another length there: a holder died before it was done."""
    synced: int
    """Up to here the last segment was durable."""
    pid: int
    wall: int
    """What the store's clock showed then, without its offset, ns."""
    boottime: int
    """Time since boot then, ns: it continues while the machine sleeps and cannot be set."""

    def pack(self) -> bytes:
        """The bytes of the marker."""
        data = _LAYOUT.pack(_MAGIC, *self)
        return data + _CHECK.pack(crc32(data))

    @classmethod
    def unpack(cls, data: bytes) -> Marker | None:
        """Inverse of ``pack``; None for anything else."""
        if len(data) != _SIZE or _CHECK.unpack_from(data, _LAYOUT.size)[0] != crc32(
            data[: _LAYOUT.size]
        ):
            return None
        magic, *fields = _LAYOUT.unpack_from(data)
        return cls(*fields) if magic == _MAGIC else None


class StoreLock:
    """The exclusive lock of one namespace. Used by one thread at a time."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.path = directory / "lock"
        self._gate = -1
        self._fd = -1
        self.place = Place(self.path)
        self._known: tuple[bytes, Marker | None] = b"", None
        """What was read or written last, and what it means."""
        self.waiting_since: float | None = None
        """Monotonic time since when ``acquire`` waits; None when it does not. Read by others."""

    def open(self) -> None:
        """Open the files. The directory exists."""
        self._gate = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.place = Place(self.path, self._fd)

    def close(self) -> None:
        """Close the files, which also gives the lock up. Idempotent."""
        gate, fd, self._gate, self._fd = self._gate, self._fd, -1, -1
        for each in (gate, fd):
            if each >= 0:
                os.close(each)

    def acquire(self) -> None:
        """Wait until nobody else has the lock.

        Raises:
            StorageError: the path names another file, or none; the lock is not held.
        """
        self.waiting_since = time.monotonic()
        flock(self._gate, LOCK_EX)
        try:
            flock(self._fd, LOCK_EX)
        finally:
            flock(self._gate, LOCK_UN)
            self.waiting_since = None
        if self.place.length() is None:
            self.release()
            raise elsewhere(self.path)

    def try_acquire(self) -> bool:
        """Take the lock if nobody has it or waits for it. Whether it is in place is not asked."""
        try:
            flock(self._gate, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            return False
        try:
            flock(self._fd, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            flock(self._gate, LOCK_UN)
        return True

    def release(self) -> None:
        """Let the next one have it."""
        flock(self._fd, LOCK_UN)

    def drop(self) -> None:
        """Have neither the lock nor the gate, whatever was taken."""
        for each in (self._gate, self._fd):
            if each >= 0:
                flock(each, LOCK_UN)

    def read(self) -> Marker | None:
        """The marker; None when there is none yet, or when it is half written or foreign.

        Without the lock the answer may be out of date at once.
        """
        data = os.pread(self._fd, _SIZE, 0)
        known, marker = self._known
        if data != known:
            marker = Marker.unpack(data)
            self._known = data, marker
        return marker

    def write(self, marker: Marker) -> None:
        """Leave the marker. Only with the lock held."""
        data = marker.pack()
        os.pwrite(self._fd, data, 0)
        self._known = data, marker


class Place:
    """The path of a file that is open, and whether it still names that file."""

    __slots__ = ("_device", "_name", "_number", "path")

    def __init__(self, path: Path, fd: int = -1) -> None:
        """Take the file behind ``fd`` for the one at the path. With -1 there is none yet."""
        self.path = path
        self._name = os.fspath(path)
        status = os.fstat(fd) if fd >= 0 else None
        self._device, self._number = (status.st_dev, status.st_ino) if status else (0, 0)

    def length(self) -> int | None:
        """Bytes of the file that is open; None when the path does not name it any more."""
        try:
            status = os.stat(self._name)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if status.st_ino != self._number or status.st_dev != self._device:
            return None
        return status.st_size


def elsewhere(path: Path, *, written: bool = False) -> StorageError:
    """The error for a file that another process deleted, moved or replaced.

    ``written``: it was noticed after a change was written.
    """
    where = (
        "the change may be in the files that were there before"
        if written
        else "nothing was written to what the path names now"
    )
    return StorageError(
        f"the store was deleted, moved or replaced while in use: path={path}; {where}. "
        "Put it back in place, or restart this process to use what the path names"
    )
