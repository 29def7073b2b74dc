"""A durable store of any kind, the real worker processes on it, and what they left behind."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest

from pyworkflow._operations import Operations
from pyworkflow._plugins import make_storage
from pyworkflow._serialization import decode, decode_arguments
from pyworkflow.runs import Run
from pyworkflow.spi import RunQuery, StorageBackend
from pyworkflow.storekit import fsck
from tests.e2e import _program
from tests.servers import PostgresServer, ValkeyServer, shared_postgres, shared_valkey
from tests.watched import home, spawn

if TYPE_CHECKING:
    from pyworkflow.events import Event

#: Every durable store that is ours, by the scheme of its URL.
KINDS = ("file", "sqlite", "postgresql", "redis")
#: Those behind a server.
SERVED = ("postgresql", "redis")
ROOT = Path(__file__).parents[2]
#: Seconds; reached only when something is broken.
PATIENCE = 90.0


class Stage:
    """A store, a log of executions of steps, and processes that a test begins."""

    def __init__(self, path: Path, url: str, namespace: str) -> None:
        self.path = path
        self.url = url
        self.namespace = namespace
        self.log = path / "steps.log"
        self.processes: list[subprocess.Popen[bytes]] = []
        #: The server, when it belongs to this test.
        self.server: PostgresServer | ValkeyServer | None = None

    def storage(self) -> StorageBackend:
        """A store object of our own."""
        return make_storage(self.url, self.namespace)

    def ask(self, coroutine: Callable[[StorageBackend], Any]) -> Any:
        """What the store answers to an object of our own."""

        async def main() -> Any:
            async with self.storage() as storage:
                return await coroutine(storage)

        return asyncio.run(main())

    def environment(self, url: str | None = None) -> dict[str, str]:
        """The environment of a process that uses the store, under another URL if one is given."""
        return {
            **{name: value for name, value in os.environ.items() if "PYWORKFLOW" not in name},
            "PYTHONPATH": os.pathsep.join([str(ROOT), *(p for p in sys.path if p)]),
            "STEP_LOG": str(self.log),
            "PYWORKFLOW_STORAGE": url or self.url,
            "PYWORKFLOW_NAMESPACE": self.namespace,
            "PYWORKFLOW_LEASE": "3s",
            "PYWORKFLOW_RENEW_EVERY": "0.5s",
        }

    def worker(self, url: str | None = None) -> subprocess.Popen[bytes]:
        """Begin ``pyworkflow worker``; what it logs is in ``output()``."""
        command = [sys.executable, "-m", "pyworkflow.cli", "worker", _program.__name__]
        number = len(self.processes)
        with (self.path / f"worker-{number}.log").open("wb") as log:
            process = spawn(
                command, env=self.environment(url), cwd=self.path, stdout=log, stderr=log
            )
        self.processes.append(process)
        return process

    def ready(self, process: subprocess.Popen[bytes]) -> bool:
        """Whether a worker has opened the store; before that, a server that is away ends it."""
        log = self.path / f"worker-{self.processes.index(process)}.log"
        return b"claims work" in log.read_bytes()

    def command(self, *words: str, url: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command of ``pyworkflow`` to its end."""
        return subprocess.run(
            [sys.executable, "-m", "pyworkflow.cli", *words],
            env=self.environment(url),
            cwd=self.path,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
        )

    def output(self) -> str:
        """What all workers have printed and logged."""
        logs = sorted(self.path.glob("worker-*.log"))
        return "\n".join(log.read_text("utf-8", "replace") for log in logs)

    def end(self) -> None:
        """End all processes."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            home().forget(process.pid)

    def start(self, workflow: Any, numbers: Sequence[int]) -> list[str]:
        """Start runs, each with its number, for workers to work on."""

        async def begin(storage: StorageBackend) -> list[str]:
            return [await start_one(storage, workflow, number) for number in numbers]

        return list(self.ask(begin))

    def runs(self) -> list[Run]:
        """All runs."""

        return list(self.ask(_all_runs))

    def histories(self) -> dict[str, list[Event]]:
        """All events of all runs, by the run's number."""

        async def read(storage: StorageBackend) -> dict[str, list[Event]]:
            found: dict[str, list[Event]] = {}
            for run in await _all_runs(storage):
                (number, *_), _ = decode_arguments(run.args_text)
                found[str(number)] = list(await storage.get_events(run.run_id))
            return found

        return dict(self.ask(read))

    def recorded(self) -> set[tuple[str, str]]:
        """(run, step) of every step whose result is in a history."""
        return {
            (number, decode(str(event.data["result"])))
            for number, events in self.histories().items()
            for event in events
            if event.type == "step.completed"
        }

    def lines(self) -> list[list[str]]:
        """The log of executions: run, step, process."""
        if not self.log.exists():
            return []
        return [line.split() for line in self.log.read_text("ascii").splitlines()]

    def executions(self) -> Counter[tuple[str, str]]:
        """How often each (run, step) was begun."""
        return Counter((run, name) for run, name, _ in self.lines())

    def all_over(self) -> bool:
        """Whether every run has ended."""
        return all(run.status.is_terminal for run in self.runs())

    def check(self) -> None:
        """Histories are dense, no key is there twice, and the store is sound."""

        async def look(storage: StorageBackend) -> list[str]:
            return [str(violation) for violation in await fsck(storage)]

        assert self.ask(look) == []
        for events in self.histories().values():
            assert [event.seq for event in events] == list(range(1, len(events) + 1))
            keys = [event.key for event in events if event.key]
            assert len(keys) == len(set(keys))

    def journeys_ended(self, numbers: Sequence[int]) -> None:
        """Each journey ended once, with its result, and every step of it was executed."""
        runs = self.runs()
        assert sorted(str(run.status) for run in runs) == ["completed"] * len(numbers)
        assert {decode_arguments(run.args_text)[0][0] for run in runs} == set(numbers)
        assert all(decode(run.result_text) == _program.EXPECTED for run in runs)
        assert set(self.executions()) == {
            (str(number), name) for number in numbers for name in _program.EXPECTED
        }
        self.check()

    def kill_at(self, process: subprocess.Popen[bytes], lines: int) -> None:
        """kill -9 when the log has grown to so many lines, or when all runs have ended."""
        eventually(
            lambda: process.poll() is not None or len(self.lines()) >= lines,
            f"{lines} executions",
            pause=0.001,
            say=self.output,
        )
        process.kill()
        process.wait()

    @contextmanager
    def nothing_recorded_runs_again(self) -> Iterator[Callable[[], None]]:
        """Gives a function that remembers what has a result; at the end none of that ran again."""
        seen: list[tuple[set[tuple[str, str]], Counter[tuple[str, str]]]] = []

        def remember() -> None:
            recorded = self.recorded()
            # What runs now and is not in a history yet may count later: look at the log second.
            seen.append((recorded, self.executions()))

        yield remember
        executions = self.executions()
        for recorded, before in seen:
            assert {key for key in recorded if executions[key] != before[key]} == set()


