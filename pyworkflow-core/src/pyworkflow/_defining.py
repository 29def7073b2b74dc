"""What may become a workflow or a step: functions and names."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from pyworkflow.errors import DefinitionError

__all__ = ["check_alone", "check_function", "check_name"]


def check_name(kind: str, name: object, fn: Callable[..., object]) -> str:
    """The name of a definition. ``DefinitionError``."""
    if name is None:
        return fn.__name__
    if not isinstance(name, str) or not name:
        raise DefinitionError(f"@{kind}(name={name!r}): a name is text, and not empty")
    return name


def check_alone(kind: str, more: tuple[object, ...]) -> None:
    """Refuse what is given by position beside the function. ``DefinitionError``."""
    if more:
        raise DefinitionError(
            f"@{kind} takes one function by position, and settings by name: also given {more!r:.80}"
        )


def check_function(kind: str, fn: Callable[..., object]) -> None:
    """Refuse what another process could not find again. ``DefinitionError``."""
    if isinstance(fn, (staticmethod, classmethod)) or not inspect.isfunction(fn):
        raise DefinitionError(
            f"@{kind} takes a plain function, not {fn!r}; methods and callables cannot be found "
            "again by another process: write a function at module level"
        )
    if fn.__name__ == "<lambda>":
        raise DefinitionError(f"@{kind} takes a function with a name, not a lambda; use def")
    parts = fn.__qualname__.rpartition(".")
    if parts[1] and not parts[0].endswith("<locals>"):
        raise DefinitionError(
            f"@{kind} cannot be put on a method: {fn.__qualname__}; write a function at module "
            "level and pass it the data it needs"
        )
    if kind == "step" and (inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn)):
        raise DefinitionError(
            f"step {fn.__qualname__} is a generator; return a list, or make each part a step"
        )
