"""Packs: files of runs that are read one by one, when they are asked for.

A pack replaces sealed segments of the journal. Its lines have the journal's format. A line of kind
``runs`` has some runs: ``{"v":1,"at":N,"heads":[{...}, ...],"runs":[{...}, ...]}``, where byte ``N``
of it begins the first of ``runs``. A head is what a store needs in memory of a run, its items among
it, and the lengths of the run's JSON and of the row in it; the run itself has the form that it has
in a delta. All lines of ``delta`` before it count: they remove runs. A run may occur several times,
in one pack and in several: what comes later is added, as deltas are.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from pyworkflow.spi import (
    Delta,
    RunStatus,
    SchemaTooNew,
    StorageDamaged,
    StorageError,
    from_micros,
)
from pyworkflow.storekit import DormantRun, RunState
from pyworkflow_storage_file import _lines
from pyworkflow_storage_file._codec import decode

__all__ = ["ROW", "RUNS", "Entry", "Pack", "PackedRun", "entries_of"]

#: The kind of a line that has runs.
RUNS: Final = b"runs"
_FORMAT: Final = 1
_START = re.compile(rb'\{"v":(\d{1,9}),"at":(\d{1,12}),"heads":')
#: A run's JSON begins with its row: ``{"set":``.
ROW: Final = 7
#: Beside its JSON, what a run costs in a pack, about.
_OVERHEAD: Final = 200
_PLAIN: Final = ("number", "workflow", "idempotency_key", "seen_seq", "paused", "stalled")
#: Of each place of a run: the pack, the offset, the lengths of row and run, the number of events.
_FIELDS: Final = 5


class Entry(NamedTuple):
    """A run in a line of kind ``runs``."""

    head: dict[str, Any]
    start: int
    """Its offset in the line's body."""
    end: int


def entries_of(body: bytes) -> Iterator[Entry]:
    """The entries of a line of kind ``runs``.

    Raises:
        SchemaTooNew: a newer version wrote it.
        ValueError: it is no such line.
    """
    match = _START.match(body)
    if match is None:
        raise ValueError("no heads of runs")
    if int(match[1]) > _FORMAT:
        raise SchemaTooNew("pack", int(match[1]), _FORMAT)
    start = int(match[2])
    heads: Any = decode(body[: start - len(',"runs":[')] + b"}")["heads"]
    for head in heads:
        end = start + head["all"]
        yield Entry(head, start, end)
        start = end + 1


class Pack:
    """A pack that is open for reading."""

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            StorageDamaged: it is missing.
        """
        self.path = path
        self.name = path.name
        self.dead = 0
        """Bytes of runs that were removed since."""
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise StorageDamaged(str(path), 0, "the manifest names it and it is missing") from None
        self.size = os.fstat(self._fd).st_size

    def close(self) -> None:
        """Close the file. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of a line that ``lines`` has given."""
        data = os.pread(self._fd, length, offset)
        if len(data) != length:
            raise StorageDamaged(str(self.path), offset, "the file is shorter than it was")
        return data

    def lines(self, *, bodies: frozenset[bytes] | None = None) -> Iterator[_lines.Line]:
        """All lines in order, read one by one; the other kinds than ``bodies`` are passed over.

        Raises:
            StorageDamaged: with the offset of the first byte that belongs to no line.
            SchemaTooNew: at an intact line of a newer format.
        """
        offset, number = 0, 1
        while offset < self.size:
            try:
                start = os.pread(self._fd, _lines.LONGEST_HEAD, offset)
                kind, length = _lines.measure(start, offset)
                if bodies is None or kind in bodies:
                    line = _lines.parse(os.pread(self._fd, length, offset), 0, length, offset)
                    if line.number != number:
                        raise _lines.Damage(
                            offset, f"a line is missing: number={line.number} expected={number}"
                        )
                    yield line
            except _lines.TooNew as error:
                raise SchemaTooNew(str(self.path), error.version, _lines.FORMAT) from None
            except _lines.Damage as damage:
                raise StorageDamaged(str(self.path), damage.offset, damage.detail) from None
            offset += length
            number += 1


class PackedRun(DormantRun):
    """A run in packs."""

    __slots__ = ("places",)

    def __init__(self, run_id: str) -> None:
        super().__init__(run_id)
        self.places: tuple[Any, ...] = ()
        """Pack, offset, length of the row, length of all, number of events; and so on."""

    def add_place(self, pack: Pack, offset: int, head: Mapping[str, Any]) -> None:
        """Note that there is more of the run."""
        self.places += (pack, offset, head["row"], head["all"], head["n"])

    def set_places(self, places: list[tuple[Any, ...]]) -> None:
        """Have these places and no others."""
        self.places = tuple(field for place in places for field in place)

    def list_places(self) -> list[tuple[Any, ...]]:
        """The places in order."""
        given = self.places
        return [given[at : at + _FIELDS] for at in range(0, len(given), _FIELDS)]

    @property
    def stored(self) -> int:
        """The number of events in its places."""
        return sum(self.places[_FIELDS - 1 :: _FIELDS])

    def take(self, head: Mapping[str, Any]) -> None:
        """Bring the head in memory level with one that was read."""
        for name in _PLAIN:
            if name in head:
                setattr(self, name, head[name])
        if "final" in head:
            self.final = RunStatus(head["final"])
        if "finished_at" in head:
            at = head["finished_at"]
            self.finished_at = None if at is None else from_micros(at)
        if "parent" in head:
            self.parent_id = head["parent"]
        self.length += head["n"]
        gone, items = head.get("gone", ()), head.get("items")
        if gone or items:
            self.items = dict(self.items)
            for item_id in gone:
                self.items.pop(item_id, None)
            if items:
                delta = Delta.from_json({"v": 1, "runs": [{"id": self.run_id, "items": items}]})
                self.items |= {item.item_id: item for item in delta.parts[0].items}

    def load(self) -> RunState:
        """Read the run."""
        run = RunState(self.run_id)
        for pack, offset, _, length, _ in self.list_places():
            self._apply(run, pack, offset, pack.read(offset, length))
        if run.length != self.length:
            pack, offset = self.places[:2]
            raise StorageDamaged(
                str(pack.path),
                offset,
                f"run_id={self.run_id} events={run.length} expected={self.length}",
            )
        return run

    def load_row(self) -> RunState:
        """Read the run's row."""
        run = RunState(self.run_id)
        for pack, offset, length, _, _ in self.list_places():
            row = pack.read(offset + ROW, length)
            self._apply(run, pack, offset, b'{"set":%b}' % row)
        return run

    def _apply(self, run: RunState, pack: Pack, offset: int, text: bytes) -> None:
        try:
            part = decode(text)
            part["id"] = self.run_id
            run.apply(Delta.from_json({"v": 1, "runs": [part]}).parts[0])
        except StorageError:
            raise
        except Exception as error:
            raise StorageDamaged(
                str(pack.path), offset, f"the run does not load: {type(error).__name__}: {error}"
            ) from error

    def released(self) -> None:
        """The store has removed the run: its places are garbage."""
        for pack, _, _, length, _ in self.list_places():
            pack.dead += length + _OVERHEAD
