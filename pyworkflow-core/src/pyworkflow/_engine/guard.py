"""What keeps workflow code from holding its worker: an audit hook, and a watchdog thread.

The hook refuses input, output, threads and ``time.sleep`` in workflow code at the very line; the
watchdog interrupts code that computes for too long. Finalizers that run in the middle of workflow
code, since the garbage collector or the end of a reference chose that moment, are not the
workflow's doing: they may do what they do.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import sys
import threading
import time
import zoneinfo
from collections.abc import Callable, Sequence
from datetime import timedelta
from time import monotonic
from types import FrameType
from typing import Any

from pyworkflow._engine.blocking import LoopWatch
from pyworkflow._engine.interrupts import may_be_ctrl_c
from pyworkflow._replay.context import current_run
from pyworkflow._replay.loop import DeterministicLoop, WorkflowBlocked
from pyworkflow._replay.replay import Replay
from pyworkflow.events import Event

__all__ = ["Guard", "in_finalizer", "shared_guard"]

#: Audit events that workflow code may not cause. Imports open files too: they are let through.
_REFUSED = {
    "open": "opening a file",
    "os.listdir": "listing a directory",
    "os.scandir": "listing a directory",
    "os.rmdir": "removing a directory",
    "os.link": "linking a file",
    "os.symlink": "linking a file",
    "os.truncate": "changing a file",
    "os.chmod": "changing a file",
    "os.chown": "changing a file",
    "builtins.input": "reading the terminal",
    "os.mkdir": "making a directory",
    "os.remove": "removing a file",
    "os.rename": "renaming a file",
    "os.system": "running a program",
    "os.exec": "running a program",
    "os.fork": "forking",
    "os.posix_spawn": "running a program",
    "os.spawn": "running a program",
    "subprocess.Popen": "running a program",
    "socket.__new__": "opening a socket",
    "socket.connect": "connecting a socket",
    "socket.bind": "opening a socket",
    "socket.getaddrinfo": "looking up a host",
    "socket.gethostbyname": "looking up a host",
    "sqlite3.connect": "opening a database",
    "time.sleep": "time.sleep()",
    "_thread.start_new_thread": "starting a thread",
    "_thread.start_joinable_thread": "starting a thread",
}
#: Modules that read files of the installation on behalf of whatever code is running.
_MACHINERY = frozenset(
    {
        "_frozen_importlib",
        "_frozen_importlib_external",
        "encodings",
        "importlib",
        "linecache",
        "logging",
        "traceback",
        "warnings",
        "zoneinfo",
    }
)
_LIMIT = 2.0
_POLL = 0.25

# Thread id → the replay whose code that thread is running, since when, and for how long it may.
_spinning: dict[int, tuple[Replay, float, timedelta | None]] = {}
_lock = threading.Lock()
# The thread in which the garbage collector is at work. There is one collection at a time.
_collecting = 0


def _on_collection(phase: str, _info: dict[str, int]) -> None:
    global _collecting
    _collecting = threading.get_ident() if phase == "start" else 0


def in_finalizer() -> bool:
    """Whether the running code is a finalizer: called by the collector, or a ``__del__``."""
    if _collecting and _collecting == threading.get_ident():
        return True
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not _is_replay(frame):
        if frame.f_code.co_name == "__del__" or frame.f_globals.get("__name__") == "weakref":
            return True
        frame = frame.f_back
    return False


def _is_replay(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")) == "pyworkflow._replay.replay"


def _audit(event: str, args: tuple[object, ...]) -> None:
    if event not in _REFUSED:
        return
    run = current_run()
    if run is None or run.evicting or _of_the_machinery(sys._getframe(1)) or in_finalizer():
        return
    if event == "open" and str(args[0]).startswith(zoneinfo.TZPATH):
        return  # the C part of zoneinfo reads them in the name of whoever asks
    what = _REFUSED[event]
    if event in ("open", "time.sleep") and args:
        what += f" ({args[0]!r:.80})"
    remedy = (
        "use `await sleep(...)`" if event == "time.sleep" else "do it in a step and await the step"
    )
    run.refuse(f"workflow code cannot do this: {what}; {remedy}")


def _of_the_machinery(frame: FrameType | None) -> bool:
    """Whether the import system, logging or a traceback's printing asks, not the workflow."""
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name.partition(".")[0] in _MACHINERY:
            return True
        if name.startswith("pyworkflow._replay"):
            return False
        frame = frame.f_back
    return False