async def _all_runs(storage: StorageBackend) -> list[Run]:
    runs: list[Run] = []
    cursor: str | None = None
    while True:
        page = await storage.list_runs(RunQuery(limit=200), cursor)
        runs += page.items
        cursor = page.cursor
        if cursor is None:
            return runs


async def start_one(storage: StorageBackend, workflow: Any, number: int, *more: Any) -> str:
    """Start a run under its own key; a second time it is the same run."""
    options = workflow.options(idempotency_key=f"run-{number}").options
    return await Operations(storage, None, None).start(workflow, (number, *more), {}, options)


def eventually(
    check: Callable[[], Any],
    what: str,
    *,
    pause: float = 0.1,
    say: Callable[[], str] = str,
) -> Any:
    """Poll until ``check()`` is true; its value. ``say`` explains why it never was."""
    end = time.monotonic() + PATIENCE
    while not (found := check()):
        assert time.monotonic() < end, f"not within {PATIENCE} s: {what}\n{say()[-6000:]}"
        time.sleep(pause)
    return found


@contextmanager
def staged(kind: str, path: Path, *, own: bool = False, **options: Any) -> Iterator[Stage]:
    """A stage on an empty store; ``own``: with a durable server that the test may stop.

    ``options`` are those of the own server.
    """
    namespace = f"e2e-{uuid4().hex[:12]}"
    with ExitStack() as stack:
        server: PostgresServer | ValkeyServer | None = None
        if kind == "file":
            url = f"file://{path}/store"
        elif kind == "sqlite":
            url = f"sqlite:///{path}/store.db"
        elif own:
            made = PostgresServer if kind == "postgresql" else ValkeyServer
            server = stack.enter_context(made(**options))
            url = server.url
        elif kind == "postgresql":
            url = shared_postgres().database()
        else:
            url = shared_valkey().url
        stage = Stage(path, url, namespace)
        stage.server = server
        stack.callback(stage.end)
        yield stage


@pytest.fixture(params=KINDS)
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stage]:
    """A stage on each kind of store, once per kind."""
    with staged(request.param, tmp_path) as made:
        yield made


@pytest.fixture(params=SERVED)
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stage]:
    """A stage behind a durable server of its own, which demands a password."""
    with staged(request.param, tmp_path, own=True, password=True) as made:
        yield made
