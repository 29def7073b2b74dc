"""Everything that touches private parts of asyncio, with a self-test.

Entering our loop inside a running task sets the outer loop, its current task and the hooks for
async generators aside, and puts them back in reverse. Nothing else in the project may do this.
"""

from __future__ import annotations

import asyncio
import sys
from asyncio import events, tasks
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from pyworkflow.errors import ConfigurationError

if TYPE_CHECKING:
    from pyworkflow._replay.loop import DeterministicLoop as ReplayLoop

__all__ = ["ASYNCIO_PROFILE", "Batch", "enter", "leave", "prepare"]

T = TypeVar("T")

#: Number of the set of ops that asyncio's constructs make under our loop. All supported Pythons
#: share one; it is recorded in ``workflow.started`` so that a later one can tell them apart.
ASYNCIO_PROFILE = 1

# From 3.14 the current task is kept per thread, and entering a task while another is set raises;
# up to 3.13 it is kept per loop, and nothing has to be set aside.
_swap: Callable[[Any, Any], Any] | None = (
    getattr(tasks, "_swap_current_task") if sys.version_info >= (3, 14) else None  # noqa: B009 - absent before 3.12
)


class _Hook:
    """A hook for async generators that asks whose loop is running."""

    __slots__ = ("_before", "_name")

    def __init__(self, name: str, before: Callable[[Any], object] | None) -> None:
        self._name = name
        self._before = before

    def __call__(self, generator: Any) -> None:
        ours = getattr(events._get_running_loop(), self._name, None)
        hook = self._before if ours is None else ours
        if hook is not None:
            hook(generator)


class Batch:
    """Context manager: within it, entering our loops is cheap.

    Every change of the hooks for async generators tells the process's audit hooks, which takes
    longer than all the rest of entering: within a batch they are changed once, to hooks that pass
    generators of other loops on to the hooks that were there before. A batch may last over awaits.
    """

    __slots__ = ("_before", "_first")

    def __enter__(self) -> None:
        self._before = before = sys.get_asyncgen_hooks()
        self._first = _Hook("asyncgen_started", before.firstiter)
        sys.set_asyncgen_hooks(self._first, _Hook("asyncgen_dropped", before.finalizer))

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if sys.get_asyncgen_hooks().firstiter is self._first:  # nobody has set others since
            sys.set_asyncgen_hooks(*self._before)


#: What ``enter`` set aside: the outer loop, its current task, and the hooks, if they were changed.
Outer = tuple[asyncio.AbstractEventLoop | None, Any, Any]


def enter(loop: ReplayLoop) -> Outer:
    """Make ``loop`` the running loop of this thread until ``leave`` is called with the answer."""
    outer = events._get_running_loop()
    task = _swap(outer, None) if _swap is not None and outer is not None else None
    hooks: Any = sys.get_asyncgen_hooks()
    if type(hooks.firstiter) is _Hook:
        hooks = None
    else:
        sys.set_asyncgen_hooks(loop.asyncgen_started, loop.asyncgen_dropped)
    events._set_running_loop(loop)
    return outer, task, hooks


def leave(outer: Outer) -> None:
    """Put back what ``enter`` set aside, in reverse."""
    loop, task, hooks = outer
    events._set_running_loop(loop)
    if hooks is not None:
        sys.set_asyncgen_hooks(*hooks)
    if _swap is not None and loop is not None:
        _swap(loop, task)


async def _wait_for(fut: Any, timeout: float | None) -> Any:
    """``asyncio.wait_for`` as CPython 3.12 and later have it: no task of its own."""
    if timeout is not None and timeout <= 0:
        fut = asyncio.ensure_future(fut)
        if fut.done():
            return fut.result()
        fut.cancel()
        await asyncio.wait([fut])
        try:
            return fut.result()
        except asyncio.CancelledError as exc:
            raise TimeoutError from exc
    async with asyncio.timeout(timeout):
        return await fut


def _install_wait_for() -> None:
    """On 3.11, let ``asyncio.wait_for`` take the newer form under our loop.

    3.11's own makes a task, so that ops inside it would differ from those of later Pythons. The
    function's code is replaced, not its name, because ``from asyncio import wait_for`` has copied
    the name already.
    """
    if sys.version_info >= (3, 12) or hasattr(tasks, "_pyworkflow_wait_for"):
        return
    from types import FunctionType

    from pyworkflow._replay.loop import DeterministicLoop

    original = tasks.wait_for
    kept = FunctionType(
        original.__code__, original.__globals__, original.__name__, original.__defaults__
    )

    def choose(fut: Any, timeout: Any) -> Coroutine[Any, Any, Any]:
        under_ours = isinstance(events._get_running_loop(), DeterministicLoop)
        return (_wait_for if under_ours else kept)(fut, timeout)

    tasks._pyworkflow_wait_for = choose  # type: ignore[attr-defined]  # read by the new code

    async def wait_for(fut: Any, timeout: Any) -> Any:
        return await _pyworkflow_wait_for(fut, timeout)  # type: ignore[name-defined]  # noqa: F821 - a global of asyncio.tasks

    original.__code__ = wait_for.__code__


def _install_gather_hash() -> None:
    """Futures of ``asyncio.gather`` take their place in sets by creation, as the loop's own do.

    ``gather`` makes them without asking the loop, and by identity their order would be random.
    """
    from pyworkflow._replay.loop import DeterministicLoop

    kind: Any = getattr(tasks, "_GatheringFuture")  # noqa: B009 - private to asyncio

    def by_creation(self: Any) -> int:
        loop = self.get_loop()
        if not isinstance(loop, DeterministicLoop):
            return object.__hash__(self)
        number: int | None = getattr(self, "_pyworkflow_hash", None)
        if number is None:
            # Drawn when first asked for: the run's own code asks, in the same order every time.
            number = self._pyworkflow_hash = loop.next_hash()
        return number

    kind.__hash__ = by_creation


def _self_test() -> None:
    """Refuse a Python whose asyncio does not behave as replay needs. Raises ``ConfigurationError``."""
    from pyworkflow._replay.loop import DeterministicLoop

    async def program() -> list[str]:
        seen: list[str] = []

        async def branch(name: str) -> None:
            await asyncio.sleep(0)
            seen.append(name)

        async with asyncio.TaskGroup() as group:
            group.create_task(branch("a"))
            group.create_task(branch("b"))
        return seen

    outer = events._get_running_loop()
    before = asyncio.current_task() if outer is not None else None
    found: object
    try:
        root = DeterministicLoop(salt=1).start(program())
        after = asyncio.current_task() if outer is not None else None
        found = (root.result(), after is before and events._get_running_loop() is outer)
    except Exception as exc:  # noqa: BLE001 - whatever it is, it is the answer
        found = exc
    if found != (["a", "b"], True):
        raise ConfigurationError(
            f"this Python's asyncio does not pass the replay self-test: "
            f"python={sys.version.split()[0]} found={found!r}; use CPython 3.11 to 3.13, or a "
            "newer PyWorkflow"
        )


_prepared = False


def prepare() -> None:
    """Make this process fit to replay; called before the first run. Idempotent."""
    global _prepared
    if not _prepared:
        _install_wait_for()
        _install_gather_hash()
        _self_test()
        _prepared = True
