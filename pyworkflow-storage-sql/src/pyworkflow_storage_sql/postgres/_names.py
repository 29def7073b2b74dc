"""Texts and names as PostgreSQL can hold them: without NUL, and short enough for an index.

``escape`` keeps the order of code points and is exact. A name beyond ``LONGEST`` bytes stands as
its start and a digest; what the digest means goes to the table ``names`` in the same transaction.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from hashlib import sha256

__all__ = ["Names", "escape", "unescape"]

LONGEST = 600
_START = 64
_KEPT = 10_000
#: Never part of an escaped text: there, \x01 is always followed by \x01 or \x02.
_MARK = "\x01\x03"
#: As a column shows it, and as JSON does.
_FOUND = re.compile(r"(?:\x01\x03|\\u0001\\u0003)([0-9a-f]{64})")


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
    """The long names that this process has met, by their digest."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    def short(self, name: str, met: dict[str, str]) -> str:
        """How the name is stored; a long one is put into ``met``."""
        if len(name) <= LONGEST // 4 and "\x00" not in name and "\x01" not in name:
            return name
        text = escape(name)
        data = text.encode()
        if len(data) <= LONGEST:
            return text
        digest = sha256(data).hexdigest()
        met[digest] = text
        # The start is for people, and must not end in half an escape.
        start = name[:_START].replace("\x00", "").replace("\x01", "")
        return f"{start}{_MARK}{digest}"

    def stored(self, name: str) -> str:
        """How the name is stored, for what asks for it."""
        return self.short(name, {})

    def full(self, stored: str) -> str:
        """The name that is stored so."""
        if "\x01" not in stored:
            return stored
        start, mark, digest = stored.rpartition(_MARK)
        return unescape(self._known[digest] if mark else start + digest)

    def unknown(self, texts: Iterable[object]) -> set[str]:
        """Digests in these of names that were not met yet."""
        if len(self._known) > _KEPT:
            self._known.clear()
        return {
            digest
            for text in texts
            if isinstance(text, str) and ("\x01\x03" in text or "\\u0001\\u0003" in text)
            for digest in _FOUND.findall(text)
            if digest not in self._known
        }

    def learn(self, met: Mapping[str, str]) -> None:
        """Keep what these stand for."""
        self._known.update(met)
