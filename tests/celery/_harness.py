"""A broker, a store, real Celery workers on both, and what they left behind.

Every wait is for a condition and has a deadline. A worker is a process group of its own; its log
is a file, shown when a wait fails.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import psutil

from pyworkflow._operations import Operations
from pyworkflow._plugins import make_storage
from pyworkflow.events import Event
from pyworkflow.runs import Run
from pyworkflow.spi import StorageBackend
from pyworkflow.storekit import fsck
from tests.celery import _program
from tests.servers import ServerFailed, ValkeyServer, shared_postgres, until
from tests.watched import home, kill, spawn

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
APP = [sys.executable, "-m", "celery", "-A", "pyworkflow.celery.app"]
PATIENCE = 60.0
#: Seconds of a lease that is waited for.
LEASE = 4.0
SHORT_LEASE = {"PYWORKFLOW_LEASE": f"{LEASE}s", "PYWORKFLOW_RENEW_EVERY": "0.5s"}

T = TypeVar("T")


class Worker:
    """A ``celery … worker`` (or ``beat``) with all its processes."""

    def __init__(self, command: list[str], *, env: Mapping[str, str], cwd: Path, log: Path) -> None:
        self.path = log
        with log.open("ab") as file:
            self.process = spawn(
                command, env=dict(env), cwd=cwd, stdout=file, stderr=file, start_new_session=True
            )
        self._all = [psutil.Process(self.process.pid)]

    @property
    def pid(self) -> int:
        """Of the main process."""
        return self.process.pid

    @property
    def log(self) -> str:
        """What it has said."""
        return self.path.read_text("utf-8", "replace")

    @property
    def ready(self) -> bool:
        """Whether it takes messages; fails when it has ended instead."""
        assert self.process.poll() is None, f"it ended: {self.process.returncode}\n{self.log}"
        return " ready." in self.log

    def children(self) -> list[int]:
        """Its pool's processes."""
        return [child.pid for child in psutil.Process(self.pid).children()]

    def signal(self, number: int) -> None:
        """To the main process alone."""
        self.process.send_signal(number)

    def signal_all(self, number: int) -> None:
        """To the whole group, as a container's end does."""
        self._remember()
        os.killpg(self.pid, number)

    def wait(self) -> int:
        """Its status, when it has ended."""
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it does not end within {PATIENCE} s\n{self.log}") from None

    def end(self) -> None:
        """End all that is left of it."""
        self._remember()
        if self.process.poll() is None:
            kill(self.pid)
        for process in self._all:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait(PATIENCE)
        home().forget(self.pid)

    def _remember(self) -> None:
        try:
            self._all += psutil.Process(self.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return


class _KeptStore:
    """An open store of the test's own: a connection per question costs more than the question.

    For the shared PostgreSQL, which no test stops; files would be held, and a broker is killed.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._runner = asyncio.Runner()
        self._storage: StorageBackend | None = None

    def ask(self, question: Callable[[StorageBackend], Awaitable[T]]) -> T:
        """What the store answers."""

        async def main() -> T:
            if self._storage is None:
                storage = make_storage(self._url, "default")
                await storage.open()
                self._storage = storage
            return await question(self._storage)

        return self._runner.run(main())

    def close(self) -> None:
        """Close the store and its loop."""
        storage, self._storage = self._storage, None
        try:
            if storage is not None:
                self._runner.run(storage.close())
        finally:
            self._runner.close()


class Fleet:
    """A broker and a store, clients and workers on them."""

    def __init__(self, path: Path, broker: ValkeyServer, storage: str) -> None:
        self.path = path
        self.broker = broker
        self.storage_url = storage
        self.log = path / "steps.log"
        self.gates = path / "gates"
        self.gates.mkdir()
        self.log.touch()
        self.workers: list[Worker] = []
        self.broker_url = broker.url
        #: Another way to the broker, for the client alone.
        self.client_broker: str | None = None
        self._client: subprocess.Popen[str] | None = None
        self._kept = _KeptStore(storage) if storage.startswith("postgresql:") else None

    # --- processes ----------------------------------------------------------------------------

    def environment(self, **more: str) -> dict[str, str]:
        """That of every process here."""
        clean = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PYWORKFLOW_", "CELERY_"))
        }
        return {
            **clean,
            "PYTHONPATH": os.pathsep.join([str(ROOT), *(p for p in sys.path if p)]),
            "PYTHONUNBUFFERED": "1",
            "STEP_LOG": str(self.log),
            "GATES": str(self.gates),
            "PYWORKFLOW_EXECUTOR": "celery://",
            "PYWORKFLOW_BROKER_URL": self.broker_url,
            "PYWORKFLOW_STORAGE": self.storage_url,
            "PYWORKFLOW_MODULES": _program.__name__,
            # Nobody waits for it, and no busy machine outlasts it: what goes on all the same was
            # finished or given back.
            "PYWORKFLOW_LEASE": "300s",
            "PYWORKFLOW_RENEW_EVERY": "20s",
            "PYWORKFLOW_MUTE": "1s",
            "PYWORKFLOW_DRAIN": "5s",
            **more,
        }

    def begin(
        self,
        *words: str,
        pool: str = "prefork",
        concurrency: int = 2,
        queues: str = "pyworkflow",
        app: str = "pyworkflow.celery.app",
        **env: str,
    ) -> Worker:
        """Begin a worker, and do not wait for it."""
        number = len(self.workers)
        command = [
            *(sys.executable, "-m", "celery", "-A", app, "worker", "--loglevel=info"),
            *("-P", pool, "-c", str(concurrency), "-Q", queues, "-n", f"w{number}@%h"),
            "--without-mingle",
            *words,
        ]
        return self._begin(command, f"worker-{number}.log", env)

    def worker(self, *words: str, **options: Any) -> Worker:
        """A worker that is ready."""
        made = self.begin(*words, **options)
        self.eventually(lambda: made.ready, "the worker is ready")
        return made

    def beat(self, **env: str) -> Worker:
        """A scheduler."""
        return self._begin([*APP, "beat", "--loglevel=info"], f"beat-{len(self.workers)}.log", env)

    def _begin(self, command: list[str], name: str, env: Mapping[str, str]) -> Worker:
        made = Worker(command, env=self.environment(**env), cwd=self.path, log=self.path / name)
        self.workers.append(made)
        return made

    def end(self) -> None:
        """End every process."""
        if self._client is not None:
            self._client.kill()
            self._client.communicate()
        for worker in self.workers:
            worker.end()
        if self._kept is not None:
            self._kept.close()

    def logs(self) -> str:
        """All logs."""
        return "\n".join(
            f"--- {log.name}\n{log.read_text('utf-8', 'replace')}"
            for log in sorted(self.path.glob("*.log"))
        )

    def eventually(self, check: Callable[[], T | None], what: str) -> T:
        """The first true answer; otherwise all logs."""
        try:
            return until(check, what, deadline=PATIENCE)
        except ServerFailed as exc:
            raise AssertionError(f"{exc}\n{self.logs()[-8000:]}") from None

    # --- a client -----------------------------------------------------------------------------

    def start(self, workflow: Any, *args: object, tag: str | None = None, **options: Any) -> str:
        """Start a run as a program does: commit, and ring."""
        answer = self.request(workflow.name, tag or new_tag(), *args, **options)
        assert isinstance(answer, str), answer
        return answer

    def request(self, name: str, *args: object, **options: Any) -> Any:
        """What the client says."""
        if self._client is None:
            code = f"from {_program.__name__} import client; client()"
            with (self.path / "client.log").open("wb") as log:
                self._client = subprocess.Popen(
                    [sys.executable, "-c", code],
                    env=self.environment(
                        PYWORKFLOW_BROKER_URL=self.client_broker or self.broker_url
                    ),
                    cwd=self.path,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                )
        client = self._client
        assert client.stdin is not None
        assert client.stdout is not None
        client.stdin.write(json.dumps([name, args, options]) + "\n")
        client.stdin.flush()
        line = client.stdout.readline()
        assert line, self.logs()[-8000:]
        return json.loads(line)

    def start_silently(self, workflow: Any, *args: object, tag: str | None = None) -> str:
        """Start a run as a client does that dies after its commit: nobody rings."""

        async def begin(storage: StorageBackend) -> str:
            operations = Operations(storage, None, None)
            return await operations.start(
                workflow, (tag or new_tag(), *args), {}, workflow.options().options
            )

        return self.ask(begin)

    # --- the store ----------------------------------------------------------------------------

    def ask(self, question: Callable[[StorageBackend], Awaitable[T]]) -> T:
        """What the store answers."""
        if self._kept is not None:
            return self._kept.ask(question)

        async def main() -> T:
            async with make_storage(self.storage_url, "default") as storage:
                return await question(storage)

        return asyncio.run(main())

    def run(self, run_id: str) -> Run:
        """A run as it stands."""
        found = self.ask(lambda storage: storage.get_run(run_id))
        assert found is not None
        return found

    def status(self, run_id: str) -> str:
        """That of a run."""
        return str(self.run(run_id).status)

    def ended(self, run_id: str) -> Run:
        """A run, when it has ended."""

        def look() -> Run | None:
            run = self.run(run_id)
            return run if run.status.is_terminal else None

        return self.eventually(look, f"the run {run_id} ends")

    def result(self, run_id: str) -> Any:
        """The result of a run that completes."""
        run = self.ended(run_id)
        assert run.status == "completed", f"{run}\n{self.logs()[-8000:]}"
        return run.result

    def events(self, run_id: str) -> list[Event]:
        """The history of a run."""
        return list(self.ask(lambda storage: storage.get_events(run_id)))

    def check(self, *run_ids: str) -> None:
        """The store is sound, and histories are dense and say nothing twice."""

        async def look(storage: StorageBackend) -> list[str]:
            return [str(violation) for violation in await fsck(storage)]

        assert self.ask(look) == []
        for run_id in run_ids:
            events = self.events(run_id)
            assert [event.seq for event in events] == list(range(1, len(events) + 1))
            keys = [event.key for event in events if event.key]
            assert len(keys) == len(set(keys))

    # --- steps --------------------------------------------------------------------------------

    def lines(self, tag: str) -> list[tuple[str, int]]:
        """(step, process) of every execution of a tag."""
        found = [line.split() for line in self.log.read_text("ascii").splitlines()]
        return [(name, int(pid)) for each, name, pid in found if each == tag]

    def executions(self, tag: str) -> Counter[str]:
        """How often each step of a tag was begun."""
        return Counter(name for name, _ in self.lines(tag))

    def begun(self, tag: str, name: str, number: int = 1) -> int:
        """The process of an execution, when it has begun."""
        what = f"execution {number} of {name}"

        def look() -> int | None:
            pids = [pid for each, pid in self.lines(tag) if each == name]
            return pids[number - 1] if len(pids) >= number else None

        return self.eventually(look, what)

    def open_gate(self, tag: str) -> None:
        """Let the steps of a tag go on."""
        (self.gates / tag).touch()

    # --- the broker ---------------------------------------------------------------------------

    def redis(self) -> Any:
        """A client of the broker."""
        import redis

        return redis.Redis.from_url(self.broker.url)

    def published(self) -> int:
        """Messages that the broker was given since its start: each is one ``LPUSH``."""
        with self.redis() as client:
            stats = client.info("commandstats")
        return int(stats.get("cmdstat_lpush", {}).get("calls", 0))

    def waiting(self, queue: str = "pyworkflow") -> int:
        """Messages in a queue, of all priorities."""
        with self.redis() as client:
            keys = [queue, *(f"{queue}\x06\x16{n}" for n in range(1, 10))]
            return sum(int(client.llen(key)) for key in keys)

    def ring(self, run_id: str, item_id: str = "turn", *, times: int = 1, **more: Any) -> None:
        """Send doorbells of our own making."""
        self.send({"run_id": run_id, "item_id": item_id, "v": 1}, times=times, **more)

    def send(self, fields: Mapping[str, Any], *, times: int = 1, **more: Any) -> None:
        """Send messages for the task that takes doorbells, readable or not."""
        from celery import Celery

        app = Celery("test", broker=self.broker.url, set_as_current=False)
        app.conf.accept_content = ["json", "pickle"]
        try:
            for _ in range(times):
                options = {"queue": "pyworkflow", "ignore_result": True, **more}
                app.send_task("pyworkflow.handle", kwargs=dict(fields), **options)
        finally:
            app.close()


def new_tag() -> str:
    """One that no other run has."""
    return f"t{uuid4().hex[:10]}"


def storage_of(kind: str, path: Path, broker: ValkeyServer) -> str:
    """The URL of an empty store."""
    if kind == "file":
        return f"file://{path}/store"
    if kind == "sqlite":
        return f"sqlite:///{path}/store.db"
    if kind == "redis":
        return broker.url.removesuffix("/0") + "/1"
    return shared_postgres().database()


def beyond_the_lease(fleet: Fleet) -> None:
    """Wait until a short lease that was not renewed has run out by the storage's clock."""
    began = fleet.ask(lambda storage: storage.now())

    def passed() -> bool:
        now = fleet.ask(lambda storage: storage.now())
        return (now - began).total_seconds() > LEASE * 1.25

    fleet.eventually(passed, "time passes")


@contextmanager
def fleet_on(path: Path, kind: str = "postgresql", **broker: Any) -> Iterator[Fleet]:
    """A fleet on an empty store of a kind, with a broker of its own."""
    with ValkeyServer({"appendonly": "no", **broker}) as server:
        made = Fleet(path, server, storage_of(kind, path, server))
        try:
            yield made
        finally:
            made.end()


TERM, QUIT, KILL, STOP, CONT = (
    signal.SIGTERM,
    signal.SIGQUIT,
    signal.SIGKILL,
    signal.SIGSTOP,
    signal.SIGCONT,
)
