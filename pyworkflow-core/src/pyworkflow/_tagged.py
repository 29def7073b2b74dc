"""Values as JSON trees with tags, so that ``_restore.py`` gives back equal value and type.

What JSON has is itself. Everything else is an object with the key ``"$py"``, the *tag*, which says
how to read the rest; a user's dict with that key is written as tagged pairs, so nothing collides.
Only exact types are taken: a subclass that would come back as its base is refused.
"""

from __future__ import annotations

import base64
import sys
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from enum import Enum, Flag
from math import isfinite
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from types import FunctionType
from typing import Any, cast
from uuid import UUID

from pydantic_core import from_json, to_json

from pyworkflow._portable import portable_name, resolve_type
from pyworkflow._shapes import STATE, Shape, dataclass_shape, shape_of, state_of
from pyworkflow.errors import SerializationError

__all__ = [
    "FLAT",
    "LEAVES",
    "MARK",
    "NotSerializable",
    "storable",
    "text_of",
    "walk",
]

MARK = "$py"
"""The key of a tagged object."""
MARKED = '"$py"'
"""What the text of a tagged value contains; without it, text is plain JSON."""
DEPTH = 190
"""Levels of JSON; parsers stop at 200, and stores put a few around a payload."""
_BITS = 2_048
"""Integers beyond are written in hexadecimal: Python limits decimal digits, down to 640."""
_BIG = 1 << _BITS

Tree = Any
"""What ``json.loads`` would give: a tree of dicts, lists and scalars."""
Encoder = Callable[[Any, int], Tree]


class NotSerializable(SerializationError):
    """A value that cannot be stored: ``path`` leads to it, ``why`` says what is wrong."""

    def __init__(self, path: str, type: str, why: str, remedy: str) -> None:
        super().__init__(path, type, why, remedy)
        self.path, self.type, self.why, self.remedy = path, type, why, remedy

    def __str__(self) -> str:
        return f"{self.path} cannot be stored: type={self.type}: {self.why}; {self.remedy}"


class Refused(Exception):  # internal: leaves this module as NotSerializable
    """Unwinds to the caller of ``walk`` and collects the path on its way up."""

    def __init__(self, value: object, why: str, remedy: str = "", by_type: bool = False) -> None:
        super().__init__(why)
        self.kind = type(value)
        self.why, self.remedy, self.by_type = why, remedy, by_type
        self.path: list[str] = []
        self.trail: list[int] = []

    def inside(self, step: str, container: object) -> None:
        """Note that the value is ``step`` of ``container``."""
        self.path.append(step)
        self.trail.append(id(container))

    def error(self, root: str) -> NotSerializable:
        """What the user sees."""
        path, why = root + "".join(reversed(self.path)), self.why
        if len(path) > 300:
            path = f"{path[:200]}…{path[-80:]}"
        if len(set(self.trail)) < len(self.trail):
            why = "it contains itself"
        name = f"{self.kind.__module__}.{self.kind.__qualname__}"
        return NotSerializable(path, name.removeprefix("builtins."), why, self.remedy or PLAIN)


PLAIN = (
    "return plain data, a dataclass or a pydantic model, or annotate with a type that pydantic "
    "can dump and validate"
)
_FINITE = "use None or a string for what is not a finite number"
_BYTES = "use bytes for binary data"
FLAT = "flatten it, or store the data elsewhere and pass a reference"
"""The remedy for nesting."""


def walk(value: object, depth: int = 0) -> Tree:
    """The value as a JSON tree with tags; a new tree, which shares scalars only.

    Raises:
        Refused: something in it cannot be stored.
    """
    kind = type(value)
    if kind is str:
        if not value.isascii():  # type: ignore[attr-defined] # kind is str
            _check_text(cast("str", value))
        return value
    if value is None or kind is bool:
        return value
    encoder = _ENCODERS.get(kind)
    if encoder is None:
        encoder = _encoder_for(kind, value)
    return encoder(value, depth)


def text_of(tree: Tree) -> str:
    """The compact JSON text of a tree."""
    return to_json(tree).decode()


