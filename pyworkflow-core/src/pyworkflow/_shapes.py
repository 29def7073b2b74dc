"""What the state of an object consists of: its fields, and attributes besides them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cached_property, lru_cache
from types import FunctionType, MemberDescriptorType
from typing import Any, NamedTuple, cast

__all__ = ["STATE", "Shape", "dataclass_shape", "set_state", "shape_of", "state_of"]

STATE = "_state"
"""What the tag of a value ends with that is made again without running its class's code."""

#: ``Page[Item](...)`` notes its type arguments there; they are nothing that the value computes with.
_NOTED = frozenset({"__orig_class__"})
_OWN_SLOTS = frozenset({"__dict__", "__weakref__"})


class Shape(NamedTuple):
    """The state of a class's instances."""

    names: tuple[str, ...]
    """The fields."""
    fields: frozenset[str]
    """The fields, too."""
    slots: tuple[str, ...]
    """Slots besides the fields."""
    caches: frozenset[str]
    """Properties that keep what they computed: it can be left out, and is computed again."""
    parameters: tuple[str, ...] | None
    """Dataclasses: fields that ``__init__`` takes; None when it cannot be used."""
    plain: bool
    """Dataclasses: calling ``__init__`` with the fields sets them, and does nothing else."""


def shape_of(kind: Any, names: tuple[str, ...]) -> Shape:
    """The shape of a class with these fields."""
    found: list[str] = []
    caches: set[str] = set()
    for base in cast("tuple[type, ...]", kind.__mro__):
        slotted = "__slots__" in vars(base)
        for name, attribute in cast("dict[str, object]", vars(base)).items():
            if isinstance(attribute, cached_property):
                caches.add(name)
            elif slotted and isinstance(attribute, MemberDescriptorType):
                found.append(name)  # as the instance has it, mangled
    slots = tuple(
        name
        for name in dict.fromkeys(found)
        if name not in names and name not in _OWN_SLOTS and not name.startswith("__pydantic")
    )
    return Shape(names, frozenset(names), slots, frozenset(caches), None, False)


@lru_cache(maxsize=1024)
def dataclass_shape(kind: Any) -> Shape:
    """The shape of a dataclass, or of a subclass of one."""
    everything: Any = kind.__dataclass_fields__.values()
    fields = dataclasses.fields(kind)
    shape = shape_of(kind, tuple(field.name for field in fields))
    only_init = [f for f in everything if f._field_type.name == "_FIELD_INITVAR"]
    # InitVars are not stored, so an __init__ that wants one cannot be called.
    wants_more = any(
        f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        for f in only_init
    )
    own = "__dataclass_fields__" in vars(kind) and kind.__dataclass_params__.init
    parameters = tuple(f.name for f in fields if f.init) if own and not wants_more else None
    if hasattr(kind, "__is_pydantic_dataclass__"):
        plain = not only_init and not hasattr(kind, "__post_init__")
    else:
        plain = parameters is None or (not only_init and _init_only_sets(kind, shape.names))
    return shape._replace(parameters=parameters, plain=plain)


def _init_only_sets(kind: Any, names: tuple[str, ...]) -> bool:
    init: Callable[..., object] = kind.__init__
    if hasattr(kind, "__post_init__") or kind.__new__ is not object.__new__:
        return False
    if not isinstance(init, FunctionType) or init.__code__.co_filename != "<string>":
        return False  # not the one that dataclasses makes
    setter = kind.__setattr__
    frozen = isinstance(setter, FunctionType) and kind.__dataclass_params__.frozen
    if setter is not object.__setattr__ and not frozen:
        return False
    bases: tuple[type, ...] = kind.__mro__
    for name in names:
        attribute: object = next((vars(c)[name] for c in bases if name in vars(c)), None)
        if hasattr(type(attribute), "__set__") and not isinstance(attribute, MemberDescriptorType):
            return False  # a property under the name of a field
    return True


def state_of(value: object, shape: Shape) -> dict[str, object]:
    """An instance's attributes besides its fields."""
    found: dict[str, object] = {}
    attributes: dict[str, object] | None = getattr(value, "__dict__", None)
    if attributes and attributes.keys() != shape.fields:
        found = {
            name: item
            for name, item in attributes.items()
            if name not in shape.fields and name not in _NOTED
        }
    for name in shape.slots:
        try:
            found[name] = object.__getattribute__(value, name)
        except AttributeError:
            continue  # not set
    return found


def set_state(made: object, state: dict[str, object], slots: tuple[str, ...]) -> None:
    """Give an instance these attributes, and run none of its class's code."""
    attributes: dict[str, object] | None = getattr(made, "__dict__", None)
    for name, item in state.items():
        if attributes is None or name in slots:
            object.__setattr__(made, name, item)
        else:
            attributes[name] = item
