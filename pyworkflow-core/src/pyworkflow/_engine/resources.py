"""Opening and closing the resources that the steps of a worker use.

Each is opened once, whoever asks first; the others wait for the same. An async one is entered and
exited in one task of the worker's loop, a sync one in threads, so that neither opening nor closing
blocks the loop.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import logging
import os
import threading
from collections.abc import Generator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from time import monotonic
from typing import Any, TypeVar, cast

from pyworkflow._engine.threads import StepThreads
from pyworkflow._resources import Resource, fake_of, running_opener
from pyworkflow.errors import DefinitionError, WorkflowContextError

__all__ = ["WorkerResources"]

T = TypeVar("T")
_log = logging.getLogger("pyworkflow.engine")

CLOSING = 4.0
"""Seconds for all resources of a worker to close; what takes longer is left to the process's end."""
_THREADS = 64
"""Sync resources that async steps open at the same time; the threads start as they are needed."""


class _Entry:
    """One resource that is open, opens, or failed to."""

    def __init__(self, resource: Resource[Any], keeper: WorkerResources) -> None:
        self.resource = resource
        self.keeper = keeper
        """The worker whose loop or threads open it."""
        self.opened: Future[object] = Future()
        # A running future cannot be cancelled: one step that gives up takes it from no other.
        self.opened.set_running_or_notify_cancel()
        self.number = 0
        """Its place in the order of opening; 0 until it is open."""
        self.waits_for: set[_Entry] = set()
        self.started = False
        """Sync ones: a thread runs its factory, or did."""
        self.abandoned = False
        """The worker has closed before it was open."""
        self.manager: Any = None
        self.task: asyncio.Task[None] | None = None
        self.release = asyncio.Event()


