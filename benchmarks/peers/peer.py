"""What a peer is, and how its program is run."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from tests.servers import GivenServer, PostgresServer

#: The line of a traceback that names the exception; some say more after it.
_RAISED = re.compile(r"[\w.]*(Error|Exception|Warning)\b.*:")
PROGRAMS = Path(__file__).parent / "programs"


class Peer(Protocol):
    """An engine to measure; each is a module beside this one with an object ``PEER``."""

    NAME: ClassVar[str]
    #: Its stores, and with which of ours each is compared.
    STORES: ClassVar[Mapping[str, str]]
    #: Sizes that differ from everybody's because its own would take hours, by workload.
    SIZES: ClassVar[Mapping[str, Mapping[str, int]]] = {}
    #: Workloads that it cannot do, and why.
    SKIPS: ClassVar[Mapping[str, str]] = {}

    def setup(self, cache: Path) -> list[str]:
        """Install it; the command that runs its program."""
        ...

    def place(self, store: str, directory: Path) -> AbstractContextManager[dict[str, Any]]:
        """A new, empty store (and server), as the settings that its program needs."""
        ...


@contextmanager
def scratch(directory: Path) -> Iterator[Path]:
    """A directory on the disk that is measured, removed afterwards."""
    with tempfile.TemporaryDirectory(
        prefix="pyworkflow-peers-", dir=directory, ignore_cleanup_errors=True
    ) as path:
        yield Path(path)


@functools.cache
def _postgres() -> PostgresServer | GivenServer:
    from tests.servers import GivenServer, PostgresServer

    given = os.environ.get("PYWORKFLOW_TEST_POSTGRES")
    return GivenServer(given) if given else PostgresServer()


@contextmanager
def database(store: str, directory: Path) -> Iterator[dict[str, Any]]:
    """The URL of an empty SQLite file, or of an empty database of one PostgreSQL for all sides."""
    if store.startswith("sqlite"):
        with scratch(directory) as path:
            yield {"url": f"sqlite:///{path}/store.db"}
        return
    server = _postgres()
    url = server.database()
    try:
        yield {"url": url}
    finally:
        server.sql(f"DROP DATABASE {urlsplit(url).path[1:]} WITH (FORCE)")


@contextmanager
def server_process(
    command: list[str], folder: Path, answers: Callable[[], bool], **environment: str
) -> Iterator[int]:
    """The process of a server that answers; it ends with the block, and with this process."""
    from tests.watched import ServerFailed, home, kill, spawn, until

    log = folder / "server.log"
    with log.open("wb") as file:
        process = spawn(
            command, stdout=file, stderr=file, cwd=folder, start_new_session=True,
            env={**os.environ, **environment},
        )  # fmt: skip
    try:
        until(lambda: process.poll() is not None or answers(), "no answer of the server")
        if process.poll() is not None:
            raise ServerFailed(log.read_text(errors="replace").strip().rpartition("\n")[2])
        yield process.pid
    finally:
        kill(process.pid)
        process.wait()
        home().forget(process.pid)


def resident(pid: int) -> float:
    """MB that a process and its children hold, shared pages by share."""
    from tests.watched import tree

    total = 0.0
    for process in tree(pid):
        text = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii")
        total += sum(int(line.split()[1]) for line in text.splitlines() if line[:4] == "Pss:")
    return total / 1024


def answers(url: str) -> bool:
    """Whether a server of ours is ready there."""
    try:
        with urllib.request.urlopen(url, timeout=1) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


class Files(Peer):
    """What keeps its state in a database that is a file, or one that the caller's server has."""

    def place(self, store: str, directory: Path) -> AbstractContextManager[dict[str, Any]]:
        return database(store, directory)


class Server(Peer):
    """What has a server of its own, begun anew for each measurement."""

    _server: Path


class Program:
    """A program of a peer while it runs."""

    def __init__(self, command: list[str], told: dict[str, Any], log: Path, *, own: bool) -> None:
        environment = dict(os.environ)
        if not own:
            environment.pop("PYTHONPATH", None)  # a peer sees its own environment alone
        environment["PYTHONDONTWRITEBYTECODE"] = "1"
        self._log = log
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [*command, json.dumps(told)],
                stdout=subprocess.PIPE,
                stderr=errors,
                stdin=subprocess.PIPE,  # its end tells the program that nobody waits for it
                env=environment,
                cwd=log.parent,
                start_new_session=True,
                text=True,
            )
        # Open as long as we live, and kept from `communicate`, which would close it.
        self._leash, self._process.stdin = self._process.stdin, None

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def kill(self) -> None:
        """SIGKILL to it and whatever it started."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()
        for pipe in (self._leash, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def wait(self, patience: float) -> dict[str, Any]:
        """All that it says until it ends."""
        try:
            said, _ = self._process.communicate(timeout=patience)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"not done after {patience:g} s") from None
        finally:
            self.kill()
        if self._process.returncode:
            raise RuntimeError(self.failure())
        lines = [json.loads(line) for line in said.splitlines() if line.startswith('{"what"')]
        return {line["what"]: line["value"] for line in lines}

    def failure(self) -> str:
        """The last words of a program that failed."""
        words = self._log.read_text(errors="replace").strip().splitlines()
        raised = [line for line in words if _RAISED.match(line)]
        said = (raised or words or [f"status={self._process.returncode}"])[-1]
        return said[:300]


def ours(program: str = "run_ours.py") -> list[str]:
    """The command of our own program: the interpreter that runs this."""
    return [sys.executable, str(PROGRAMS / program)]
