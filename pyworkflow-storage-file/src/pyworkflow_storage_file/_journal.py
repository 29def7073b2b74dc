"""The journal of one namespace: a manifest, packs, and segments of lines that grow at their end.

What lies in packs and in all segments but the last does not change: it is read without the lock.
Sequence of a write: take the lock, read what others appended, append, flush, leave the marker, let
go of the lock. Whoever takes the lock compares the marker with the length of the last segment; if
they differ, a holder died, and the file is flushed before a byte of it is believed. What is left of
a write that was cut short is cut off; any other damage is named and nothing is changed.
Everything here blocks, and is for one thread at a time.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NoReturn, TypeGuard

from pyworkflow.spi import StorageDamaged, StorageError, StorageUnavailable
from pyworkflow.storekit import SteadyClock, failpoints
from pyworkflow.storekit.embedded import Pace
from pyworkflow_storage_file import _lines
from pyworkflow_storage_file._calls import Calls
from pyworkflow_storage_file._compact import Plan
from pyworkflow_storage_file._files import Files, Manifest, segment_name, storage_error
from pyworkflow_storage_file._lock import (
    CLEAN,
    DIRTY,
    POISONED,
    Marker,
    StoreLock,
    boot_id,
    elsewhere,
)
from pyworkflow_storage_file._packs import Pack
from pyworkflow_storage_file._reading import Reader
from pyworkflow_storage_file._records import Record, Sink

__all__ = ["SEGMENT_BYTES", "Clocks", "Journal", "Record", "Sink"]

_log = logging.getLogger("pyworkflow.storage.file")

failpoints.register(
    __name__,
    OSError,
    {
        "file.before_append": "records are complete, and nothing of them is in the journal",
        "file.before_fsync": "records are appended, and may not survive power loss",
        "file.after_fsync": "records are on disk, and nobody has an answer yet",
        "file.before_pack": "packs are on disk, and the manifest does not name them",
    },
)


#: A segment that has reached this length is sealed, and goes into a pack.
SEGMENT_BYTES: Final = 16 * 1024 * 1024
#: So little is read with the lock held, without looking for what can be read before.
_LITTLE: Final = 256 * 1024
#: So often what is packed while it is read is looked for at its new place, without the lock.
_TRIES: Final = 5


#: Wall clock and time since boot, ns.
Clocks = tuple[int, int]


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
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        self.directory = directory
        self.lock = StoreLock(directory)
        self.pace = Pace()
        self.clock = SteadyClock()
        """Shows ns, without the offset that the store adds."""
        self._clocks: Clocks = 0, 0
        """As they were read last."""
        self._sink = sink
        self._calls = calls if calls is not None else Calls()
        self._files = Files(directory, namespace=namespace, sync=sync, calls=self._calls)
        self._segment_bytes = segment_bytes
        self._boot = boot_id()
        self._pid = os.getpid()
        self._at = Reader(self._files, sink)
        self._loaded = False
        self._synced = 0
        self._cuts = 0
        self._mine: Marker | None = None
        """The last one that this object left, while all of it is so here."""
        self.last_marker: Marker | None = None
        """What the previous holder left, if it lived in this boot; set by ``acquire``."""

    # --- life ---------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Bytes of the packs and segments, as far as they were read."""
        return self._at.size

    @property
    def packs(self) -> Sequence[Pack]:
        """The packs, as far as this process has taken them over."""
        return self._at.packs.opened

    @property
    def has_sealed(self) -> bool:
        """Whether there are segments to be packed."""
        return len(self._at.manifest.segments) > 1

    @property
    def generation(self) -> int:
        """How often the journal was packed, plus one."""
        return self._at.manifest.generation

    def make_files(self) -> Files:
        """For another thread: an object for the same files."""
        return self._files.copy()

    def open(self, prepare: Callable[[], None] | None = None) -> None:
        """Make or find the files and read them. ``prepare`` is called in between.

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
            except OSError as error:
                raise storage_error("cannot prepare the store", self.directory, error) from error
            finally:
                self.lock.release()
            if prepare is not None:
                prepare()
            self.acquire()
            self.release()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the files. Idempotent."""
        self._loaded = False
        self._at.close()
        self.lock.close()

    # --- the lock -----------------------------------------------------------------------------

    def read_clocks(self) -> Clocks:
        """Read the machine's clocks. The next marker says what they were."""
        self._clocks = clocks = self._calls.clocks()
        return clocks

    def is_current(self) -> bool:
        """Whether the state holds every record that anybody was told is written.

        Takes no lock. False only means that ``acquire`` must look.
        """
        marker = self.lock.read()
        if marker is None or marker.state != CLEAN or not self._is_here(marker):
            return False
        if marker is not self._mine:
            self.clock.resume(marker.wall - marker.boottime)
        return self._at.place.length() == self._at.offset

    def check_place(self) -> None:
        """With the lock held, after a write: others take the same lock.

        That they read the same segment was seen when the lock was taken. So one look before a
        write and one after it tell that it is where others look for it.

        Raises:
            StorageError: the store was deleted, moved or replaced.
        """
        if self.lock.place.length() is None:
            raise elsewhere(self.lock.path, written=True)

    def acquire(self) -> None:
        """Take the lock and bring the state level with the files.

        Raises:
            StorageError: and the lock is not held.
        """
        self.read_ahead()
        self.lock.acquire()
        try:
            marker = self.lock.read()
            self.read_clocks()
            self.last_marker = marker if marker is not None and marker.boot == self._boot else None
            self._resume_clock(marker)
            if self._is_level(marker):
                self._synced = marker.synced
            else:
                self._catch_up(marker)
                if self._at.place.length() is None:
                    self._loaded = False
                    raise elsewhere(self._at.path)
        except OSError as error:
            self.lock.release()
            raise storage_error("cannot read the journal", self.directory, error) from error
        except BaseException:
            self.lock.release()
            raise

    def try_acquire(self) -> bool:
        """Take the lock if it is free, nothing is to be read, and the next append is a mere append.

        Then ``make_room`` has nothing to do.

        Raises:
            StorageError: and the lock is not held.
        """
        if self._at.offset >= self._segment_bytes or not self.lock.try_acquire():
            return False
        try:
            marker = self.lock.read()
            if self._is_level(marker):
                if marker is not self._mine:
                    self._synced = marker.synced
                    self._resume_clock(marker)
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

    def make_room(self) -> None:
        """Begin a new segment if the last one is full: before the sink is told of new records.

        Raises:
            StorageFull, StorageError: nothing has changed.
        """
        if self._at.offset >= self._segment_bytes:
            self._roll()

    def append(self, records: Sequence[Record], *, durable: bool) -> None:
        """Append records with one write; when ``durable``, they survive power loss on return.

        Raises:
            StorageFull: no room; nothing of them is in the journal, nor will be.
            StorageError: likewise, or nobody can know and the store refuses everybody from now on.
        """
        if self._at.offset >= self._segment_bytes:
            self._roll()
        number, synced, start = self._at.number, self._synced, self._at.offset
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
            self._files.write(self._at.fd, data, start)
            if durable:
                flushing = True
                if failpoints.active:
                    failpoints.hit("file.before_fsync")
                began = self._calls.ticks()
                self._files.flush(self._at.fd)
                self.pace.flushed(self._calls.ticks() - began)
                if failpoints.active:
                    failpoints.hit("file.after_fsync")
        except OSError as error:
            # A failed flush may have lost more than this write: everything since the last good one.
            self._undo(synced if flushing else start, error)
        self._at.offset = start + len(data)
        self._at.number = number + len(records)
        if durable:
            self._synced = self._at.offset
        try:
            self._mark(CLEAN)
        except OSError as error:
            self._loaded = False
            raise StorageUnavailable(
                f"cannot tell whether a change was written: path={self.lock.path} error={error}; "
                "send the same change again"
            ) from error

    def seal(self) -> None:
        """Have the last segment be sealed, if there is anything in it."""
        if self._at.offset > 0:
            self._roll()

    def clean_up(self) -> None:
        """Delete what no manifest names. With the lock of packing held, too."""
        self._files.remove_leftovers()

    def install(self, plan: Plan) -> bool:
        """Switch to packs in place of what they were made of; False when that is not there.

        A crash at any point leaves the old files or the new ones, whole.

        Raises:
            StorageError: the old files count.
        """
        manifest = self._files.read_manifest()
        before = plan.before
        if (
            manifest.generation != before.generation
            or manifest.segments[: plan.sealed] != before.segments[: plan.sealed]
        ):
            return False
        if failpoints.active:
            failpoints.hit("file.before_pack")
        manifest = plan.manifest(manifest)
        try:
            self._mark(DIRTY)
            self._switch(manifest)
        except OSError as error:
            self._mark(CLEAN)
            raise storage_error("cannot name a pack", self.directory, error) from error
        self._mark(CLEAN, manifest)
        return True

    def _resume_clock(self, marker: Marker | None) -> None:
        """Have the clock be no earlier than what any process has read from it."""
        if marker is not None and marker.boot == self._boot:
            self.clock.resume(marker.wall - marker.boottime)
        elif marker is not None:
            self.clock.resume(marker.wall - self._clocks[1])

    # --- reading ------------------------------------------------------------------------------

    def _is_here(self, marker: Marker) -> bool:
        if marker is self._mine:
            return self._loaded
        return (
            self._loaded
            and marker.boot == self._boot
            and marker.generation == self._at.manifest.generation
            and marker.segments == len(self._at.manifest.segments)
            and marker.cuts == self._cuts
        )

    def _is_level(self, marker: Marker | None) -> TypeGuard[Marker]:
        """Whether the state holds all that there is, whoever had the lock before."""
        return (
            marker is not None
            and marker.state == CLEAN
            and self._is_here(marker)
            and self._at.place.length() == self._at.offset == marker.end
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
        here = clean and marker is not None and self._is_here(marker)
        loaded, self._loaded = self._loaded, False  # until everything was read
        self._mine = None
        if not here:
            manifest = self._files.read_manifest()
            # After another boot, and without a marker, the last segment may have been cut off.
            unsure = not alive and self._at.is_last and self._at.offset > 0
            if not loaded or unsure or cuts != self._cuts or not self._at.adopt(manifest):
                self._at.restart(manifest)
        if self._at.length < self._at.offset:
            self._at.restart(self._files.read_manifest())
        self._cuts = cuts
        self._at.read_sealed()
        size = self._at.length
        there = (
            marker is not None
            and marker.generation == self._at.manifest.generation
            and marker.segments == len(self._at.manifest.segments)
        )
        if clean and there and marker is not None and size == marker.end:
            self._synced = marker.synced
            self._read(marker.synced)
            if self._at.offset == size:
                self._loaded = True
                return
        else:
            # Its last holder died: nothing is believed before it is sure to survive as well.
            self._flush_or_poison()
            self._read(marker.synced if there and marker is not None else 0)
        self._synced = self._at.offset
        self._loaded = True
        if marker is None and self._sink.latest:  # the clock's latest reading is lost with it
            self.clock.resume(self._sink.latest - self._clocks[1])
        self._mark(CLEAN)

    def read_ahead(self) -> None:
        """Read what cannot change any more; without the lock, so that others can write meanwhile.

        What is left, ``acquire`` reads with the lock held.
        """
        if self._loaded and self.lock.place.length() is None:
            return  # to be reported with the lock
        try:
            for _ in range(_TRIES):
                marker = self.lock.read()
                alive = marker is not None and marker.boot == self._boot
                if (
                    marker is not None
                    and self._is_here(marker)
                    and marker.end - self._at.offset < _LITTLE
                ):
                    return
                manifest = self._files.read_manifest()
                try:
                    self._read_unchanging(marker if alive else None, manifest)
                    return
                except StorageDamaged:
                    # The files may have been packed, and deleted, just now.
                    self._loaded = False
                    if self._files.read_manifest() == manifest:
                        raise
        except OSError as error:
            raise storage_error("cannot read the journal", self.directory, error) from error

    def _read_unchanging(self, marker: Marker | None, manifest: Manifest) -> None:
        cuts = 0 if marker is None else marker.cuts
        loaded, self._loaded, self._mine = self._loaded, False, None
        if not loaded or cuts != self._cuts or not self._at.adopt(manifest):
            self._at.restart(manifest)
        self._cuts = cuts
        self._at.read_sealed()
        if (
            marker is not None
            and marker.state == CLEAN
            and marker.generation == self._at.manifest.generation
            and marker.segments == len(self._at.manifest.segments)
            and self._at.offset < marker.synced <= self._at.length
        ):
            self._at.read(None, marker.synced)  # nothing below is ever cut off
        self._loaded = True

    def _read(self, floor: int) -> None:
        """With the lock held: read the rest of the last segment, and cut off what is torn."""
        damage = self._at.read(floor)
        if damage is not None:
            self._cut_tail(damage, floor)

    def _cut_tail(self, damage: _lines.Damage, floor: int) -> None:
        """Drop what a dead writer left half done; nobody was told that it is there."""
        path, size = self._at.path, self._at.length
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
        self._files.truncate(self._at.fd, damage.offset)
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
        name = segment_name(self._at.manifest.generation, len(self._at.manifest.segments) + 1)
        fd = -1
        try:
            self._files.flush(self._at.fd)
        except OSError as error:
            self._undo(self._synced, error)
        try:
            fd = self._files.new_segment(name)
            self._files.flush(fd)
            self._mark(DIRTY)
            manifest = self._files.read_manifest()
            manifest = manifest._replace(segments=[*manifest.segments, name])
            self._switch(manifest)
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            self._loaded = False
            raise storage_error("cannot start a new segment", self.directory, error) from error
        except StorageError:
            os.close(fd)
            raise
        self._at.begin(fd, manifest)
        self._synced = 0
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
            self._files.flush(self._at.fd)
        except OSError as error:
            self._poison(error)

    def _mark(self, state: int, manifest: Manifest | None = None) -> None:
        """Leave the marker; with a manifest when it is not the one that was read."""
        self._mine = None
        wall, boottime = self._clocks
        generation, segments, *_ = self._at.manifest if manifest is None else manifest
        marker = Marker(
            state,
            self._boot,
            generation,
            len(segments),
            self._cuts,
            self._at.offset,
            self._synced,
            self._pid,
            self.clock.read(wall, boottime),
            boottime,
        )
        self.lock.write(marker)
        if manifest is None and state == CLEAN:
            self._mine = marker

    # --- when writing fails -------------------------------------------------------------------

    def _undo(self, length: int, error: OSError) -> NoReturn:
        """Take back a write that failed, down to ``length``, for everybody and for good."""
        self._loaded = False
        try:
            if length < self._at.offset:
                self._cuts += 1  # others may have read what goes now
            self._mark(DIRTY)
            self._files.truncate(self._at.fd, length)
            self._files.flush(self._at.fd)
            self._at.offset = length
            self._synced = min(self._synced, length)
            self._mark(CLEAN)
        except OSError:
            self._poison(error)
        raise storage_error("cannot write", self._at.path, error) from error

    def _poison(self, error: OSError) -> NoReturn:
        """Nobody can know what the disk holds: refuse everybody, also after a restart."""
        self._loaded = False
        reason = f"file={self._at.path} error={error}\n"
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
