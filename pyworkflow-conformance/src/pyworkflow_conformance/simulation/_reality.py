"""What the engine takes from the machine, given by the cluster that runs: clocks, names, secrets.

The engine reads these through names of its modules; while a simulation runs, those names mean what
is defined here. Nothing of it costs anything when no simulation runs.
"""

from __future__ import annotations

import gc
import logging
import secrets
import sys
import time
import warnings
from asyncio import events
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from random import Random
from types import ModuleType
from typing import Any, Protocol

from pyworkflow.testing.internals import Batch, Settings, Step, Workflow, guard, owner, prepare
from pyworkflow.testing.internals import (
    clock as _clock,
)
from pyworkflow.testing.internals import (
    config as _config,
)
from pyworkflow.testing.internals import (
    definitions as _definitions,
)
from pyworkflow.testing.internals import (
    hooks as _hooks,
)
from pyworkflow.testing.internals import (
    memory as _memory,
)
from pyworkflow.testing.internals import (
    operations as _operations,
)
from pyworkflow.testing.internals import (
    primitives as _primitives,
)
from pyworkflow.testing.internals import replaying as replay

__all__ = ["World", "body", "in_world", "utcnow"]

_FIRST = datetime(2030, 1, 1, tzinfo=UTC)


class World(Protocol):
    """What a cluster tells the engine of the world around it."""

    settings: Settings
    random: Random
    """Where names and secrets come from."""

    def monotonic(self) -> float:
        """Seconds of virtual time."""
        ...

    def wall(self) -> float:
        """Seconds of virtual time as the clock of the machine shows them that runs now."""
        ...

    def find_workflow(self, name: str) -> Workflow[Any, Any] | None:
        """The workflow of the process that runs now."""
        ...

    def find_step(self, name: str) -> Step[Any, Any] | None:
        """The step."""
        ...

    def workflow_names(self) -> frozenset[str]:
        """What the process that runs now has."""
        ...

    def new_owner(self) -> str:
        """A name for a worker of the process that runs now."""
        ...

    def is_gone(self, owner: str) -> bool:
        """Whether the process that runs now can see that this one has ended."""
        ...

    def body(self, run_id: str, op: str, attempt: int, name: str) -> Callable[[], None]:
        """The body of a step begins; what is returned is called at its end."""
        ...

    def told(self, record: logging.LogRecord) -> None:
        """The engine logged an error."""
        ...


_world: World | None = None


def _here() -> World:
    assert _world is not None
    return _world


def monotonic() -> float:
    """``time.monotonic`` of the world."""
    return time.monotonic() if _world is None else _world.monotonic()


def utcnow() -> datetime:
    """``_clock.utcnow`` of the machine that runs now."""
    return _FIRST + timedelta(microseconds=round(_here().wall() * 1_000_000))


def ticks() -> int:
    """``_clock.ticks`` of the world."""
    return round(_here().monotonic() * 1_000_000)


class _Secrets:
    @staticmethod
    def token_hex(bytes: int) -> str:
        return f"{_here().random.getrandbits(8 * bytes):0{2 * bytes}x}"


class _Unwatched:
    """In place of the guard: feeds, and has neither a thread nor an audit hook."""

    def feed(self, live: Any, events: Any, limit: Any = None) -> None:
        live.feed(events)

    def begin(self) -> None:
        """No thread watches."""

    def watch(self, loop: Any) -> Any:
        """Nothing looks at a loop here; what this returns ends that."""
        return lambda: None


_UNWATCHED = _Unwatched()


def _is_gone(owner: str) -> bool:
    return _here().is_gone(owner)


def _find_workflow(name: str) -> Workflow[Any, Any] | None:
    return _here().find_workflow(name)


def _find_step(name: str) -> Step[Any, Any] | None:
    return _here().find_step(name)


def _places() -> list[tuple[ModuleType, str, Any]]:
    """(module, name, what it means in a simulation): wherever the engine has one of these names."""
    meanings: list[tuple[Any, Any]] = [
        (time.monotonic, monotonic),
        (_clock.utcnow, utcnow),
        (_clock.ticks, ticks),
        (secrets, _Secrets),
        (_config.settings, lambda: _here().settings),
        (guard.shared_guard, lambda: _UNWATCHED),
        (owner.new_owner, lambda: _here().new_owner()),
        (owner.is_gone, _is_gone),
        (_definitions.workflow_names, lambda: _here().workflow_names()),
        (_definitions.find_workflow, _find_workflow),
        (_definitions.find_step, _find_step),
    ]
    return [
        (module, name, meaning)
        for where, module in sorted(sys.modules.items())
        if where in (_memory.__name__, _operations.__name__, _clock.__name__)
        or where.startswith("pyworkflow._engine.")
        for name, value in vars(module).items()
        for real, meaning in meanings
        if value is real
    ]


class _Ear(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if _world is not None:
            _world.told(record)


@contextmanager
def in_world(world: World) -> Generator[None]:
    """Until the end, the engine lives in ``world``. Worlds do not nest."""
    global _world
    if _world is not None:
        raise RuntimeError("a simulation is running already, and simulations do not nest")
    prepare()
    standing = [(m, name, getattr(m, name)) for m, name, _ in _PATCHES]
    log, ear = logging.getLogger("pyworkflow"), _Ear()
    level, propagate, handlers = log.level, log.propagate, log.handlers
    standing_replays = set(replay._alive)
    collects = gc.isenabled()
    gc.disable()  # a collector closes coroutines when it likes
    # What a plugin listens to changes which way the engine goes.
    plugins = _hooks.replace_table(_hooks.HookTable())
    _world = world
    outer = events._get_running_loop()
    events._set_running_loop(None)
    try:
        for module, name, meaning in _PATCHES:
            setattr(module, name, meaning)
        log.setLevel(logging.ERROR)
        log.propagate, log.handlers = False, [ear]
        with warnings.catch_warnings(), Batch():
            warnings.simplefilter("ignore")
            yield
    finally:
        events._set_running_loop(outer)
        for left in replay._alive - standing_replays:
            # Generators that asyncio cannot close are kept for ever; here their run is over.
            left.close()
            replay._alive.discard(left)
        for module, name, meaning in standing:
            setattr(module, name, meaning)
        log.setLevel(level)
        log.propagate, log.handlers = propagate, handlers
        _world = None
        _hooks.replace_table(plugins)
        if collects:
            gc.enable()


_PATCHES = _places()


@contextmanager
def body(name: str) -> Generator[int]:
    """The body of a simulated program's step, from its first line to its last; which try it is."""
    context = _primitives.step_context()
    if _world is None:
        yield context.attempt
        return
    ended = _world.body(context.run_id, context.step_id, context.attempt, name)
    try:
        yield context.attempt
    finally:
        ended()
