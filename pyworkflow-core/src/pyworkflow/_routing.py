"""Where a client's call goes: the worker of the step that makes it, or the process's host."""

from __future__ import annotations

import asyncio
import sys
import threading
import warnings
from asyncio import events
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from pyworkflow._engine.places import Place, current_place, in_loop, without_slot
from pyworkflow._engine.worker import Worker
from pyworkflow._local import EmbeddedHost, host, host_is_here, running_host
from pyworkflow._operations import Operations
from pyworkflow._replay.context import current_run
from pyworkflow.errors import WorkflowContextError
from pyworkflow.spi.storage import StorageBackend

__all__ = [
    "Importing",
    "call",
    "call_async",
    "operations_in_step",
    "refuse_in_workflow",
    "refuse_waiting",
]

T = TypeVar("T")
Call = Callable[[Operations], Coroutine[Any, Any, T]]

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


def refuse_in_workflow(what: str) -> None:
    """Raise in workflow code, where the run stalls, and in a module that is being imported."""
    if _importing is not None:
        raise WorkflowContextError(
            f"{what} was called while {_importing} is imported for its workflows; put it under "
            '`if __name__ == "__main__":`'
        )
    running = current_run()
    if running is not None:
        running.refuse(f"{what} cannot be called in workflow code; call it in a step")


def refuse_waiting(what: str, form: str) -> None:
    """Raise where waiting would block the loop that has to do the work."""
    place = current_place()
    if host_is_here() or (place is not None and _is_running(place.loop)):
        raise WorkflowContextError(
            f"{what} was called in an async step, whose worker would wait for itself; use "
            f"`await {form}`, or make the step an ordinary function"
        )


def operations_in_step() -> Operations | None:
    """The client of the worker that runs the calling step; None outside of steps."""
    place = current_place()
    return None if place is None else _operations_of(place.worker)


def call(
    what: str,
    form: str,
    make: Call[T],
    *,
    waits: bool = False,
    then: Callable[[Operations, T], object] | None = None,
) -> T:
    """Make a client's call from a sync function, and wait for it.

    Args:
        what: The function, for messages.
        form: What to write in async code instead.
        make: The call.
        waits: It waits for the end of a run: a step that calls releases its slot meanwhile.
        then: Called with the worker's own client when the call was made beside it.
    """
    refuse_in_workflow(what)
    if waits:
        refuse_waiting(what, form)
    _warn_of_blocking(what, form)
    place = current_place()
    if place is not None:
        operations = _operations_of(place.worker)
        if _is_running(place.loop):
            return _beside(place.worker.storage, operations, make, then)
        if not waits:
            return asyncio.run_coroutine_threadsafe(make(operations), place.loop).result()
        return _wait_in_thread(what, place, lambda: make(operations))
    embedded = host()
    if embedded.is_here:
        return _beside(embedded.storage, _operations(embedded), make, then)
    return embedded.call(make(_operations(embedded)))


async def call_async(what: str, make: Call[T], *, waits: bool = False) -> T:
    """Make a client's call from a coroutine."""
    refuse_in_workflow(what)
    place = current_place()
    if place is not None:
        loop, operations = place.loop, _operations_of(place.worker)
        if waits:
            return await without_slot(place, lambda: in_loop(loop, make(operations)))
        return await in_loop(loop, make(operations))
    running = running_host()
    embedded = await asyncio.to_thread(host) if running is None else running
    return await in_loop(embedded.loop, make(_operations(embedded)))


def _operations(embedded: EmbeddedHost) -> Operations:
    if embedded.worker is not None:
        return _operations_of(embedded.worker)
    executor = embedded.executor if embedded.executor.capabilities.distributed else None
    return Operations(embedded.storage, None, executor)


def _operations_of(worker: Worker) -> Operations:
    found = worker.client
    if not isinstance(found, Operations):
        found = worker.client = Operations(worker.storage, worker, None)
    return found


def _is_running(loop: asyncio.AbstractEventLoop) -> bool:
    return events._get_running_loop() is loop


def _wait_in_thread(what: str, place: Place, wait: Callable[[], Awaitable[T]]) -> T:
    """Wait for a run in a step that runs in a thread."""
    future = asyncio.run_coroutine_threadsafe(without_slot(place, wait), place.loop)
    with place.waiting_for(future):
        try:
            return future.result()
        except BaseException:
            future.cancel()
            if place.is_abandoned:
                raise WorkflowContextError(
                    f"{what} waits no longer, since this attempt of the step is over: it timed "
                    "out or was cancelled"
                ) from None
            raise


def _beside(
    storage: StorageBackend,
    operations: Operations,
    make: Call[T],
    then: Callable[[Operations, T], object] | None,
) -> T:
    """Run on a clone of the store, since the caller blocks the store's loop; tell the worker."""
    found = _in_a_thread(storage, make)
    operations.wake()
    if then is not None:
        then(operations, found)
    return found


def _in_a_thread(storage: StorageBackend, make: Call[T]) -> T:
    """Run on a clone of the store in a thread of its own: the caller blocks the store's loop."""
    box: list[T | BaseException] = []

    async def main() -> T:
        async with storage.clone() as clone:
            return await make(Operations(clone, None, None))

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


# --- sync functions where an event loop runs --------------------------------------------------------

_warned: set[tuple[str, int]] = set()
_PACKAGE = __name__.partition(".")[0]


def _warn_of_blocking(what: str, form: str) -> None:
    """Warn, once per line of code, of a call that blocks the event loop of this thread."""
    if events._get_running_loop() is None:
        return
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and (
        frame.f_globals.get("__name__", "").partition(".")[0] == _PACKAGE
    ):
        level, frame = level + 1, frame.f_back
    line = (frame.f_code.co_filename, frame.f_lineno)
    if line in _warned:
        return
    _warned.add(line)
    warnings.warn(
        f"{what} blocks the event loop of this thread until it has its answer; use `await {form}`, "
        "or a Client",
        RuntimeWarning,
        stacklevel=level,
    )
