"""The async ``Client``: on the configured store or on another."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Coroutine, Iterable
from datetime import timedelta
from types import TracebackType
from typing import Any, Self, TypeVar

from pyworkflow._config import settings
from pyworkflow._definitions import BoundWorkflow, Workflow, start_of
from pyworkflow._engine.places import current_place, without_slot
from pyworkflow._engine.worker import Worker
from pyworkflow._local import check_shared, configured_executor
from pyworkflow._operations import IfStalled, Operations
from pyworkflow._plugins import load_observers, make_storage
from pyworkflow._queries import Named
from pyworkflow._results import parse_timeout
from pyworkflow._routing import call_async, refuse_in_workflow
from pyworkflow.events import Event
from pyworkflow.runs import Run
from pyworkflow.spi._contract import check_executor_contract, check_storage_contract
from pyworkflow.spi.executor import Executor
from pyworkflow.spi.storage import (
    Page,
    StorageBackend,
)

__all__ = ["Client"]

R = TypeVar("R")
T = TypeVar("T")
D = str | int | float | timedelta
Target = Workflow[..., R] | BoundWorkflow[..., R]


class Client:
    """The functions of the module as coroutines, on the configured store or on another.

    ``async with Client(storage=…) as client`` has a worker of its own in this loop (when the
    executor is local and the setting ``worker`` is on). Without arguments it shares the process's
    embedded worker, and inside a step the worker that runs the step.
    """

    def __init__(
        self,
        *,
        storage: str | StorageBackend | None = None,
        executor: str | Executor | None = None,
        namespace: str | None = None,
    ) -> None:
        if storage is not None and not isinstance(storage, str):
            check_storage_contract(storage)
        if executor is not None and not isinstance(executor, str):
            check_executor_contract(executor)
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
        if self._has_own:
            await self._operations()
        else:
            await call_async("Client", _nothing)
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

    @property
    def _has_own(self) -> bool:
        """Whether it was given a place of its own; without, it is the caller's, call by call."""
        return not (self._storage is self._executor is self._namespace is None)

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
        load_observers()
        is_distributed = executor.capabilities.distributed
        try:
            await storage.open()
            if is_distributed or not (config.worker or self._opened is None):
                is_default = is_distributed and self._storage is None and config.storage_is_default
                check_shared(storage, executor, is_default=is_default)
        except BaseException:
            await self.close()
            raise
        if is_distributed:
            if executor is not self._executor:
                self._ringer = executor
            await executor.open({})
            self._own = Operations(storage, None, executor)
        elif not config.worker:
            self._own = Operations(storage, None, None)
        else:
            self._worker = Worker(storage, config, queues=config.queues or None)
            await self._worker.open()
            self._worker.serve()
            self._own = Operations(storage, self._worker, None)
        return self._own

    async def _call(
        self, call: Callable[[Operations], Coroutine[Any, Any, T]], *, waits: bool = False
    ) -> T:
        if not self._has_own:
            return await call_async("Client", call, waits=waits)
        refuse_in_workflow("Client")
        operations = await self._operations()
        place = current_place() if waits else None
        if place is not None:
            return await without_slot(place, lambda: call(operations))
        return await call(operations)

    async def start(
        self,
        workflow: Target[Any],
        /,
        *args: Any,
        idempotency_key: str | None = None,
        **kwargs: Any,
    ) -> str:
        """As ``pyworkflow.start``."""
        refuse_in_workflow("Client")
        bound = start_of("start()", workflow, idempotency_key)
        text = bound.workflow.encode_call(args, kwargs)  # wrong arguments need no store
        return await self._call(lambda ops: ops.start_encoded(bound.workflow, text, bound.options))

    async def run(
        self, workflow: Target[R], /, *args: Any, timeout: D | None = None, **kwargs: Any
    ) -> R:
        """As ``pyworkflow.run``."""
        parse_timeout(timeout)
        run_id = await self.start(start_of("run()", workflow), *args, **kwargs)
        found: R = await self.result(run_id, timeout=timeout)
        return found

    async def result(
        self, run_id: str, *, timeout: D | None = None, if_stalled: IfStalled | None = None
    ) -> Any:
        """As ``pyworkflow.result``."""
        return await self._call(lambda ops: ops.result(run_id, timeout, if_stalled), waits=True)

    async def get_run(self, run_id: str) -> Run:
        """As ``pyworkflow.get_run``."""
        return await self._call(lambda ops: ops.get_run(run_id))

    async def list_runs(
        self,
        *,
        status: str | Iterable[str] | None = None,
        workflow: str | Named | None = None,
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


async def _nothing(_: Operations) -> None:
    """Opens what a call needs."""
