"""Whether a value came back as it went: equal, of equal types, with equal state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from pyworkflow._shapes import shape_of, state_of
from pyworkflow._tagged import LEAVES, text_of, walk

__all__ = ["same"]

_BUILTIN = (list, dict, set, frozenset, tuple, str, bytes, int, float, complex)
_Pairs = set[tuple[int, int]]


def same(went: Any, came: Any) -> bool:
    """Whether nothing of a value was lost.

    Types must be equal, but for a subclass of a builtin type that adds nothing to it: an annotation
    ``float`` makes a float of NumPy's. Locks and connections, which nothing can copy, need only be
    of the same type: the class made another.
    """
    return _same(went, came, set())


def _same(went: Any, came: Any, seen: _Pairs) -> bool:
    if went is came:
        return True
    pair = id(went), id(came)
    if pair in seen:
        return True  # compared further up
    kind = cast("Any", type(came))
    if type(went) is not kind and not _adds_nothing(went, came):
        return False
    seen = seen | {pair}
    if kind is list or kind is tuple:
        return len(went) == len(came) and all(map(lambda a, b: _same(a, b, seen), went, came))
    if kind is dict:
        return _same_dicts(went, came, seen)
    if kind is set or kind is frozenset:
        others = {item: item for item in came}
        return len(went) == len(came) and all(
            item in others and _same(item, others[item], seen) for item in went
        )
    if kind in LEAVES:
        return type(went) is not kind or text_of(walk(went)) == text_of(walk(came))
    return _same_objects(went, came, seen)


def _adds_nothing(went: object, came: object) -> bool:
    """Whether a value of a subclass is that of a builtin type and no more."""
    base = type(came)
    if base not in LEAVES and base not in _BUILTIN:
        return False
    if base not in type(went).__mro__ or hasattr(went, "_fields"):
        return False
    if getattr(went, "default_factory", None) is not None:
        return False  # a defaultdict
    return not state_of(went, shape_of(type(went), ())) and bool(went == came)


def _same_dicts(went: Mapping[Any, Any], came: Mapping[Any, Any], seen: _Pairs) -> bool:
    return len(went) == len(came) and all(
        _same(key, other, seen) and _same(item, came[other], seen)
        for (key, item), other in zip(went.items(), came, strict=True)
    )


def _same_objects(went: Any, came: Any, seen: _Pairs) -> bool:
    shape = shape_of(type(came), ())
    state = state_of(went, shape)
    for name in ("__pydantic_private__", "__pydantic_extra__"):
        if not _same(getattr(went, name, None), getattr(came, name, None), seen):
            return False
    other = state_of(came, shape)
    if state or other:
        # What a cached property has computed, or not yet, is no difference.
        for cache in shape.caches:
            state.pop(cache, None)
            other.pop(cache, None)
        if state.keys() != other.keys():
            return False
        if not all(_same(item, other[name], seen) for name, item in state.items()):
            return False
        return not isinstance(went, _BUILTIN) or bool(went == came)
    equality: object = type(came).__eq__
    if equality is not object.__eq__:
        return bool(went == came)
    return _same_inside(went, came)


def _same_inside(went: Any, came: Any) -> bool:
    """Objects without equality and without attributes: what copying them would take."""
    try:
        parts: Any = went.__reduce_ex__(4)
        others: Any = came.__reduce_ex__(4)
    except Exception:  # noqa: BLE001 - a lock, a connection: nothing can copy it
        return True
    if isinstance(parts, str):
        return bool(parts == others)
    return parts[:3] == others[:3] and not any(part is not None for part in parts[3:5])
