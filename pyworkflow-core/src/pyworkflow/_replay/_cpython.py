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
from typing import Any, TypeVar

from pyworkflow.errors import ConfigurationError

__all__ = ["ASYNCIO_PROFILE", "Entered", "prepare"]

T = TypeVar("T")

#: Number of the set of ops that asyncio's constructs make under our loop. All supported Pythons
#: share one; it is recorded in ``workflow.started`` so that a later one can tell them apart.
ASYNCIO_PROFILE = 1

# From 3.14 the current task is kept per thread, and entering a task while another is set raises;
# up to 3.13 it is kept per loop, and nothing has to be set aside.
_swap: Callable[[Any, Any], Any] | None = (
    getattr(tasks, "_swap_current_task") if sys.version_info >= (3, 14) else None  # noqa: B009 - absent before 3.12
)


class Entered:
    """Context manager: within it, ``loop`` is the running loop of this thread.

    One object serves a loop again and again, but is not entered twice at once.
    """

    __slots__ = ("_hooks", "_loop", "_ours", "_outer", "_task")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        ours: Any = loop
        self._ours: tuple[Any, Any] = (ours.asyncgen_started, ours.asyncgen_dropped)

    def __enter__(self) -> None:
        outer = self._outer = events._get_running_loop()
        self._task = _swap(outer, None) if _swap is not None and outer is not None else None
        self._hooks = sys.get_asyncgen_hooks()
        sys.set_asyncgen_hooks(*self._ours)
        events._set_running_loop(self._loop)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        events._set_running_loop(self._outer)
        sys.set_asyncgen_hooks(*self._hooks)
        if _swap is not None and self._outer is not None:
            _swap(self._outer, self._task)


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
