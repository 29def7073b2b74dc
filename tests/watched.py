"""Server processes that end with the process that started them, however that one ends.

A watchdog waits at the other end of a pipe; nothing of a server outlives it.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil

__all__ = [
    "DEADLINE",
    "ServerFailed",
    "as_nobody",
    "free_memory",
    "free_port",
    "give_away",
    "home",
    "kill",
    "send",
    "spawn",
    "stopped",
    "tree",
    "until",
    "watch",
]

T = TypeVar("T")

#: Seconds until a server that does not answer counts as failed; reached only when it is broken.
DEADLINE = 60.0
#: Below every system's range for outgoing connections, so that none of these takes the port of a
#: server that is down for a moment.
PORTS = (10_240, 32_000)
#: The user that servers run as under root: PostgreSQL refuses root.
UNPRIVILEGED = "nobody"

# Registers itself at the watchdog, whose pipe is its standard input, before it becomes the server:
# there is no moment in which a server runs unwatched.
LAUNCHER = 'printf "%s\\n" "+$$" >&0 && exec "$@" </dev/null'

# Reads "+pid" and "-pid" until the pipe's last writer is gone; then ends what is left.
WATCHDOG = """
import os, sys
sys.path[:0] = sys.argv[2:]
from tests.watched import watch
watch(sys.argv[1])
"""


class ServerFailed(RuntimeError):
    """A server did not start or answer; the message has the end of its log."""


def until(probe: Callable[[], T | None], what: str, *, deadline: float = DEADLINE) -> T:
    """The first answer of ``probe`` that is neither ``None`` nor false."""
    end = time.monotonic() + deadline
    pause = 0.001
    while True:
        answer = probe()
        if answer:
            return answer
        if time.monotonic() > end:
            raise ServerFailed(f"{what} within {deadline:g} s")
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)


class Home:
    """The folder of this process's servers, and the watchdog that outlives the process."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.path = Path(tempfile.mkdtemp(prefix="pyworkflow-servers-"))
        self.path.chmod(0o711)  # servers of another user pass through
        reader, self.pipe = os.pipe()
        self._watchdog = subprocess.Popen(
            [sys.executable, "-c", WATCHDOG, str(self.path), *sys.path],
            stdin=reader,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # an interrupt of the tests is none of its business
        )
        os.close(reader)
        atexit.register(self.close)

    def forget(self, pid: int) -> None:
        """The process is gone; its number may become another's."""
        os.write(self.pipe, f"-{pid}\n".encode())

    def close(self) -> None:
        """The watchdog ends what is left, and itself."""
        if os.getpid() == self.pid:  # not in a fork
            os.close(self.pipe)
            self._watchdog.wait(DEADLINE)


_home_lock = threading.Lock()
_home_made: Home | None = None


def home() -> Home:
    global _home_made
    with _home_lock:
        if _home_made is None or _home_made.pid != os.getpid():
            _home_made = Home()
        return _home_made


def watch(folder: str) -> None:
    """The watchdog's work."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    pids: set[int] = set()
    for line in sys.stdin:
        (pids.add if line[0] == "+" else pids.discard)(int(line[1:]))
    for pid in pids:
        kill(pid)
    for lock in Path(folder).glob("*/data/postmaster.pid"):
        free_memory(lock)
    shutil.rmtree(folder, ignore_errors=True)


def tree(pid: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def send(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            pass


def kill(pid: int) -> None:
    """SIGKILL to a process and its children; returns when all are gone."""
    send(tree(pid)[:1], signal.SIGSTOP)  # a stopped parent makes no further children
    doomed = tree(pid)
    send(doomed, signal.SIGKILL)
    for process in doomed[1:]:
        until(functools.partial(_gone, process), f"process {process.pid} did not end")


def _gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def stopped(process: psutil.Process) -> bool:
    """Whether it does nothing more; a stopped parent leaves the children that end as zombies."""
    try:
        return process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def free_memory(lock: Path) -> None:
    """Remove the shared memory that a killed PostgreSQL leaves behind, and its lock file."""
    try:
        segment = lock.read_text().splitlines()[6].split()
    except (OSError, IndexError):
        return
    if len(segment) == 2:
        ctypes.CDLL(None).shmctl(int(segment[1]), 0, None)  # 0: IPC_RMID
    lock.unlink(missing_ok=True)


def free_port() -> int:
    while True:
        port = random.SystemRandom().randint(*PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def spawn(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """Begin a process that the watchdog ends when this one is gone; ``options`` as of ``Popen``."""
    words = ["/bin/sh", "-c", LAUNCHER, "sh", *command]
    return subprocess.Popen(words, stdin=home().pipe, **options)


def as_nobody() -> dict[str, object]:
    root = os.geteuid() == 0
    return {"user": UNPRIVILEGED, "group": _ids()[1], "extra_groups": []} if root else {}


def _ids() -> tuple[int, int]:
    import pwd

    entry = pwd.getpwnam(UNPRIVILEGED)
    return entry.pw_uid, entry.pw_gid


def give_away(folder: Path) -> None:
    """Let the servers' user own a folder with all that is in it."""
    if os.geteuid() == 0:
        ids = _ids()
        for root, _, files in os.walk(folder):
            os.chown(root, *ids)
            for name in files:
                os.chown(Path(root, name), *ids)
