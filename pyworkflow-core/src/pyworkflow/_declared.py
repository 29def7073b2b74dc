"""``declare_workflow``: workflows that are started here and defined in another process.

A declaration has a name, and perhaps the parameters and the result's type. Workers of this process
never claim its runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, ParamSpec, TypeVar, cast

from pyworkflow._definitions import D, Workflow, find_workflow
from pyworkflow._serialization import register_portable
from pyworkflow.errors import DefinitionError

__all__ = ["DeclaredWorkflow", "Declaration", "declare_workflow", "known_workflow"]

P = ParamSpec("P")
R = TypeVar("R")


class DeclaredWorkflow(Workflow[P, R]):
    """A workflow whose code is in another process; made by ``declare_workflow``.

    It is started like any workflow. Arguments are validated by the annotations, the result is
    decoded by its own.
    """

    def call(self, args: str) -> Coroutine[Any, Any, object]:
        """Refused: there is no code."""
        raise DefinitionError(f"workflow {self.name!r} is only declared here; it has no code")


class Declaration(DeclaredWorkflow[..., Any]):
    """A declaration by name alone; as a decorator it gives one with parameters and result."""

    def __init__(self, name: str, **settings: Any) -> None:
        super().__init__(_anything, name=name, **settings)
        self._settings = settings
        self.__name__ = self.__qualname__ = name

    def __call__(self, fn: Callable[P, Awaitable[R]], /) -> DeclaredWorkflow[P, R]:  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride] - a call decorates here
        """Take parameters and result from ``fn``, whose body is ``...`` and never runs."""
        if not inspect.isfunction(fn):
            return super().__call__(fn)
        if not _is_stub(fn):
            raise DefinitionError(
                f"the function {fn.__qualname__} that declares workflow {self.name!r} has a body, "
                "which would never run here; write `...` as its body, or define it with @workflow"
            )
        declared: DeclaredWorkflow[P, R] = DeclaredWorkflow(fn, name=self.name, **self._settings)
        register_portable(fn.__module__)
        _declared[self.name] = declared
        return declared


def declare_workflow(
    name: str,
    *,
    version: str = "1",
    max_duration: D | None = None,
    queue: str | None = None,
    priority: int = 0,
    tags: Sequence[str] = (),
) -> Declaration:
    """Name a workflow that other processes define, to start it here.

    ``ship = declare_workflow("ship")`` takes any arguments. As a decorator it takes parameters and
    result from a function without code::

        @declare_workflow("ship", queue="depot")
        async def ship(order: Order) -> Receipt: ...

    The settings are those of ``@workflow``: what the definition says of them is not known here.

    Raises:
        DefinitionError: the name is no text, or the function has a body.
    """
    given = cast("object", name)  # callers need not use a type checker
    if not isinstance(given, str) or not given:
        raise DefinitionError(
            f'declare_workflow({name!r}): a name is text, and not empty: declare_workflow("ship")'
        )
    declared = Declaration(
        name, version=version, max_duration=max_duration, queue=queue, priority=priority, tags=tags
    )
    _declared.setdefault(name, declared)
    return declared


def known_workflow(name: str) -> Workflow[..., Any] | None:
    """The workflow of this name that is defined or declared here."""
    return find_workflow(name) or _declared.get(name)


_declared: dict[str, Workflow[..., Any]] = {}


async def _anything(*args: Any, **kwargs: Any) -> Any:
    """Parameters of a workflow of which the name alone is known."""


async def _empty() -> None: ...


async def _documented() -> None:
    """The same with a docstring, which moves its constants."""


_STUBS = frozenset({_empty.__code__.co_code, _documented.__code__.co_code})


def _is_stub(fn: Callable[..., object]) -> bool:
    """Whether the body is ``...``, perhaps with a docstring. What is not async is refused later."""
    code = fn.__code__
    constants = {c for c in code.co_consts if c is not None and c is not Ellipsis}
    if constants - {fn.__doc__}:
        return False
    return code.co_code in _STUBS or not inspect.iscoroutinefunction(fn)
