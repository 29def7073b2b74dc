"""How a failure is shown: what the check guards first, the paths that differ, the check's frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from types import CodeType, TracebackType
from typing import Any, cast

__all__ = ["differences", "from_check", "headline", "without_headline"]

#: Paths of a difference that are shown.
SHOWN = 12
_END = "\n\n"


def headline(doc: str | None) -> str:
    """The check's docstring, in one paragraph that ends with an empty line."""
    text = " ".join((doc or "").replace("``", "`").split())
    return f"{text}{_END}" if text else ""


def without_headline(message: str) -> str:
    """The part of a failure's message that says what was compared."""
    return message.partition(_END)[2] or message


def from_check(traceback: TracebackType | None, code: CodeType) -> TracebackType | None:
    """The frames from the check's own on: not those of the event loop that ran it."""
    place = traceback
    while place is not None:
        if place.tb_frame.f_code is code:
            return place
        place = place.tb_next
    return traceback


def differences(found: object, expected: object) -> list[str]:
    """The paths at which two values differ, with both values; empty when they are equal."""
    told = list(_paths("", found, expected))
    more = [f"and {len(told) - SHOWN} more"] if len(told) > SHOWN else []
    return told[:SHOWN] + more


def _paths(path: str, found: object, expected: object) -> list[str]:
    if found == expected:
        return []
    a, b = _parts(found), _parts(expected)
    if a is None or b is None or isinstance(found, Mapping) is not isinstance(expected, Mapping):
        return [f"{path or 'value'}: found {_cut(found)}, expected {_cut(expected)}"]
    told: list[str] = []
    for name in [*a, *(name for name in b if name not in a)]:
        at = f"{path}{name}"
        if name not in b:
            told.append(f"{at}: found {_cut(a[name])}, expected nothing")
        elif name not in a:
            told.append(f"{at}: found nothing, expected {_cut(b[name])}")
        else:
            told += _paths(at, a[name], b[name])
    return told or [f"{path or 'value'}: found {_cut(found)}, expected {_cut(expected)}"]


def _parts(value: object) -> dict[str, object] | None:
    """What a value consists of, by the text that leads to it; None for one without parts."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f".{field.name}": getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        return {f"[{key!r}]": one for key, one in cast("Mapping[Any, object]", value).items()}
    names = getattr(value, "_fields", None)
    if isinstance(value, tuple) and names is not None:
        return {f".{name}": one for name, one in zip(names, cast("Any", value), strict=True)}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        items = cast("Sequence[object]", value)
        return {f"[{index}]": one for index, one in enumerate(items)}
    return None


def _cut(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}…"
