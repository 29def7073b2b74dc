"""The files of an open database, compared with what its path names."""

from __future__ import annotations

import os
from pathlib import Path

from pyworkflow.spi import StorageError

__all__ = ["Place"]

_Inode = tuple[int, int]


class Place:
    """Whether the files that a process has open are those that others would open.

    SQLite itself continues on files without a name, which no other process can open, and on a
    database that was truncated, as long as pages of it are cached or in its log.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._path = str(path)
        self._log_path = ""
        self._inode: _Inode | None = None
        """Device and number of the file that was opened first; another one is not opened later."""
        self._log: _Inode | None = None
        """The same of ``-wal``, which stays while a connection is open; None when none is."""

    def opened(self) -> None:
        """The writing connection is open, and has read."""
        self._inode = _inode_of(self._path)
        self._log_path = f"{os.path.realpath(self.path)}-wal"  # SQLite follows links, too
        self._log = _inode_of(self._log_path)

    def closing(self) -> None:
        """It is about to be closed; the last one of all processes deletes the log.

        A log that was lost before stays lost: a connection with another one would mix them up.
        """
        if self._log is not None and _inode_of(self._log_path) == self._log:
            self._log = None

    def check(self) -> None:
        """Cheap enough for each transaction; from any thread.

        Raises:
            StorageError: The files were deleted, moved or replaced, or the database is empty.
        """
        inode, log = self._inode, self._log
        if inode is None:
            return
        try:
            status = os.stat(self._path)  # noqa: PTH116 - half the time of Path.stat
        except FileNotFoundError:
            raise self._moved() from None
        if (status.st_dev, status.st_ino) != inode:
            raise self._moved()
        if not status.st_size:
            raise StorageError(
                f"the database was truncated while in use: path={self.path}; what was not "
                "acknowledged is not in it. End the processes that use it, then restore the file "
                "from a copy"
            )
        if log is None:
            return
        try:
            status = os.stat(self._log_path)  # noqa: PTH116 - as above
        except FileNotFoundError:
            is_there = False
        else:
            is_there = (status.st_dev, status.st_ino) == log
        if not is_there and self._log is log:  # else the connection was closed meanwhile
            raise StorageError(
                "the write-ahead log of the database was deleted, moved or replaced while in use: "
                f"path={self._log_path}; what was not acknowledged is not in the file at this "
                "path. Put the file back, or end the processes that use the database, and start "
                "them again"
            )

    def _moved(self) -> StorageError:
        return StorageError(
            f"the database was deleted, moved or replaced while in use: path={self.path}; "
            "what was not acknowledged is not in the file at this path. Put the file back, or "
            "start the process again to use the one that is there"
        )


def _inode_of(path: str) -> _Inode:
    """Device and number of the file at the path; (0, 0) when there is none."""
    try:
        status = os.stat(path)  # noqa: PTH116 - as above
    except FileNotFoundError:
        return 0, 0
    return status.st_dev, status.st_ino