class _Process:
    """What the workers of one process share."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        """Of all entries, also of those that belong to one worker."""
        self.entries: dict[Resource[Any], _Entry] = {}
        self.users: set[WorkerResources] = set()
        self.numbers = itertools.count(1)

    def leave(self, worker: WorkerResources) -> list[_Entry]:
        """Which entries close with this worker: its own async ones, and all with the last."""
        self.users.discard(worker)
        leaving = [
            entry
            for entry in self.entries.values()
            if not self.users or (entry.keeper is worker and entry.resource.is_async)
        ]
        for entry in leaving:
            del self.entries[entry.resource]
        return leaving


_process = _Process()
#: What a parent process had: kept, for a collector must not close what the parent still uses.
_inherited: list[_Process] = []
#: The entry whose factory runs in this context.
_opening: contextvars.ContextVar[_Entry | None] = contextvars.ContextVar(
    "pyworkflow_opening", default=None
)


def _after_in_child() -> None:
    global _process
    _inherited.append(_process)
    _process = _Process()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_in_child)


class WorkerResources:
    """The open resources of one worker, and those of the process that it uses."""

    def __init__(self) -> None:
        self._entries: dict[Resource[Any], _Entry] = {}
        self._fakes: dict[Resource[Any], object] = {}
        self._threads = StepThreads(_THREADS)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = os.getpid()
        self._closed = False

    def begin(self) -> None:
        """In the worker's loop, before its first step."""
        self._loop = asyncio.get_running_loop()

    def begin_threads(self) -> None:
        """Start a thread now: at the end of a process none can start."""
        self._threads.begin(1)

    def override(self, resource: Resource[Any], value: object) -> None:
        """Let the steps of this worker get ``value`` instead; it may be another resource."""
        self._fakes[resource] = value

    # --- what steps call ------------------------------------------------------------------------

    async def get(self, resource: Resource[T]) -> T:
        """The open resource, from any event loop."""
        faked, value = self._fake_of(resource)
        if faked:
            if isinstance(value, Resource):
                return await self.get(cast("Resource[T]", value))
            return cast("T", value)
        here = asyncio.get_running_loop()
        if resource.scope == "loop" and here is not self._loop:
            raise WorkflowContextError(
                f"the resource belongs to the worker's event loop, and this code runs in another: "
                f"resource={resource.name}; make one in this loop, or use an async step"
            )
        entry, is_new = self._entry(resource)
        if not entry.opened.done():
            with _waiting(entry):
                if is_new:
                    self._open(entry, here)
                if not entry.opened.done():
                    return cast("T", await asyncio.wrap_future(entry.opened))
        return cast("T", entry.opened.result())

    def get_sync(self, resource: Resource[T]) -> T:
        """The open resource, from a thread."""
        faked, value = self._fake_of(resource)
        if faked:
            if isinstance(value, Resource):
                return self.get_sync(cast("Resource[T]", value))
            return cast("T", value)
        entry, is_new = self._entry(resource)
        if not entry.opened.done():
            with _waiting(entry):
                if is_new or not resource.is_async:
                    # A sync one may wait for a thread to open it in: this is one.
                    self._open(entry, None)
                return cast("T", entry.opened.result())
        return cast("T", entry.opened.result())

    def _fake_of(self, resource: Resource[Any]) -> tuple[bool, object]:
        if resource in self._fakes:
            return True, self._fakes[resource]
        return fake_of(resource)

    def _entry(self, resource: Resource[Any]) -> tuple[_Entry, bool]:
        """The entry, and whether the caller has to open it."""
        if self._pid != os.getpid():
            raise WorkflowContextError(
                "a child process cannot use the resources of its parent: "
                f"resource={resource.name}; make one in the child"
            )
        opener = _opening.get()
        if opener is not None and (opener.resource.scope, resource.scope) == ("process", "loop"):
            raise DefinitionError(
                f"a resource of the process cannot use one of a loop, which may close before it: "
                f"resource={opener.resource.name} uses={resource.name}; give both the same scope"
            )
        process = _process
        with process.lock:
            if self._closed:
                raise WorkflowContextError(
                    f"the worker ends, and its resources are closed: resource={resource.name}"
                )
            entries = self._entries
            if resource.scope == "process":
                entries = process.entries
                process.users.add(self)
            entry = entries.get(resource)
            if entry is not None and entry.keeper.is_usable(entry):
                return entry, False
            entry = entries[resource] = _Entry(resource, self)
            return entry, True

    def is_usable(self, entry: _Entry) -> bool:
        """Whether what this worker opened can still be used: its loop was not closed under it."""
        return not (entry.resource.is_async and self._loop is not None and self._loop.is_closed())

    # --- opening --------------------------------------------------------------------------------

    def _open(self, entry: _Entry, here: asyncio.AbstractEventLoop | None) -> None:
        """Begin to open; ``here`` is the running loop, None in a thread without one."""
        # Not in the context of the step that happens to be first.
        context = contextvars.Context()
        context.run(_opening.set, entry)
        context.run(running_opener.set, self)
        if not entry.resource.is_async:

            def enter() -> None:
                context.run(self._enter, entry)

            if here is None:
                enter()
                return
            try:
                self._threads.submit(enter)
            except RuntimeError:
                enter()  # the process ends, and no thread can start any more
            return
        loop = self._loop
        assert loop is not None

        def begin() -> None:
            entry.task = loop.create_task(self._keep(entry), context=context)

        if here is loop:
            begin()
            return
        try:
            loop.call_soon_threadsafe(begin)
        except RuntimeError as closed:
            self._failed(entry, closed)

    def _enter(self, entry: _Entry) -> None:
        """Open a sync resource, in a thread."""
        with _process.lock:
            if entry.started:
                return
            entry.started = True
        try:
            entry.manager = entry.resource.make()
            value: object = entry.manager.__enter__()
        except BaseException as exc:  # noqa: BLE001 - the steps that wait for it get it
            self._failed(entry, exc)
            return
        if not self._opened(entry, value):
            _exit(entry)

    async def _keep(self, entry: _Entry) -> None:
        """Open an async resource, and close it in the same task, as cancel scopes want it."""
        try:
            manager: Any = entry.resource.make()
            value: object = await manager.__aenter__()
        except BaseException as exc:  # noqa: BLE001 - the steps that wait for it get it
            self._failed(entry, exc)
            return
        if self._opened(entry, value):
            try:
                await entry.release.wait()
            except asyncio.CancelledError as exc:
                # The loop ends without the worker's close().
                if not await manager.__aexit__(type(exc), exc, exc.__traceback__):
                    raise
                return
        await manager.__aexit__(None, None, None)

    def _opened(self, entry: _Entry, value: object) -> bool:
        """Give the value to those that wait; False when the worker has ended meanwhile."""
        with _process.lock:
            abandoned = entry.abandoned
            if not abandoned:
                entry.number = next(_process.numbers)
        if abandoned:
            entry.opened.set_exception(_ended(entry))
            return False
        _log.debug("a resource is open: resource=%s", entry.resource.name)
        entry.opened.set_result(value)
        return True

    def _failed(self, entry: _Entry, error: BaseException) -> None:
        """The attempts that wait fail; the next one tries again."""
        with _process.lock:
            for entries in (self._entries, _process.entries):
                if entries.get(entry.resource) is entry:
                    del entries[entry.resource]
        if isinstance(error, asyncio.CancelledError) and entry.abandoned:
            error = _ended(entry)
        elif (
            not isinstance(error, Exception)
            or isinstance(error, StopIteration)
            or error.args == ("generator didn't yield",)
        ):
            # A future takes some of these for its own, and SystemExit would end the worker; the
            # last one is contextlib's, which names no factory.
            message = f"opening a resource raised {type(error).__name__}: {error}"
            wrapped = RuntimeError(f"{message}; resource={entry.resource.name}")
            wrapped.__cause__ = error
            error = wrapped
        entry.opened.set_exception(error)

    # --- closing --------------------------------------------------------------------------------

    async def close(self) -> None:
        """Close what is open, in the reverse order of opening. Never raises.

        Resources of the process close with the last worker that used them. All of it takes
        ``CLOSING`` seconds at most.
        """
        process = _process
        with process.lock:
            if self._closed:
                return
            self._closed = True
            own = list(self._entries.values())
            self._entries.clear()
            entries = [*own, *process.leave(self)]
            for entry in entries:
                entry.abandoned = not entry.opened.done() and not entry.number
        end = monotonic() + CLOSING
        for entry in sorted(entries, key=lambda e: e.number, reverse=True):
            if entry.abandoned:
                if entry.task is not None:
                    entry.task.cancel()
                    await asyncio.wait({entry.task}, timeout=max(0.1, end - monotonic()))
            elif entry.number:
                await self._close_one(entry, max(0.1, end - monotonic()))
        self._threads.close()

    async def _close_one(self, entry: _Entry, seconds: float) -> None:
        entry.release.set()
        closing: asyncio.Future[Any]
        if entry.task is not None:
            closing = entry.task
        else:
            try:
                closing = self._threads.submit(partial(_exit, entry))
            except RuntimeError:
                _exit(entry)  # the process ends, and no thread can start any more
                return
        done, _ = await asyncio.wait({closing}, timeout=seconds)
        if not done:
            _log.warning(
                "a resource takes too long to close, and ends with the process: resource=%s "
                "seconds=%.1f",
                entry.resource.name,
                seconds,
            )
        elif entry.task is not None and not entry.task.cancelled():
            _report(entry, entry.task.exception())


