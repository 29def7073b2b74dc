"""One LMDB environment per directory and process: opening, transactions, growth, forks, errors.

LMDB forbids to open a directory twice in one process and to use it across a fork. A transaction
blocks: nothing here may be called on an event loop.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import lmdb

from pyworkflow.spi import (
    ConfigurationError,
    SchemaTooNew,
    StorageDamaged,
    StorageError,
    StorageFull,
    StorageUnavailable,
)
from pyworkflow_storage_lmdb._plugin import LEAST_SIZE

__all__ = ["Environment"]

T = TypeVar("T")

#: Version of the layout that `_tables` describes.
SCHEMA = 1
FIRST_SIZE = LEAST_SIZE
MAX_SIZE = 1 << 40
MADE = "made"
"""An empty file beside LMDB's: a store was made here."""

_open: dict[Path, Environment] = {}
_lock = threading.RLock()


class Environment:
    """An open directory, shared by all storage objects of the process that use it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.users = 0
        # Held for each transaction: LMDB grows only while none is open, and no fork may copy one.
        self.lock = threading.Lock()
        path.mkdir(parents=True, exist_ok=True)
        file = path / "data.mdb"
        # LMDB takes an empty file for a new one, and would begin anew in silence.
        if (path / MADE).exists() and not (file.exists() and file.stat().st_size):
            raise StorageDamaged(str(file), 0, "it is empty or gone")
        self.lmdb = lmdb.open(str(path), map_size=FIRST_SIZE, max_readers=1024)
        try:
            self._fill_up(file)
            self.lmdb.reader_check()  # slots of processes that are gone
        except BaseException:
            self.lmdb.close()
            raise

    def _fill_up(self, file: Path) -> None:
        """Make the file as long as its pages say: reading behind its end would kill the process.

        LMDB itself leaves free pages at the end unwritten, so a short file may be a sound one. In
        one that was cut, pages of zeros stand for what is missing: no tree and no value is that.
        """
        while True:
            try:
                with self.lmdb.begin(write=True):  # nobody else makes it longer meanwhile
                    needed = (self.lmdb.info()["last_pgno"] + 1) * self.lmdb.stat()["psize"]
                    if file.stat().st_size < needed:
                        os.truncate(file, needed)
                    return
            except lmdb.MapResizedError:
                self.lmdb.set_mapsize(0)  # another process made it larger since it was opened

    @classmethod
    def acquire(cls, path: Path) -> Environment:
        """The environment of a directory, open and with the current schema; ``release`` it."""
        path = path.absolute()
        with _lock:
            environment = _open.get(path)
            if environment is None:
                try:
                    environment = cls(path)
                except (FileExistsError, NotADirectoryError, PermissionError) as error:
                    raise ConfigurationError(
                        f"the directory cannot be used: path={path} cause={error.strerror}; "
                        "name one that can be made and written"
                    ) from error
                except (lmdb.Error, OSError) as error:
                    raise _translated(error, path) from error
                try:
                    environment.run(_migrate, write=True, max_size=MAX_SIZE)
                    (path / MADE).touch()
                except BaseException:
                    environment.lmdb.close()
                    raise
                _open[path] = environment
            environment.users += 1
            return environment

    def release(self) -> None:
        """Close when nobody else uses it."""
        with _lock:
            self.users -= 1
            if self.users == 0 and _open.get(self.path) is self:
                del _open[self.path]
                with self.lock:
                    self.lmdb.close()

    def run(self, work: Callable[[lmdb.Transaction], T], *, write: bool, max_size: int) -> T:
        """What ``work`` returns, done in one transaction; an exception undoes it."""
        with self.lock:
            while True:
                try:
                    with self.lmdb.begin(write=write) as txn:
                        return work(txn)
                except lmdb.MapFullError as error:
                    size = self.lmdb.info()["map_size"]
                    if size >= max_size:
                        raise StorageFull(
                            f"the store has reached its largest size: path={self.path} "
                            f"max_size={max_size}; purge old runs, or open it with a larger "
                            "max_size"
                        ) from error
                    self.lmdb.set_mapsize(min(2 * size, max_size))
                except lmdb.MapResizedError:
                    self.lmdb.set_mapsize(0)  # another process made it larger: take its size
                except lmdb.Error as error:
                    raise _translated(error, self.path) from error
                except (json.JSONDecodeError, UnicodeDecodeError) as error:
                    file = str(self.path / "data.mdb")
                    raise StorageDamaged(file, 0, "a value in it is no JSON") from error


def _migrate(txn: lmdb.Transaction) -> None:
    # In a write transaction: of several processes that come at once, one writes.
    found = txn.get(b"mschema")
    if found is None:
        txn.put(b"mschema", str(SCHEMA).encode())
    elif (version := json.loads(bytes(found))) > SCHEMA:
        raise SchemaTooNew("lmdb", version, SCHEMA)


def _translated(error: Exception, path: Path) -> StorageError:
    damaged = (lmdb.CorruptedError, lmdb.InvalidError, lmdb.PageNotFoundError)
    if isinstance(error, damaged):
        return StorageDamaged(str(path / "data.mdb"), 0, str(error))
    if isinstance(error, lmdb.VersionMismatchError):
        return StorageError(
            f"another version of LMDB wrote this file: path={path} cause={error}; "
            "open it with the lmdb package that wrote it"
        )
    if isinstance(error, lmdb.DiskError):
        return StorageFull(f"the disk is full: path={path} cause={error}; make room")
    return StorageUnavailable(
        f"the store does not answer: path={path} cause={error}; is the directory local, "
        "writable, and not full?"
    )


# A child gets none of its parent's environments. No transaction is open while the fork happens.


def _before_fork() -> None:
    _lock.acquire()
    for environment in _open.values():
        environment.lock.acquire()


def _in_parent() -> None:
    for environment in _open.values():
        environment.lock.release()
    _lock.release()


def _in_child() -> None:
    global _lock
    for environment in _open.values():
        environment.lmdb.close()  # lets go of the child's copy alone
    _open.clear()
    _lock = threading.RLock()


os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)
