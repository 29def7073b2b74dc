"""``@workflow`` and ``@step``: definitions, their signatures, and the registry of names."""

from __future__ import annotations

import asyncio
import functools
import importlib
import inspect
import typing
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import (
    Any,
    Generic,
    Literal,
    Never,
    NoReturn,
    ParamSpec,
    TypeVar,
    cast,
    overload,
)

from pyworkflow._defining import check_alone, check_function, check_name
from pyworkflow._names import check_limit, is_name
from pyworkflow._option_values import (
    MOST_RETRIES,
    check_attributes,
    check_hard_timeout,
    check_place,
    check_tags,
    delay_option,
    duration_option,
)
from pyworkflow._registry import (
    STEPS,
    WORKFLOWS,
    check_options,
    find_step,
    find_workflow,
    workflow_names,
)
from pyworkflow._replay.context import current_run
from pyworkflow._retry import RETRIES, RetryDelay, RetryPolicy
from pyworkflow._serialization import (
    decode,
    decode_arguments,
    digest_arguments,
    encode,
)
from pyworkflow._signature import Signature
from pyworkflow.errors import (
    ArgumentError,
    DefinitionError,
    SerializationError,
    WorkflowContextError,
)

__all__ = [
    "BoundWorkflow",
    "RunOptions",
    "Step",
    "Workflow",
    "find_step",
    "find_workflow",
    "start_of",
    "step",
    "workflow",
    "workflow_names",
]

P = ParamSpec("P")
R = TypeVar("R")
D = str | int | float | timedelta

_RESERVED = ("idempotency_key", "storage", "wait", "timeout")


class RunOptions:
    """What ``Workflow.options`` sets for one start; None leaves the definition's value."""

    __slots__ = (
        "attributes", "idempotency_key", "max_duration", "priority", "queue", "run_id", "tags",
    )  # fmt: skip

    def __init__(
        self,
        *,
        run_id: str | None = None,
        idempotency_key: str | None = None,
        queue: str | None = None,
        priority: int | None = None,
        tags: Sequence[str] = (),
        attributes: Mapping[str, Any] | None = None,
        max_duration: D | None = None,
    ) -> None:
        check_place(ArgumentError, queue, priority)
        self.run_id = run_id
        self.idempotency_key = idempotency_key
        self.queue = queue
        self.priority = priority
        self.tags = check_tags(ArgumentError, tags)
        self.attributes = check_attributes(attributes)
        self.max_duration = (
            None
            if max_duration is None
            else duration_option("max_duration", max_duration, ArgumentError)
        )

    def with_key(self, key: str) -> RunOptions:
        """The same with an idempotency key."""
        return RunOptions(
            run_id=self.run_id,
            idempotency_key=key,
            queue=self.queue,
            priority=self.priority,
            tags=self.tags,
            attributes=self.attributes,
            max_duration=self.max_duration,
        )


