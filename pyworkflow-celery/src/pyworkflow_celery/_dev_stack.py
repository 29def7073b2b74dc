"""The processes of ``pyworkflow dev``: started, shown, started again when they end, and ended.

Each has a thread that keeps it going. All are sessions of their own, so that Ctrl-C reaches this
process alone, which then ends them in order: workers first, the broker last.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from pyworkflow_celery._dev_output import Output
from pyworkflow_celery._dev_watch import LAUNCHER, group_is_empty, kill_group, wait_until

__all__ = ["Program", "Stack", "StackFailed"]

_PAUSES = (0.5, 1.0, 2.0, 5.0, 10.0)
"""Seconds before a program that ended is started again."""
_STEADY = 30.0
"""Seconds after which a program counts as well, and its next end as the first one."""
_DRAINS = 20.0
"""Seconds beyond the grace time that a worker may take: the store may not answer."""
_START = 60.0


class StackFailed(Exception):
    """A part of the stack did not start; what it said was shown."""


@dataclass(frozen=True, slots=True)
class Program:
    """One program of the stack."""

    name: str
    command: Sequence[str]
    rank: int
    """Those of higher rank are ended first."""
    ready: str | Callable[[int], bool] | None = None
    """What it logs, as a regular expression, or what is so of its pid, when it is ready."""
    vital: bool = False
    """Without its first start the stack makes no sense."""
    hide: str | None = None
    """What it logs, as a regular expression, that says nothing here."""


@dataclass(slots=True)
class _State:
    process: subprocess.Popen[bytes] | None = None
    ready: bool = False
    failures: int = 0
    groups: list[int] = field(default_factory=list[int])
    """Process groups that may still have processes."""


class _Keeper:
    """Keeps one program going, in a thread."""

    def __init__(self, stack: Stack, program: Program) -> None:
        self.program = program
        self.state = _State()
        self.changed = threading.Event()
        """It is ready, or nothing is expected of it any more."""
        self._stack = stack
        self.thread = threading.Thread(target=self._keep, name=program.name, daemon=True)

    def _keep(self) -> None:
        stack, state, name = self._stack, self.state, self.program.name
        while not stack.ending.is_set():
            began = time.monotonic()
            status = self._once()
            if stack.ending.is_set():
                break
            if not state.ready and self.program.vital:
                stack.fail(f"{name} did not start: status={status}; its log above says why")
                break
            if time.monotonic() - began > _STEADY:
                state.failures = 0
            pause = _PAUSES[min(state.failures, len(_PAUSES) - 1)]
            state.failures += 1
            stack.say(f"{name} has ended: status={status}; it starts again in {pause:g} s")
            stack.ending.wait(pause)
        self.changed.set()

    def _once(self) -> int:
        """Run the program until it ends; its status."""
        stack, state = self._stack, self.state
        with stack.lock:
            if stack.ending.is_set():
                return 0
            process = stack.spawn(self.program)
            state.process = process
            state.groups.append(process.pid)
        reader = threading.Thread(target=self._read, args=(process,), daemon=True)
        reader.start()
        if callable(self.program.ready):
            fact = self.program.ready
            is_so = wait_until(lambda: process.poll() is not None or fact(process.pid), _START)
            # Of one that has ended `_keep` says what that means, before anybody is woken.
            if is_so and process.poll() is None:
                self._see_ready()
        status = process.wait()
        with stack.lock:
            state.process = None
        # Pool children that lost their main process drain; nothing of them stays.
        threading.Thread(target=self._clear, args=(process.pid,), daemon=True).start()
        reader.join(0.2)  # what it said at the end comes before what is said about it
        return status

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        self._stack.output.drain(self.program.name, process.stdout, self._seen)

    def _seen(self, line: str) -> bool:
        """Whether the line is shown."""
        mark, hide = self.program.ready, self.program.hide
        if isinstance(mark, str) and re.search(mark, line):
            self._see_ready()
        return hide is None or re.search(hide, line) is None

    def _see_ready(self) -> None:
        self.state.ready = True
        self.changed.set()

    def _clear(self, group: int) -> None:
        stack = self._stack
        if not wait_until(lambda: group_is_empty(group), stack.grace + _DRAINS):
            kill_group(group, signal.SIGKILL)
        stack.forget(group)
        with stack.lock:
            self.state.groups.remove(group)

    def send(self, number: int) -> None:
        """Send a signal to the program, and SIGKILL to all that belongs to it."""
        with self._stack.lock:
            process, groups = self.state.process, list(self.state.groups)
            if number == signal.SIGKILL:
                for group in groups:
                    kill_group(group, number)
            elif process is not None and process.poll() is None:
                process.send_signal(number)

    def has_ended(self) -> bool:
        """Whether nothing of it is left."""
        with self._stack.lock:
            return not self.state.groups and self.state.process is None


class Stack:
    """All programs, and the watchdog that outlives this process. A context manager."""

    def __init__(
        self,
        programs: Sequence[Program],
        *,
        env: Mapping[str, str],
        folder: Path,
        grace: float,
        say_on: str,
    ) -> None:
        """``folder`` is removed by the watchdog at the end; ``say_on`` names the lines of ours."""
        self.grace = grace
        self.lock = threading.RLock()
        self.ending = threading.Event()
        self.output = Output(
            sys.stderr, [say_on, *(program.name for program in programs)], self.wake
        )
        self._say_on = say_on
        self._env = dict(env)
        self._folder = folder
        self._keepers = [_Keeper(self, program) for program in programs]
        self._why: str | None = None
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        self._watchdog_read, self._watchdog_write = os.pipe()
        self._watchdog: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._watchdog = subprocess.Popen(
            [
                *(sys.executable, "-m", "pyworkflow_celery._dev_watch"),
                *(str(self._folder), str(self.grace + _DRAINS)),
            ],
            stdin=self._watchdog_read,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # it may outlive the terminal
            start_new_session=True,
        )
        os.close(self._watchdog_read)
        return self

    def __exit__(self, *exc: object) -> None:
        self.end()

    def say(self, text: str) -> None:
        """A line of our own among the others."""
        self.output.line(self._say_on, text)

    def wake(self) -> None:
        """End ``wait``. From any thread or signal handler."""
        try:
            os.write(self._wake_write, b"x")
        except OSError:
            pass  # it is full of such wishes, or all is over

    def fail(self, why: str) -> None:
        """End ``wait`` with an error."""
        self._why = why
        self.wake()

    def start(self) -> None:
        """Start the programs of each rank, the lowest first, and wait until they are ready.

        Raises:
            StackFailed: One ended before it was ready.
            KeyboardInterrupt: ``wake`` was called meanwhile.
        """
        for rank in sorted({keeper.program.rank for keeper in self._keepers}):
            begun = [keeper for keeper in self._keepers if keeper.program.rank == rank]
            for keeper in begun:
                keeper.thread.start()
            for keeper in begun:
                if keeper.program.ready is not None:
                    self._until_ready(keeper)

    def _until_ready(self, keeper: _Keeper) -> None:
        end = time.monotonic() + _START
        while not keeper.changed.wait(0.05):
            if self._is_woken():
                self._raise_why()
                raise KeyboardInterrupt
            if time.monotonic() > end:
                raise StackFailed(f"{keeper.program.name} is not ready within {_START:g} s")
        self._raise_why()

    def _is_woken(self) -> bool:
        import select

        return bool(select.select([self._wake_read], [], [], 0)[0])

    def _raise_why(self) -> None:
        if self._why is not None:
            raise StackFailed(self._why)

    def wait(self) -> None:
        """Until ``wake`` is called. Raises ``StackFailed``."""
        os.read(self._wake_read, 1)
        self._raise_why()

    def kill(self) -> None:
        """Have the end not wait for anything. From a signal handler."""
        for keeper in self._keepers:
            keeper.send(signal.SIGKILL)

    def end(self) -> None:
        """End all programs, those of the highest rank first, and the watchdog. Again: nothing."""
        with self.lock:  # from now on nothing is started
            self.ending.set()
        if self._watchdog is None:
            return
        for rank in sorted({keeper.program.rank for keeper in self._keepers}, reverse=True):
            self._end([keeper for keeper in self._keepers if keeper.program.rank == rank])
        with self.lock:
            watchdog, self._watchdog = self._watchdog, None
            os.close(self._watchdog_write)
        watchdog.wait()

    def _end(self, keepers: Sequence[_Keeper]) -> None:
        started = [keeper for keeper in keepers if keeper.thread.ident is not None]

        def ended() -> bool:
            return all(not keeper.thread.is_alive() and keeper.has_ended() for keeper in started)

        for keeper in started:
            keeper.send(signal.SIGTERM)
        if not wait_until(ended, self.grace + _DRAINS):
            for keeper in started:
                keeper.send(signal.SIGKILL)
            wait_until(ended, 5.0)

    def spawn(self, program: Program) -> subprocess.Popen[bytes]:
        """Start a program, known to the watchdog before it is itself."""
        return subprocess.Popen(
            ["/bin/sh", "-c", LAUNCHER, str(program.rank), *program.command],
            stdin=self._watchdog_write,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self._env,
            start_new_session=True,
        )

    def forget(self, pid: int) -> None:
        """The process is gone; its number may become another's."""
        with self.lock:
            if self._watchdog is None:
                return
            try:
                os.write(self._watchdog_write, f"-{pid}\n".encode())
            except OSError:
                pass  # the watchdog was killed
