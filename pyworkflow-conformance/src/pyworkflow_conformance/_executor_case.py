"""What every check of an executor works with: a client, workers, the store, and what steps did."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from time import monotonic
from types import MappingProxyType
from typing import Any, Protocol, TypeVar, cast, overload
from uuid import uuid4

import pytest

from pyworkflow.errors import ConfigurationError
from pyworkflow.runs import Run, RunStatus
from pyworkflow.spi.capabilities import ExecutorCapabilities
from pyworkflow.spi.storage import StorageBackend
from pyworkflow.storekit import fsck
from pyworkflow.testing.internals import make_storage, redact_url
from pyworkflow_conformance import _executor_client
from pyworkflow_conformance._case import GAP_PATIENCE, SEED, Suite
from pyworkflow_conformance._executor_effects import Effect, read_effects
from pyworkflow_conformance._executor_other import TRACES

__all__ = ["OTHER", "PROGRAMS", "Broker", "ExecutorCase", "ExecutorSuite", "WorkerHandle", "check"]

S = TypeVar("S", bound="ExecutorSuite")
T = TypeVar("T")

PROGRAMS = "pyworkflow_conformance._executor_programs"
OTHER = "pyworkflow_conformance._executor_other"
#: Seconds after which what does not happen is a failure.
PATIENCE = 60.0
_LOOK = 0.03


class Broker(Protocol):
    """The broker of one check, which nobody else uses."""

    def stop(self) -> None:
        """Take it away; returns when it answers no more."""
        ...

    def start(self) -> None:
        """Bring it back at the same address; messages may be lost."""
        ...

    def drop(self) -> None:
        """Lose every message that waits."""
        ...


class ExecutorSuite:
    """What a test class of an executor says, and may say."""

    #: What the executor declares; the suite proves it.
    capabilities = ExecutorCapabilities(contract_version=2)

    #: Id of a check → why the executor knowingly fails it.
    gaps: Mapping[str, str] = MappingProxyType({})

    #: Decides all that a check leaves to chance.
    seed: int = Suite.seed

    #: Begins the name of every namespace that the checks use.
    namespace_prefix = "conformance-"

    def environment(self, namespace: str, folder: Path) -> Mapping[str, str]:
        """The settings of clients and workers, as environment variables.

        ``PYWORKFLOW_EXECUTOR`` and ``PYWORKFLOW_STORAGE`` at least: a store for many processes.
        ``folder`` is empty, and removed after the check.
        """
        raise NotImplementedError

    def worker_command(
        self, namespace: str, modules: Sequence[str], queues: Sequence[str], concurrency: int
    ) -> Sequence[str]:
        """The command line of a worker.

        SIGTERM to its process must drain it. ``queues`` is empty for what a worker takes unless
        told otherwise.
        """
        command = [sys.executable, "-m", "pyworkflow.cli", "worker", *modules]
        for queue in queues:
            command += ["--queue", queue]
        return [*command, "--concurrency", str(concurrency)]

    def broker(self, namespace: str) -> Broker | None:
        """Control over the broker, for checks that take it away."""
        return None


class WorkerHandle:
    """A worker: a process and whatever it starts, in a process group of its own."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=environment,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Of the process that was started."""
        return self._process.pid

    @property
    def status(self) -> int | None:
        """The exit status; None while it runs."""
        return self._process.poll()

    def signal(self, number: int) -> None:
        """To the process that was started."""
        self._process.send_signal(number)

    def signal_all(self, number: int) -> None:
        """To it and all that it started."""
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            pass

    async def ended(self) -> int:
        """Wait for its end; the status."""
        return await asyncio.to_thread(self._process.wait, PATIENCE)

    async def kill(self) -> None:
        """SIGKILL to all of it."""
        self.signal_all(signal.SIGKILL)
        await self.ended()


