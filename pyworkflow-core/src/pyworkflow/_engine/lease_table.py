"""The claims of one worker in memory that it shares with its renewal process.

The worker writes without a system call, so neither a lock nor the interpreter's lock is handed
over. A record that is read while it is written has a wrong checksum and is read the next time.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
from zlib import crc32

from pyworkflow.spi.storage import ClaimRef

__all__ = ["LeaseTable", "shared_memory"]

_HEADER = 64
_SLOT = 1024
_SLOTS = 2048
SIZE = _HEADER + _SLOT * _SLOTS
_TIME = struct.Struct("<d")
_COUNT = struct.Struct("<I")
#: Checksum of what follows it, bytes of data, when it was claimed, bytes of run and item id.
_RECORD = struct.Struct("<IIdHH")
_CHECKSUM_BYTES = 4
_BEAT, _RENEWED, _OUTSIDE, _USED = 0, 8, 16, 24


class LeaseTable:
    """Claims by slot, and when the worker last answered and renewed (``monotonic``, seconds)."""

    def __init__(self, fd: int) -> None:
        self._memory = mmap.mmap(fd, SIZE)
        self._free = list(range(_SLOTS - 1, -1, -1))
        self._slots: dict[ClaimRef, int] = {}

    # --- written by the worker ------------------------------------------------------------------

    def add(self, ref: ClaimRef, since: float) -> None:
        """A claim from ``since`` on. One that does not fit is left out: it is renewed inside."""
        run, item, token = (
            text.encode("utf-8", "surrogatepass") for text in (ref.run_id, ref.item_id, ref.token)
        )
        data = run + item + token
        if not self._free or len(data) > _SLOT - _RECORD.size or ref in self._slots:
            return
        slot = self._slots[ref] = self._free.pop()
        record = _RECORD.pack(0, len(data), since, len(run), len(item)) + data
        checksum = _COUNT.pack(crc32(record[_CHECKSUM_BYTES:]))
        at = _HEADER + slot * _SLOT
        self._memory[at : at + len(record)] = checksum + record[_CHECKSUM_BYTES:]
        if slot >= self._count(_USED):
            self._memory[_USED : _USED + 4] = _COUNT.pack(slot + 1)

    def discard(self, ref: ClaimRef) -> None:
        """The claim is over."""
        slot = self._slots.pop(ref, None)
        if slot is not None:
            at = _HEADER + slot * _SLOT
            self._memory[at : at + 8] = bytes(8)
            self._free.append(slot)

    def beat(self, now: float) -> None:
        """The worker's loop answers."""
        self._write(_BEAT, now)

    def renewed(self, now: float) -> None:
        """The worker renewed its claims itself."""
        self._write(_RENEWED, now)

    # --- read by the renewal process --------------------------------------------------------------

    def claims(self, before: float) -> list[ClaimRef]:
        """What was claimed before then."""
        found: list[ClaimRef] = []
        for slot in range(min(self._count(_USED), _SLOTS)):
            at = _HEADER + slot * _SLOT
            checksum, size, since, run, item = _RECORD.unpack_from(self._memory, at)
            if size == 0 or size > _SLOT - _RECORD.size or since > before:
                continue
            record = self._memory[at + _CHECKSUM_BYTES : at + _RECORD.size + size]
            if crc32(record) != checksum:
                continue
            data = record[_RECORD.size - _CHECKSUM_BYTES :]
            parts = data[:run], data[run : run + item], data[run + item :]
            found.append(ClaimRef(*(part.decode("utf-8", "surrogatepass") for part in parts)))
        return found

    @property
    def beat_at(self) -> float:
        """When the worker's loop last answered."""
        return self._read(_BEAT)

    @property
    def renewed_at(self) -> float:
        """When the worker last renewed its claims itself."""
        return self._read(_RENEWED)

    @property
    def outside_at(self) -> float:
        """When the renewal process last renewed them; 0 for never."""
        return self._read(_OUTSIDE)

    def renewed_outside(self, now: float) -> None:
        """The renewal process renewed the claims."""
        self._write(_OUTSIDE, now)

    def _count(self, at: int) -> int:
        return int(_COUNT.unpack_from(self._memory, at)[0])

    def _read(self, at: int) -> float:
        return float(_TIME.unpack_from(self._memory, at)[0])

    def _write(self, at: int, value: float) -> None:
        self._memory[at : at + 8] = _TIME.pack(value)


def shared_memory() -> int:
    """A descriptor of memory that ends with the last process that has it."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("pyworkflow-leases")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, SIZE)
    return fd
