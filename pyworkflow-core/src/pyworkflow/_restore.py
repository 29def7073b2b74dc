"""From the JSON trees that ``_tagged.py`` made back to values. No pickle, and no name is called.

A tag says of what kind its class must be; a class of another kind is refused before it is touched.
"""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Callable, Mapping
from datetime import date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from enum import Enum, Flag
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, cast
from uuid import UUID

from pydantic_core import from_json, to_json

from pyworkflow._portable import resolve_type
from pyworkflow._shapes import Shape, dataclass_shape, set_state, shape_of
from pyworkflow._tagged import MARK, Tree
from pyworkflow.errors import SerializationError

__all__ = ["StoredArgumentInvalid", "StoredValueInvalid", "from_text", "restore"]

Decoder = Callable[[dict[str, Tree]], object]


class StoredValueInvalid(SerializationError):
    """A stored value no longer fits the type it was stored as; the run stalls until it does."""

    def __init__(self, type: str, why: str) -> None:
        super().__init__(type, why)
        self.type, self.why = type, why

    def __str__(self) -> str:
        return (
            f"a stored value no longer fits its type: type={self.type}: {self.why}; make the "
            "change compatible (a default, an optional field), or put the old type back"
        )


class StoredArgumentInvalid(SerializationError):
    """A stored argument does not fit its parameter's annotation; the run stalls until it does."""

    def __init__(self, workflow: str, parameter: str, expected: str, found: str, why: str) -> None:
        super().__init__(workflow, parameter, expected, found, why)
        self.workflow, self.parameter = workflow, parameter
        self.expected, self.found, self.why = expected, found, why

    def __str__(self) -> str:
        return (
            f"a stored argument does not fit its parameter: workflow={self.workflow} "
            f"parameter={self.parameter} expected={self.expected} found={self.found}: {self.why}; "
            "let the annotation accept what was stored, or put the old one back"
        )


def from_text(text: str) -> Tree:
    """The tree of a JSON text.

    Raises:
        SerializationError: the text is not JSON.
    """
    try:
        return from_json(text)
    except ValueError as wrong:
        raise SerializationError(f"a stored payload is not JSON: {wrong}") from wrong


def restore(tree: Tree) -> object:
    """The value of a tree that ``walk`` made; the tree is used up.

    Raises:
        SerializationError: a tag is unknown or its type is not here (``StoredValueInvalid``:
            the type is here and does not take the value).
    """
    kind = cast("object", type(tree))
    if kind is list:
        for index, item in enumerate(tree):
            if type(item) in _BRANCHES:
                tree[index] = restore(item)
    elif kind is dict:
        if MARK in tree:
            return _untag(tree)
        for key, item in tree.items():
            if type(item) in _BRANCHES:
                tree[key] = restore(item)
    return tree


_BRANCHES = (list, dict)


def _untag(tree: dict[str, Tree]) -> object:
    tag = tree[MARK]
    decoder = _DECODERS.get(tag) if isinstance(tag, str) else None
    if decoder is None:
        raise SerializationError(
            f"a stored value has an unknown tag: tag={tag!r}; it was written by a newer version, "
            "upgrade this worker"
        )
    try:
        return decoder(tree)
    except SerializationError:
        raise
    except Exception as failed:
        raise StoredValueInvalid(
            str(tree.get("t", tag)), f"{type(failed).__name__}: {failed}"
        ) from failed


def _class(tree: dict[str, Tree], base: type | None, attribute: str = "") -> Any:
    """The class of a tag; refused unless it is of the kind that the tag is for."""
    found = resolve_type(tree["t"])
    if (base is not None and not issubclass(found, base)) or not hasattr(found, attribute or "mro"):
        raise StoredValueInvalid(tree["t"], f"the class is no longer a {tree[MARK]}")
    return found


def _undict(tree: dict[str, Tree]) -> object:
    return {restore(key): restore(item) for key, item in tree["v"]}


def _unmoment(kind: type[datetime | time]) -> Decoder:
    def decode(tree: dict[str, Tree]) -> object:
        moment = kind.fromisoformat(tree["v"])
        zone: tzinfo | None = moment.tzinfo
        if "z" in tree:
            zone = _zone(tree["z"])
        elif "n" in tree:
            zone = timezone(cast("timedelta", cast("tzinfo", zone).utcoffset(None)), tree["n"])
        return moment.replace(tzinfo=zone, fold=tree.get("f", 0))

    return decode


def _zone(key: str) -> tzinfo:
    from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

    try:
        return ZoneInfo(key)
    except ZoneInfoNotFoundError as unknown:
        raise SerializationError(
            f"a stored time is in a zone that this machine does not know: zone={key!r}; "
            "pip install tzdata"
        ) from unknown


def _unenum(tree: dict[str, Tree]) -> object:
    return _class(tree, Enum)[tree["v"]]


def _unflag(tree: dict[str, Tree]) -> object:
    return _class(tree, Flag)(restore(tree["v"]))


def _unnamedtuple(tree: dict[str, Tree]) -> object:
    kind = _class(tree, tuple, "_fields")
    fields = cast("dict[str, object]", restore(tree["v"]))
    _refuse_unknown(tree, fields, kind._fields)
    defaults: Mapping[str, object] = kind._field_defaults
    # Not kind(...): a __new__ of the user's could change what was stored.
    return cast("Any", tuple).__new__(
        kind, [fields[name] if name in fields else defaults[name] for name in kind._fields]
    )


def _unnamedtuple_state(tree: dict[str, Tree]) -> object:
    made = _unnamedtuple(tree)
    return _with_attributes(made, tree, shape_of(type(made), ()))


