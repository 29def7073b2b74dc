"""Packing: sealed segments become a pack, and packs that are small or mostly garbage become one.

Works on files that do not change any more, without the store's lock. What it has written counts
once the journal has switched to the manifest that names it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, Final, NamedTuple

from pyworkflow.spi import Json, SchemaTooNew, StorageDamaged
from pyworkflow_storage_file import _lines
from pyworkflow_storage_file._codec import decode, encode
from pyworkflow_storage_file._files import Files, Manifest, pack_name
from pyworkflow_storage_file._merge import CLOCK, DELTA, Merger, join_runs
from pyworkflow_storage_file._packs import RUNS, Pack, entries_of

__all__ = ["Plan", "Stopped", "pack"]

#: So many bytes of a segment are merged at once: what they amount to is in memory.
_MERGED_BYTES: Final = 4 * 1024 * 1024
#: Packs are joined up to this size: to take over another one, processes read its heads.
_PACK_BYTES: Final = 64 * 1024 * 1024
_REMOVALS: Final = frozenset({DELTA})

#: Where a line is: the place of its pack, the number of the line.
_Place = tuple[int, int]
_NOWHERE: Final[_Place] = (-1, -1)


class Stopped(Exception):
    """The process does not want to pack any more."""


class Plan(NamedTuple):
    """What the journal is to be, if it is still what it was."""

    before: Manifest
    packs: list[str]
    sealed: int
    """So many of its first segments the packs replace."""
    first: int
    """The number of the first line after them."""

    def manifest(self, now: Manifest) -> Manifest:
        """The manifest that names the packs, in place of the one that counts now."""
        return Manifest(now.generation + 1, now.segments[self.sealed :], self.packs, self.first)


def pack(
    files: Files, manifest: Manifest, *, garbage: AbstractSet[str], stop: Callable[[], bool]
) -> Plan | None:
    """Write packs for the sealed segments of a journal; None when there is nothing to do.

    Packs named in ``garbage`` are written anew without what was removed. The caller has the lock of
    packing.

    Raises:
        StorageDamaged, SchemaTooNew: a file that is not what it should be; it is left alone.
        OSError: nothing was changed, and files may be left over.
        Stopped: as ``stop`` said; files may be left over.
    """
    work = _Packing(files, manifest.generation + 1, stop)
    packs = list(manifest.packs)
    sealed = manifest.segments[:-1]
    first = manifest.first
    if sealed:
        name, first = work.pack_segments([files.directory / each for each in sealed], first)
        packs.append(name)
    sizes = {name: (files.directory / name).stat().st_size for name in packs}
    start, total = len(packs) - 1, sizes.get(packs[-1], 0) if packs else 0
    while start > 0 and sizes[packs[start - 1]] <= min(2 * total, _PACK_BYTES - total):
        start -= 1
        total += sizes[packs[start]]
    if start < len(packs) - 1 or (packs and packs[-1] in garbage):
        packs[start:] = [work.join(packs, range(start, len(packs)))]
    for index, name in enumerate(packs):
        if name in garbage:
            packs[index] = work.join(packs, range(index, index + 1))
    if packs == manifest.packs and not sealed:
        return None
    return Plan(manifest, packs, len(sealed), first)


class _Packing:
    """The packs that one run of ``pack`` writes."""

    def __init__(self, files: Files, generation: int, stop: Callable[[], bool]) -> None:
        self._files = files
        self._generation = generation
        self._stop = stop
        self._written = 0

    def pack_segments(self, paths: list[Path], first: int) -> tuple[str, int]:
        """Write a pack of segments; its name, and the number after that of their last line."""
        number = first

        def lines() -> Iterator[tuple[bytes, bytes]]:
            nonlocal number
            merger, size = Merger(), 0
            for path in paths:
                for line in _segment(path, number):
                    try:
                        merger.add(line.kind, line.body)
                    except (SchemaTooNew, MemoryError):
                        raise
                    except Exception as error:
                        raise StorageDamaged(
                            str(path),
                            line.offset,
                            f"the record does not load: {type(error).__name__}: {error}",
                        ) from error
                    number += 1
                    size += len(line.body)
                    if size >= _MERGED_BYTES:
                        yield from merger.take()
                        size = 0
            yield from merger.take()

        return self._write(lines()), number

    def join(self, packs: list[str], places: range) -> str:
        """Write one pack of several that follow one another, without runs that were removed."""
        opened = [Pack(self._files.directory / name) for name in packs[places.start :]]
        try:
            removed: dict[str, _Place] = {}
            for place, each in enumerate(opened):
                for line in each.lines(bodies=_REMOVALS):
                    for part in _delta(line.body)["runs"]:
                        removed[part["id"]] = place, line.number
            whole = places.start == 0
            return self._write(_joined(opened[: len(places)], removed, whole=whole))
        finally:
            for each in opened:
                each.close()

    def _write(self, lines: Iterable[tuple[bytes, bytes]]) -> str:
        files = self._files
        self._written += 1
        name = pack_name(self._generation, self._written)
        fd = files.new_segment(name)
        try:
            offset = 0
            for number, (kind, body) in enumerate(lines, 1):
                if self._stop():
                    raise Stopped
                line = _lines.encode(number, offset, kind, body)
                files.write(fd, line, offset)
                offset += len(line)
                time.sleep(0)  # the event loop waits for the interpreter's lock
            files.flush(fd)
        finally:
            os.close(fd)
        return name


def _segment(path: Path, number: int) -> Iterator[_lines.Line]:
    """The lines of a sealed segment."""
    try:
        yield from _lines.scan(path.read_bytes(), 0, number)
    except _lines.TooNew as error:
        raise SchemaTooNew(str(path), error.version, _lines.FORMAT) from None
    except _lines.Damage as damage:
        raise StorageDamaged(str(path), damage.offset, damage.detail) from None


def _delta(body: bytes) -> Any:
    return decode(body)


def _joined(
    packs: list[Pack], removed: dict[str, _Place], *, whole: bool
) -> Iterator[tuple[bytes, bytes]]:
    """The lines of several packs; ``whole``: nothing lies in packs before them."""
    clock: bytes | None = None
    keys: dict[str, Json] = {}
    for place, each in enumerate(packs):
        for line in each.lines():
            if line.kind == CLOCK:
                clock = line.body
            elif line.kind == DELTA:
                delta = _delta(line.body)
                for key in delta.get("freed", ()):
                    keys[key] = None
                keys |= delta.get("taken", {})
                if delta["runs"] and not whole:
                    yield DELTA, encode({"v": delta["v"], "runs": delta["runs"]})
            elif line.kind == RUNS:
                here = place, line.number
                entries = list(entries_of(line.body))
                alive = [e for e in entries if removed.get(e.head["id"], _NOWHERE) < here]
                if len(alive) == len(entries):
                    yield RUNS, line.body
                else:
                    yield from join_runs((e.head, line.body[e.start : e.end]) for e in alive)
            else:
                raise StorageDamaged(
                    str(each.path), line.offset, f"unknown kind of record: {line.kind!r}"
                )
    if clock is not None:
        yield CLOCK, clock
    given = list(keys.items())
    for start in range(0, len(given), 1000):
        some = given[start : start + 1000]
        freed: list[Json] = [key for key, mark in some if mark is None and not whole]
        taken: dict[str, Json] = {key: mark for key, mark in some if mark is not None}
        if freed or taken:
            yield DELTA, encode({"v": 1, "runs": [], "taken": taken, "freed": freed})
