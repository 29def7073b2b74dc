"""Starting runs and asking about them: the functions of the module, and the async ``Client``."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from datetime import timedelta
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

from pyworkflow._config import settings
from pyworkflow._definitions import RunOptions, Workflow, set_starter
from pyworkflow._engine.worker import Worker
from pyworkflow._local import (
    EmbeddedHost,
    check_shared,
    configured_executor,
    host,
    refuse_in_host,
)
from pyworkflow._operations import Operations
from pyworkflow._plugins import make_storage
from pyworkflow._replay.context import current_run
from pyworkflow.errors import (
    ArgumentError,
    WorkflowContextError,
)
from pyworkflow.events import Event
from pyworkflow.runs import Run
from pyworkflow.spi.executor import Executor
from pyworkflow.spi.storage import (
    Page,
    StorageBackend,
)

__all__ = [
    "Client",
    "Starter",
    "cancel",
    "get_events",
    "get_run",
    "list_runs",
    "result",
    "run",
    "start",
    "start_async",
]

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
D = str | int | float | timedelta

# --- the functions of the module ------------------------------------------------------------------


class Starter:
    """How definitions start runs: ``Workflow.start`` and its relatives."""

    def start(
        self,
        workflow: Workflow[Any, Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        options: RunOptions,
    ) -> str:
        """Start in the process's host; blocks until the run is durable."""
        _not_in_workflow("start()")
        workflow.encode_call(args, kwargs)  # wrong arguments need no store
        embedded = host()
        if embedded.is_here:
            run_id = _aside(embedded, lambda ops: ops.start(workflow, args, kwargs, options))
            if embedded.worker is not None:
                embedded.worker.wake()
        else:
            run_id = embedded.call(_operations(embedded).start(workflow, args, kwargs, options))
        embedded.started.add(run_id)
        return run_id

    async def start_async(
        self,
        workflow: Workflow[Any, Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        options: RunOptions,
    ) -> str:
        """Start in the process's host."""
        _not_in_workflow("start_async()")
        workflow.encode_call(args, kwargs)
        embedded = await asyncio.to_thread(host)
        coro = _operations(embedded).start(workflow, args, kwargs, options)
        run_id = await _on(embedded, coro)
        embedded.started.add(run_id)
        return run_id

    def run(
        self,
        workflow: Workflow[Any, Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        options: RunOptions,
        timeout: D | None = None,
    ) -> Any:
        """Start and wait for the result."""
        _not_in_workflow("run()")
        refuse_in_host("run()")
        return result(self.start(workflow, args, kwargs, options), timeout=timeout)


_starter = Starter()
set_starter(_starter)


_importing: str | None = None


class Importing:
    """Within it, a module is imported for its definitions: starting runs is refused.

    A script that starts a run when it is imported would start one more in each worker.
    """

    def __init__(self, module: str) -> None:
        self._module = module
        self._outer: str | None = None

    def __enter__(self) -> None:
        global _importing
        self._outer, _importing = _importing, self._module

    def __exit__(self, *_: object) -> None:
        global _importing
        _importing = self._outer


def _not_in_workflow(what: str) -> None:
    if _importing is not None:
        raise WorkflowContextError(
            f"{what} was called while {_importing} is imported for its workflows; put it under "
            '`if __name__ == "__main__":`'
        )
    running = current_run()
    if running is not None:
        running.refuse(f"{what} cannot be called in workflow code; call it in a step")


def _check(workflow: object) -> None:
    if not isinstance(workflow, Workflow):
        raise ArgumentError(
            f"start() takes a workflow, not {workflow!r}; decorate the function with @workflow"
        )


def _operations(embedded: EmbeddedHost) -> Operations:
    executor = embedded.executor if embedded.executor.capabilities.distributed else None
    return Operations(embedded.storage, embedded.worker, executor)


async def _on(embedded: EmbeddedHost, coro: Coroutine[Any, Any, T]) -> T:
    """Run on the host's loop, from any loop."""
    if embedded.is_here:
        return await coro
    return await asyncio.wrap_future(embedded.submit(coro))


def _aside(embedded: EmbeddedHost, call: Callable[[Operations], Awaitable[T]]) -> T:
    """Run on a twin of the store in a thread of its own: the caller holds the host's loop."""
    box: list[T | BaseException] = []

    async def main() -> T:
        async with embedded.storage.twin() as storage:
            return await call(Operations(storage, None, None))

    def body() -> None:
        try:
            box.append(asyncio.run(main()))
        except BaseException as exc:  # noqa: BLE001 - handed to the caller
            box.append(exc)

    thread = threading.Thread(target=body, name="pyworkflow-aside")
    thread.start()
    thread.join()
    if isinstance(box[0], BaseException):
        raise box[0]
    return box[0]


def _sync(what: str, call: Callable[[Operations], Coroutine[Any, Any, T]]) -> T:
    _not_in_workflow(what)
    embedded = host()
    if embedded.is_here:
        return _aside(embedded, call)
    return embedded.call(call(_operations(embedded)))


def start(
    workflow: Workflow[..., Any], /, *args: Any, idempotency_key: str | None = None, **kwargs: Any
) -> str:
    """Begin a run of ``workflow``; returns its id once the run is durable.

    With an ``idempotency_key``, a run that has the key and was started with the same is returned
    instead of a new one.

    Raises:
        ArgumentError: the arguments do not fit; nothing was started.
        IdempotencyConflict: the key belongs to a run that was started with something else.
        PayloadTooLarge, SerializationError: the arguments cannot be stored.
        StorageError: the store cannot be used.
    """
    _check(workflow)
    return _starter.start(workflow, args, kwargs, RunOptions(idempotency_key=idempotency_key))


async def start_async(
    workflow: Workflow[..., Any], /, *args: Any, idempotency_key: str | None = None, **kwargs: Any
) -> str:
    """``start`` as a coroutine."""
    _check(workflow)
    options = RunOptions(idempotency_key=idempotency_key)
    return await _starter.start_async(workflow, args, kwargs, options)


def run(workflow: Workflow[..., R], /, *args: Any, timeout: D | None = None, **kwargs: Any) -> R:
    """Start a run, wait for its end, and return its result. Raises as ``start`` and ``result``."""
    _check(workflow)
    found: R = _starter.run(workflow, args, kwargs, RunOptions(), timeout)
    return found


def result(run_id: str, *, timeout: D | None = None) -> Any:
    """Wait for the end of a run and return its result.

    Raises:
        RunNotFound: no run has this id.
        RunCancelled, RunTerminated, WorkflowTimeout: it ended without a result.
        TimeoutError: it has not ended within ``timeout``; it goes on.
        Exception: what the workflow raised.
    """
    _not_in_workflow("result()")
    refuse_in_host("result()")
    return _sync("result()", lambda ops: ops.result(run_id, timeout))


def get_run(run_id: str) -> Run:
    """The run as it stands, its values decoded. Raises ``RunNotFound``."""
    return _sync("get_run()", lambda ops: ops.get_run(run_id))


def list_runs(
    *,
    status: str | Iterable[str] | None = None,
    workflow: str | None = None,
    limit: int = 100,
    cursor: str | None = None,
) -> Page[Run]:
    """Runs, newest first: ``.items``, and ``.cursor`` for the next page (None at the end)."""
    return _sync("list_runs()", lambda ops: ops.list_runs(status, workflow, limit, cursor))


def get_events(run_id: str, *, after: int = 0, limit: int | None = None) -> list[Event]:
    """The run's events with seq above ``after``, in order. Raises ``RunNotFound``."""
    return _sync("get_events()", lambda ops: ops.get_events(run_id, after, limit))


def cancel(run_id: str, *, reason: str = "") -> None:
    """Ask a run to end; returns when the request is durable.

    The workflow gets ``CancelledError`` where it waits and may clean up. A run that no code has
    begun, or that is stalled, is closed at once. No-op on a cancelled run.

    Raises:
        RunNotFound: no run has this id.
        RunClosed: it has ended otherwise.
    """
    _sync("cancel()", lambda ops: ops.cancel(run_id, reason))


class Client:
    """The functions of the module as coroutines, on the configured store or on another.

    ``async with Client(storage=…) as client`` has a worker of its own in this loop (when the
    executor is local); without a store of its own it shares the process's embedded worker.
    """

    def __init__(
        self,
        *,
        storage: str | StorageBackend | None = None,
        executor: str | Executor | None = None,
        namespace: str | None = None,
    ) -> None:
        self._storage = storage
        self._executor = executor
        self._namespace = namespace
        self._own: Operations | None = None
        self._opening: asyncio.Lock | None = None
        self._worker: Worker | None = None
        self._opened: StorageBackend | None = None
        self._ringer: Executor | None = None
        """The executor that the client made, when it is a distributed one."""

    async def __aenter__(self) -> Self:
        await self._operations()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Drain the client's own worker, and close the store if the client opened it.

        Whoever still waits for the result of a run that has not ended gets a ``StorageError``.
        """
        if self._worker is not None:
            await self._worker.drain(10)
            await self._worker.close()
        if self._own is not None:
            self._own.close()
        if self._ringer is not None:
            await self._ringer.close()
        if self._opened is not None:
            await self._opened.close()
        self._own = self._worker = self._opened = self._ringer = None

    async def _operations(self) -> Operations:
        if self._own is not None:
            return self._own
        if self._opening is None:
            self._opening = asyncio.Lock()
        async with self._opening:
            # Several first calls at once share one worker.
            own: Operations | None = self._own
            return await self._open() if own is None else own

    async def _open(self) -> Operations:
        config = settings()
        if self._storage is None and self._executor is None and self._namespace is None:
            embedded = await asyncio.to_thread(host)
            return _operations(embedded)
        source = config.storage if self._storage is None else self._storage
        if isinstance(source, str):
            storage = make_storage(source, self._namespace or config.namespace)
            self._opened = storage
        else:
            storage = source
        executor = self._executor
        if executor is None or isinstance(executor, str):
            wanted = config if executor is None else dataclasses.replace(config, executor=executor)
            executor = configured_executor(wanted)
        try:
            await storage.open()
            if executor.capabilities.distributed:
                is_default = self._storage is None and config.storage_is_default
                check_shared(storage, executor, is_default=is_default)
        except BaseException:
            await self.close()
            raise
        if executor.capabilities.distributed:
            if executor is not self._executor:
                self._ringer = executor
            await executor.open({})
            self._own = Operations(storage, None, executor)
        else:
            self._worker = Worker(storage, config)
            await self._worker.open()
            self._worker.serve()
            self._own = Operations(storage, self._worker, None)
        return self._own

    async def _call(self, call: Callable[[Operations], Coroutine[Any, Any, T]]) -> T:
        _not_in_workflow("Client")
        ops = await self._operations()
        if ops is self._own:
            return await call(ops)
        return await _on(host(), call(ops))

    async def start(
        self,
        workflow: Workflow[..., Any],
        /,
        *args: Any,
        idempotency_key: str | None = None,
        **kwargs: Any,
    ) -> str:
        """As ``pyworkflow.start``."""
        _check(workflow)
        options = RunOptions(idempotency_key=idempotency_key)
        return await self._call(lambda ops: ops.start(workflow, args, kwargs, options))

    async def run(
        self, workflow: Workflow[..., R], /, *args: Any, timeout: D | None = None, **kwargs: Any
    ) -> R:
        """As ``pyworkflow.run``."""
        run_id = await self.start(workflow, *args, **kwargs)
        found: R = await self.result(run_id, timeout=timeout)
        return found

    async def result(self, run_id: str, *, timeout: D | None = None) -> Any:
        """As ``pyworkflow.result``."""
        return await self._call(lambda ops: ops.result(run_id, timeout))

    async def get_run(self, run_id: str) -> Run:
        """As ``pyworkflow.get_run``."""
        return await self._call(lambda ops: ops.get_run(run_id))

    async def list_runs(
        self,
        *,
        status: str | Iterable[str] | None = None,
        workflow: str | None = None,
        limit: int = 100,
        cursor: str | None = None,
    ) -> Page[Run]:
        """As ``pyworkflow.list_runs``."""
        return await self._call(lambda ops: ops.list_runs(status, workflow, limit, cursor))

    async def get_events(
        self, run_id: str, *, after: int = 0, limit: int | None = None
    ) -> list[Event]:
        """As ``pyworkflow.get_events``."""
        return await self._call(lambda ops: ops.get_events(run_id, after, limit))

    async def cancel(self, run_id: str, *, reason: str = "") -> None:
        """As ``pyworkflow.cancel``."""
        await self._call(lambda ops: ops.cancel(run_id, reason))
