"""The deterministic event loop: asyncio on replayed time, one branch of ops per task.

It never waits and knows no clock: ``spin`` runs what is ready and returns. What a workflow cannot
have (threads, sockets, real timers) is refused here, at the line that asks for it.
"""

from __future__ import annotations

import asyncio
import contextvars
import sys
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from math import ceil, ulp
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, TypeVar, TypeVarTuple

from pyworkflow._replay._cpython import enter, leave
from pyworkflow.errors import WorkflowContextError

__all__ = ["Branch", "BusyLoop", "DeterministicLoop", "WorkflowBlocked", "WorkflowTask"]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

#: µs since the epoch of the last instant that a date can name.
LAST_INSTANT = 253_402_300_799_999_999

_SPREAD, _MASK = 0x9E3779B97F4A7C15, 0x7FFFFFFFFFFFFFFF

#: Callbacks that one input may cause. Beyond it the code is taken to wait by spinning.
BUDGET = 100_000

_SHARED = (
    "this asyncio object belongs to another run, or is used outside of the run that made it: "
    "objects such as Lock, Queue or Future cannot be shared between runs; create them inside "
    "the workflow"
)


class WorkflowBlocked(BaseException):
    """Thrown into workflow code that holds the worker's thread for too long."""


class BusyLoop(Exception):
    """Workflow code ran more callbacks for one input than any real one needs."""


class Branch:
    """A path of task creations; ops count per kind within it."""

    __slots__ = ("_children", "_counts", "path")

    def __init__(self, path: str) -> None:
        self.path = path
        self._children = 0
        self._counts: dict[str, int] = {}

    def child(self) -> Branch:
        """The branch of the next task made here."""
        self._children += 1
        return Branch(f"{self.path}.{self._children}")

    def next_op(self, kind: str) -> str:
        """The identity of the next op of this kind made here."""
        number = self._counts.get(kind, 0) + 1
        self._counts[kind] = number
        return f"{self.path}#{number}:{kind}"


# The branch of callbacks: the context travels with whatever registered them.
_branch_of_context: contextvars.ContextVar[Branch] = contextvars.ContextVar("pyworkflow_branch")


class WorkflowFuture(asyncio.Future[T]):
    """A future whose place in a set depends on the run alone; made by ``create_future``."""

    __slots__ = ("_hash",)
    _hash: int

    def __hash__(self) -> int:
        return self._hash


class WorkflowTask(asyncio.Task[T]):
    """A task whose place in a set depends on the run alone.

    asyncio iterates over sets of tasks (``TaskGroup`` cancels that way). The hash is salted with
    the run's seed: equal hashes for the first task of every run would make asyncio's process-wide
    set of tasks quadratic.
    """

    branch: Branch
    _hash: int

    def __new__(  # pyright: ignore[reportInconsistentConstructor] - asyncio.Task takes more, we do not
        cls,
        coro: Coroutine[Any, Any, T],
        *,
        loop: DeterministicLoop,
        name: str | None = None,
        context: contextvars.Context | None = None,
    ) -> WorkflowTask[T]:
        # asyncio.Task.__init__ puts the task into a set, so the hash must stand before.
        self = super().__new__(cls)
        self._hash = loop.next_hash()
        return self

    def __hash__(self) -> int:
        return self._hash


class _Handle(asyncio.Handle):
    """A handle that does not ask its loop whether it is debugged."""

    __slots__ = ()

    def __init__(
        self,
        callback: Callable[..., object],
        args: tuple[object, ...],
        loop: DeterministicLoop,
        context: contextvars.Context | None,
    ) -> None:
        self._context = contextvars.copy_context() if context is None else context
        self._loop = loop
        self._callback = callback
        self._args = args
        self._cancelled = False
        self._repr = None
        self._source_traceback = None


class DurableTimer(asyncio.TimerHandle):
    """A handle of ``call_at`` that is an op of the run."""

    __slots__ = ("op",)
    op: str


if TYPE_CHECKING:
    # For type checkers only: there AbstractEventLoop's methods are abstract, and what this loop
    # refuses is filled in below.
    _Loop = asyncio.BaseEventLoop
else:
    _Loop = asyncio.AbstractEventLoop