def _check_text(value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Refused(
            value, "the text holds a lone surrogate, which is no character", _BYTES
        ) from None


def _enter(value: object, depth: int, levels: int) -> int:
    depth += levels
    if depth > DEPTH:
        raise Refused(value, f"it is nested more than {DEPTH} levels deep, as JSON", FLAT)
    return depth


def _int(value: int, depth: int) -> Tree:
    if -_BIG < value < _BIG:
        return value
    _enter(value, depth, 1)
    return {MARK: "int", "v": hex(value)}


def _float(value: float, _depth: int) -> Tree:
    if not isfinite(value):
        raise Refused(value, f"{value!r} is not a finite number", _FINITE)
    return value


def _items(values: Any, depth: int, container: object, names: Any = None) -> list[Tree]:
    done: list[Tree] = []
    try:
        for item in values:
            done.append(walk(item, depth))  # noqa: PERF401 # its length is the path of a failure
    except Refused as refused:
        refused.inside(names[len(done)] if names else f"[{len(done)}]", container)
        raise
    return done


def _list(value: list[Any], depth: int) -> Tree:
    inner = _enter(value, depth, 1)
    done: list[Tree] = []
    try:
        for item in value:
            kind = type(item)  # pyright: ignore[reportUnknownVariableType] # item is Any
            if (kind is int and -_BIG < item < _BIG) or (kind is str and item.isascii()):
                done.append(item)  # as walk does, without the call
            else:
                done.append(walk(item, inner))
    except Refused as refused:
        refused.inside(f"[{len(done)}]", value)
        raise
    return done


def _dict(value: dict[Any, Any], depth: int) -> Tree:
    inner = _enter(value, depth, 1)
    done: dict[str, Tree] = {}
    key: object = None
    try:
        for key, item in value.items():
            if type(key) is not str or key == MARK:
                break
            if not key.isascii():
                _check_text(key)
            kind = type(item)  # pyright: ignore[reportUnknownVariableType] # item is Any
            if (kind is int and -_BIG < item < _BIG) or (kind is str and item.isascii()):
                done[key] = item  # as walk does, without the call
            else:
                done[key] = walk(item, inner)
        else:
            return done
    except Refused as refused:
        refused.inside(f"[{_short(key)}]", value)
        raise
    return _pairs(value, depth)


def _pairs(value: dict[Any, object], depth: int) -> Tree:
    inner = _enter(value, depth, 3)
    pairs: list[Tree] = []
    key: object = None
    try:
        for key, item in value.items():
            pairs.append([walk(key, inner), walk(item, inner)])
    except Refused as refused:
        refused.inside(f"[{_short(key)}]", value)
        raise
    return {MARK: "dict", "v": pairs}


def _short(key: object) -> str:
    try:
        text = repr(key)
    except Exception:  # noqa: BLE001 # a __repr__ of the user's, an integer of 5000 digits
        return f"<{type(key).__name__}>"
    return text if len(text) <= 40 else f"{text[:36]} …"


def _sequence(tag: str) -> Encoder:
    def encode(value: Any, depth: int) -> Tree:
        return {MARK: tag, "v": _items(value, _enter(value, depth, 2), value)}

    return encode


def _set(tag: str) -> Encoder:
    def encode(value: Any, depth: int) -> Tree:
        inner = _enter(value, depth, 2)
        items: list[Tree] = []
        try:
            for item in value:
                items.append(walk(item, inner))  # noqa: PERF401 # the path of a failure
        except Refused as refused:
            refused.inside("{…}", value)
            raise
        # Sorted by text: sets of strings iterate differently in each process.
        return {MARK: tag, "v": sorted(items, key=to_json)}

    return encode


def _leaf(tag: str, text: Callable[[Any], Tree], levels: int = 1) -> Encoder:
    def encode(value: Any, depth: int) -> Tree:
        _enter(value, depth, levels)
        return {MARK: tag, "v": text(value)}

    return encode


def _decimal(value: Decimal) -> str:
    if not value.is_finite():
        raise Refused(value, f"{value!r} is not a finite number", _FINITE)
    return str(value)


def _complex(value: complex) -> Tree:
    return [_float(value.real, 0), _float(value.imag, 0)]


def _path(value: PurePath) -> str:
    text = str(value)
    _check_text(text)
    return text


def _moment(tag: str) -> Encoder:
    def encode(value: Any, depth: int) -> Tree:
        _enter(value, depth, 1)
        done: dict[str, Tree] = {MARK: tag}
        zone: tzinfo | None = value.tzinfo
        if zone is None or zone is UTC:
            done["v"] = value.isoformat()
        elif type(zone) is timezone:
            done["v"] = value.isoformat()
            name = zone.tzname(None)
            if name != timezone(zone.utcoffset(None)).tzname(None):
                done["n"] = walk(name)
        elif (key := _zone_key(zone)) is not None:
            done["v"] = value.replace(tzinfo=None).isoformat()
            done["z"] = key
        elif type(zone).__module__.startswith("pydantic_core"):
            # What pydantic puts on datetimes that it parsed: a fixed offset.
            done["v"] = value.isoformat()
        else:
            raise Refused(
                zone,
                "it is no timezone of the standard library",
                "use datetime.timezone or zoneinfo",
            )
        if value.fold:
            done["f"] = 1
        return done

    return encode


def _zone_key(zone: tzinfo) -> str | None:
    zoneinfo = sys.modules.get("zoneinfo")
    if zoneinfo is None or type(zone) is not zoneinfo.ZoneInfo:
        return None
    return cast("str | None", zone.key)  # type: ignore[attr-defined] # a ZoneInfo


_ENCODERS: dict[type, Encoder] = {
    int: _int,
    float: _float,
    list: _list,
    dict: _dict,
    tuple: _sequence("tuple"),
    set: _set("set"),
    frozenset: _set("frozenset"),
    range: _leaf("range", lambda value: [walk(value.start), walk(value.stop), walk(value.step)], 3),
    datetime: _moment("datetime"),
    time: _moment("time"),
    date: _leaf("date", date.isoformat),
    timedelta: _leaf("timedelta", lambda value: [value.days, value.seconds, value.microseconds], 2),
    UUID: _leaf("uuid", str),
    Decimal: _leaf("decimal", _decimal),
    complex: _leaf("complex", _complex, 2),
    bytes: _leaf("bytes", lambda value: base64.b64encode(value).decode()),
    bytearray: _leaf("bytearray", lambda value: base64.b64encode(value).decode()),
    type(Path()): _leaf("path", _path),
    PurePosixPath: _leaf("posixpath", _path),
    PureWindowsPath: _leaf("windowspath", _path),
}


LEAVES = frozenset(_ENCODERS) - {list, dict, tuple, set, frozenset}
"""Built-in types, with strings, that contain no other values."""


def _encoder_for(kind: type, value: object) -> Encoder:
    """The encoder of a class that is not built in; kept, because classes are few."""
    make = _maker(kind)
    if make is None:
        raise Refused(value, "this type has no exact form in JSON", by_type=True)
    name = portable_name(kind)
    try:
        found: type | None = resolve_type(name)
    except SerializationError:
        found = None
    if found is not kind:
        raise Refused(
            value,
            f"a reader would not find this class as {name!r}",
            "define it at the top level of a module under its own name",
            by_type=True,
        )
    encoder = _ENCODERS[kind] = make(kind, name)
    return encoder


def _maker(kind: Any) -> Callable[[Any, str], Encoder] | None:
    if issubclass(kind, Enum):
        return _flag if issubclass(kind, Flag) else _enum
    if hasattr(kind, "__pydantic_fields__") and hasattr(kind, "model_validate"):
        return _model
    if not _reduces_as_any(kind):
        return None
    if hasattr(kind, "_fields") and tuple in kind.__mro__:
        return _namedtuple
    if hasattr(kind, "__dataclass_fields__") and not issubclass(kind, _CONTAINERS):
        return _dataclass
    return None


def _reduces_as_any(kind: type) -> bool:
    """Whether all state is in fields and attributes: a ``deque`` or a ``StringIO`` has other."""
    ways = kind.__reduce__, kind.__reduce_ex__
    defaults: tuple[object, ...] = (object.__reduce__, object.__reduce_ex__)
    return all(way in defaults or isinstance(way, FunctionType) for way in ways)


_CONTAINERS = (list, dict, set, frozenset, tuple, str, bytes, int, float, BaseException)


def _enum(_kind: type, name: str) -> Encoder:
    def encode(value: Enum, depth: int) -> Tree:
        _enter(value, depth, 1)
        if type(value)._member_map_.get(value._name_) is not value:
            raise Refused(value, "its class has no member of its name", "use a member of the class")
        return {MARK: "enum", "t": name, "v": value._name_}

    return encode


def _flag(_kind: type, name: str) -> Encoder:
    def encode(value: Flag, depth: int) -> Tree:
        # By number: a combination of flags has no name of its own.
        return {MARK: "flag", "t": name, "v": walk(value._value_, _enter(value, depth, 1))}

    return encode


def _fields(value: object, names: list[str], depth: int) -> dict[str, Tree]:
    """The named attributes; two levels of JSON, with the tag."""
    inner = _enter(value, depth, 2)
    done: dict[str, Tree] = {}
    name = ""
    try:
        for name in names:
            if not hasattr(value, name):
                raise Refused(value, f"its field {name!r} is not set", "set every field")
            done[name] = walk(getattr(value, name), inner)
    except Refused as refused:
        refused.inside(f".{name}", value)
        raise
    return done


def _attributes(value: object, shape: Shape, depth: int) -> dict[str, Tree] | None:
    """The tree of the attributes besides the fields; None without any."""
    state = state_of(value, shape)
    for name in [name for name in state if name in shape.caches]:
        try:
            walk(state[name], depth + 2)
        except Refused:
            del state[name]  # its property computes it again
    if not state:
        return None
    try:
        return cast("dict[str, Tree]", _dict(state, depth + 1))
    except Refused as refused:
        # As people write it: the dict of attributes is no part of the path.
        refused.path[-1] = f".{refused.path[-1][2:-2]}"
        raise


def _dataclass(kind: type, name: str) -> Encoder:
    shape = dataclass_shape(kind)
    names, plain = list(shape.names), shape.plain
    tag = "pydantic_dataclass" if hasattr(kind, "__is_pydantic_dataclass__") else "dataclass"

    def encode(value: object, depth: int) -> Tree:
        done: dict[str, Tree] = {MARK: tag, "t": name, "v": _fields(value, names, depth)}
        state = _attributes(value, shape, depth)
        if state is not None or not plain:
            done[MARK] = tag + STATE
            done["a"] = state or {}
        return done

    return encode


def _namedtuple(kind: type, name: str) -> Encoder:
    names: list[str] = list(kind._fields)  # type: ignore[attr-defined] # a NamedTuple
    shape = shape_of(kind, ())

    def encode(value: tuple[object, ...], depth: int) -> Tree:
        items = _items(value, _enter(value, depth, 2), value, [f".{field}" for field in names])
        done: dict[str, Tree] = {MARK: "namedtuple", "t": name}
        done["v"] = dict(zip(names, items, strict=True))
        state = _attributes(value, shape, depth)
        if state is not None:
            done[MARK] += STATE
            done["a"] = state
        return done

    return encode


def _model(kind: Any, name: str) -> Encoder:
    names: list[str] = list(kind.__pydantic_fields__)
    shape = shape_of(kind, tuple(names))

    def encode(value: Any, depth: int) -> Tree:
        try:
            done: dict[str, Tree] = {MARK: "model", "t": name, "v": _fields(value, names, depth)}
            if value.__pydantic_extra__:
                done["x"] = _dict(value.__pydantic_extra__, depth + 1)
        except Refused as refused:
            if not refused.by_type:
                raise
            done = {MARK: "model_json", "t": name, "v": _dumped(value, names, refused)}
        if len(value.__pydantic_fields_set__) != len(names) + len(value.__pydantic_extra__ or ()):
            done["s"] = sorted(value.__pydantic_fields_set__)
        attributes: dict[str, object] = value.__pydantic_private__ or {}
        private = storable(attributes, depth + 2)
        if private:
            done["p"] = private
        state = _attributes(value, shape, depth)
        if state is not None:
            done[MARK] += STATE
            done["a"] = state
        if left_out := attributes.keys() - private.keys():
            _check_left_out(value, left_out, done)
        return done

    return encode


def _check_left_out(value: Any, names: Iterable[str], tree: Tree) -> None:
    """Refuse private attributes that are not stored, and that the class makes differently."""
    from pyworkflow._restore import restore
    from pyworkflow._same import same

    try:
        made: Any = restore(from_json(to_json(tree)))
    except SerializationError:
        return  # refused when the whole value is read again
    others: dict[str, object] = made.__pydantic_private__ or {}
    for name in names:
        item = value.__pydantic_private__[name]
        if name not in others or not same(item, others[name]):
            refused = Refused(
                item, "this private attribute has no exact form in JSON", by_type=True
            )
            refused.inside(f".{name}", value)
            raise refused


def storable(attributes: Mapping[str, object], depth: int) -> dict[str, Tree]:
    """Of these attributes, the trees of those that can be stored."""
    kept: dict[str, Tree] = {}
    for name, value in list(attributes.items()):
        if name.isidentifier() and not name.startswith("__"):
            try:
                kept[name] = walk(value, depth)
            except Exception:  # noqa: BLE001 - refused, or code of the user's
                continue
    return kept


def _dumped(value: Any, names: list[str], refused: Refused) -> Tree:
    """A model with fields that only pydantic knows, as pydantic writes it, if that is exact."""
    try:
        text = value.model_dump_json(round_trip=True, by_alias=False, warnings="error")
        kind = cast("Any", type(value))
        again = kind.model_validate_json(text, by_alias=False, by_name=True)
    except Exception as failed:  # validators and serializers are user code
        refused.why += f" ({type(failed).__name__} when pydantic dumps it)"
        raise refused from failed
    from pyworkflow._same import same

    if not all(same(getattr(value, name), getattr(again, name)) for name in names):
        refused.why += " (dumped by pydantic it comes back different)"
        raise refused
    return from_json(text)
