"""Event loops of simulated processes: one thread, one virtual clock, one order that a seed decides.

Each process of a cluster has a loop of its own. ``Clockwork`` runs them: it picks a process that
has something to do and one of its ready callbacks, and jumps to the next timer when nobody has.
"""

from __future__ import annotations

import asyncio
import contextvars
from asyncio import events
from collections.abc import Callable, Coroutine
from heapq import heappop, heappush
from random import Random
from typing import Any

__all__ = ["Clockwork", "ProcessLoop", "SimulatedTask", "make_loop"]

_TICK = 1e-6
"""Seconds that a callback takes: whoever asks for the time again and again sees it pass."""


class _Numbered:
    """Takes its place in sets by creation: by address, the order would differ between processes."""

    _number: int

    def __hash__(self) -> int:
        return self._number


class SimulatedFuture(_Numbered, asyncio.Future[Any]):
    """A future of a simulated loop."""

    def __init__(self, number: int, *, loop: asyncio.AbstractEventLoop) -> None:
        self._number = number
        super().__init__(loop=loop)


class SimulatedTask(_Numbered, asyncio.Task[Any]):
    """A task of a simulated loop."""

    def __init__(
        self, number: int, coro: Coroutine[Any, Any, Any], *, loop: ProcessLoop, **options: Any
    ) -> None:
        self._number = number
        super().__init__(coro, loop=loop, **options)