class ExecutorCase:
    """One check's client, workers, store and folder."""

    def __init__(self, suite: ExecutorSuite, check_id: str, folder: Path) -> None:
        self.suite = suite
        self.folder = folder / "effects"
        self.folder.mkdir()
        (folder / "given").mkdir()
        self.namespace = f"{suite.namespace_prefix}{check_id}-{uuid4().hex[:10]}".lower()
        self.chance = random.Random(f"{suite.seed}:{check_id}")
        given = suite.environment(self.namespace, folder / "given")
        for name in ("PYWORKFLOW_EXECUTOR", "PYWORKFLOW_STORAGE"):
            if name not in given:
                raise ConfigurationError(f"environment() does not say {name}")
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            TRACES: str(self.folder),
            **given,
            "PYWORKFLOW_NAMESPACE": self.namespace,
        }
        self.store: StorageBackend = make_storage(given["PYWORKFLOW_STORAGE"], self.namespace)
        self.workers: list[WorkerHandle] = []
        self._root = folder
        self._client: asyncio.subprocess.Process | None = None
        self._asking = asyncio.Lock()

    # --- client -----------------------------------------------------------------------------------

    async def _ask(self, **asked: Any) -> dict[str, Any]:
        async with self._asking:
            if self._client is None:
                with (self._root / "client.log").open("ab") as log:
                    self._client = await asyncio.create_subprocess_exec(
                        sys.executable,
                        "-P",
                        _executor_client.__file__,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=log,
                        env=self.environment,
                    )
            assert self._client.stdin is not None
            assert self._client.stdout is not None
            self._client.stdin.write((json.dumps(asked) + "\n").encode())
            line = await asyncio.wait_for(self._client.stdout.readline(), PATIENCE)
        assert line, "the client ended: " + self._tail("client.log")
        return cast("dict[str, Any]", json.loads(line))

    async def start(
        self, workflow: str, name: str, *args: Any, ring: bool = True, priority: int = 0
    ) -> str:
        """Start a run of one of the suite's workflows; ``ring=False``: its doorbell is lost."""
        answer = await self.asked(workflow, name, *args, ring=ring, priority=priority)
        return str(answer["run_id"])

    async def asked(
        self, workflow: str, name: str, *args: Any, ring: bool = True, priority: int = 0
    ) -> dict[str, Any]:
        """The same; the whole answer of the client, with the seconds that it took."""
        answer = await self._ask(
            start=workflow,
            run_id=f"run-{name}",
            args=[str(self.folder), name, *args],
            ring=ring,
            priority=priority,
        )
        assert "error" not in answer, f"start: {answer['error']}"
        return answer

    async def ring(self, *bells: tuple[str, str]) -> None:
        """Ring, as often as said, for what may be due or not."""
        answer = await self._ask(bells=bells)
        assert "error" not in answer, f"ring: {answer['error']}"

    # --- workers ----------------------------------------------------------------------------------

    def worker(
        self,
        *,
        modules: Sequence[str] = (PROGRAMS, OTHER),
        queues: Sequence[str] = (),
        concurrency: int = 4,
        lease: str = "2s",
        mute: str = "1s",
        drain: str = "2s",
    ) -> WorkerHandle:
        """Start a worker, with settings of its own."""
        command = self.suite.worker_command(self.namespace, modules, queues, concurrency)
        own = {
            "PYWORKFLOW_LEASE": lease,
            "PYWORKFLOW_MUTE": mute,
            "PYWORKFLOW_DRAIN": drain,
        }
        handle = WorkerHandle(
            command,
            {**self.environment, **own},
            self._root / f"worker-{len(self.workers)}.log",
        )
        self.workers.append(handle)
        return handle

    # --- what happened ----------------------------------------------------------------------------

    def effects(self, what: str = "", prefix: str = "") -> list[Effect]:
        """What steps did so far."""
        return [
            one
            for one in read_effects(self.folder)
            if one.name.startswith(prefix) and what in {"", one.what}
        ]

    async def until(
        self, what: str, probe: Callable[[], Awaitable[T | None]], patience: float | None = None
    ) -> T:
        """The first answer of the probe that is true."""
        patience = PATIENCE if patience is None else patience
        end = monotonic() + patience
        while not (found := await probe()):
            assert monotonic() < end, f"not within {patience:g} s: {what}"
            await asyncio.sleep(_LOOK)
        return found

    async def seen(self, what: str, probe: Callable[[], T], patience: float | None = None) -> T:
        """The same with a probe that need not wait."""

        async def look() -> T:
            return probe()

        return await self.until(what, look, patience)

    async def begun(self, name: str) -> Effect:
        """Wait until a step has begun; its first effect."""
        found = await self.seen(f"step {name} begins", lambda: self.effects("begin", name))
        return found[0]

    def go(self, name: str) -> None:
        """Let a step go on."""
        (self.folder / f"{name}.go").touch()

    async def run(self, name: str) -> Run:
        """The run as it stands."""
        run = await self.store.get_run(f"run-{name}")
        assert run is not None, f"no run of {name}"
        return run

    async def result(self, name: str, patience: float | None = None) -> Any:
        """Wait until a run is completed; its result."""
        await self.done(name, patience=patience)
        run = await self.run(name)
        return run.result

    async def done(self, *names: str, patience: float | None = None) -> None:
        """Wait until runs are completed."""
        end = monotonic() + (PATIENCE if patience is None else patience)
        for name in names:
            run = await self.until(
                f"run {name} ends", partial(self._over, name), max(1.0, end - monotonic())
            )
            assert run.status is RunStatus.COMPLETED, f"{name}: {run.status} {run.error}"

    async def _over(self, name: str) -> Run | None:
        run = await self.run(name)
        return run if run.status.is_terminal else None

    def once(self, *names: str) -> None:
        """Each of these steps began and ended once."""
        seen = [(one.name, one.what) for one in self.effects()]
        for name in names:
            for what in ("begin", "end"):
                found = seen.count((name, what))
                assert found == 1, f"{found} times: {name} {what}"

    async def close(self) -> None:
        """End everything that the check started."""
        for worker in self.workers:
            # A stopped one is killed as well; those that a dead parent left are in its group.
            worker.signal_all(signal.SIGKILL)
            await worker.ended()
        if self._client is not None:
            if self._client.returncode is None:
                self._client.kill()
            await self._client.wait()
            transport = getattr(self._client, "_transport", None)
            if transport is not None:
                transport.close()
        await self.store.close()

    def circumstances(self, check_id: str) -> str:
        """What helps to understand and to repeat a failure."""
        logs = "\n".join(
            f"--- {name}\n{self._tail(name)}"
            for name in sorted(path.name for path in self._root.glob("*.log"))
        )
        effects = ", ".join(f"{one.name}:{one.what}@{one.pid}" for one in self.effects()[-40:])
        return (
            f"check={check_id} seed={self.suite.seed} namespace={self.namespace} "
            f"storage={redact_url(self.environment['PYWORKFLOW_STORAGE'])}\n"
            f"repeat: {SEED}={self.suite.seed} pytest -k {check_id.replace('-', '_')}\n"
            f"what steps did: {effects or 'nothing'}\n{logs}"
        )

    def _tail(self, name: str) -> str:
        path = self._root / name
        return path.read_text(errors="replace")[-3000:] if path.exists() else ""


