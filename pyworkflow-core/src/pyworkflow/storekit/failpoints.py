"""Failpoints: named places at which a test makes a process die, stop, stall or fail.

Off unless the environment variable ``PYWORKFLOW_FAILPOINTS`` is set; then a place costs one look at
a global. A module names its places with ``register`` and comes to one like this::

    if failpoints.active:
        failpoints.hit("sqlite.before_commit")
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import threading
import time
from collections.abc import Mapping
from typing import Final, NamedTuple, NoReturn

from pyworkflow.errors import ConfigurationError, StorageUnavailable

__all__ = [
    "VARIABLE",
    "Failpoint",
    "active",
    "check",
    "hit",
    "hits",
    "read",
    "register",
    "registered",
]

VARIABLE: Final = "PYWORKFLOW_FAILPOINTS"
SYNTAX: Final = "NAME=ACTION[@N][,…] with ACTION kill, exit, stop, raise or sleep:SECONDS"
#: The status of a process that ``exit`` ended.
EXIT_STATUS: Final = 70

_log = logging.getLogger("pyworkflow.failpoints")

active = False
"""Whether any failpoint of this process is on."""


class Failpoint(NamedTuple):
    """A place that a module has."""

    name: str
    meaning: str
    """When the place is reached: what is done by then, and what is not."""
    module: str
    raises: type[OSError | StorageUnavailable] | None
    """What ``raise`` raises; None where nothing can fail, so that ``raise`` is refused."""


class _Plan(NamedTuple):
    """What is to happen at a failpoint."""

    action: str
    seconds: float
    at: int
    """At which hit; 0 at every one."""


class _State:
    def __init__(self) -> None:
        self.points: dict[str, Failpoint] = {}
        self.hits: dict[str, int] = {}
        self.plans: dict[str, _Plan] = {}
        self.problem = ""
        self.text = ""
        self.told = False
        self.lock = threading.Lock()


_state = _State()


def register(
    module: str, raises: type[OSError | StorageUnavailable] | None, places: Mapping[str, str]
) -> None:
    """Name the places of a module (``__name__``) when it is imported: names and their meanings.

    ``raises`` is what the action ``raise`` raises there; None where nothing can fail.
    """
    for name, meaning in places.items():
        known = _state.points.get(name)
        if known is not None and known.module != module:
            raise ValueError(f"two modules have a failpoint of this name: name={name}")
        _state.points[name] = Failpoint(name, meaning, module, raises)
        _state.hits.setdefault(name, 0)


def registered() -> Mapping[str, Failpoint]:
    """The failpoints of the modules that are imported, by name."""
    return dict(sorted(_state.points.items()))


def hits() -> Mapping[str, int]:
    """How often each failpoint was reached; counted while ``active``."""
    return {name: count for name, count in sorted(_state.hits.items()) if count}


def read(text: str) -> None:
    """Turn failpoints on as ``text`` says, in place of what was on; the empty text turns them off.

    Called with the environment variable when this module is imported. What is wrong with the text
    is said by ``check``; until then nothing is on.
    """
    global active
    state = _state
    state.text, state.problem, state.told = text, "", False
    state.hits = dict.fromkeys(state.points, 0)
    state.plans = {}
    try:
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, plan = _parse(part)
            if name in state.plans:
                raise ValueError(f"{name} is named twice")
            state.plans[name] = plan
    except ValueError as exc:
        state.problem, state.plans = str(exc), {}
    active = bool(state.plans)


def _parse(part: str) -> tuple[str, _Plan]:
    name, equals, rest = part.partition("=")
    action, at_sign, number = rest.partition("@")
    action, colon, seconds = action.partition(":")
    if not (name and equals and action in ("kill", "exit", "stop", "raise", "sleep")):
        raise ValueError(f"{part!r:.80} is not {SYNTAX}")
    if at_sign and not (number.isascii() and number.isdigit() and int(number) > 0):
        raise ValueError(f"{part!r:.80}: the hit after @ is a number from 1 on")
    if bool(colon) != (action == "sleep"):
        raise ValueError(f"{part!r:.80}: sleep, and nothing else, has seconds after a colon")
    try:
        length = float(seconds) if colon else 0.0
    except ValueError:
        length = -1.0
    if not 0 <= length < 1e6:
        raise ValueError(f"{part!r:.80}: not a number of seconds")
    return name, _Plan(action, length, int(number) if at_sign else 0)


def check() -> None:
    """Refuse what names no failpoint, and say loudly that some are on. Called before any work.

    Raises:
        ConfigurationError: the variable cannot be read, names a failpoint that no module of this
            process has, or wants a raise where nothing can fail.
    """
    state = _state
    if state.problem:
        _refuse(state.problem)
    if not active or state.told:
        return
    for name, plan in state.plans.items():
        point = state.points.get(name)
        if point is None:
            _refuse(f"no module of this process has the failpoint {name!r:.80}")
        if plan.action == "raise" and point.raises is None:
            _refuse(f"nothing can be raised at {name!r}; take another action")
    state.told = True
    _log.warning(
        "FAILPOINTS ARE ON: this process fails on purpose: %s=%s; unset the variable anywhere but "
        "in tests",
        VARIABLE,
        state.text,
    )


def _refuse(problem: str) -> NoReturn:
    names = ", ".join(registered())
    raise ConfigurationError(f"{VARIABLE}: {problem}; the failpoints here are {names}")


def hit(name: str) -> None:
    """The place was reached: do what was ordered. Called while ``active``, from any thread."""
    state = _state
    with state.lock:
        state.hits[name] += 1
        count = state.hits[name]
    plan = state.plans.get(name)
    if plan is None or plan.at not in (0, count):
        return
    match plan.action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "exit":
            os._exit(EXIT_STATUS)
        case "sleep":
            time.sleep(plan.seconds)
        case _:
            kind = state.points[name].raises
            if kind is None:
                return  # ``check`` refuses this
            said = f"a failpoint: name={name} hit={count}"
            raise kind(errno.EIO, said) if issubclass(kind, OSError) else kind(said)


read(os.environ.get(VARIABLE, ""))
