"""The least size that a value has as JSON, known before it is encoded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from pyworkflow._tagged import DEPTH

__all__ = ["SCALARS", "least_size"]

SCALARS = frozenset({int, float, bool, type(None)})
_ITEMS = frozenset({list, tuple, set, frozenset})


def least_size(value: object, limit: int) -> tuple[int, bool]:
    """A size that the JSON text of ``value`` does not fall below, and whether all of it was counted.

    Stops as soon as it is above ``limit``, so that it takes no memory to speak of. What has no
    form of JSON's own counts one character, and what lies below ``DEPTH`` levels, as in a list
    that contains itself, nothing; look at its tree then.
    """
    size, whole = 0, True
    level: list[Any] = [value]
    for _ in range(DEPTH + 1):
        below: list[Any] = []
        for item in level:
            if size > limit:
                return size, whole
            kind = type(item)  # pyright: ignore[reportUnknownVariableType] # of a value of any type
            if kind is str:
                size += len(item) + 2
            elif kind in SCALARS:
                size += 1
            elif kind in _ITEMS:
                size += len(item) + 1  # brackets and commas
                if size + len(item) <= limit:  # an item has a character, at least
                    below.extend(cast("Iterable[Any]", item))
                else:
                    size += len(item)
            elif kind is dict:
                size += 4 * len(item) + 1  # braces, commas, colons, quotes
                if size + len(item) <= limit:
                    size += sum(len(key) for key in item if type(key) is str)
                    below.extend(item.values())
                else:
                    size += len(item)
            elif kind is bytes or kind is bytearray:
                size += 4 * len(item) // 3
            else:
                size += 1
                whole = False
        if not below:
            return size, whole
        level = below
    return size, False