Body = Callable[[S, ExecutorCase], Awaitable[None]]


@overload
def check(body: Body[S]) -> Callable[[S], None]: ...


@overload
def check(*, needs: Sequence[str]) -> Callable[[Body[S]], Callable[[S], None]]: ...


def check(
    body: Body[S] | None = None, *, needs: Sequence[str] = ()
) -> Callable[[S], None] | Callable[[Body[S]], Callable[[S], None]]:
    """Make a test of a check: processes of its own, all ended with it; ``fsck`` at the end.

    ``needs``: capabilities without which the check does not apply, or ``broker``.
    """
    if body is None:
        return lambda body: _test_of(body, needs)
    return _test_of(body, needs)


def _test_of(body: Body[S], needs: Sequence[str]) -> Callable[[S], None]:
    name = body.__name__
    group, number = name.removeprefix("test_").split("_")[:2]
    check_id = f"{group}-{number}"

    def test(self: S) -> None:
        missing = [need for need in needs if not _has(self, need)]
        if missing:
            pytest.skip(f"does not apply: {check_id} needs {', '.join(missing)}")
        gap = self.gaps.get(check_id)
        if gap is None:
            asyncio.run(_drive(self, body, check_id))
            return
        try:
            asyncio.run(asyncio.wait_for(_drive(self, body, check_id), GAP_PATIENCE))
        except Exception:  # noqa: BLE001 - a gap may fail in any way
            pytest.xfail(f"declared gap: {gap}")
        pytest.fail(f"{check_id} is declared a gap and passes: take it out of gaps")

    # Not functools.wraps: pytest would look at the check's own signature.
    test.__name__, test.__qualname__ = name, body.__qualname__
    test.__doc__, test.__module__ = body.__doc__, body.__module__
    vars(test)["needs"] = tuple(needs)
    return test


def _has(suite: ExecutorSuite, need: str) -> bool:
    if need == "broker":
        # Overridden: only then does the suite know it.
        return type(suite).broker is not ExecutorSuite.broker
    return bool(getattr(suite.capabilities, need))


async def _drive(suite: S, body: Callable[[S, ExecutorCase], Awaitable[None]], name: str) -> None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        case = ExecutorCase(suite, name, Path(folder))
        try:
            async with asyncio.timeout(3 * PATIENCE):
                await body(suite, case)
            violations = await fsck(case.store)
            assert not violations, "fsck: " + "; ".join(map(str, violations[:10]))
        except Exception as error:
            error.add_note(case.circumstances(name))
            raise
        finally:
            await case.close()
