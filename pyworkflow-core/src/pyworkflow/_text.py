"""Text of others on a terminal or in a log: control characters escaped, length limited.

A value can hold a line break, an escape sequence or a change of direction. Printed as it is, it
writes lines of its own, clears the screen, or shows another text than it has.
"""

from __future__ import annotations

import re

__all__ = ["cut", "escaped", "escaped_json", "indented"]

#: C0, DEL and C1; marks, embeddings, overrides and isolates of direction; line and paragraph
#: separators; lone surrogates, which no terminal can show.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def escaped(text: str) -> str:
    r"""The text on one line: ``\n``, ``\x1b``, ``\u202e`` instead of the characters."""
    return text if text.isprintable() else _UNSAFE.sub(_escape, text)


def escaped_json(text: str) -> str:
    """A JSON text without such characters; the same JSON. Line breaks between values stay."""
    if text.isprintable():
        return text
    return _UNSAFE.sub(lambda found: found[0] if found[0] == "\n" else _escape_json(found), text)


def indented(text: str, by: str = "    ") -> str:
    """Several lines, each escaped and indented: none of them passes for a line of the log."""
    return "\n".join(by + escaped(line) for line in text.split("\n"))


def cut(text: str, limit: int) -> str:
    """The text, or its beginning and end with a note of its length in between."""
    if len(text) <= limit:
        return text
    note = f"… ({len(text)} characters, cut) …"
    half = max(0, (limit - len(note)) // 2)
    return f"{text[: limit - len(note) - half]}{note}{text[len(text) - half :]}"


def _escape(found: re.Match[str]) -> str:
    char = found[0]
    return _SHORT.get(char) or (f"\\x{ord(char):02x}" if char < "\x80" else _escape_json(found))


def _escape_json(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"
