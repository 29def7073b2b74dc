"""The thread that packs: at most one in all processes that use a namespace."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from typing import Final, Protocol

from pyworkflow.spi import StorageError
from pyworkflow_storage_file._compact import Plan, Stopped, pack
from pyworkflow_storage_file._files import Files, storage_error
from pyworkflow_storage_file._lock import CLEAN, DIRTY, StoreLock

__all__ = ["Packer", "PackingLock", "prepare"]

_log = logging.getLogger("pyworkflow.storage.file")

#: After a failure, the next try comes so many seconds later.
_PAUSE_S: Final = 60.0


class PackingLock:
    """The lock of packing: a file of its own, which the death of its process unlocks."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "packing"
        self._fd = -1

    def try_acquire(self) -> bool:
        """Take the lock if no other process or object has it."""
        mode = self._path.with_name("lock").stat().st_mode & 0o666  # others may share the store
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, mode)
        try:
            flock(fd, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        self._fd = fd
        return True

    def release(self) -> None:
        """Let another one have it. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def prepare(files: Files, lock: StoreLock) -> None:
    """Pack what is sealed before anything is read: by 0.1.0, or by a process that ended early.

    The store's lock is not held on entry and on return. Leaves all as it is when a process died
    while it changed files: that is repaired first, by whoever reads them.

    Raises:
        StorageError: the files cannot be used.
    """
    packing = PackingLock(files.directory)
    if not packing.try_acquire():
        return
    try:
        plan = None
        try:
            plan = pack(files, files.read_manifest(), garbage=frozenset(), stop=lambda: False)
        except OSError as error:
            _log.warning("the journal was not packed: %s", error)
        lock.acquire()
        try:
            if plan is not None:
                _name(files, lock, plan)
            files.remove_leftovers()
        finally:
            lock.release()
    except OSError as error:
        raise storage_error("cannot name a pack", files.directory, error) from error
    finally:
        packing.release()


def _name(files: Files, lock: StoreLock, plan: Plan) -> None:
    """With the lock held: switch to a manifest that names the packs of a plan."""
    marker = lock.read()
    before = files.read_manifest()
    if marker is None or marker.state != CLEAN or before.generation != plan.before.generation:
        return
    manifest = plan.manifest(before)
    lock.write(marker._replace(state=DIRTY))
    files.switch(manifest)
    files.flush_names()
    lock.write(marker._replace(generation=manifest.generation, segments=len(manifest.segments)))


class Host(Protocol):
    """The writer, as the thread uses it. Its methods take the writer's mutex."""

    def seal(self, stop: Callable[[], bool]) -> frozenset[str]:
        """Seal the last segment if much is garbage; the packs that are mostly garbage."""
        ...

    def install(self, plan: Plan, stop: Callable[[], bool]) -> bool:
        """Switch to the packs; False when another process was faster."""
        ...


class Packer:
    """Packs in a thread of its own while there is something to pack."""

    def __init__(self, make_files: Callable[[], Files], host: Host) -> None:
        self._make_files = make_files
        self._host = host
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._lock: PackingLock | None = None
        self._not_before = 0.0

    @property
    def is_ready(self) -> bool:
        """Whether ``start`` would start a thread."""
        return not self._stopping and not self.is_busy and time.monotonic() >= self._not_before

    @property
    def is_busy(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self, seconds: float) -> None:
        """Wait for the thread to end. Without the writer's mutex."""
        if self._thread is not None:
            self._thread.join(seconds)

    def start(self) -> None:
        """Begin to pack."""
        self._thread = threading.Thread(
            target=self._main, name="pyworkflow-storage-file-packing", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """End the thread, whose work is lost; returns when it has ended."""
        self._stopping = True
        thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self._stopping = False

    def abandon(self) -> None:
        """In a forked child: leave the lock to the parent."""
        self._thread = None
        if self._lock is not None:
            self._lock.release()  # closes this process's copy, which does not unlock it

    def _is_stopping(self) -> bool:
        return self._stopping

    def _main(self) -> None:
        files = self._make_files()
        lock = self._lock = PackingLock(files.directory)
        try:
            if not lock.try_acquire():
                self._not_before = time.monotonic() + 1.0  # another process packs
                return
            garbage = self._host.seal(self._is_stopping)
            manifest = files.read_manifest()
            plan = pack(files, manifest, garbage=garbage, stop=self._is_stopping)
            if plan is not None:
                self._host.install(plan, self._is_stopping)
        except Stopped:
            pass
        except (OSError, StorageError) as error:
            self._not_before = time.monotonic() + _PAUSE_S
            if not self._stopping:
                _log.warning("the journal was not packed: %s", error)
        finally:
            lock.release()
