"""What a process has read: packs, and segments up to a place in the one that is open.

Nothing here takes the lock or writes. The journal decides when what may be read.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from pyworkflow.spi import SchemaTooNew, StorageDamaged
from pyworkflow_storage_file import _lines
from pyworkflow_storage_file._files import Files, Manifest, read_all
from pyworkflow_storage_file._lock import Place
from pyworkflow_storage_file._open_packs import OpenPacks
from pyworkflow_storage_file._records import Sink

__all__ = ["Reader"]

_NONE: Final = Manifest(0, [])


class Reader:
    """The place up to which the files were read into ``sink``."""

    def __init__(self, files: Files, sink: Sink) -> None:
        self._files = files
        self._sink = sink
        self.packs = OpenPacks(files.directory, sink)
        self.manifest: Manifest = _NONE
        """The one by which was read."""
        self.fd = -1
        """The segment that is open."""
        self.place = Place(files.directory)
        """Where it lies; the directory before one is open."""
        self.index: int = 0
        """Its place among the segments."""
        self.offset = 0
        """Up to here it was read."""
        self.number = 1
        """Of the next line."""
        self._sealed: dict[str, int] = {}
        """Bytes of the segments before it, by name."""
        self._before = 0
        """Bytes of these and of the packs."""

    def close(self) -> None:
        """Close the files. Idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
        self.packs.close()

    @property
    def size(self) -> int:
        """Bytes of the packs and segments, as far as they were read."""
        return self._before + self.offset

    @property
    def length(self) -> int:
        """Bytes of the segment that is open, read or not."""
        return os.fstat(self.fd).st_size

    @property
    def is_last(self) -> bool:
        """Whether the segment that is open is the last one."""
        return self.index == len(self.manifest.segments) - 1

    @property
    def _name(self) -> str:
        """The segment that is open."""
        return self.manifest.segments[self.index]

    @property
    def path(self) -> Path:
        """The segment that is open; the directory before one is."""
        return self.place.path

    def restart(self, manifest: Manifest) -> None:
        """Read the packs into a sink that begins anew, and open the first segment."""
        self._sink.reset()
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
        self.packs.restart(manifest.packs)
        self.manifest = manifest
        self.index = 0
        self._sealed = {}
        self.number = manifest.first
        self._open(self._files.open_segment(manifest.segments[0]))

    def adopt(self, manifest: Manifest) -> bool:
        """Continue by a newer manifest; False when what was read is not part of it.

        After an exception only ``restart`` helps.
        """
        if self._name not in manifest.segments:
            return False
        index = manifest.segments.index(self._name)
        before = manifest.segments[:index]
        if not self._sealed.keys() >= set(before):
            return False
        self.packs.exchange(manifest.packs, manifest.segments[0])
        # The files are not asked: a packer may have deleted them since the manifest was read.
        self._sealed = {name: self._sealed[name] for name in before}
        self._before = self.packs.size + sum(self._sealed.values())
        self.manifest = manifest
        self.index = index
        return True

    def begin(self, fd: int, manifest: Manifest) -> None:
        """The last segment was sealed: continue in a new, empty one."""
        os.close(self.fd)
        self._sealed[self._name] = self.offset
        self.manifest = manifest
        self.index = len(manifest.segments) - 1
        self._open(fd)

    def read_sealed(self) -> None:
        """Read all segments but the last, and open that one."""
        while not self.is_last:
            self.read(None)
            self._sealed[self._name] = self.offset
            fd, self.fd = self.fd, -1
            os.close(fd)
            self.index += 1
            self._open(self._files.open_segment(self._name))

    def _open(self, fd: int) -> None:
        self.fd = fd
        self._before = self.packs.size + sum(self._sealed.values())
        self.place = Place(self._files.directory / self._name, fd)
        self.offset = 0
        self._sink.segment = self._name

    def read(self, floor: int | None, end: int | None = None) -> _lines.Damage | None:
        """Read the rest of the open segment, up to ``end``; what is torn there, if anything is.

        Below ``floor`` the last segment was durable; None: all that is read was.

        Raises:
            StorageDamaged: anything else is wrong with it.
            SchemaTooNew: a newer version wrote it.
        """
        base = self.offset
        data = read_all(self.fd, base, end)
        load = self._sink.load
        try:
            for line in _lines.scan(data, base, self.number):
                try:
                    load(line.kind, line.body)
                except (SchemaTooNew, MemoryError):
                    raise
                except Exception as error:
                    raise _lines.Damage(
                        line.offset, f"the record does not load: {type(error).__name__}: {error}"
                    ) from error
                self.offset = line.end
                self.number = line.number + 1
        except _lines.TooNew as error:
            raise SchemaTooNew(str(self.path), error.version, _lines.FORMAT) from None
        except _lines.Damage as damage:
            if (
                floor is None
                or damage.offset < floor <= base + len(data)
                or damage.__cause__ is not None
                or not _lines.is_torn(data, base, damage.offset)
            ):
                raise StorageDamaged(str(self.path), damage.offset, damage.detail) from None
            return damage
        return None
