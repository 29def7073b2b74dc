"""The line format of the journal: one line of JSON per record, with length and checksum.

``{"v":1,"n":7,"s":4096,"l":81,"k":"delta","c":"9ae0daaf","d":{...}}`` and a newline, where ``v`` is
the format, ``n`` the number of the line (dense within a generation), ``s`` the offset below which
this file was known to be durable when the line was written, ``l`` the length of ``d`` in bytes,
``k`` its kind, and ``c`` the CRC-32 of everything before ``,"c"`` and of ``d``.
The layout is fixed to the byte, so that length and checksum mean the bytes, not the JSON.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple
from zlib import crc32

__all__ = [
    "FORMAT",
    "LONGEST_HEAD",
    "Damage",
    "Line",
    "TooNew",
    "encode",
    "is_torn",
    "measure",
    "parse",
    "scan",
]

#: Version of the line format that this code writes, and the newest that it reads.
FORMAT = 1

_HEAD = re.compile(
    rb'(\{"v":(\d{1,9}),"n":(\d{1,19}),"s":(\d{1,19}),"l":(\d{1,10}),"k":"([a-z]{1,16})")'
    rb',"c":"([0-9a-f]{8})","d":'
)

#: No head of a line, up to its body, is longer.
LONGEST_HEAD = 160


class Line(NamedTuple):
    """A line that holds what its checksum says."""

    number: int
    synced: int
    kind: bytes
    body: bytes
    offset: int
    end: int


class Damage(Exception):
    """Bytes at ``offset`` are no line."""

    def __init__(self, offset: int, detail: str) -> None:
        super().__init__(offset, detail)
        self.offset, self.detail = offset, detail


class TooNew(Exception):
    """An intact line of a newer format."""

    def __init__(self, version: int) -> None:
        super().__init__(version)
        self.version = version


def encode(number: int, synced: int, kind: bytes, body: bytes) -> bytes:
    """The bytes of one line. ``body`` is JSON without a raw newline."""
    head = b'{"v":%d,"n":%d,"s":%d,"l":%d,"k":"%b"' % (FORMAT, number, synced, len(body), kind)
    return b'%b,"c":"%08x","d":%b}\n' % (head, crc32(body, crc32(head)), body)


def parse(data: bytes, offset: int, end: int, base: int = 0) -> Line:
    """The line in ``data[offset:end]``, which ends with its newline.

    ``base`` is the place of ``data`` in its file: errors and lines name offsets of the file.

    Raises:
        Damage: length, checksum or layout are wrong.
        TooNew: the line is intact, and of a newer format.
    """
    match = _HEAD.match(data, offset, end)
    if match is None:
        raise Damage(base + offset, "no line of the journal starts here")
    head, version, number, synced, length, kind, checksum = match.groups()
    start = match.end()
    stop = start + int(length)
    if stop + 2 != end or data[stop:end] != b"}\n":
        raise Damage(base + offset, "the line's length is wrong")
    body = data[start:stop]
    if crc32(body, crc32(head)) != int(checksum, 16):
        raise Damage(base + offset, "the line's checksum is wrong")
    if int(version) > FORMAT:
        raise TooNew(int(version))
    return Line(int(number), int(synced), kind, body, base + offset, base + end)


def measure(start: bytes, offset: int) -> tuple[bytes, int]:
    """The kind and the length of the line that begins with ``start``, at ``offset`` of its file.

    Nothing is checked but the head's layout.

    Raises:
        Damage: no line starts here.
    """
    match = _HEAD.match(start)
    if match is None:
        raise Damage(offset, "no line of the journal starts here")
    return match[6], match.end() + int(match[5]) + 2


def scan(data: bytes, base: int, number: int) -> Iterator[Line]:
    """All lines of ``data``, the first of which must have ``number``, the next one more.

    Raises:
        Damage: at the first byte that belongs to no line.
        TooNew: at an intact line of a newer format.
    """
    offset = 0
    size = len(data)
    while offset < size:
        end = data.find(b"\n", offset) + 1
        if end == 0:
            raise Damage(base + offset, "the line has no end")
        line = parse(data, offset, end, base)
        if line.number != number:
            raise Damage(
                base + offset, f"a line is missing: number={line.number} expected={number}"
            )
        yield line
        number += 1
        offset = end


def is_torn(data: bytes, base: int, bad: int) -> bool:
    """Whether the damage at file offset ``bad`` can be the end of a write that was cut short.

    It cannot when a later line is intact that was written after those bytes were durable.
    """
    offset = data.find(b"\n", bad - base) + 1
    while offset:
        end = data.find(b"\n", offset) + 1
        if end == 0:
            return True
        try:
            if parse(data, offset, end, base).synced > bad:
                return False
        except TooNew:
            return False
        except Damage:
            pass
        offset = end
    return True
