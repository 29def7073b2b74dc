"""Parameters of a definition: which calls are the same, and which defaults are copied."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from copy import deepcopy
from enum import Enum
from itertools import product
from types import ModuleType
from typing import Any

from pyworkflow._tagged import Refused, text_of, walk
from pyworkflow.errors import DefinitionError

__all__ = ["Parameters"]

_MOST_DEFAULTS = 6
"""Parameters with defaults up to which every way to write a call is tried: 2 to the power of it."""
_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_Tree = Any


class Parameters:
    """The parameters of a function, from its signature."""

    def __init__(self, signature: inspect.Signature) -> None:
        self._signature = signature
        listed = [p for p in signature.parameters.values() if p.kind in _BY_POSITION]
        self._places = [
            "" if p.kind is inspect.Parameter.POSITIONAL_ONLY else p.name for p in listed
        ]

    # --- equal calls ----------------------------------------------------------------------------

    def bound(self, args: list[_Tree], kwargs: dict[str, _Tree]) -> dict[str, _Tree]:
        """A call's arguments with all that can be by position."""
        args, kwargs = list(args), dict(kwargs)
        for name in self._places[len(args) :]:
            if not name or name not in kwargs:
                break
            args.append(kwargs.pop(name))
        return _call(args, kwargs)

    def equal_calls(self, args: list[_Tree], kwargs: dict[str, _Tree]) -> Iterator[dict[str, Any]]:
        """Every way to write a call: by position or name, with defaults given or left out."""
        count = len(self._places)
        rest = args[count:]
        values: dict[int | str, _Tree] = dict(enumerate(args[:count]))
        for place, name in enumerate(self._places):
            if name and name in kwargs:
                values[place] = kwargs[name]
        values.update((n, v) for n, v in kwargs.items() if n not in self._places)
        free = self._defaults(values)[:_MOST_DEFAULTS]
        for chosen in product((False, True), repeat=len(free)):
            form = dict(values)
            for (key, default), given in zip(free, chosen, strict=True):
                # First as it was written, then the other way.
                if (key in values) == given:
                    form.pop(key, None)
                else:
                    form[key] = values.get(key, default)
            yield from self._splits(form, rest)

    def _splits(self, form: dict[int | str, _Tree], rest: list[_Tree]) -> Iterator[dict[str, Any]]:
        """The call with its first parameters by position and the others by name."""
        named = {key: value for key, value in form.items() if isinstance(key, str)}
        placed = {key: value for key, value in form.items() if isinstance(key, int)}
        first = 0
        while first in placed:
            first += 1
        for split in range(first, -1, -1):
            if rest and split < len(self._places):
                return
            later = [place for place in placed if place >= split]
            if not all(self._places[place] for place in later):
                return  # one of them can be given by position only
            by_name = {self._places[place]: placed[place] for place in later}
            yield _call([placed[place] for place in range(split)] + rest, by_name | named)

    def _defaults(self, values: Mapping[int | str, _Tree]) -> list[tuple[int | str, _Tree]]:
        """Parameters that the call leaves to their default, or gives the same value."""
        found: list[tuple[int | str, _Tree]] = []
        place = -1
        for parameter in self._signature.parameters.values():
            place += parameter.kind in _BY_POSITION
            if parameter.default is inspect.Parameter.empty:
                continue
            key = place if parameter.kind in _BY_POSITION else parameter.name
            try:
                tree = walk(parameter.default)
            except Refused:
                continue
            if key not in values or text_of(values[key]) == text_of(tree):
                found.append((key, tree))
        return found

    # --- defaults -------------------------------------------------------------------------------

    def mutable_defaults(self, what: str, only: Collection[type] | None) -> dict[str, object]:
        """Defaults that each execution gets a copy of; with ``only``, of these types.

        Raises:
            DefinitionError: one can be changed and not be copied.
        """
        found: dict[str, object] = {}
        for name, parameter in self._signature.parameters.items():
            default: object = parameter.default
            if default is inspect.Parameter.empty:
                continue
            if only is not None and type(default) not in only:
                continue
            try:
                if not _is_shared(default):
                    found[name] = default
            except Exception as failed:  # copying runs code of the value's type
                if only is not None:
                    continue
                raise DefinitionError(
                    f"the default of a parameter can be changed by one run and seen by the next, "
                    f"and it cannot be copied: {what} parameter={name} "
                    f"type={type(default).__qualname__} ({type(failed).__name__}: {failed}); "
                    f"write {name}=None and make it in the body"
                ) from failed
        return found

    def filled(
        self, fresh: Mapping[str, object], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with a copy of each of these defaults that they leave out."""
        bound = self._signature.bind(*args, **kwargs)
        missing = {n: d for n, d in fresh.items() if n not in bound.arguments}
        if not missing:
            return args, kwargs
        bound.apply_defaults()
        for name, default in missing.items():
            bound.arguments[name] = deepcopy(default)
        return bound.args, bound.kwargs


def _call(args: list[_Tree], kwargs: dict[str, _Tree]) -> dict[str, _Tree]:
    return {"args": args, "kwargs": kwargs} if kwargs else {"args": args}


def _is_shared(default: object) -> bool:
    """Whether a default can be the same object for all: nothing in it changes.

    Raises:
        Exception: whatever copying it raises.
    """
    if isinstance(default, (type, ModuleType, Enum)) or deepcopy(default) is default:
        return True
    # A sentinel is compared with ``is``: an object without state stays itself.
    reduce: Callable[[int], Any] = default.__reduce_ex__
    made = reduce(4)
    if not isinstance(made, tuple) or getattr(made[0], "__name__", "") != "__newobj__":
        return False
    parts: tuple[Any, ...] = (*made, None, None, None)
    return parts[1] == (type(default),) and not any(parts[2:5])
