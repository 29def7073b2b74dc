"""Programs that tests start: their log in a file, their end certain."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from tests.watched import DEADLINE, home, kill, spawn, until

BIN = Path(sys.executable).parent


def environment(**variables: str) -> dict[str, str]:
    """This one without PyWorkflow's and Celery's variables, and with the programs' folder first."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYWORKFLOW_", "CELERY_", "FLOWER_"))
    }
    return {**clean, "PATH": f"{BIN}:{clean['PATH']}", "PYTHONUNBUFFERED": "1", **variables}


class Program:
    """A program in a session of its own; a context manager that leaves nothing behind."""

    def __init__(
        self, command: Sequence[str], *, env: Mapping[str, str], cwd: Path, log: Path
    ) -> None:
        self.log = log
        with log.open("ab") as file:
            self._process = spawn(
                command, env=env, cwd=cwd, stdout=file, stderr=file, start_new_session=True
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def status(self) -> int | None:
        return self._process.poll()

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, text: str) -> str:
        """Wait until it has logged a text; all that it has logged."""

        def logged() -> str | None:
            if text in self.said():
                return self.said()
            assert self.status is None, f"it has ended: status={self.status}\n{self.said()}"
            return None

        try:
            return until(logged, f"{text!r} was not logged")
        except RuntimeError as error:
            raise AssertionError(f"{error}\n{self.said()}") from error

    def send(self, number: int) -> None:
        self._process.send_signal(number)

    def end(self, number: int = signal.SIGTERM, timeout: float = DEADLINE) -> int:
        """Tell it to end; its status."""
        self.send(number)
        return self.wait(timeout)

    def wait(self, timeout: float = DEADLINE) -> int:
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it does not end within {timeout} s:\n{self.said()}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.status is None:
            kill(self.pid)
            self._process.wait(DEADLINE)
        home().forget(self.pid)


def run(
    *command: str | Path, env: Mapping[str, str], cwd: Path, timeout: float = 120.0
) -> subprocess.CompletedProcess[str]:
    """A command that ends by itself."""
    return subprocess.run(
        [str(word) for word in command],
        env=dict(env),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def alive(pid: int) -> bool:
    """Whether a process runs; what waits to be collected does not."""
    import psutil

    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