class ProcessLoop(asyncio.AbstractEventLoop):
    """The event loop of one simulated process.

    What asyncio promises holds: callbacks that were registered by one callback run in their order,
    none runs while another does. Callbacks of different origin run in an order of the seed's.
    """

    without_threads = True

    def __init__(self, clockwork: Clockwork, name: str) -> None:
        self.clockwork = clockwork
        self.name = name
        self.is_dead = False
        self.process: Any = None
        """The worker process that this is the loop of, if it is one's."""
        self.skew = 0.0
        """Seconds by which this machine's wall clock is ahead."""
        self.tasks: dict[SimulatedTask, None] = {}
        self.ready: list[tuple[events.Handle, int]] = []
        self._held: list[tuple[events.Handle, int]] | None = None
        """While the process is stopped: what would be ready."""

    def __repr__(self) -> str:
        return f"<process {self.name}>"

    # --- what asyncio asks of a loop ----------------------------------------------------------

    def time(self) -> float:
        """Seconds of virtual time."""
        return self.clockwork.now

    def call_soon(  # type: ignore[override]  # typeshed relates callback's arguments to args
        self,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> events.Handle:
        """Have a callback run."""
        handle = events.Handle(callback, args, self, context)
        self.add(handle, self.clockwork.steps)
        return handle

    def call_soon_threadsafe(  # type: ignore[override]  # as above
        self,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> events.Handle:
        """There is one thread."""
        return self.call_soon(callback, *args, context=context)

    def call_later(  # type: ignore[override]  # typeshed relates callback's arguments to args
        self,
        delay: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> events.TimerHandle:
        """Have a callback run after so many seconds of virtual time."""
        if delay <= 0 and not self.is_dead:
            # Ready now, at the latest when time passes; the heap is for what waits.
            handle = events.TimerHandle(self.clockwork.now, callback, args, self, context)
            self.add(handle, self.clockwork.steps)
            return handle
        return self.call_at(self.clockwork.now + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]  # typeshed relates callback's arguments to args
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> events.TimerHandle:
        """Have a callback run at an instant of virtual time."""
        handle = events.TimerHandle(when, callback, args, self, context)
        if not self.is_dead:
            self.clockwork.add_timer(when, self, handle)
        return handle

    def create_future(self) -> asyncio.Future[Any]:
        """A future of this loop."""
        return SimulatedFuture(self.clockwork.number(), loop=self)

    def create_task(
        self,
        coro: Any,
        *,
        name: str | None = None,
        context: contextvars.Context | None = None,
        **options: Any,
    ) -> asyncio.Task[Any]:
        """A task of this loop."""
        number = self.clockwork.number()
        task = SimulatedTask(
            number, coro, loop=self, name=name or f"task-{number}", context=context, **options
        )
        self.tasks[task] = None
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self.tasks.pop(task, None)  # type: ignore[call-overload]  # none other has this callback

    def get_task_factory(self) -> Any:
        """There is one, as it were: nobody makes tasks past ``create_task``."""
        return ProcessLoop.create_task

    def get_debug(self) -> bool:
        """Never."""
        return False

    def is_running(self) -> bool:
        """While the process lives."""
        return not self.is_dead

    def is_closed(self) -> bool:
        """Once the process is gone."""
        return self.is_dead

    def run_in_executor(  # type: ignore[override]  # typeshed relates func's arguments to args
        self, executor: Any, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        """There are no threads: call it here, at once."""
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as exc:  # noqa: BLE001 - whatever it raises is its result
            future.set_exception(exc)
        return future

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Something in a callback went wrong that nobody handled."""
        exc = context.get("exception")
        if not self.is_dead:
            problem = f"{self.name}: {context.get('message')}: {exc!r}"
            self.clockwork.problems.append(problem)
            self.clockwork.halted = True

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        """As ``call_exception_handler``."""
        self.call_exception_handler(context)

    def _timer_handle_cancelled(self, handle: events.TimerHandle) -> None:
        """Asyncio tells of each; it is dropped when its time comes."""

    # --- what becomes of the process ----------------------------------------------------------

    def add(self, handle: events.Handle, origin: int) -> None:
        """A callback is ready to run; ``origin`` is the callback that registered it."""
        if self.is_dead:
            return
        if self._held is not None:
            self._held.append((handle, origin))
            return
        if not self.ready:
            self.clockwork.awake.append(self)
        self.ready.append((handle, origin))

    @property
    def is_stopped(self) -> bool:
        """Whether the process stands still."""
        return self._held is not None

    def stop_running(self) -> None:
        """The process stands still: nothing of it runs until ``go_on``."""
        if self._held is None and not self.is_dead:
            if self.ready:
                self.clockwork.awake.remove(self)
            self._held, self.ready = self.ready, []

    def go_on(self) -> None:
        """The process runs again, not knowing that time has passed."""
        held, self._held = self._held, None
        for handle, origin in held or ():
            self.add(handle, origin)

    def kill(self) -> None:
        """The process is gone: nothing of it ever runs again but what Python runs by itself.

        Its coroutines are closed here and now, newest first: later, the collector would do it at
        a moment that no seed decides. What they do then reaches nobody, for the process is dead.
        """
        if self.is_dead:
            return
        if self.ready:
            self.clockwork.awake.remove(self)
        self.is_dead = True
        self.ready, self._held = [], None
        before = events._get_running_loop()
        events._set_running_loop(self)
        try:
            for task in reversed(list(self.tasks)):
                task._log_destroy_pending = False  # type: ignore[attr-defined]  # private to asyncio
                coro: Any = task.get_coro()
                try:
                    coro.close()
                except RuntimeError:
                    pass  # it awaits in ``finally``: no one goes on with it
        finally:
            events._set_running_loop(before)
        self.tasks.clear()

    def take(self, random: Random | None) -> events.Handle:
        """The next callback to run: the oldest, or one that ``random`` picks."""
        ready = self.ready
        first = 0
        if random is not None and len(ready) > 1:
            first = picked = int(random.random() * len(ready))
            origin = ready[picked][1]
            # Whatever one callback registered keeps its order.
            for index in range(picked):
                if ready[index][1] == origin:
                    first = index
                    break
        handle, _ = ready.pop(first)
        if not ready:
            self.clockwork.awake.remove(self)
        return handle


def make_loop(clockwork: Clockwork, name: str) -> ProcessLoop:
    """The loop of a new process."""
    kind: Any = ProcessLoop  # typeshed takes what it leaves out for abstract
    made: ProcessLoop = kind(clockwork, name)
    return made


class Clockwork:
    """Runs the processes of a cluster, one callback at a time."""

    def __init__(self, seed: int | str, *, shuffled: bool = True) -> None:
        self.random = Random(seed)
        self.now = 1.0
        """Seconds of virtual time."""
        self.steps = 0
        """Callbacks run so far."""
        self.awake: list[ProcessLoop] = []
        """Processes that have something to do now."""
        self.halted = False
        """Set by whoever wants ``run`` to return."""
        self.problems: list[str] = []
        """Exceptions that left a callback."""
        self.at_step: Callable[[], int] | None = None
        """Called when ``steps`` reaches ``next_step``; says when next."""
        self.next_step = -1
        self._shuffled = shuffled
        self._timers: list[tuple[float, int, ProcessLoop, events.TimerHandle]] = []
        self._numbers = 0

    def number(self) -> int:
        """The next number."""
        self._numbers += 1
        return self._numbers

    def add_timer(self, when: float, loop: ProcessLoop, handle: events.TimerHandle) -> None:
        """Have a callback ready at ``when``."""
        self._numbers += 1
        heappush(self._timers, (when, self._numbers, loop, handle))

    def run(self, *, until: float, most: int) -> None:
        """Run callbacks until ``halted``, until nothing is left to do, or past time ``until``."""
        random = self.random
        shuffle = random if self._shuffled else None
        outer = running = events._get_running_loop()
        end = self.steps + most
        awake = self.awake
        self.halted = False
        try:
            while not self.halted and self.steps < end and self.now < until:
                if not awake and not self._jump():
                    return
                loop = awake[int(random.random() * len(awake))] if len(awake) > 1 else awake[0]
                if loop is not running:
                    events._set_running_loop(loop)
                    running = loop
                ready = loop.ready
                for _ in range(1 + int(random.random() * 8)):
                    handle = loop.take(shuffle)
                    self.steps += 1
                    self.now += _TICK
                    if not handle._cancelled:
                        handle._run()
                    if self.steps == self.next_step and self.at_step is not None:
                        self.next_step = self.at_step()
                        ready = loop.ready
                    if not ready:
                        break
        finally:
            events._set_running_loop(outer)

    @property
    def busy(self) -> bool:
        """Whether anything is left to do, now or later."""
        return bool(self.awake or self._timers)

    def _jump(self) -> bool:
        """Let time pass until something is ready; False when nothing ever will be."""
        timers = self._timers
        while timers:
            when, number, loop, handle = heappop(timers)
            if handle._cancelled or loop.is_dead:
                continue
            self.now = max(self.now, when)
            loop.add(handle, -number)
            # What is due at the same instant is ready together.
            while timers and timers[0][0] <= self.now:
                _, number, loop, handle = heappop(timers)
                if not handle._cancelled:
                    loop.add(handle, -number)
            if self.awake:
                return True
        return False
