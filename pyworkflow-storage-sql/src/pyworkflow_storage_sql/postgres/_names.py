"""Texts and names as PostgreSQL can hold them: without NUL, and short enough for an index.

``escape`` is exact and keeps the order of code points, but for U+0000 and U+0001.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["Names", "escape", "unescape"]

_START = 64


def escape(text: str) -> str:
    """The text without NUL."""
    if "\x00" in text or "\x01" in text:
        return text.replace("\x01", "\x01\x02").replace("\x00", "\x01\x01")
    return text


def unescape(text: str) -> str:
    """Inverse of ``escape``."""
    if "\x01" in text:
        # One pass: the second sign of a pair must not be taken for the first of another.
        return re.sub("\x01([\x01\x02])", lambda m: "\x00" if m[1] == "\x01" else "\x01", text)
    return text


class Names:
    """Names as columns hold them: escaped, but for a few that 0.1.0 wrote.

    It stored a long name as its start and a digest. Migration 11 brought those back that an index
    can have; the table ``names`` has the others, and no new ones.
    """

    def __init__(self) -> None:
        self._columns: dict[str, str] = {}
        self._texts: dict[str, str] = {}

    def learn(self, found: Iterable[tuple[str, str]]) -> None:
        """Digests and the escaped names that they stand for."""
        for digest, escaped in found:
            text = unescape(escaped)
            start = text[:_START].replace("\x00", "").replace("\x01", "")
            column = f"{start}\x01\x03{digest}"
            self._columns[text], self._texts[column] = column, text

    def column(self, name: str) -> str:
        """How the name is stored."""
        if self._columns and name in self._columns:
            return self._columns[name]
        return escape(name)

    def text(self, column: str) -> str:
        """The name that is stored so."""
        if "\x01" not in column:
            return column
        return self._texts.get(column) or unescape(column)
