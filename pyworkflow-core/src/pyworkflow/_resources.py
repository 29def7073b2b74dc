"""Resources of steps: engines, HTTP clients, models. Their definitions, and how steps ask for them.

Workers open and close them (``_engine/resources.py``).
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import typing
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
)
from contextvars import ContextVar
from typing import Any, Generic, Literal, TypeVar, cast, overload

from pyworkflow._context import running_try
from pyworkflow._replay.context import current_run
from pyworkflow.errors import DefinitionError, WorkflowContextError

__all__ = ["Opener", "Resource", "Scope", "fake_of", "override", "resource", "running_opener"]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
Scope = Literal["loop", "process"]


class Opener(typing.Protocol):
    """What opens resources for the steps of a worker."""

    async def get(self, resource: Resource[T]) -> T:
        """The open resource, from any event loop."""
        ...

    def get_sync(self, resource: Resource[T]) -> T:
        """The open resource, from a thread."""
        ...


#: What opens a resource in this context, for those that it uses; in steps, see ``_opener``.
running_opener: ContextVar[Opener | None] = ContextVar("pyworkflow_opener", default=None)


def _opener() -> Opener | None:
    """What opens resources for this code: the resource that is being opened, or the step."""
    opener = running_opener.get()
    if opener is None:
        what = running_try.get()
        opener = None if what is None else cast("Opener | None", what.opener)
    return opener


class Resource(Generic[T_co]):
    """Something that steps share, and that a worker opens and closes; made by ``@resource``.

    Opened before its first use, once per event loop or process, and closed when the worker ends.
    """

    def __init__(self, factory: Callable[[], Any], *, scope: Scope | None = None) -> None:
        self.make, self.is_async = _managers_of(factory)
        """Makes a context manager, async or not."""
        if scope not in (None, "loop", "process"):
            raise DefinitionError(f"scope={scope!r} is neither 'loop' nor 'process'")
        self.scope: Scope = scope or ("loop" if self.is_async else "process")
        self.name = _name_of(factory)
        _check_parameters(self.name, factory)
        self.__doc__ = factory.__doc__

    def get(self) -> Coroutine[Any, Any, T_co]:
        """The open resource: ``await`` it in an async step, or in what such a step awaits.

        Raises:
            WorkflowContextError: called in workflow code, without an event loop, or outside of a
                step, unless the resource is faked (``pyworkflow.testing.override``).
            Exception: What the factory raised. The next call tries again.
        """
        self._refuse_in_workflow("get")
        if asyncio._get_running_loop() is None:
            raise WorkflowContextError(
                f"no event loop runs here: resource={self.name}; in a sync step, call get_sync()"
            )
        return self._get()

    async def _get(self) -> T_co:
        opener = _opener()
        if opener is not None:
            return await opener.get(self)
        faked, value = fake_of(self)
        return cast("T_co", value) if faked else self._refuse()

    def get_sync(self) -> T_co:
        """The open resource, in a sync step, or in what such a step calls.

        Raises as ``get``.
        """
        self._refuse_in_workflow("get_sync")
        if asyncio._get_running_loop() is not None:
            raise WorkflowContextError(
                f"get_sync() would block the event loop: resource={self.name}; await get() here"
            )
        opener = _opener()
        if opener is not None:
            return opener.get_sync(self)
        faked, value = fake_of(self)
        return cast("T_co", value) if faked else self._refuse()

    def _refuse_in_workflow(self, method: str) -> None:
        run = current_run()
        if run is not None:
            run.refuse(
                f"{method}() of a resource was called in workflow code: resource={self.name}; "
                "call it in the step that uses it"
            )

    def _refuse(self) -> typing.NoReturn:
        raise WorkflowContextError(
            f"a worker opens resources for the steps that it runs, and this code runs in none: "
            f"resource={self.name}; in a test, use pyworkflow.testing.override(); in a thread that "
            "a step starts, pass on the open object"
        )

    def __repr__(self) -> str:
        return f"<resource {self.name}>"


class _ResourceDecorator(typing.Protocol):
    @overload
    def __call__(
        self, factory: Callable[[], AbstractAsyncContextManager[T, Any]], /
    ) -> Resource[T]: ...
    @overload
    def __call__(self, factory: Callable[[], AbstractContextManager[T, Any]], /) -> Resource[T]: ...
    @overload
    def __call__(self, factory: Callable[[], AsyncIterator[T]], /) -> Resource[T]: ...
    @overload
    def __call__(self, factory: Callable[[], Iterator[T]], /) -> Resource[T]: ...


@overload
def resource(factory: Callable[[], AbstractAsyncContextManager[T, Any]], /) -> Resource[T]: ...
@overload
def resource(factory: Callable[[], AbstractContextManager[T, Any]], /) -> Resource[T]: ...
@overload
def resource(factory: Callable[[], AsyncIterator[T]], /) -> Resource[T]: ...
@overload
def resource(factory: Callable[[], Iterator[T]], /) -> Resource[T]: ...
@overload
def resource(*, scope: Scope) -> _ResourceDecorator: ...
def resource(factory: Callable[[], Any] | None = None, /, *, scope: Scope | None = None) -> Any:
    """Define what steps share: ``@resource`` on a generator function that yields it once.

    The code before the ``yield`` opens it, the code after it closes it; put that into ``finally``.
    An async step writes ``await engine.get()``, a sync step ``engine.get_sync()``. A factory may
    use other resources in the same way. A class or function that gives a context manager is taken
    too: ``client = resource(httpx.AsyncClient)``.

    ``scope="loop"``, the default of async factories, opens one for each event loop that runs steps:
    for what belongs to a loop, such as async engines and clients. ``scope="process"``, the default
    of sync factories, opens one for the process: for what any thread may use. Closed in the reverse
    order of their opening, when the worker drains.

    When opening fails, the attempt of the step fails with that error, and the next attempt tries
    again.

    Raises:
        DefinitionError: The factory yields nothing and gives no context manager, or has required
            parameters.
    """
    if factory is not None:
        return Resource[Any](factory, scope=scope)
    return functools.partial(Resource[Any], scope=scope)


def _managers_of(factory: Callable[[], Any]) -> tuple[Callable[[], Any], bool]:
    """What makes a context manager, and whether that is an async one."""
    if inspect.isasyncgenfunction(factory):
        return asynccontextmanager(factory), True
    if inspect.isgeneratorfunction(factory):
        return contextmanager(factory), False
    made = cast("Any", factory)
    if type(made) is functools.partial:
        made = made.func
    inner: Any = inspect.unwrap(made)
    if inspect.isasyncgenfunction(inner) or hasattr(inner, "__aenter__"):
        return factory, True
    if inspect.isgeneratorfunction(inner) or hasattr(inner, "__enter__"):
        return factory, False
    raise DefinitionError(
        f"a resource needs a generator function that yields once, or what gives a context manager, "
        f"not {factory!r:.100}; write `yield` where the resource is open"
    )


def _name_of(factory: Callable[[], Any]) -> str:
    named: Any = factory.func if isinstance(factory, functools.partial) else factory
    return f"{named.__module__}.{named.__qualname__}"


def _check_parameters(name: str, factory: Callable[[], Any]) -> None:
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (ValueError, TypeError):
        return  # a class of an extension module
    needed = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if needed:
        raise DefinitionError(
            f"a worker calls the factory of a resource without arguments: resource={name} "
            f"parameters={', '.join(needed)}; use functools.partial, or read settings inside"
        )


# --- fakes ----------------------------------------------------------------------------------------

_fakes: dict[Resource[Any], list[list[object]]] = {}


@contextmanager
def override(resource: Resource[Any], value: object) -> Generator[None]:
    """Let all workers of this process, and code outside of workers, get ``value`` instead.

    ``value`` is what ``get`` gives: it is neither opened nor closed. Or it is another resource,
    which is opened in place of this one.
    """
    entry = [value]
    _fakes.setdefault(resource, []).append(entry)
    try:
        yield
    finally:
        entries = _fakes[resource]
        entries[:] = [one for one in entries if one is not entry]
        if not entries:
            del _fakes[resource]


def fake_of(resource: Resource[Any]) -> tuple[bool, object]:
    """Whether the resource is faked in this process, and by what."""
    entries = _fakes.get(resource)
    return (True, entries[-1][0]) if entries else (False, None)
