"""Calls hooks without being harmed: what a plugin raises is counted, logged and goes no further.

Which plugins there are is for ``_plugins.py``.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Literal, cast

if TYPE_CHECKING:
    from pluggy import HookImpl, PluginManager

__all__ = [
    "around",
    "ask",
    "call",
    "error_class",
    "has_hooks",
    "hooks_active",
    "observe",
    "observe_once",
    "observer_errors",
]

_log = logging.getLogger("pyworkflow.plugins")

#: (plugin, hook) → how often it raised in this process.
observer_errors: Counter[tuple[str, str]] = Counter()


def has_hooks(plugin: object) -> bool:
    """True when ``pyworkflow.spi.hookimpl`` marks a method or function of ``plugin``."""
    return _table.marks(plugin)


def hooks_active(hook: str) -> bool:
    """True when a loaded plugin implements ``hook``: whether its arguments are worth computing."""
    return hook in _table.active


def observe(hook: str, /, **kwargs: object) -> None:
    """Call every implementation of ``hook``. Nearly free when there is none; never raises.

    An implementation that raises is counted in ``observer_errors`` and logged.
    """
    if hook in _table.active:
        for impl in _table.impls(hook):
            _guarded(impl, hook, call, impl, kwargs)


def observe_once(hook: str, /, **kwargs: object) -> None:
    """As ``observe``, but never twice for one plugin of this process."""
    for impl in _table.impls(hook):
        with _table.lock:
            if (hook, id(impl.plugin)) in _table.told:
                continue
            _table.told.add((hook, id(impl.plugin)))
        _guarded(impl, hook, call, impl, kwargs)


def ask(hook: str, /, **kwargs: object) -> object:
    """The first answer other than None, the plugin loaded last asked first. Never raises."""
    if hook in _table.active:
        for impl in _table.impls(hook):
            answer = _guarded(impl, hook, call, impl, kwargs)
            if answer is not None:
                return answer
    return None


def error_class(exc: BaseException) -> Literal["retry", "fatal"] | None:
    """What the plugins think of an exception from a step; None when none has an opinion."""
    answer = ask("pyworkflow_error_class", exc=exc)
    if answer == "retry":
        return "retry"
    if answer == "fatal":
        return "fatal"
    if answer is not None:
        _log.warning("a plugin's error class is neither retry nor fatal: answer=%.200r", answer)
    return None


def around(hook: str, /, **kwargs: object) -> AbstractContextManager[object]:
    """One context manager out of all that implementations of ``hook`` return, to be used once.

    What goes wrong in a plugin's manager is counted and logged; the body's exceptions pass through
    unchanged, whatever a manager answers.
    """
    if hook not in _table.active:
        return _NOTHING
    return _Around(hook, kwargs)


def call(impl: HookImpl, kwargs: Mapping[str, object]) -> object:
    """Call one implementation with those of ``kwargs`` that it takes; lets its errors through."""
    # One by one and not through pluggy's multicall: there, one that raises silences the rest.
    return impl.function(*[kwargs[name] for name in impl.argnames])


_NOTHING = nullcontext()


class _Around:
    def __init__(self, hook: str, kwargs: Mapping[str, object]) -> None:
        self._hook = hook
        self._kwargs = kwargs
        self._entered: list[tuple[HookImpl, AbstractContextManager[object]]] = []

    def __enter__(self) -> None:
        for impl in _table.impls(self._hook):
            _guarded(impl, self._hook, self._enter, impl)

    def _enter(self, impl: HookImpl) -> None:
        manager = call(impl, self._kwargs)
        if manager is not None:
            typed = cast("AbstractContextManager[object]", manager)
            typed.__enter__()
            self._entered.append((impl, typed))

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for impl, manager in reversed(self._entered):
            _guarded(impl, self._hook, manager.__exit__, exc_type, exc, traceback)


def _guarded(impl: HookImpl, hook: str, action: Callable[..., object], *args: object) -> object:
    try:
        return action(*args)
    except BaseException as error:  # a plugin's CancelledError would cancel our task
        if isinstance(error, KeyboardInterrupt) and _in_main_thread():
            raise  # Ctrl-C; it never arrives in another thread
        key = (impl.plugin_name, hook)
        with _table.lock:
            observer_errors[key] += 1
            times = observer_errors[key]
        # A broken observer of every step must not flood the log: the 1st, 10th, 100th … time.
        if str(times).rstrip("0") == "1":
            _log.error(
                "a plugin's hook failed and was ignored: plugin=%s hook=%s times=%d",
                *(*key, times),
                exc_info=error,
            )
        return None


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


class HookTable:
    """The registered plugins and which hooks they implement."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.active: frozenset[str] = frozenset()
        """Names of the hooks that some plugin implements: what the hot path looks at."""
        self.told: set[tuple[str, int]] = set()
        """(hook, id of a plugin) of what is observed once."""
        self._manager: PluginManager | None = None

    def register(self, plugin: object, name: str) -> None:
        """Add a plugin, all or nothing; a second time is a no-op.

        Raises:
            Exception: A hook does not fit its spec, or the name is taken.
        """
        with self.lock:
            manager = self._pluggy()
            if manager.is_registered(plugin):
                return
            try:
                manager.register(plugin, name=name)
                self._check(plugin)
            except Exception:
                self.unregister(plugin)
                raise
            self._refresh()

    def unregister(self, plugin: object) -> None:
        """Take a plugin away; a no-op when it is not there."""
        with self.lock:
            manager = self._pluggy()
            if manager.is_registered(plugin):
                manager.unregister(plugin)
            self.told = {pair for pair in self.told if pair[1] != id(plugin)}
            self._refresh()

    def impls(self, hook: str) -> list[HookImpl]:
        """In pluggy's order: ``tryfirst``, then the one registered last, ``trylast`` at the end."""
        manager = self._manager
        if manager is None:
            return []
        caller = getattr(manager.hook, hook, None)
        return [] if caller is None else [*reversed(caller.get_hookimpls())]

    def marks(self, plugin: object) -> bool:
        """Whether the object has a marked method or function; it need not be registered."""
        with self.lock:
            parse = self._pluggy().parse_hookimpl_opts
            return any(parse(plugin, name) is not None for name in dir(plugin))

    def hooks_of(self, plugin: object) -> list[str]:
        """Names of the hooks that a registered plugin implements."""
        with self.lock:
            callers = self._pluggy().get_hookcallers(plugin) or ()
            return sorted(caller.name for caller in callers if caller.has_spec())

    def _pluggy(self) -> PluginManager:
        if self._manager is None:
            import pluggy

            from pyworkflow.spi import hookspecs

            self._manager = pluggy.PluginManager("pyworkflow")
            self._manager.add_hookspecs(hookspecs)
        return self._manager

    def _check(self, plugin: object) -> None:
        for caller in self._pluggy().get_hookcallers(plugin) or ():
            hook = caller.name
            for impl in caller.get_hookimpls():
                if impl.plugin is not plugin:
                    continue
                if impl.wrapper or impl.hookwrapper:
                    raise TypeError(f"{hook} is a pluggy wrapper; only plain functions are called")
                if inspect.iscoroutinefunction(impl.function):
                    raise TypeError(f"{hook} is async; only plain functions are called")
                if not caller.has_spec():
                    # Written for a newer version, or misspelt: either way it is never called.
                    _log.warning(
                        "a plugin implements a hook that does not exist: plugin=%s hook=%s",
                        *(impl.plugin_name, hook),
                    )

    def _refresh(self) -> None:
        manager = self._pluggy()
        self.active = frozenset(
            hook for _, plugin in manager.list_name_plugin() for hook in self.hooks_of(plugin)
        )


_table = HookTable()


def table() -> HookTable:
    """The table of this process."""
    return _table


def replace_table(other: HookTable) -> HookTable:
    """Have another table stand, for a simulation; the one that stood."""
    global _table
    standing, _table = _table, other
    return standing


def _reset_for_tests() -> None:  # pyright: ignore[reportUnusedFunction] - by tests
    global _table
    _table = HookTable()
    observer_errors.clear()