def _audit_sleep() -> None:
    """``time.sleep`` tells audit hooks from 3.13 on; before, a wrapper does."""
    if sys.version_info >= (3, 13):
        return
    original = time.sleep

    @functools.wraps(original)
    def sleep(seconds: float, /) -> None:
        _audit("time.sleep", (seconds,))
        original(seconds)

    time.sleep = sleep  # type: ignore[assignment]  # the same call, audited


def _audit_threads() -> None:
    """Starting a thread tells audit hooks from 3.12 on; before, a wrapper does."""
    if sys.version_info >= (3, 12):
        return
    original: Any = getattr(threading, "_start_new_thread")  # noqa: B009 - private to threading

    @functools.wraps(original)
    def start_new_thread(*args: Any, **kwargs: Any) -> Any:
        _audit("_thread.start_new_thread", ())
        return original(*args, **kwargs)

    setattr(threading, "_start_new_thread", start_new_thread)  # noqa: B010 - as above


class Guard:
    """Runs workflow code, watched. One per process: an audit hook cannot be taken away."""

    def __init__(self, limit: float = _LIMIT) -> None:
        self._limit = limit
        self._watching = False
        self._loops: list[LoopWatch] = []
        if sys.platform != "win32":
            os.register_at_fork(after_in_child=self._forked)
        gc.callbacks.append(_on_collection)
        DeterministicLoop.in_finalizer = staticmethod(in_finalizer)
        DeterministicLoop.may_be_ctrl_c = staticmethod(may_be_ctrl_c)
        sys.addaudithook(_audit)
        _audit_sleep()
        _audit_threads()

    def feed(self, replay: Replay, events: Sequence[Event], limit: timedelta | None = None) -> None:
        """``replay.feed(events)``, interrupted when its code takes longer than ``limit``."""
        thread = threading.get_ident()
        if not self._watching:
            self.begin()
        _spinning[thread] = replay, monotonic(), limit
        try:
            replay.feed(events)
        except WorkflowBlocked:
            replay.blocked()  # it came outside of the code: the event may be half fed
        finally:
            with _lock:
                del _spinning[thread]
                if replay.is_interrupted:
                    # It may not have been raised yet, and must not hit the worker's own code.
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), None)

    def watch(self, loop: LoopWatch) -> Callable[[], None]:
        """Name the steps that block this loop, until what this returns is called."""
        self._loops.append(loop)

        def unwatch() -> None:
            if loop in self._loops:
                self._loops.remove(loop)

        return unwatch

    def begin(self) -> None:
        """See to it that the watchdog's thread runs."""
        with _lock:
            if self._watching:
                return
            self._watching = True
        thread = threading.Thread(target=self._run, name="pyworkflow-watchdog", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            self._watching = False  # the process ends: nobody is held up for long

    def _forked(self) -> None:
        self._watching = False  # threads stay behind
        self._loops.clear()

    def _run(self) -> None:
        idle = 0
        tick = threading.Event()
        while True:
            tick.wait(_POLL)
            idle += 1
            with _lock:
                if idle > 240 and not _spinning and not any(w.is_busy() for w in self._loops):
                    self._watching = False  # a minute without work; the next feed begins another
                    return
                now = monotonic()
                for thread, (replay, since, limit) in list(_spinning.items()):
                    idle = 0
                    seconds = self._limit if limit is None else limit.total_seconds()
                    if now - since > seconds and replay.interrupt():
                        # Once more after as long: a destructor may have swallowed it.
                        _spinning[thread] = replay, now, limit
                        ctypes.pythonapi.PyThreadState_SetAsyncExc(
                            ctypes.c_ulong(thread), ctypes.py_object(WorkflowBlocked)
                        )
            for loop in tuple(self._loops):
                loop.look(monotonic())


_guard: Guard | None = None


def shared_guard() -> Guard:
    """The process's guard."""
    global _guard
    if _guard is None:
        _guard = Guard()
    return _guard