def _refuse_unknown(tree: dict[str, Tree], found: Mapping[str, object], known: Any) -> None:
    unknown = [name for name in found if name not in known]
    if unknown:
        raise StoredValueInvalid(tree["t"], f"it has no field {unknown[0]!r} any more")


def _undataclass(tree: dict[str, Tree]) -> object:
    kind = _class(tree, None, "__dataclass_fields__")
    fields = cast("dict[str, object]", restore(tree["v"]))
    plan = dataclass_shape(kind)
    _refuse_unknown(tree, fields, plan.fields)
    made: object
    if plan.parameters is None:
        made = object.__new__(kind)
        _set_defaults(kind, made, fields)
    else:
        made = kind(**{name: fields[name] for name in plan.parameters if name in fields})
    for name, item in fields.items():
        # What __post_init__ changed a second time, and fields with init=False.
        if getattr(made, name, _UNSET) is not item:
            object.__setattr__(made, name, item)
    return made


def _undataclass_state(tree: dict[str, Tree]) -> object:
    """Fields and attributes are set, and no code of the class runs."""
    kind = _class(tree, None, "__dataclass_fields__")
    fields = cast("dict[str, object]", restore(tree["v"]))
    shape = dataclass_shape(kind)
    _refuse_unknown(tree, fields, shape.fields)
    made = object.__new__(kind)
    _set_defaults(kind, made, fields)
    for name, item in fields.items():
        object.__setattr__(made, name, item)
    return _with_attributes(made, tree, shape)


def _with_attributes(made: object, tree: dict[str, Tree], shape: Shape) -> object:
    set_state(made, cast("dict[str, object]", restore(tree["a"])), shape.slots)
    return made


def _set_defaults(kind: Any, made: object, fields: Mapping[str, object]) -> None:
    for field in dataclasses.fields(kind):
        if field.name in fields:
            continue
        if field.default is not dataclasses.MISSING:
            object.__setattr__(made, field.name, field.default)
        elif field.default_factory is not dataclasses.MISSING:
            object.__setattr__(made, field.name, field.default_factory())
        else:
            raise ValueError(f"no value and no default for {field.name!r}")


_UNSET = object()


def _unpydantic_dataclass(tree: dict[str, Tree]) -> object:
    kind = _class(tree, None, "__is_pydantic_dataclass__")
    fields = cast("dict[str, object]", restore(tree["v"]))
    taken = {field.name for field in dataclasses.fields(kind) if field.init}
    given = {name: item for name, item in fields.items() if name in taken}
    made = kind.__pydantic_validator__.validate_python(given, by_alias=False, by_name=True)
    for name, item in fields.items():
        if name not in taken:
            object.__setattr__(made, name, item)
    return made


def _unmodel(tree: dict[str, Tree]) -> object:
    kind = _model_class(tree)
    fields = cast("dict[str, object]", restore(tree["v"]))
    if "x" in tree:
        fields |= cast("dict[str, object]", restore(tree["x"]))
    given = fields["root"] if getattr(kind, "__pydantic_root_model__", False) else fields
    return _with_state(kind.model_validate(given, by_alias=False, by_name=True), tree)


def _unmodel_json(tree: dict[str, Tree]) -> object:
    kind, text = _model_class(tree), to_json(tree["v"])
    return _with_state(kind.model_validate_json(text, by_alias=False, by_name=True), tree)


def _with_state(made: Any, tree: dict[str, Tree]) -> object:
    if "s" in tree:
        object.__setattr__(made, "__pydantic_fields_set__", set(tree["s"]))
    if "p" in tree:
        private: dict[str, object] = dict(made.__pydantic_private__ or {})
        private |= cast("dict[str, object]", restore(tree["p"]))
        object.__setattr__(made, "__pydantic_private__", private)
    if "a" in tree:
        kind = cast("Any", type(made))
        _with_attributes(made, tree, shape_of(kind, tuple(kind.__pydantic_fields__)))
    return made


def _model_class(tree: dict[str, Tree]) -> Any:
    from pydantic import BaseModel

    return _class(tree, BaseModel)


_DECODERS: dict[str, Decoder] = {
    "int": lambda tree: int(tree["v"], 16),
    "dict": _undict,
    "tuple": lambda tree: tuple(cast("list[object]", restore(tree["v"]))),
    "set": lambda tree: set(cast("list[object]", restore(tree["v"]))),
    "frozenset": lambda tree: frozenset(cast("list[object]", restore(tree["v"]))),
    "range": lambda tree: range(*cast("list[int]", restore(tree["v"]))),
    "datetime": _unmoment(datetime),
    "time": _unmoment(time),
    "date": lambda tree: date.fromisoformat(tree["v"]),
    "timedelta": lambda tree: timedelta(*tree["v"]),
    "uuid": lambda tree: UUID(tree["v"]),
    "decimal": lambda tree: Decimal(tree["v"]),
    "complex": lambda tree: complex(*tree["v"]),
    "bytes": lambda tree: base64.b64decode(tree["v"], validate=True),
    "bytearray": lambda tree: bytearray(base64.b64decode(tree["v"], validate=True)),
    "path": lambda tree: Path(tree["v"]),
    "posixpath": lambda tree: PurePosixPath(tree["v"]),
    "windowspath": lambda tree: PureWindowsPath(tree["v"]),
    "enum": _unenum,
    "flag": _unflag,
    "dataclass": _undataclass,
    "pydantic_dataclass": _unpydantic_dataclass,
    "dataclass_state": _undataclass_state,
    "pydantic_dataclass_state": _undataclass_state,
    "namedtuple": _unnamedtuple,
    "namedtuple_state": _unnamedtuple_state,
    "model": _unmodel,
    "model_state": _unmodel,
    "model_json": _unmodel_json,
    "model_json_state": _unmodel_json,
}
