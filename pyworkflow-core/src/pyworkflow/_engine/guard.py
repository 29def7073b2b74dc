"""What keeps workflow code from holding its worker: an audit hook, and a watchdog thread.

The hook refuses input, output, threads and ``time.sleep`` in workflow code at the very line; the
watchdog interrupts code that computes for too long.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import threading
import time
import zoneinfo
from collections.abc import Sequence
from time import monotonic
from types import FrameType
from typing import Any

from pyworkflow._replay.context import current_run
from pyworkflow._replay.loop import WorkflowBlocked
from pyworkflow._replay.replay import Replay
from pyworkflow.events import Event

__all__ = ["Guard", "shared_guard"]

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

# Thread id → the replay whose code that thread is running, and since when.
_spinning: dict[int, tuple[Replay, float]] = {}
_lock = threading.Lock()


def _audit(event: str, args: tuple[object, ...]) -> None:
    if event not in _REFUSED:
        return
    run = current_run()
    if run is None or run.evicting or _of_the_machinery(sys._getframe(1)):
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
        if sys.platform != "win32":
            os.register_at_fork(after_in_child=self._forked)
        sys.addaudithook(_audit)
        _audit_sleep()
        _audit_threads()

    def feed(self, replay: Replay, events: Sequence[Event]) -> None:
        """``replay.feed(events)``, interrupted when its code holds the thread for too long."""
        thread = threading.get_ident()
        if not self._watching:
            self.begin()
        _spinning[thread] = (replay, monotonic())
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

    def _run(self) -> None:
        idle = 0
        tick = threading.Event()
        while True:
            tick.wait(_POLL)
            idle += 1
            with _lock:
                if idle > 240 and not _spinning:
                    self._watching = False  # a minute without work; the next feed begins another
                    return
                now = monotonic()
                for thread, (replay, since) in list(_spinning.items()):
                    idle = 0
                    if now - since > self._limit and replay.interrupt():
                        # Once more after as long: a destructor may have swallowed it.
                        _spinning[thread] = replay, now
                        ctypes.pythonapi.PyThreadState_SetAsyncExc(
                            ctypes.c_ulong(thread), ctypes.py_object(WorkflowBlocked)
                        )


_guard: Guard | None = None


def shared_guard() -> Guard:
    """The process's guard."""
    global _guard
    if _guard is None:
        _guard = Guard()
    return _guard
