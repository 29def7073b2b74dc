"""The journal of one namespace: a manifest, and segments of lines that only grow at their end.

Sequence of a write: take the lock, read what others appended, append, flush, leave the marker, let
go of the lock. Whoever takes the lock compares the marker with the length of the last segment; if
they differ, a holder died, and the file is flushed before a byte of it is believed. What is left of
a write that was cut short is cut off; any other damage is named and nothing is changed.
Everything here blocks, and is for one thread at a time.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn, Protocol

from pyworkflow.spi import SchemaTooNew, StorageDamaged, StorageError, StorageUnavailable
from pyworkflow.storekit import failpoints
from pyworkflow.storekit.embedded import Pace
from pyworkflow_storage_file import _lines
from pyworkflow_storage_file._calls import Calls
from pyworkflow_storage_file._files import Files, Manifest, read_all, segment_name, storage_error
from pyworkflow_storage_file._lock import (
    CLEAN,
    DIRTY,
    POISONED,
    Marker,
    StoreLock,
    boot_id,
)

__all__ = ["Journal", "Record", "Sink"]

_log = logging.getLogger("pyworkflow.storage.file")

failpoints.register(
    __name__,
    OSError,
    {
        "file.before_append": "records are complete, and nothing of them is in the journal",
        "file.before_fsync": "records are appended, and may not survive power loss",
        "file.after_fsync": "records are on disk, and nobody has an answer yet",
    },
)


class Record(NamedTuple):
    """What one line carries: a kind and its JSON."""

    kind: bytes
    body: bytes


class Sink(Protocol):
    """Who keeps the state that the journal amounts to."""

    def reset(self) -> None:
        """Forget everything: the journal is read from its start."""
        ...

    def load(self, kind: bytes, body: bytes) -> None:
        """Apply one record. An exception means that the record is damaged."""
        ...


class Journal:
    """The files of one namespace in ``directory``, whose records go to ``sink``."""

    def __init__(
        self,
        directory: Path,
        sink: Sink,
        *,
        namespace: str = "default",
        sync: bool = True,
        calls: Calls | None = None,
        segment_bytes: int = 64 * 1024 * 1024,
    ) -> None:
        self.directory = directory
        self.lock = StoreLock(directory)
        self.pace = Pace()
        self._sink = sink
        self._calls = calls if calls is not None else Calls()
        self._files = Files(directory, namespace=namespace, sync=sync, calls=self._calls)
        self._segment_bytes = segment_bytes
        self._boot = boot_id()
        self._fd = -1
        self._loaded = False
        self._generation = 0
        self._segments: list[str] = []
        self._reading = 0
        """Index of the segment that ``_fd`` is open on."""
        self._offset = 0
        self._synced = 0
        self._number = 1
        self._cuts = 0
        self._sealed = 0
        """Bytes in the segments before the current one."""
        self.last_marker: Marker | None = None
        """What the previous holder left, if it lived in this boot; set by ``acquire``."""

    # --- life ---------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Bytes of the current generation, as far as it was read."""
        return self._sealed + self._offset

    @property
    def generation(self) -> int:
        """How often the journal was rewritten, plus one."""
        return self._generation

    def open(self) -> None:
        """Make or find the files and read them all.

        Raises:
            StorageError: the directory cannot be used, or what is in it.
        """
        above = self._files.make_directories()
        try:
            self.lock.open()
        except OSError as error:
            raise storage_error("cannot open the lock", self.lock.path, error) from error
        try:
            self.lock.acquire()
            try:
                if not self._files.manifest_path.exists():
                    self._files.create()
                if self.lock.read() is None:  # whoever made the store may have died over it
                    self._files.flush_names(*above)
                self._files.remove_leftovers()
            except OSError as error:
                raise storage_error("cannot prepare the store", self.directory, error) from error
            finally:
                self.lock.release()
            self.acquire()
            self.release()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the files. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        self._loaded = False
        self.lock.close()

    # --- the lock -----------------------------------------------------------------------------

    def is_current(self) -> bool:
        """Whether the state holds every record that anybody was told is written.

        Takes no lock. False only means that ``acquire`` must look.
        """
        marker = self.lock.read()
        return (
            marker is not None
            and marker.state == CLEAN
            and self._is_here(marker)
            and os.fstat(self._fd).st_size == self._offset
        )

    def acquire(self) -> None:
        """Take the lock and bring the state level with the files.

        Raises:
            StorageError: and the lock is not held.
        """
        self.lock.acquire()
        try:
            marker = self.lock.read()
            self.last_marker = marker if marker is not None and marker.boot == self._boot else None
            if not self._is_level(marker):
                self._catch_up(marker)
        except OSError as error:
            self.lock.release()
            raise storage_error("cannot read the journal", self.directory, error) from error
        except BaseException:
            self.lock.release()
            raise

    def try_acquire(self) -> bool:
        """Take the lock if it is free, nothing is to be read, and the next append is a mere append.

        Raises:
            StorageError: and the lock is not held.
        """
        if self._offset >= self._segment_bytes or not self.lock.try_acquire():
            return False
        try:
            marker = self.lock.read()
            if self._is_level(marker):
                self.last_marker = marker
                return True
        except OSError as error:
            self.lock.release()
            raise storage_error("cannot read the journal", self.directory, error) from error
        except BaseException:
            self.lock.release()
            raise
        self.lock.release()
        return False

    def release(self) -> None:
        """Let go of the lock."""
        self.lock.release()

    def drop_lock(self) -> None:
        """Hold no lock, however far an ``acquire`` came that something was thrown into."""
        self.lock.drop()

    def invalidate(self) -> None:
        """The state may be ahead of the files: unless ``validate`` comes, all is read anew."""
        self._loaded = False

    def validate(self) -> None:
        """The state is level with the files again."""
        self._loaded = True

    # --- writing, with the lock held ----------------------------------------------------------

    def touch(self) -> None:
        """Leave a new marker, with the clocks as they are."""
        self._mark(CLEAN)

    def reload(self) -> None:
        """Read everything anew."""
        self._loaded = False
        self._catch_up(self.lock.read())

    def append(self, records: Sequence[Record], *, durable: bool) -> None:
        """Append records with one write; when ``durable``, they survive power loss on return.

        Raises:
            StorageFull: no room; nothing of them is in the journal, nor will be.
            StorageError: likewise, or nobody can know and the store refuses everybody from now on.
        """
        if self._offset >= self._segment_bytes:
            self._roll()
        number, synced, start = self._number, self._synced, self._offset
        data = b"".join(
            [
                _lines.encode(n, synced, record.kind, record.body)
                for n, record in enumerate(records, number)
            ]
        )
        flushing = False
        try:
            if failpoints.active:
                failpoints.hit("file.before_append")
            self._files.write(self._fd, data, start)
            if durable:
                flushing = True
                if failpoints.active:
                    failpoints.hit("file.before_fsync")
                began = self._calls.ticks()
                self._files.flush(self._fd)
                self.pace.flushed(self._calls.ticks() - began)
                if failpoints.active:
                    failpoints.hit("file.after_fsync")
        except OSError as error:
            # A failed flush may have lost more than this write: everything since the last good one.
            self._undo(synced if flushing else start, error)
        self._offset = start + len(data)
        self._number = number + len(records)
        if durable:
            self._synced = self._offset
        try:
            self._mark(CLEAN)
        except OSError as error:
            self._loaded = False
            raise StorageUnavailable(
                f"cannot tell whether a change was written: path={self.lock.path} error={error}; "
                "send the same change again"
            ) from error

    def rewrite(self, records: Iterable[Record]) -> None:
        """Start a new generation that holds ``records`` alone, and drop the old one.

        A crash at any point leaves the old generation or the new one, whole.

        Raises:
            StorageError: the old generation stands.
        """
        generation = self._generation + 1
        names: list[str] = []
        fd = -1
        offset = number = sealed = 0
        try:
            for record in records:
                if fd < 0 or offset >= self._segment_bytes:
                    if fd >= 0:
                        self._files.flush(fd)
                        os.close(fd)
                        sealed += offset
                    names.append(segment_name(generation, len(names) + 1))
                    fd = self._files.new_segment(names[-1])
                    offset = 0
                number += 1
                line = _lines.encode(number, offset, record.kind, record.body)
                self._files.write(fd, line, offset)
                offset += len(line)
            if fd < 0:
                names.append(segment_name(generation, 1))
                fd = self._files.new_segment(names[-1])
            self._files.flush(fd)
            self._mark(DIRTY)
            self._switch(Manifest(generation, names))
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            self._files.remove_leftovers()
            self._mark(CLEAN)
            raise storage_error("cannot rewrite the journal", self.directory, error) from error
        except StorageError:
            os.close(fd)
            raise
        os.close(self._fd)
        self._fd = fd
        self._generation, self._segments, self._reading = generation, names, len(names) - 1
        self._offset = self._synced = offset
        self._number, self._sealed = number + 1, sealed
        self._mark(CLEAN)
        self._files.remove_leftovers()

    # --- reading ------------------------------------------------------------------------------

    def _is_here(self, marker: Marker) -> bool:
        return (
            self._loaded
            and marker.boot == self._boot
            and marker.generation == self._generation
            and marker.segments == len(self._segments)
            and marker.cuts == self._cuts
        )

    def _is_level(self, marker: Marker | None) -> bool:
        """Whether the state holds all that there is, whoever had the lock before."""
        return (
            marker is not None
            and marker.state == CLEAN
            and self._is_here(marker)
            and os.fstat(self._fd).st_size == self._offset == marker.end
        )

    def _catch_up(self, marker: Marker | None) -> None:
        """Read what is new, all of it when in doubt; leave a clean marker if there was none."""
        alive = marker is not None and marker.boot == self._boot
        if (alive and marker is not None and marker.state == POISONED) or (
            not alive and self._files.poison_path.exists()
        ):
            self._refuse_poisoned()
        clean = alive and marker is not None and marker.state == CLEAN
        cuts = marker.cuts if alive and marker is not None else 0
        if not (clean and marker is not None and self._is_here(marker)):
            manifest = self._files.read_manifest()
            if (
                not self._loaded
                or not alive
                or manifest.generation != self._generation
                or cuts != self._cuts
            ):
                self._restart(manifest)
            self._segments = manifest.segments
        if os.fstat(self._fd).st_size < self._offset:
            self._restart(Manifest(self._generation, self._segments))
        self._cuts = cuts
        self._loaded = False  # until everything was read
        while self._reading < len(self._segments) - 1:
            self._read_segment(None)
            self._sealed += self._offset
            os.close(self._fd)
            self._fd = -1
            self._reading += 1
            self._offset = 0
            self._fd = self._files.open_segment(self._segments[self._reading])
        size = os.fstat(self._fd).st_size
        there = (
            marker is not None
            and marker.generation == self._generation
            and marker.segments == len(self._segments)
        )
        if clean and there and marker is not None and size == marker.end:
            self._synced = marker.synced
            self._read_segment(marker.synced)
            if self._offset == size:
                self._loaded = True
                return
        else:
            # Its last holder died: nothing is believed before it is sure to survive as well.
            self._flush_or_poison()
            self._read_segment(marker.synced if there and marker is not None else 0)
        self._synced = self._offset
        self._loaded = True
        self._mark(CLEAN)

    def _restart(self, manifest: Manifest) -> None:
        self._sink.reset()
        self._loaded = False
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._fd = self._files.open_segment(manifest.segments[0])
        self._generation, self._segments = manifest
        self._reading = self._offset = self._synced = self._sealed = 0
        self._number = 1

    def _read_segment(self, floor: int | None) -> None:
        """Apply the rest of the open segment.

        Below ``floor`` the last segment was durable; None: this is another one, and all of it was.
        """
        path = self.directory / self._segments[self._reading]
        base = self._offset
        data = read_all(self._fd, base)
        size = base + len(data)
        load = self._sink.load
        try:
            for line in _lines.scan(data, base, self._number):
                try:
                    load(line.kind, line.body)
                except (SchemaTooNew, MemoryError):
                    raise
                except Exception as error:
                    raise _lines.Damage(
                        line.offset, f"the record does not load: {type(error).__name__}: {error}"
                    ) from error
                self._offset = line.end
                self._number = line.number + 1
        except _lines.TooNew as error:
            raise SchemaTooNew(str(path), error.version, _lines.FORMAT) from None
        except _lines.Damage as damage:
            if (
                floor is None
                or damage.offset < floor <= size
                or damage.__cause__ is not None
                or not _lines.is_torn(data, base, damage.offset)
            ):
                raise StorageDamaged(str(path), damage.offset, damage.detail) from None
            self._cut_tail(path, damage, size, floor)

    def _cut_tail(self, path: Path, damage: _lines.Damage, size: int, floor: int) -> None:
        """Drop what a dead writer left half done; nobody was told that it is there."""
        if size < floor:
            _log.warning(
                "the journal was shortened by someone else: file=%s length=%d durable=%d",
                path,
                size,
                floor,
            )
        marker = self.last_marker
        if marker is None or damage.offset < marker.end:
            self._cuts += 1  # others may have read what was there
        self._mark(DIRTY)
        self._files.truncate(self._fd, damage.offset)
        self._flush_or_poison()
        _log.info(
            "dropped the rest of a write that was cut short: file=%s offset=%d bytes=%d: %s",
            path,
            damage.offset,
            size - damage.offset,
            damage.detail,
        )

    # --- files --------------------------------------------------------------------------------

    def _roll(self) -> None:
        """Seal the current segment and go on in a new one."""
        name = segment_name(self._generation, len(self._segments) + 1)
        fd = -1
        try:
            self._files.flush(self._fd)
        except OSError as error:
            self._undo(self._synced, error)
        try:
            fd = self._files.new_segment(name)
            self._files.flush(fd)
            self._mark(DIRTY)
            self._switch(Manifest(self._generation, [*self._segments, name]))
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            self._loaded = False
            raise storage_error("cannot start a new segment", self.directory, error) from error
        except StorageError:
            os.close(fd)
            raise
        os.close(self._fd)
        self._fd = fd
        self._segments = [*self._segments, name]
        self._reading += 1
        self._sealed += self._offset
        self._offset = self._synced = 0
        self._mark(CLEAN)

    def _switch(self, manifest: Manifest) -> None:
        """Make ``manifest`` the journal, for good."""
        self._files.switch(manifest)
        try:
            self._files.flush_names()
        except OSError as error:
            # Appends would go to a segment that may not be the store's after power loss.
            self._poison(error)

    def _flush_or_poison(self) -> None:
        """A flush that cannot be undone when it fails: a second one would wrongly succeed."""
        try:
            self._files.flush(self._fd)
        except OSError as error:
            self._poison(error)

    def _mark(self, state: int) -> None:
        wall, boottime = self._calls.clocks()
        self.lock.write(
            Marker(
                state,
                self._boot,
                self._generation,
                len(self._segments),
                self._cuts,
                self._offset,
                self._synced,
                os.getpid(),
                wall,
                boottime,
            )
        )

    # --- when writing fails -------------------------------------------------------------------

    def _undo(self, length: int, error: OSError) -> NoReturn:
        """Take back a write that failed, down to ``length``, for everybody and for good."""
        self._loaded = False
        try:
            if length < self._offset:
                self._cuts += 1  # others may have read what goes now
            self._mark(DIRTY)
            self._files.truncate(self._fd, length)
            self._files.flush(self._fd)
            self._offset = length
            self._synced = min(self._synced, length)
            self._mark(CLEAN)
        except OSError:
            self._poison(error)
        raise storage_error("cannot write", self._segment_path(), error) from error

    def _poison(self, error: OSError) -> NoReturn:
        """Nobody can know what the disk holds: refuse everybody, also after a restart."""
        self._loaded = False
        reason = f"file={self._segment_path()} error={error}\n"
        try:
            self._mark(POISONED)
        except OSError:
            pass  # the file that comes next says so too
        self._files.poison(reason)
        _log.critical("the store is poisoned: path=%s %s", self.directory, reason.strip())
        self._refuse_poisoned(error)

    def _refuse_poisoned(self, cause: BaseException | None = None) -> NoReturn:
        raise StorageError(
            f"the store is poisoned: path={self.directory}: the disk failed while data was being "
            "made durable, and what it holds cannot be known; stop every process that uses the "
            "store, check the disk, copy the directory to a good one, delete its files "
            f"'{self._files.poison_path.name}' and '{self.lock.path.name}', and start again"
        ) from cause

    def _segment_path(self) -> Path:
        return self.directory / self._segments[-1] if self._segments else self.directory