class DeterministicLoop(_Loop):
    """One run's event loop. Usable only while ``spin`` or ``run_callback`` is in progress."""

    in_finalizer: ClassVar[staticmethod[[], bool]] = staticmethod(lambda: False)
    """Whether a finalizer runs in the middle of workflow code: its misuse is not the run's."""
    may_be_ctrl_c: ClassVar[staticmethod[[], bool]] = staticmethod(lambda: True)
    """Whether a KeyboardInterrupt may be the user's, and not one that the code raised."""

    def __init__(self, *, salt: int) -> None:
        self._ready: deque[asyncio.Handle] = deque()
        self._salt = salt
        self._objects = 0
        self._elapsed = 0  # µs since the start of the run
        self._reached = 0.0  # the latest instant, in seconds, that a fired timer was set for
        self._open = False
        self._tasks: list[WorkflowTask[Any]] = []
        self._tasks_limit = 64
        self._generators: list[AsyncGenerator[Any, Any]] = []
        self._generators_limit = 16
        self._root_branch = Branch("1")
        self._root: asyncio.Task[Any] | None = None
        #: Set by the watchdog's interruption; the spin ends at once.
        self.interrupted = False
        #: The object that primitives and timers of this run talk to (``context.RunContext``).
        self.run: Any = None

    # --- driving ------------------------------------------------------------------------------

    def start(self, coro: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Make ``coro`` the root task, in a context of its own, and let it run until it waits."""
        context = contextvars.Context()
        context.run(_branch_of_context.set, self._root_branch)
        self._open = True
        outer = enter(self)
        try:
            root: WorkflowTask[T] = WorkflowTask(coro, loop=self, name="1", context=context)
            root.branch = self._root_branch
            self._root = root
            self._tasks.append(root)
            self._drain()
        finally:
            leave(outer)
            self._open = False
        return root

    def deliver(self, callback: Callable[..., object], *args: object) -> None:
        """Call ``callback``, which resolves something, and run what becomes ready.

        Raises:
            BusyLoop: the budget is used up.
        """
        self._open = True
        outer = enter(self)
        try:
            callback(*args)
            self._drain()
        finally:
            leave(outer)
            self._open = False

    def _drain(self) -> None:
        ready = self._ready
        root = self._root
        assert root is not None
        budget = BUDGET
        while ready:
            if root.done():
                # The run is over with its root: tasks left behind do nothing more.
                ready.clear()
                return
            handle = ready.popleft()
            if handle._cancelled:
                continue
            try:
                handle._run()
            except SystemExit:
                pass  # asyncio lets it through; its task holds it, and the run ends by that
            except KeyboardInterrupt:
                if self.may_be_ctrl_c():
                    raise
            budget -= 1
            if self.interrupted:
                ready.clear()
                return
            if budget <= 0:
                ready.clear()
                raise BusyLoop(f"callbacks={BUDGET}")

    def call_fired(self, timer: DurableTimer) -> None:
        """A timer's input was delivered: its callback is ready."""
        self._reached = max(self._reached, timer.when())
        if not timer.cancelled():
            self._ready.append(timer)

    def advance(self, elapsed: int) -> None:
        """Set the time to ``elapsed`` µs since the start of the run."""
        self._elapsed = elapsed

    def close_tasks(self) -> list[str]:
        """Close what is unfinished, newest first; the names of what refuses three times.

        Closing throws GeneratorExit, never CancelledError: ``finally`` runs, ``except
        CancelledError`` does not.
        """
        outer = enter(self)
        try:
            stubborn = self._close_tasks()
        finally:
            leave(outer)
        self._ready.clear()
        self._tasks = [t for t in self._tasks if t.get_name() in stubborn and not t.done()]
        if not stubborn:
            # Nothing runs here any more: without cycles the run's memory is free at once, and no
            # garbage for a collector that would look at all of the process to find it.
            self._root = self.run = None
        return stubborn

    def _close_tasks(self) -> list[str]:
        stubborn: list[str] = []
        unfinished = [task for task in reversed(self._tasks) if not task.done()]
        # Closing a coroutine does not reach into a generator that it waits for: the generator would
        # stay where it is, and go on when it is freed, in whichever run is at work then.
        for outer in (*reversed(self._generators), *(task.get_coro() for task in unfinished)):
            _unwind(outer)
        for task in unfinished:
            if task.done():
                continue
            # A task closed on purpose is no cause for a warning.
            setattr(task, "_log_destroy_pending", False)  # noqa: B010 - private to asyncio
            if not _close(task.get_coro()):
                stubborn.append(task.get_name())
        # A started generator that is suspended in a yield has no one to close it but us.
        self._generators = [g for g in self._generators if not _close_generator(g)]
        stubborn += [getattr(g, "__qualname__", "generator") for g in self._generators]
        return stubborn

    def unfinished(self) -> list[str]:
        """Names of tasks that have not ended."""
        return [t.get_name() for t in self._tasks if not t.done()]

    # --- identity -----------------------------------------------------------------------------

    def next_hash(self) -> int:
        """A number for the next object: the same in every replay, different between runs."""
        self._objects += 1
        return (self._salt + self._objects * _SPREAD) & _MASK

    def branch(self) -> Branch:
        """The branch that is running: of the current task, else of what registered the callback."""
        task = asyncio.current_task(self)
        if task is not None:
            return task.branch  # type: ignore[attr-defined, no-any-return]  # every task here is a WorkflowTask
        return _branch_of_context.get(self._root_branch)

    def _check(self) -> None:
        if not self._open:
            raise WorkflowContextError(_SHARED)

    # --- what asyncio asks of a loop ------------------------------------------------------------

    def time(self) -> float:
        # A timer stands at a whole µs; what it was set for may be a rounding error later, and is
        # reached all the same once it fired: ``while loop.time() < end`` must come to an end.
        return max(self._elapsed / 1_000_000, self._reached)

    def call_soon(
        self,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.Handle:
        if not self._open:
            raise WorkflowContextError(_SHARED)
        handle = _Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_later(
        self,
        delay: float,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        self._check()
        timer = DurableTimer(when, callback, args, self, context)
        last: int = LAST_INSTANT - self.run.start
        if when >= last / 1_000_000:
            until = last  # for ever, as far as dates go: infinity too
        elif when <= self.time():
            until = self._elapsed
        else:
            until = max(_whole(when), self._elapsed + 1)
        if until <= self._elapsed:
            # Nothing to wait for: the same on every replay, since time is replayed.
            self._ready.append(timer)
            timer.op = ""
        else:
            timer.op = self.run.start_timer(until, timer)
        return timer

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        if isinstance(handle, DurableTimer) and handle.op and self.run is not None:
            self.run.cancel_timer(handle.op)

    def create_future(self) -> asyncio.Future[Any]:
        if not self._open:
            raise WorkflowContextError(_SHARED)
        future: WorkflowFuture[Any] = WorkflowFuture(loop=self)
        self._objects += 1
        future._hash = (self._salt + self._objects * _SPREAD) & _MASK
        return future

    def create_task(
        self,
        coro: Generator[Any, None, T] | Coroutine[Any, Any, T],
        *,
        name: object = None,
        context: contextvars.Context | None = None,
        **options: object,
    ) -> asyncio.Task[T]:
        if not self._open:
            _discard(coro)
            raise WorkflowContextError(_SHARED)
        if options.get("eager_start"):
            _discard(coro)
            self.refuse("eager tasks cannot be replayed: leave eager_start out")
        if _called_by_as_completed():
            _discard(coro)
            self.refuse(
                "asyncio.as_completed() puts coroutines into a set and cannot be replayed; use "
                "asyncio.wait(tasks, return_when=FIRST_COMPLETED), or pass tasks to it"
            )
        if self.run is not None and self.run.closed:
            _discard(coro)
            raise WorkflowContextError("the run is over or being put aside: no task can start")
        branch = self.branch().child()
        if context is None:
            context = contextvars.copy_context()
            context.run(_branch_of_context.set, branch)
        task: WorkflowTask[T] = WorkflowTask(
            coro,  # type: ignore[arg-type]  # generators are refused by asyncio.Task itself
            loop=self,
            name=branch.path if name is None else str(name),
            context=context,
        )
        task.branch = branch
        tasks = self._tasks
        tasks.append(task)
        if len(tasks) > self._tasks_limit:
            self._tasks = [t for t in tasks if not t.done()]
            self._tasks_limit = 64 + 2 * len(self._tasks)
        return task

    def asyncgen_started(self, generator: AsyncGenerator[Any, Any]) -> None:
        """Hook: keep a started generator, so that no collector decides when it ends."""
        self._generators.append(generator)
        if len(self._generators) > self._generators_limit:
            alive = [g for g in self._generators if getattr(g, "ag_frame", None) is not None]
            self._generators = alive
            self._generators_limit = 16 + 2 * len(alive)

    def asyncgen_dropped(self, generator: AsyncGenerator[Any, Any]) -> None:
        """Hook: never reached while generators are kept; a collected one is left alone."""

    def get_debug(self) -> bool:
        return False

    def set_debug(self, enabled: bool) -> None:
        return None

    def is_running(self) -> bool:
        return self._open

    def is_closed(self) -> bool:
        return False

    def get_task_factory(self) -> None:
        return None

    def get_exception_handler(self) -> None:
        return None

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Errors that nobody awaits must not depend on when objects are collected."""
        if self.run is not None:
            self.run.loop_error(context)

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        self.call_exception_handler(context)

    def refuse(self, why: str) -> NoReturn:
        """Refuse something in workflow code: raises at the line, and the run stalls."""
        error = WorkflowContextError(why)
        if self.run is not None and not self.in_finalizer():
            self.run.misused(error)
        raise error


def _whole(when: float) -> int:
    """``when`` seconds in whole µs: never earlier, but for what is lost in sums of floats.

    0.012239 + 0.004012 is more than 0.016251, and that timer is due before one of 0.016252.
    """
    micros = when * 1_000_000
    nearest = round(micros)
    # A billionth of a second is finer than any clock; far from the start floats are coarser still.
    return nearest if micros - nearest <= 1e-3 + 4e6 * ulp(when) else ceil(micros)


def _close(coro: Any) -> bool:
    for _ in range(3):
        try:
            coro.close()
        except RuntimeError:  # it awaited again, or runs right now
            continue
        except BaseException:  # noqa: BLE001 - an error in a ``finally``: closed all the same
            return True
        return True
    return False


async def _nothing() -> AsyncGenerator[None, None]:
    yield


def _generator_calls() -> tuple[type, ...]:
    generator = _nothing()
    calls = (generator.asend(None), generator.aclose())
    for call in calls:
        call.close()  # or they complain that nobody awaited them
    return tuple(type(call) for call in calls)


#: What a coroutine waits for while it asks an async generator for a value, or closes it.
_GENERATOR_CALLS = _generator_calls()


def _unwind(outer: Any) -> None:
    """End the generator that a coroutine or generator waits for, if it does."""
    awaited = outer
    while awaited is not None and not isinstance(awaited, _GENERATOR_CALLS):
        for name in ("cr_await", "ag_await", "gi_yieldfrom"):
            if hasattr(awaited, name):
                awaited = getattr(awaited, name)
                break
        else:
            return
    if awaited is not None:
        _throw(awaited)


def _throw(call: Any) -> bool:
    """Throw GeneratorExit into a suspended generator until it ends; False when it refuses."""
    try:
        for _ in range(3):
            call.throw(GeneratorExit)
    except BaseException:  # noqa: BLE001 - it has ended, in whatever way
        return True
    return False


def _close_generator(generator: AsyncGenerator[Any, Any]) -> bool:
    """Close a started generator; False when it refuses, and must be kept for ever."""
    if getattr(generator, "ag_frame", None) is None:  # it is over; 3.11 may call it running still
        return True
    if getattr(generator, "ag_running", False):  # nobody can end what it waits for
        return False
    closer = generator.aclose()
    try:
        closer.send(None)
    except BaseException:  # noqa: BLE001 - it has ended, in whatever way
        return True
    return _throw(closer)


def _discard(coro: object) -> None:
    close = getattr(coro, "close", None)
    if close is not None:
        close()


def _called_by_as_completed() -> bool:
    """Whether ``asyncio.as_completed`` is making a task of a coroutine it was given."""
    frame = sys._getframe(2)
    if "ensure_future" not in frame.f_code.co_name:
        return False
    back = frame.f_back
    for _ in range(3):
        if back is None:
            return False
        code = back.f_code
        if code.co_name == "gather":
            return False  # what most tasks are made by: nothing is between it and the task
        if code.co_name in ("as_completed", "_AsCompletedIterator") or (
            code.co_name == "__init__" and "_AsCompletedIterator" in code.co_qualname
        ):
            return True
        back = back.f_back
    return False


def _refusal(name: str) -> Callable[..., NoReturn]:
    def refused(self: DeterministicLoop, *_args: object, **_kwargs: object) -> NoReturn:
        self.refuse(
            f"loop.{name}() is input, output or a thread, which workflow code cannot have; "
            "do it in a step and await the step"
        )

    refused.__name__ = name
    return refused


for _name in dir(asyncio.AbstractEventLoop):
    if not _name.startswith("_") and getattr(DeterministicLoop, _name) is getattr(
        asyncio.AbstractEventLoop, _name
    ):
        setattr(DeterministicLoop, _name, _refusal(_name))
