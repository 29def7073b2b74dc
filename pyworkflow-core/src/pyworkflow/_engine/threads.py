"""Daemon threads for the bodies of sync steps.

A library's pool would be joined at the end of the interpreter: a process that gave a step back
could then not end while its body still runs. These threads end with the process.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from queue import SimpleQueue

from pyworkflow.errors import WorkflowContextError

__all__ = ["MOST_WAITING", "Ended", "StepThreads"]

MOST_WAITING = 1000
"""Threads that may wait for runs at once: each of them has a stack of its own."""

#: What a call returned, and what it raised: never the exception of a future, for asyncio and the
#: coroutines under it take some of those (StopIteration, GeneratorExit) for their own.
Ended = tuple[object, BaseException | None]
_Call = tuple[asyncio.AbstractEventLoop, "asyncio.Future[Ended]", Callable[[], object]]


class StepThreads:
    """Up to ``number`` threads, begun as they are needed; callers see to the bound."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._begun = 0
        self._idle = 0
        self._lent = 0

    def begin(self, most: int = 32) -> None:
        """Begin up to ``most`` of them now: at the end of a process none can start."""
        with self._lock:
            while self._begun < min(self._number, most):
                self._start()

    def submit(self, call: Callable[[], object]) -> asyncio.Future[Ended]:
        """Run ``call`` in a thread; the future belongs to the running loop."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Ended] = loop.create_future()
        with self._lock:
            if self._idle <= 0 and self._begun < self._number:
                try:
                    self._start()
                except RuntimeError:
                    if self._begun == 0:
                        raise
                    # The process ends: those that are there do it, one after the other.
            self._idle -= 1
        self._calls.put((loop, future, call))
        return future

    def lend(self) -> None:
        """One of the threads waits for a run: another may take its place.

        Raises:
            WorkflowContextError: no other thread can be started, or too many wait already.
        """
        with self._lock:
            if self._lent >= MOST_WAITING:
                raise WorkflowContextError(
                    f"too many threads of this worker wait for runs: waiting={self._lent}; wait in "
                    "an async step, with `await result_async(...)`"
                )
            if self._idle <= 0:
                try:
                    self._start()
                except RuntimeError as exc:
                    raise WorkflowContextError(
                        "no thread is left to run what this step waits for, and none can start: "
                        f"{exc}; wait in an async step, with `await result_async(...)`"
                    ) from exc
            self._lent += 1
            self._number += 1

    def take_back(self) -> None:
        """The thread resumes; a surplus one ends after its next call."""
        with self._lock:
            self._lent -= 1
            self._number -= 1

    def close(self) -> None:
        """Let the threads end once they have nothing to do."""
        for _ in range(self._begun):
            self._calls.put(None)

    def _start(self) -> None:
        name = f"pyworkflow-step-{self._begun}"
        threading.Thread(target=self._run, name=name, daemon=True).start()
        self._begun += 1
        self._idle += 1

    def _run(self) -> None:
        while (item := self._calls.get()) is not None:
            loop, future, call = item
            value: object = None
            error: BaseException | None = None
            try:
                value = call()
            except BaseException as exc:  # noqa: BLE001 - it is the step's result
                error = exc
            with self._lock:
                surplus = self._begun > self._number and self._idle >= 0
                if surplus:
                    self._begun -= 1
                else:
                    self._idle += 1
            try:
                loop.call_soon_threadsafe(_resolve, future, value, error)
            except RuntimeError:
                pass  # the loop is closed: the step was given back long ago
            del item, future, call, value, error
            if surplus:
                return


def _resolve(future: asyncio.Future[Ended], value: object, error: BaseException | None) -> None:
    if not future.done():
        future.set_result((value, error))
