"""How a worker's processes learn that it is time to end, and children of its main process.

The main process holds the only writing end of a pipe that its pool children watch: when it closes
it, or dies, they drain. A second signal ends all at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import selectors
import signal
import threading
from collections.abc import Callable, Sequence
from time import monotonic, sleep
from typing import Any

from pyworkflow_celery._celery import set_pdeathsig, worker_state
from pyworkflow_celery._process import Host, standing_host
from pyworkflow_celery._publish import flush_all

__all__ = ["Shutdown", "shutdown"]

_log = logging.getLogger("pyworkflow.celery")

_SAME = 0.5
"""Seconds in which a second SIGTERM means the same as the first: the main process and a service
manager may both have sent one.
"""
_RETURNS = 5.0
_RESULT = 0.2
"""Seconds for the pool to read the result of the last task of a child."""
_AS_ONE = 0.1
"""Seconds in which a second signal is the first one, which came twice: a terminal tells a whole
group, and a program in it may pass on what it was told.
"""
_GIVES_BACK = 1.5
_SENDS = 0.5
_ENDS = 1.5
"""Seconds for the main process to end in order, when people insist."""
_CLOSES = 8.0
"""Seconds for the end of a worker beyond its drain. A broker that hangs would be waited for."""
_LOOKS = 1.0
_SIGNALS = ("SIGTERM", "SIGQUIT", "SIGINT")


class Shutdown:
    """The end of this worker. Its methods may be called in signal handlers: they take no lock."""

    def __init__(self) -> None:
        self.told = False
        """Everybody here was told to finish or give back what is held."""
        self.insisted = False
        """Nobody waits any more."""
        self._began = False
        """The first signal was acted on."""
        self.at_once = False
        """This child dies with what it holds; the main process frees that."""
        self.main: int | None = None
        """The process id of the worker's main process, once there is a worker."""
        self.forks = False
        """The pool consists of processes."""
        self.on_told: Callable[[], object] | None = None
        """Called in the loop of the main process, once."""
        self._read: int | None = None
        self._write: int | None = None
        self._since: float | None = None
        self._pools_own: Any = signal.SIG_DFL
        self._children: Callable[[], Sequence[int]] = tuple
        self._heard: tuple[int, ...] = ()
        """A pipe that signals are written to."""

    def prepare(self, *, forks: bool) -> None:
        """In the main process, before the pool starts."""
        self.told = self.insisted = self._began = False
        self.main, self.forks, self.on_told = os.getpid(), forks, None
        if forks and hasattr(os, "fork"):
            self._read, self._write = os.pipe()

    @property
    def in_child(self) -> bool:
        """Whether this process is a child of the worker's main process."""
        return self.main is not None and self.main != os.getpid()

    def tell(self) -> None:
        """Have everything drain. The main process of a pool of processes goes on sweeping."""
        if self.told:
            return
        self.told = True
        standing = standing_host()
        if standing is not None and self.on_told is not None:
            standing.loop.call_soon_threadsafe(self.on_told)
        if self.forks:
            self._close_write()
        elif standing is not None:
            standing.begin_drain()

    def _close_write(self) -> None:
        fd, self._write = self._write, None
        if fd is not None and not self.in_child:
            os.close(fd)

    def after_fork(self) -> None:
        """In every child: the end of the main process must be the end of the pipe."""
        if self._heard:
            signal.set_wakeup_fd(-1)
        heard, self._heard = self._heard, ()
        fd, self._write = self._write, None
        for each in (fd, *heard):
            if each is not None:
                os.close(each)

    def obey(self, children: Callable[[], Sequence[int]] = tuple) -> None:
        """In the main thread of the main process, which has these children: hear signals first."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._children = children
        for name in _SIGNALS:
            if hasattr(signal, name):
                self._wrap(getattr(signal, name))
        self._heard = read, write = os.pipe()
        os.set_blocking(write, False)
        # Written to whatever handlers there are, and whatever they wait for.
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        threading.Thread(
            target=self._listen, args=(read,), name="pyworkflow-signals", daemon=True
        ).start()

    def _wrap(self, number: int) -> None:
        """Tell before Celery acts on a signal: a cold shutdown would not ask us first."""
        celerys: Any = signal.getsignal(number)
        if not callable(celerys):
            return

        def handler(signum: int, frame: Any) -> Any:
            if not self.in_child and not self._began:
                self._began = True
                self._begin_end()
            return celerys(signum, frame)

        signal.signal(number, handler)

    def _begin_end(self) -> None:
        self.tell()
        standing = standing_host()
        if standing is None:
            return
        _say(f"the worker drains, for up to {standing.grace:g} s; another signal ends it at once")
        if not self.forks:
            # Threads cannot be ended from outside: they are given their time here.
            standing.drained.wait(standing.grace + 1.0)

    def _listen(self, heard: int) -> None:
        """In a thread of its own: whether people insist, and whether the end takes too long."""
        numbers = {getattr(signal, name, None) for name in _SIGNALS}
        times: list[float] = []
        with selectors.DefaultSelector() as selector:
            selector.register(heard, selectors.EVENT_READ)
            while not self.insisted:
                if not selector.select(_LOOKS if times else None):
                    if self._is_late(times[0]):
                        _say("the end takes too long, the broker may not answer")
                        self.insist(0)
                    continue
                for number in os.read(heard, 16) or b"\0":
                    if number == 0:
                        return
                    if number in numbers:
                        times.append(monotonic())
                if len(times) > 2 or (len(times) == 2 and times[1] - times[0] > _AS_ONE):
                    self.insist()

    def _is_late(self, since: float) -> bool:
        """All was given back for a while, and tasks that are not ours are not at work."""
        standing = standing_host()
        drained = standing is None or (standing.drained.is_set() and not self.forks)
        # Children that are told do not say when they are done: they get all of their time.
        grace = 0.0 if drained or standing is None else standing.grace
        if monotonic() - since < grace + _CLOSES:
            return False
        return all(
            request.task.name.startswith("pyworkflow.")
            for request in list(worker_state.active_requests)
        )

    def insist(self, status: int = 1) -> None:
        """End at once: give back what is held, and wait for nothing."""
        self.insisted = True
        _say("the worker ends at once")
        pids = self.kill_children() if self.forks else [os.getpid()]
        if self.forks:
            # The main process ends in order, as after a cold shutdown.
            worker_state.should_terminate = worker_state.should_terminate or 1
        standing = standing_host()
        if standing is not None:
            try:
                standing.call(standing.free(pids), _GIVES_BACK)
            except Exception:  # noqa: BLE001 - the process ends all the same
                _log.warning("what is held could not be given back: it runs out with its leases")
        if self.forks:
            sleep(_ENDS)
        else:
            flush_all(_SENDS)
        os._exit(status)

    def kill_children(self) -> list[int]:
        """Those of the main process, which gives back what they held; which these were."""
        pids = list(self._children())
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        return pids

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


def _say(what: str) -> None:
    """Also in a signal handler, where logging may meet its own lock."""
    try:
        os.write(2, f"pyworkflow: {what}\n".encode())
    except OSError:
        pass  # nobody reads it


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