def _exit(entry: _Entry) -> None:
    """Close a sync resource."""
    try:
        entry.manager.__exit__(None, None, None)
    except BaseException as exc:  # noqa: BLE001 - the others are closed all the same
        _report(entry, exc)


def _report(entry: _Entry, error: BaseException | None) -> None:
    if error is not None:
        _log.error("a resource failed to close: resource=%s", entry.resource.name, exc_info=error)


def _ended(entry: _Entry) -> WorkflowContextError:
    return WorkflowContextError(
        f"the worker ended while a resource was opening: resource={entry.resource.name}"
    )


@contextmanager
def _waiting(entry: _Entry) -> Generator[None]:
    """Note that the factory of this context, if any, waits for ``entry``.

    Raises:
        DefinitionError: They would wait for each other for ever.
    """
    opener = _opening.get()
    if opener is None:
        yield
        return
    with _process.lock:
        if opener in _reached_from(entry):
            raise DefinitionError(
                f"two resources need each other: resource={opener.resource.name} "
                f"uses={entry.resource.name}; let one of them make its own"
            )
        opener.waits_for.add(entry)
    try:
        yield
    finally:
        opener.waits_for.discard(entry)


def _reached_from(entry: _Entry) -> set[_Entry]:
    reached, todo = {entry}, [entry]
    while todo:
        for other in todo.pop().waits_for - reached:
            reached.add(other)
            todo.append(other)
    return reached