class Step(Generic[P, R]):
    """A unit of work with side effects; made by ``@step``.

    In a workflow, awaiting a call is durable: the body runs, with retries, until its result is
    recorded, and never again after that. Outside of a run, and inside another step, the body just
    runs: no retry, no timeout, no record.
    """

    def __init__(
        self,
        fn: Callable[P, Awaitable[R]] | Callable[P, R],
        *,
        name: str | None = None,
        max_retries: int | None = None,
        retry_delay: RetryDelay = "exponential",
        timeout: D | None = None,
        queue: str | None = None,
        priority: int | None = None,
        dispatch: Literal["auto", "queue"] = "auto",
        semantics: Literal["at_least_once", "at_most_once"] = "at_least_once",
        hard_timeout: bool = False,
    ) -> None:
        check_function("step", fn)
        if semantics not in ("at_least_once", "at_most_once"):
            raise DefinitionError(
                f"semantics={semantics!r} is neither 'at_least_once' nor 'at_most_once'"
            )
        if dispatch not in ("auto", "queue"):
            raise DefinitionError(f"dispatch={dispatch!r} is neither 'auto' nor 'queue'")
        if max_retries is None:
            max_retries = 0 if semantics == "at_most_once" else RETRIES
        if type(max_retries) is not int or max_retries < 0:
            raise DefinitionError(f"max_retries={max_retries!r} is not a number of tries >= 0")
        if max_retries > MOST_RETRIES:
            raise DefinitionError(f"max_retries={max_retries!r:.80} is more than {MOST_RETRIES}")
        if semantics == "at_most_once" and max_retries:
            raise DefinitionError(
                f"at_most_once and max_retries={max_retries} exclude each other; leave one out"
            )
        check_place(DefinitionError, queue, priority)
        check_hard_timeout(hard_timeout, timeout)
        functools.update_wrapper(self, fn)
        self.fn = fn
        self.name = check_name("step", name, fn)
        self.policy = RetryPolicy(max_retries, delay_option(retry_delay))
        self.timeout = None if timeout is None else duration_option("timeout", timeout)
        self.queue = queue
        # Runs of 0.1.0 may have longer names: their code must load, and they are replayed.
        self._fits = is_name(self.name) and (queue is None or is_name(queue))
        self.priority = priority
        self.dispatch = dispatch
        self.semantics = semantics
        self.hard_timeout = hard_timeout
        self.is_async = inspect.iscoroutinefunction(fn)
        self._signature = Signature(fn)
        self._fresh = self._signature.fresh_defaults((list, dict, set, bytearray))
        self._what = f"step {self.name!r}"
        self._labels: dict[str, str] = {}

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
        self._signature.check(args, kwargs)
        run = current_run()
        if run is None:
            call = self._plain(args, kwargs)
            call.__qualname__ = f"step {self.name}"  # type: ignore[attr-defined] # coroutines have it
            return call
        run.check_open(self._what)
        call = self._durable(args, kwargs)
        # What Python's warning about a forgotten await shows.
        label = self._labels.get(run.workflow)
        if label is None:
            label = self._labels[run.workflow] = f"step {self.name} of workflow {run.workflow}"
        call.__qualname__ = label  # type: ignore[attr-defined] # as above
        return call

    async def _durable(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> R:
        run = current_run()
        if run is None:
            raise WorkflowContextError(
                f"step {self.name!r} was called in a workflow and awaited outside of it; "
                "await it where it is called"
            )
        if not self._fits and not run.is_replaying:
            check_limit("step", self.name)
            check_limit("queue", self.queue or "default")
        op = run.start_step(self, args, kwargs)
        future = run.ops[op].future
        assert future is not None
        try:
            result: R = await future
        except asyncio.CancelledError:
            run.cancel_step(op)
            raise
        return result

    async def _plain(self, args: Any, kwargs: Any) -> R:
        value: Any = cast("Callable[..., Any]", self.fn)(*args, **kwargs)
        # An ordinary function round an async one returns what is to be awaited.
        result: R = await value if self.is_async or inspect.isawaitable(value) else value
        return result

    def __deepcopy__(self, memo: object) -> Step[P, R]:
        return self  # a definition is one thing, as a function is

    # --- what replay and the engine need ------------------------------------------------------

    @property
    def is_queued(self) -> bool:
        """Whether it always goes through a work item, and never runs in place."""
        return (
            self.queue is not None
            or self.dispatch == "queue"
            or self.semantics == "at_most_once"
            or self.hard_timeout
        )

    def encode_call(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> str:
        """Arguments as payload text."""
        return self._signature.encode(args, kwargs)

    def bound_call(self, text: str) -> dict[str, Any]:
        """The tree of these arguments, with all that can be by position."""
        return self._signature.bound_form(text)

    def equal_calls(self, text: str) -> Iterator[str]:
        """Every way to write the call with these arguments; defaults given or left out."""
        return self._signature.equal_forms(text)

    def arguments(self, text: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments for one attempt: lists, dicts and sets that are defaults are copies."""
        call = decode_arguments(text)
        return self._signature.filled(self._fresh, *call) if self._fresh else call

    def stored_arguments(self, text: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``arguments`` of a call that other code may have made.

        Raises:
            SerializationError: the parameters were changed, and no longer take them.
        """
        try:
            args, kwargs = self.arguments(text)
            self._signature.check(args, kwargs)
        except TypeError as exc:
            raise SerializationError(
                f"the stored arguments do not fit {self.name}{self._signature.signature}: {exc}; "
                "give new parameters a default, and keep the old ones until no run has them"
            ) from exc
        return args, kwargs

    def encode_result(self, value: object, limit: int = 0) -> str:
        """The result as payload text. ``SerializationError``, ``PayloadTooLarge``."""
        return encode(value, self._signature.result, limit=limit)

    def decode_result(self, payload: str) -> object:
        """Inverse of ``encode_result``."""
        return decode(payload, self._signature.result)

    def __repr__(self) -> str:
        return f"<step {self.name}>"


class Workflow(Generic[P, R]):
    """A durable process, made by ``@workflow``; one execution of it is a run.

    ``start`` begins a run and returns its id. Calling the workflow itself is refused.
    """

    def __init__(
        self,
        fn: Callable[P, Awaitable[R]],
        *,
        name: str | None = None,
        version: str = "1",
        max_duration: D | None = None,
        queue: str | None = None,
        priority: int = 0,
        tags: Sequence[str] = (),
        check_args: Literal["stall", "warn"] = "stall",
    ) -> None:
        check_function("workflow", fn)
        if not inspect.iscoroutinefunction(fn):
            kind = "an async generator" if inspect.isasyncgenfunction(fn) else "not async"
            remedy = "write it as `async def` and put what blocks into a step"
            if inspect.iscoroutinefunction(inspect.unwrap(fn)):
                kind = "an async function inside a decorator whose wrapper is not async"
                remedy = "write the decorator's wrapper as `async def` and await the function"
            raise DefinitionError(f"workflow {fn.__qualname__} is {kind}; {remedy}")
        if check_args not in ("stall", "warn"):
            raise DefinitionError(f"check_args={check_args!r} is neither 'stall' nor 'warn'")
        functools.update_wrapper(self, fn)
        self._signature = Signature(fn)
        for reserved in _RESERVED:
            if reserved in self._signature.signature.parameters:
                raise DefinitionError(
                    f"workflow {fn.__qualname__} has a parameter called {reserved!r}, which "
                    "start() and its relatives use themselves; rename it"
                )
        self._fresh = self._signature.fresh_defaults(None)
        self.fn = fn
        self.name = check_name("workflow", name, fn)
        if not isinstance(version, str):  # pyright: ignore[reportUnnecessaryIsInstance] - callers may lie
            raise DefinitionError(
                f"version={version!r} is not text; write version={str(version)!r}"
            )
        check_place(DefinitionError, queue, priority)
        self.version = version
        self.max_duration = (
            None if max_duration is None else duration_option("max_duration", max_duration)
        )
        self.queue = queue
        self.priority = priority
        self.tags = check_tags(DefinitionError, tags)
        self.check_args = check_args

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> NoReturn:
        run = current_run()
        if run is not None:
            run.refuse(
                f"workflow {self.name!r} was called inside a workflow: child workflows are not "
                "there yet; call an ordinary async function, or start it from a step"
            )
        raise WorkflowContextError(
            f"workflow {self.name!r} cannot be called; use start({self.name}, ...) or "
            f"{self.name}.start(...)"
        )

    def start(self, *args: P.args, **kwargs: P.kwargs) -> str:
        """Begin a run; returns its id once the run is durable. As ``pyworkflow.start``."""
        return self.options().start(*args, **kwargs)

    async def start_async(self, *args: P.args, **kwargs: P.kwargs) -> str:
        """``start`` as a coroutine."""
        return await self.options().start_async(*args, **kwargs)

    def run(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Start, wait for the end, and return the result. As ``pyworkflow.run``."""
        return self.options().run(*args, **kwargs)

    async def run_async(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """``run`` as a coroutine."""
        return await self.options().run_async(*args, **kwargs)

    def options(
        self,
        *,
        run_id: str | None = None,
        idempotency_key: str | None = None,
        queue: str | None = None,
        priority: int | None = None,
        tags: Sequence[str] = (),
        attributes: Mapping[str, Any] | None = None,
        max_duration: D | None = None,
        **unknown: Never,
    ) -> BoundWorkflow[P, R]:
        """This workflow with settings for one start.

        Raises:
            DefinitionError: there is no such setting.
        """
        if unknown:
            check_options(f"{self.name}.options", unknown, RunOptions.__slots__)
        return BoundWorkflow(
            self,
            RunOptions(
                run_id=run_id,
                idempotency_key=idempotency_key,
                queue=queue,
                priority=priority,
                tags=tags,
                attributes=attributes,
                max_duration=max_duration,
            ),
        )

    # --- what replay and the engine need ------------------------------------------------------

    def encode_call(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> str:
        """Arguments, validated against the annotations, as payload text. ``ArgumentError``."""
        valid_args, valid_kwargs = self._signature.validate(f"workflow {self.name}", args, kwargs)
        return self._signature.encode(valid_args, valid_kwargs, "; nothing was started")

    def same_call(self, one: str, other: str) -> bool:
        """Whether two payload texts are the arguments of the same call."""
        wanted = digest_arguments(one)
        if digest_arguments(other) == wanted:
            return True
        return any(digest_arguments(form) == wanted for form in self._signature.equal_forms(other))

    def __deepcopy__(self, memo: object) -> Workflow[P, R]:
        return self  # as a step

    def call(self, args: str) -> Coroutine[Any, Any, object]:
        """The coroutine for stored arguments.

        Raises:
            SerializationError: the parameters were changed, and no longer take them.
        """
        positional, named = decode_arguments(args)
        try:
            self._signature.check(positional, named)
        except TypeError as exc:
            raise SerializationError(
                f"the stored arguments do not fit {self.name}{self._signature.signature}: {exc}; "
                "give new parameters a default, and keep the old ones until no run has them"
            ) from exc
        positional, named = self._signature.fit_stored(self.name, positional, named)
        if self._fresh:
            positional, named = self._signature.filled(self._fresh, positional, named)
        return self.fn(*positional, **named)

    def encode_result(self, value: object, limit: int = 0) -> str:
        """The result as payload text. ``SerializationError``, ``PayloadTooLarge``."""
        return encode(value, self._signature.result, limit=limit)

    def decode_result(self, payload: str) -> object:
        """Inverse of ``encode_result``."""
        return decode(payload, self._signature.result)

    def argument_names(
        self, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> dict[str, object]:
        """Arguments by the names of their parameters, for messages."""
        return dict(self._signature.signature.bind(*args, **kwargs).arguments)

    def __repr__(self) -> str:
        return f"<workflow {self.name}>"


class BoundWorkflow(Generic[P, R]):
    """A workflow with options for one start; made by ``Workflow.options``."""

    def __init__(self, workflow: Workflow[P, R], options: RunOptions) -> None:
        self.workflow = workflow
        self.options = options

    def start(self, *args: P.args, **kwargs: P.kwargs) -> str:
        """As ``Workflow.start``, with the options."""
        run_id: str = _functions().start_bound(self, args, kwargs)
        return run_id

    async def start_async(self, *args: P.args, **kwargs: P.kwargs) -> str:
        """``start`` as a coroutine."""
        run_id: str = await _functions().start_bound_async(self, args, kwargs)
        return run_id

    def run(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Start, wait for the end, and return the result."""
        result: R = _functions().run_bound(self, args, kwargs, None)
        return result

    async def run_async(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """``run`` as a coroutine."""
        result: R = await _functions().run_bound_async(self, args, kwargs, None)
        return result

    def __repr__(self) -> str:
        return f"<workflow {self.workflow.name} with options>"


def start_of(what: str, workflow: object, key: str | None = None) -> BoundWorkflow[..., Any]:
    """The workflow to start with its options, given as either; ``key`` beside them.

    Raises:
        ArgumentError: something else was given, or two idempotency keys.
    """
    if isinstance(workflow, Workflow):
        plain = typing.cast("Workflow[..., Any]", workflow)
        return BoundWorkflow(plain, RunOptions(idempotency_key=key))
    if not isinstance(workflow, BoundWorkflow):
        raise ArgumentError(
            f"{what} takes a workflow or workflow.options(...), not {workflow!r}; decorate the "
            "function with @workflow"
        )
    bound = typing.cast("BoundWorkflow[..., Any]", workflow)
    existing = bound.options.idempotency_key
    if key is None or key == existing:
        return bound
    if existing is not None:
        raise ArgumentError(
            f"two idempotency keys are given: options={existing!r:.80} idempotency_key={key!r:.80}"
            "; leave one out"
        )
    return BoundWorkflow(bound.workflow, bound.options.with_key(key))


@overload
def workflow(fn: Callable[P, Awaitable[R]], /) -> Workflow[P, R]: ...
@overload
def workflow(
    *,
    name: str | None = None,
    version: str = "1",
    max_duration: D | None = None,
    queue: str | None = None,
    priority: int = 0,
    tags: Sequence[str] = (),
    check_args: Literal["stall", "warn"] = "stall",
) -> Callable[[Callable[P, Awaitable[R]]], Workflow[P, R]]: ...
def workflow(fn: Callable[..., Any] | None = None, /, *more: object, **settings: Any) -> Any:
    """Define a workflow: ``@workflow`` or ``@workflow(name=…, max_duration=…, …)``.

    Raises:
        DefinitionError: not an ``async def``, a method, a lambda, a reserved parameter name.
        DuplicateName: another function has the name.
    """

    def define(fn: Callable[..., Any]) -> Workflow[Any, Any]:
        check_options("@workflow", settings, _WORKFLOW_OPTIONS)
        return WORKFLOWS.add(Workflow(fn, **settings))

    check_alone("workflow", more)
    return define if fn is None else define(fn)


@overload
def step(fn: Callable[P, Coroutine[Any, Any, R]], /) -> Step[P, R]: ...
@overload
def step(fn: Callable[P, R], /) -> Step[P, R]: ...
@overload
def step(
    *,
    name: str | None = None,
    max_retries: int | None = None,
    retry_delay: RetryDelay = "exponential",
    timeout: D | None = None,
    queue: str | None = None,
    priority: int | None = None,
    dispatch: Literal["auto", "queue"] = "auto",
    semantics: Literal["at_least_once", "at_most_once"] = "at_least_once",
    hard_timeout: bool = False,
) -> _StepDecorator: ...
def step(fn: Callable[..., Any] | None = None, /, *more: object, **settings: Any) -> Any:
    """Define a step: ``@step`` or ``@step(max_retries=…, retry_delay=…, timeout=…, …)``.

    ``max_retries=n`` is at most n + 1 attempts (default 5; 0 for ``at_most_once``).
    ``retry_delay``: ``"exponential"`` (the default) waits 1, 2, 4, 8 … s up to 5 min, ``"fixed"``
    60 s, a duration waits that long, a list such as ``[5, "30s", "5m"]`` has a delay for each
    retry, and its last repeats. ``timeout`` bounds one attempt: an async body is cancelled. An
    ordinary function runs in a thread, which cannot be stopped: its next attempt waits until it
    has ended. With
    ``hard_timeout=True`` its process ends instead, where a pool makes another (Celery's prefork).

    Raises:
        DefinitionError: a method, a lambda, or a setting that makes no sense.
        DuplicateName: another function has the name.
    """

    def define(fn: Callable[..., Any]) -> Step[Any, Any]:
        check_options("@step", settings, _STEP_OPTIONS)
        return STEPS.add(Step(fn, **settings))

    check_alone("step", more)
    return define if fn is None else define(fn)


_WORKFLOW_OPTIONS = (
    "name", "version", "max_duration", "queue", "priority", "tags", "check_args",
)  # fmt: skip
_STEP_OPTIONS = (
    "name", "max_retries", "retry_delay", "timeout", "queue", "priority", "dispatch", "semantics",
    "hard_timeout",
)  # fmt: skip


class _StepDecorator(typing.Protocol):
    @overload
    def __call__(self, fn: Callable[P, Coroutine[Any, Any, R]], /) -> Step[P, R]: ...
    @overload
    def __call__(self, fn: Callable[P, R], /) -> Step[P, R]: ...


# --- the way up: methods that start runs --------------------------------------------------------


def _functions() -> Any:
    """The module of the client's functions, which is above this one: it loads on first use."""
    return importlib.import_module("pyworkflow._functions")
