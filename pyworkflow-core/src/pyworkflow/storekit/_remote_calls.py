"""Calls to a store behind a network: those of cancelled callers, and one poll for all waiters."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TypeVar

from pyworkflow.errors import StorageError

__all__ = ["Calls", "Look", "Poller"]

T = TypeVar("T")


class Calls:
    """The calls of one storage object. Each is carried out, even when its caller is cancelled.

    A call that begins after one was cancelled waits until that one has ended: a late claim cannot
    be granted behind a later ``free``.
    """

    def __init__(self) -> None:
        self._tasks = set[asyncio.Task[object]]()
        self._cancelled = set[asyncio.Task[object]]()

    async def run(
        self,
        work: Callable[[], Awaitable[T]],
        *,
        unwanted: Callable[[T], Awaitable[object]] | None = None,
    ) -> T:
        """The answer of ``work``, which runs in a task of its own.

        Args:
            work: A transaction from its begin to its commit, or a read.
            unwanted: Called with the answer when its caller was cancelled. A claim passes a
                function that releases what was claimed. It may call ``run``.
        """
        while self._cancelled:
            await asyncio.wait(self._cancelled)
        task = self._start(work())
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            self._cancelled.add(task)
            self._start(self._end(task, unwanted))
            raise

    def _start(self, work: Awaitable[T]) -> asyncio.Task[T]:
        async def awaited() -> T:
            return await work

        task = asyncio.get_running_loop().create_task(awaited())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _end(
        self, task: asyncio.Task[T], unwanted: Callable[[T], Awaitable[object]] | None
    ) -> None:
        try:
            await asyncio.wait([task])
        finally:
            self._cancelled.discard(task)
        if unwanted is None or task.cancelled() or task.exception() is not None:
            return
        with contextlib.suppress(StorageError):  # what was claimed is due when its lease ends
            await unwanted(task.result())

    async def close(self) -> None:
        """Return when all calls have ended. No further call may begin."""
        while self._tasks:
            await asyncio.wait(self._tasks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What a poller sees in one look at the store."""

    progress: Mapping[str, tuple[int, bool]] = field(default_factory=dict[str, tuple[int, bool]])
    """Run id → (number of events, whether it has ended), of the runs asked for that are there."""
    due: datetime | None = None
    """``next_due`` of the whole namespace, whatever the queue."""


class Poller:
    """``watch`` for a server without notifications: one look at a time serves all waiters.

    It looks while there are waiters only, 0.02 s after the last look while looks bring news, and
    more and more seldom up to every 0.5 s while they bring none.
    """

    def __init__(
        self,
        look: Callable[[frozenset[str]], Awaitable[Look]],
        *,
        quickest: float = 0.02,
        slowest: float = 0.5,
    ) -> None:
        """``look`` gets the ids of the runs that are waited for."""
        self._look = look
        self._quickest, self._slowest = quickest, slowest
        self._pause = quickest
        self._runs: dict[asyncio.Future[bool], tuple[str, int]] = {}
        self._workers: set[asyncio.Future[bool]] = set()
        self._task: asyncio.Task[None] | None = None
        self._soon = asyncio.Event()
        self._due: datetime | None = None
        self._news = True
        """The work changed, and no worker has been notified of it."""

    async def wait(self, run_id: str | None, *, after: int, timeout: timedelta) -> bool:
        """As ``StorageBackend.watch``. An error of ``look`` is raised here."""
        if run_id is None and self._news:
            self._news = False
            return True
        waiter: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        if run_id is None:
            self._workers.add(waiter)
        else:
            self._runs[waiter] = (run_id, after)
            self.hurry()
        if self._task is None or self._task.done():
            self._task = asyncio.ensure_future(self._work())
        try:
            async with asyncio.timeout(max(0.0, timeout.total_seconds())):
                return await waiter
        except TimeoutError:
            return False
        finally:
            self._workers.discard(waiter)
            self._runs.pop(waiter, None)
            if waiter.done() and not waiter.cancelled():
                waiter.exception()  # read: it may be cancelled in the moment of an error
            self._rest()

    def _rest(self) -> None:
        task = self._task
        if task is not None and not (self._workers or self._runs):
            # A task that is being cancelled serves no new waiter: the next wait makes another.
            task.cancel()
            self._task = None

    def hurry(self) -> None:
        """Look at once: this object has just written."""
        self._pause = self._quickest
        self._soon.set()

    async def close(self) -> None:
        """End the look that is under way. Waiters get False."""
        task, self._task = self._task, None
        for waiter in [*self._workers, *self._runs]:
            if not waiter.done():
                waiter.set_result(False)
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _work(self) -> None:
        while True:
            self._soon.clear()
            try:
                look = await self._look(frozenset(run_id for run_id, _ in self._runs.values()))
            except Exception as error:  # noqa: BLE001 - raised by every call that waits
                for waiter in [*self._workers, *self._runs]:
                    if not waiter.done():
                        waiter.set_exception(error)
                return
            found = self._notify(look)
            self._pause = self._quickest if found else min(self._pause * 1.5, self._slowest)
            try:
                async with asyncio.timeout(self._pause):
                    await self._soon.wait()
            except TimeoutError:
                pass

    def _notify(self, look: Look) -> bool:
        found = False
        for waiter, (run_id, after) in self._runs.items():
            length, ended = look.progress.get(run_id, (0, False))
            if (ended or length > after) and not waiter.done():
                waiter.set_result(True)
                found = True
        if look.due != self._due:
            self._due = look.due
            found = self._news = True
        if self._news:
            for waiter in self._workers:
                if not waiter.done():
                    waiter.set_result(True)
                    self._news = False
        return found
