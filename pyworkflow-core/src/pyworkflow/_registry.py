"""The names under which this process finds its workflows and steps, and what a second use means."""

from __future__ import annotations

import difflib
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from weakref import ref

from pyworkflow._context import running_step
from pyworkflow._serialization import register_portable
from pyworkflow.errors import DefinitionError, DuplicateName

if TYPE_CHECKING:
    from pyworkflow._definitions import Step, Workflow

__all__ = [
    "STEPS",
    "WORKFLOWS",
    "Registry",
    "check_findable",
    "check_options",
    "find_step",
    "find_workflow",
    "is_findable",
    "workflow_names",
]

_log = logging.getLogger("pyworkflow.client")
_warned: set[str] = set()
_Definition = TypeVar("_Definition", bound="Workflow[Any, Any] | Step[Any, Any]")


class _Locals(Generic[_Definition]):
    """Functions defined inside others: each lives as long as it is kept, the latest is found."""

    def __init__(self) -> None:
        self._refs: dict[str, list[ref[_Definition]]] = {}

    def get(self, name: str) -> _Definition | None:
        """The latest of this name."""
        for one in reversed(self._refs.get(name, ())):
            found: _Definition | None = one()
            if found is not None:
                return found
        return None

    def add(self, definition: _Definition) -> None:
        """Let this one be found."""
        alive = [one for one in self._refs.get(definition.name, ()) if one() is not None]
        self._refs[definition.name] = [*alive, ref(definition)]

    def remove(self, name: str) -> None:
        """Forget all of this name."""
        self._refs.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter([name for name in list(self._refs) if self.get(name) is not None])


class Registry(Generic[_Definition]):
    """Definitions of one kind by name.

    Two functions of one name are refused. A function that was defined inside another is no more
    than a value of that function: it replaces an earlier one, and its name ends with it.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self.named: dict[str, _Definition] = {}
        self.local: _Locals[_Definition] = _Locals()

    def find(self, name: str) -> _Definition | None:
        """The definition of this name."""
        return self.named.get(name) or self.local.get(name)

    def names(self) -> frozenset[str]:
        """All names."""
        return frozenset(self.named) | frozenset(self.local)

    def add(self, definition: _Definition) -> _Definition:
        """Register a definition, and return it.

        Raises:
            DuplicateName: another function has the name.
        """
        name, fn = definition.name, definition.fn
        existing = self.named.get(name)
        if existing is None and not _is_local(fn):
            existing = self.local.get(name)
        if existing is not None and not _same_function(existing.fn, fn):
            raise DuplicateName(self._kind, name, _location(existing.fn), _location(fn))
        self.named.pop(name, None)
        if _is_local(fn):
            self.local.add(definition)
        else:
            self.named[name] = definition
        register_portable(fn.__module__, in_step=running_step() is not None)
        return definition


WORKFLOWS: Registry[Workflow[Any, Any]] = Registry("workflow")
STEPS: Registry[Step[Any, Any]] = Registry("step")


def find_workflow(name: str) -> Workflow[Any, Any] | None:
    """The workflow of this name that this process has defined."""
    return WORKFLOWS.named.get(name) or WORKFLOWS.local.get(name)


def find_step(name: str) -> Step[Any, Any] | None:
    """The step of this name that this process has defined."""
    return STEPS.named.get(name) or STEPS.local.get(name)


def workflow_names() -> frozenset[str]:
    """The names of all workflows that this process has defined."""
    return WORKFLOWS.names()


def is_findable(definition: Workflow[Any, Any] | Step[Any, Any]) -> bool:
    """Whether another process that imports the definition's module has it, too.

    A function inside another is there only when a variable of the module keeps it.
    """
    fn = definition.fn
    if not _is_local(fn):
        return True
    module = sys.modules.get(fn.__module__)
    return any(value is definition for value in list(vars(module).values())) if module else False


def check_options(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse options that do not exist, and name the one that was meant.

    Raises:
        DefinitionError: an option is unknown.
    """
    names = tuple(known)
    for name in given:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            meant = f"did you mean {close[0]}? " if close else ""
            raise DefinitionError(
                f"there is no such option: {what} option={name}; {meant}"
                f"the options are {', '.join(names)}"
            )


def check_findable(
    workflow: Workflow[Any, Any], location: str, *, outlives: bool, distributed: bool
) -> None:
    """Refuse, or warn of, a run whose code no other process has.

    Args:
        workflow: What is to be started.
        location: Where its run is stored.
        outlives: Whether other processes see that store, now or later.
        distributed: Whether other processes are to do the work.

    Raises:
        DefinitionError: other processes are to do it.
        DuplicateName: a later function has the name, so that this one would not run.
    """
    current = find_workflow(workflow.name)
    if current is not None and not _same_function(current.fn, workflow.fn):
        raise DuplicateName(
            "workflow", workflow.name, _location(workflow.fn), _location(current.fn)
        )
    if not outlives or is_findable(workflow):
        return
    where = f"workflow={workflow.name} function={_location(workflow.fn)}"
    if distributed:
        raise DefinitionError(
            f"the workflow is defined inside a function, where no other process finds it: {where}; "
            "define it at the top level of its module"
        )
    if workflow.name not in _warned:
        _warned.add(workflow.name)
        _log.warning(
            "the workflow is defined inside a function: no other process finds it, and its runs "
            "outlive this one: %s storage=%s; define it at the top level of its module",
            where,
            location,
        )


def _is_local(fn: Callable[..., object]) -> bool:
    return "<locals>" in fn.__qualname__


def _same_function(a: Callable[..., object], b: Callable[..., object]) -> bool:
    if a.__qualname__ != b.__qualname__:
        return False
    return a.__module__ == b.__module__ or (
        "__main__" in (a.__module__, b.__module__) and _file(a) == _file(b)
    )


def _file(fn: Callable[..., object]) -> str:
    module = sys.modules.get(fn.__module__)
    return os.path.realpath(getattr(module, "__file__", None) or fn.__code__.co_filename)


def _location(fn: Callable[..., object]) -> str:
    code = fn.__code__
    return f"{fn.__module__}:{fn.__qualname__} ({code.co_filename}:{code.co_firstlineno})"
