"""How a worker's processes learn that it is time to end, and children of its main process.

The main process holds the only writing end of a pipe that its pool children watch: when it closes
it, or dies, they drain.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Callable
from time import monotonic, sleep
from typing import Any

from pyworkflow_celery._celery import set_pdeathsig
from pyworkflow_celery._process import Host, standing_host

__all__ = ["Shutdown", "shutdown"]

_log = logging.getLogger("pyworkflow.celery")

_SAME = 0.5
"""Seconds in which a second SIGTERM means the same as the first: the main process and a service
manager may both have sent one.
"""
_RETURNS = 5.0
_RESULT = 0.2
"""Seconds for the pool to read the result of the last task of a child."""


class Shutdown:
    """The end of this worker. Its methods may be called in signal handlers: they take no lock."""

    def __init__(self) -> None:
        self.told = False
        """Everybody here was told to finish or give back what is held."""
        self._first = False
        """The signal that is being handled is the one that told everybody."""
        self.at_once = False
        """This child dies with what it holds; the main process frees that."""
        self.main: int | None = None
        """The process id of the worker's main process, once there is a worker."""
        self.forks = False
        """The pool consists of processes."""
        self._read: int | None = None
        self._write: int | None = None
        self._since: float | None = None
        self._pools_own: Any = signal.SIG_DFL

    def prepare(self, *, forks: bool) -> None:
        """In the main process, before the pool starts."""
        self.told = self._first = False
        self.main, self.forks = os.getpid(), forks
        if forks and hasattr(os, "fork"):
            self._read, self._write = os.pipe()

    @property
    def may_kill(self) -> bool:
        """What does not end by itself may be killed: this is not the first signal."""
        return self.told and not self._first

    @property
    def in_child(self) -> bool:
        """Whether this process is a child of the worker's main process."""
        return self.main is not None and self.main != os.getpid()

    def tell(self) -> None:
        """Have everything drain. The main process of a pool of processes goes on sweeping."""
        if self.told:
            return
        self.told = True
        if self.forks:
            self._close_write()
        elif (standing := standing_host()) is not None:
            standing.begin_drain()

    def _close_write(self) -> None:
        fd, self._write = self._write, None
        if fd is not None and not self.in_child:
            os.close(fd)

    def after_fork(self) -> None:
        """In every child: the end of the main process must be the end of the pipe."""
        fd, self._write = self._write, None
        if fd is not None:
            os.close(fd)

    def wrap(self, name: str) -> None:
        """Tell before Celery acts on a signal: a cold shutdown would not ask us first."""
        number = getattr(signal, name, None)
        if number is None or threading.current_thread() is not threading.main_thread():
            return
        celerys: Any = signal.getsignal(number)
        if not callable(celerys):
            return

        def handler(signum: int, frame: Any) -> Any:
            self._first = not self.told
            self.tell()
            if not self.forks and (standing := standing_host()) is not None:
                # Threads cannot be ended from outside: they are given their time here.
                standing.drained.wait(standing.grace + 1.0)
            try:
                return celerys(signum, frame)
            finally:
                self._first = False

        signal.signal(number, handler)

    # --- in a pool child ------------------------------------------------------------------------

    def begin_task(self) -> None:
        """In the main thread of a pool child, with every doorbell.

        The pool sets its own handler after everything that we could hook into.
        """
        standing = signal.getsignal(signal.SIGTERM) if self.in_child else signal.SIG_IGN
        # Ignored means that REMAP_SIGTERM is set: the main process alone decides.
        if standing is not signal.SIG_IGN and standing != self._on_term:
            self._pools_own = standing
            # Celery has the kernel kill children with their main process; they can still finish.
            try:
                set_pdeathsig(signal.SIGTERM)
            except OSError:
                _log.debug("not on this platform", exc_info=True)
            signal.signal(signal.SIGTERM, self._on_term)

    def watch(self, host: Host) -> None:
        """Drain when the main process says so, or is gone."""
        if self._read is not None and self.in_child:
            asyncio.run_coroutine_threadsafe(_watch(self._read, host.begin_drain), host.loop)

    def _on_term(self, signum: int, frame: Any) -> None:
        """SIGTERM for this child alone: service managers send it to every process of a worker."""
        standing = standing_host()
        now = monotonic()
        told = min(self._since or now, (standing and standing.draining_since) or now)
        if standing is None or not standing.busy or now - told > _SAME:
            # Nothing is held, or people insist: the pool's own way, which is to die.
            self.at_once = standing is not None and standing.busy > 0
            signal.signal(signal.SIGTERM, self._pools_own)
            os.kill(os.getpid(), signal.SIGTERM)
            return
        if self._since is not None:
            return
        self._since = now
        standing.begin_drain()
        threading.Thread(target=_end_when_drained, args=(standing,), daemon=True).start()


async def _watch(fd: int, on_end: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()

    def ended() -> None:
        loop.remove_reader(fd)
        on_end()

    loop.add_reader(fd, ended)


def _end_when_drained(standing: Host) -> None:
    standing.drained.wait()
    end = monotonic() + _RETURNS
    while standing.busy and monotonic() < end:
        sleep(0.02)
    sleep(_RESULT)
    os._exit(0)


shutdown = Shutdown()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=shutdown.after_fork)
