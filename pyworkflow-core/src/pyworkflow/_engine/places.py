"""Where the body of a step runs, and the slot that it releases while it waits for another run.

A step that waits for a run with its slot taken may wait for ever: what it waits for needs a slot,
too. So whoever waits gives the slot to others and takes one again before the body resumes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Generator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

from pyworkflow._context import running_try
from pyworkflow._engine.slots import Slots
from pyworkflow._engine.threads import StepThreads

if TYPE_CHECKING:
    from pyworkflow._engine.steps import StepTry
    from pyworkflow._engine.worker import Worker

__all__ = ["Place", "current_place", "in_loop", "without_slot"]

T = TypeVar("T")


class Place:
    """One attempt of a step in a worker, made when it asks for the first time."""

    __slots__ = (
        "_slots", "_step", "_threads", "_waiting", "_waits", "has_slot", "is_abandoned", "is_over",
        "worker",
    )  # fmt: skip

    def __init__(
        self,
        worker: Worker,
        step: tuple[str, str],
        slots: Slots,
        threads: StepThreads | None,
        *,
        is_over: bool,
    ) -> None:
        self.worker = worker
        self._step = step
        """Run and op."""
        self._slots = slots
        self._threads = threads
        """Those that the body runs in; None for an async step."""
        self._waits = 0
        self._waiting: set[Future[Any]] = set()
        self.has_slot = not is_over
        self.is_over = is_over
        self.is_abandoned = is_over
        """It timed out or was cancelled; its thread may still run."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The worker's loop."""
        return self.worker.loop

    @property
    def waits(self) -> bool:
        """Whether the body waits for a run."""
        return self._waits > 0

    async def release(self) -> None:
        """The body begins to wait. In the worker's loop."""
        if self.is_over:
            return
        if not self._waits and self._threads is not None:
            self._threads.lend()  # its thread is of no use to others meanwhile
        self._waits += 1
        if self._waits == 1:
            self.worker.runner.waiting.add(self._step)
            if self.has_slot:
                self.has_slot = False
                self._slots.release()
            self.worker.wake()

    async def take_again(self) -> None:
        """The body is about to resume: wait for a slot. In the worker's loop."""
        if not self._resumes():
            return
        try:
            await self._slots.acquire(first=True)
        except asyncio.CancelledError:
            self._slots.force()
            raise
        finally:
            self._has_again()

    def take_at_once(self) -> None:
        """As ``take_again`` for what was cancelled: more than all slots may be taken then."""
        if self._resumes():
            self._slots.force()
            self._has_again()

    def _resumes(self) -> bool:
        if self.is_over or not self._waits:
            return False
        self._waits -= 1
        if self._waits:
            return False
        self._stop_waiting()
        return not self.has_slot

    def _stop_waiting(self) -> None:
        self.worker.runner.waiting.discard(self._step)
        if self._threads is not None:
            self._threads.take_back()

    def _has_again(self) -> None:
        if self.is_over or self._waits:
            self._slots.release()  # it ended, or waits again, while it waited for a slot
        else:
            self.has_slot = True

    def end_waits(self) -> None:
        """The attempt was given up: its thread need not wait for a run."""
        self.is_abandoned = True
        for future in list(self._waiting):
            future.cancel()

    def end(self) -> None:
        """The attempt is over. What still waits, waits without any claim to a slot."""
        self.is_over = True
        if self._waits:
            self._waits = 0
            self._stop_waiting()
        if self.has_slot:
            self.has_slot = False
            self._slots.release()
        self.end_waits()

    @contextmanager
    def waiting_for(self, future: Future[Any]) -> Generator[None]:
        """A thread waits for this as long as the attempt lasts."""
        self._waiting.add(future)
        if self.is_abandoned:
            future.cancel()
        try:
            yield
        finally:
            self._waiting.discard(future)


def current_place() -> Place | None:
    """Where the calling step runs; None outside of steps, and when its worker is gone."""
    what = cast("StepTry | None", running_try.get())
    if what is None or what.runner is None:
        return None
    if what.runner.worker.is_closed:
        return None
    if what.place is None:
        what.place = what.runner.place_of(what)
    return what.place


async def in_loop(loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in a loop, from any loop."""
    if asyncio.get_running_loop() is loop:
        return await coro
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coro, loop))


async def without_slot(place: Place, wait: Callable[[], Awaitable[T]]) -> T:
    """Wait for a run in a step, with its slot released. From any loop."""
    await in_loop(place.loop, place.release())
    try:
        found = await wait()
    except asyncio.CancelledError:
        if asyncio.get_running_loop() is place.loop:
            place.take_at_once()
        else:
            place.loop.call_soon_threadsafe(place.take_at_once)
        raise
    except BaseException:
        await in_loop(place.loop, place.take_again())
        raise
    await in_loop(place.loop, place.take_again())
    return found
