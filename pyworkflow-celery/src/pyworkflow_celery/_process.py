"""The runtime of this process: one event loop in a daemon thread, for storage and async steps.

Pool children open theirs after the fork, at the first doorbell; threads and solo pools share that
of the main process, and a prefork pool's main process has one that only sweeps. Nothing of it
crosses a fork.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Coroutine, Sequence
from time import monotonic
from typing import Any, TypeVar

from pyworkflow.spi import Doorbell, Outcome, Runtime
from pyworkflow.worker import Outages
from pyworkflow_celery._refusals import Refusals

__all__ = ["Host", "end_host", "host", "standing_host"]

_log = logging.getLogger("pyworkflow.celery")

T = TypeVar("T")

_DRAINS = 15.0
"""Seconds beyond the grace time after which a drain is given up: storage may be gone."""
_FREES = 3.0
_GIVES_BACK = 1.0
_PARK = 0.5
"""Seconds that a fork waits for the loop to stand still."""


class Host:
    """A thread with an event loop, and the runtime in it."""

    def __init__(self, make_runtime: Callable[[], Runtime], grace: float) -> None:
        self._make = make_runtime
        self.grace = grace
        self.loop = asyncio.new_event_loop()
        self.drained = threading.Event()
        """Everything that was held is finished or given back."""
        self.draining = False
        self.draining_since: float | None = None
        self.busy = 0
        """Doorbells that are being handled."""
        self.outages = Outages(self._ask_store, f"{os.getpid()}-{id(self)}", _log)
        """What the log says of the store, and the sweeper's pauses."""
        self._refusals = Refusals()
        self._count = threading.Lock()
        self._opening = asyncio.Lock()
        self._made: Runtime | None = None
        self._runtime: Runtime | None = None
        """The same, once it is open."""
        self._drain: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self.thread = threading.Thread(target=self._main, name="pyworkflow-loop", daemon=True)
        self.thread.start()

    def _main(self) -> None:
        asyncio.set_event_loop(self.loop)
        while True:
            try:
                self.loop.run_forever()
            except BaseException:  # noqa: BLE001 - a KeyboardInterrupt that somebody raised here
                _log.exception("the event loop was interrupted; it goes on")
            else:
                return

    def call(self, coro: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Run a coroutine in the loop and wait for it, from any other thread."""
        future = asyncio.run_coroutine_threadsafe(coro, self.loop)
        try:
            return future.result(timeout)
        except BaseException:
            future.cancel()
            raise

    def spawn(self, coro: Coroutine[Any, Any, Any]) -> None:
        """Begin a coroutine in the loop, from any thread."""

        def begin() -> None:
            task = self.loop.create_task(coro)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        self.loop.call_soon_threadsafe(begin)

    def later(self, seconds: float, what: Callable[[], object]) -> None:
        """Call ``what`` in the loop after some time, from any thread."""
        self.loop.call_soon_threadsafe(self.loop.call_later, seconds, what)

    async def runtime(self) -> Runtime:
        """The runtime, open. Only in the loop. Raises what opening it raises; then try again."""
        if self._runtime is not None:
            return self._runtime
        async with self._opening:
            if self._runtime is None:
                if self._made is None:
                    self._made = self._make()
                await self._made.open()
                self._runtime = self._made
            return self._runtime

    async def _ask_store(self) -> None:
        await (await self.runtime()).next_due()

    def handle(self, bell: Doorbell) -> Outcome:
        """See a doorbell through."""
        with self._count:
            self.busy += 1
        try:
            return self.call(self._handle(bell))
        finally:
            with self._count:
                self.busy -= 1

    async def _handle(self, bell: Doorbell) -> Outcome:
        return await self._refusals.handle((await self.runtime()).handle, bell)

    async def free(self, pids: Sequence[int]) -> None:
        """Give back what these processes hold, and wait until that is done. In the loop."""
        runtime = self._runtime
        if runtime is None:
            return
        await asyncio.gather(*[runtime.free(pid) for pid in pids])

    def sweep(self, limit: int = 100) -> int:
        """Ring for what is due; how many."""
        return self.call(self._sweep(limit))

    async def _sweep(self, limit: int) -> int:
        return await (await self.runtime()).sweep(limit)

    def begin_drain(self) -> None:
        """Take nothing more; finish or give back within the grace time. From any thread or signal.

        Nothing here takes a lock: the main thread may hold it when the signal comes.
        """
        if not self.draining:
            self.draining, self.draining_since = True, monotonic()
            self.loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        self._refusals.forget()
        if self._drain is None:
            self._drain = self.loop.create_task(self._drain_all())

    async def _drain_all(self) -> None:
        try:
            if self._runtime is not None:
                async with asyncio.timeout(self.grace + _DRAINS):
                    await self._runtime.drain(self.grace)
        except TimeoutError:
            _log.warning("the drain took too long: what is held will run out with its leases")
        except Exception:  # noqa: BLE001 - the process ends all the same
            _log.exception("the drain failed: what is held will run out with its leases")
        finally:
            self.drained.set()

    def end_process(self) -> None:
        """End this pool child at once, with whatever cannot be stopped; in the loop.

        What else it holds is given back first, so that it is not counted as a death of its own.
        """
        self.spawn(self._end_process())

    async def _end_process(self) -> None:
        try:
            if self._runtime is not None:
                async with asyncio.timeout(_GIVES_BACK):
                    await self._runtime.drain(0)
        except Exception:  # noqa: BLE001 - what is held is free when the parent has seen the end
            _log.debug("what a child holds could not be given back", exc_info=True)
        finally:
            os._exit(os.EX_TEMPFAIL)

    def close(self, *, last: bool = False, timeout: float = 10.0) -> None:
        """Drain, close the store, and end the thread. For the end of a process, or of a worker.

        ``last``: the process is about to end, and with it what no drain can stop, a sync step.
        """
        if self.loop.is_closed():
            return
        self.begin_drain()
        self.drained.wait(self.grace + _DRAINS)
        try:
            self.call(self._close(last), timeout)
        except Exception:  # noqa: BLE001 - it is over
            _log.debug("the runtime could not be closed", exc_info=True)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(1.0)
        if not self.thread.is_alive():
            self.loop.close()

    async def _close(self, last: bool) -> None:
        self.outages.close()
        for task in list(self._tasks):
            task.cancel()
        if self._runtime is None:
            return
        if last:
            self._runtime.free(os.getpid())
            await self._runtime.drain(_FREES)  # until that is done
        await self._runtime.close()

    # --- forks ----------------------------------------------------------------------------------

    def park(self) -> Callable[[], None] | None:
        """Have the loop stand still between two callbacks, where it holds no lock; how to go on."""
        if threading.current_thread() is self.thread or not self.thread.is_alive():
            return None
        parked, go_on = threading.Event(), threading.Event()

        def stand() -> None:
            parked.set()
            go_on.wait(10.0)

        self.loop.call_soon_threadsafe(stand)
        parked.wait(_PARK)
        return go_on.set


class _Standing:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.host: Host | None = None
        self.forking: list[Callable[[], None]] = []


_standing = _Standing()
#: What a parent had. Its loop shares an epoll set with the parent's: touching it here, or letting
#: it be collected, would take the parent's wake-ups away.
_inherited: list[_Standing] = []


def host(make: Callable[[], Host]) -> Host:
    """The host of this process; ``make`` makes it at the first call."""
    with _standing.lock:
        if _standing.host is None:
            _standing.host = make()
        return _standing.host


def standing_host() -> Host | None:
    """The host of this process, if it has one. Takes no lock."""
    return _standing.host


def end_host(*, last: bool = False) -> None:
    """Close the host of this process; the next call makes another."""
    with _standing.lock:
        ended, _standing.host = _standing.host, None
    if ended is not None:
        began = monotonic()
        ended.close(last=last)
        _log.debug("the runtime is closed: seconds=%.2f", monotonic() - began)


def _before_fork() -> None:
    standing = _standing.host
    go_on = standing.park() if standing is not None else None
    if go_on is not None:
        _standing.forking.append(go_on)


def _after_in_parent() -> None:
    while _standing.forking:
        _standing.forking.pop()()


def _after_in_child() -> None:
    global _standing
    _inherited.append(_standing)
    _standing = _Standing()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork, after_in_parent=_after_in_parent, after_in_child=_after_in_child
    )
