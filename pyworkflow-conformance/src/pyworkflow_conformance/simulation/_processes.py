"""The processes of a simulated cluster: workers that run the engine, and clients that call it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pyworkflow.errors import RunClosed, StorageError
from pyworkflow.events import Event, EventClass, EventType
from pyworkflow.runs import RunStatus
from pyworkflow.spi.executor import Doorbell, Outcome
from pyworkflow.spi.storage import Change, Control, ControlKind
from pyworkflow.testing.internals import LeaseKeeper, Operations, Replay, RunOptions, Worker
from pyworkflow_conformance.simulation._loop import make_loop
from pyworkflow_conformance.simulation._network import SimulatedStorage
from pyworkflow_conformance.simulation._programs import VERSIONS

if TYPE_CHECKING:
    from pyworkflow_conformance.simulation._cluster import Cluster

__all__ = ["Client", "Job", "WorkerProcess"]

_LONGEST = 1.0
"""Seconds between looks of a sweeper."""


class _Leases(LeaseKeeper):
    """Renews in a task: there are no threads."""

    async def ready(self) -> None:
        """There is no connection to open."""

    def _begin(self) -> None:
        if self._task is None:
            assert self._loop is not None
            self._task = self._loop.create_task(self._renew())


class _Evictor:
    """Closes what is put aside at once."""

    def __init__(self, saw: Callable[[str], None]) -> None:
        self._saw = saw
        self.stubborn: list[Replay] = []

    def close(self, replay: Replay) -> None:
        if not replay.is_closed:
            self._saw("coroutine put aside")
            if replay.close():
                self.stubborn.append(replay)

    def flush(self, timeout: float = 0) -> None: ...

    def stop(self) -> None: ...


class _Threads:
    """Runs the bodies of sync steps here; their end comes a little later."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def begin(self, most: int = 0) -> None: ...

    def close(self) -> None: ...

    def submit(self, call: Callable[[], object]) -> asyncio.Future[Any]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        value: object = None
        error: BaseException | None = None
        try:
            value = call()
        except BaseException as exc:  # noqa: BLE001 - it is the step's result
            error = exc
        took = self._cluster.clockwork.random.choice((0.0, 0.01, 0.3))
        loop.call_later(took, _resolve, future, value, error)
        return future


def _resolve(future: asyncio.Future[Any], value: object, error: BaseException | None) -> None:
    if not future.done():
        future.set_result((value, error))


class WorkerProcess:
    """A process with a worker, and with what makes it work: its own looks, or doorbells."""

    def __init__(self, cluster: Cluster, index: int, number: int, version: str) -> None:
        self.cluster = cluster
        self.index = index
        self.version = version
        self.polls = cluster.plan.setup.workers[index] == "polls"
        self.loop = make_loop(cluster.clockwork, f"worker{index}.{number}")
        self.loop.process = self
        self.loop.skew = cluster.plan.setup.skews[index]
        self.owner = f"simulated/{self.loop.name}"
        self.draining = False
        self.storage = SimulatedStorage(cluster.server, self.loop)
        self._bells: list[Doorbell] = []
        self._handling = 0
        setup = cluster.plan.setup
        with cluster.running(self.loop):
            self.worker = worker = Worker(
                self.storage,
                cluster.settings,
                spread=setup.spread,
                notify=cluster.notify if cluster.rings else None,
            )
            worker.leases = _Leases(
                self.storage,
                cluster.settings.lease,
                cluster.settings.renew_every,
                worker._lost,
                outages=worker.outages,
            )
            worker.evictor = _Evictor(cluster.saw)  # type: ignore[assignment]  # has what is asked of one
            worker.runner._threads = _Threads(cluster)  # type: ignore[assignment]  # has what is asked of them
            worker.pipeline.batch = contextlib.nullcontext()  # the world has one for all
            self.loop.create_task(self._main())

    @property
    def workflow(self) -> Any:
        """What this process has under the programs' name."""
        return VERSIONS[self.version]

    async def _main(self) -> None:
        while True:
            try:
                await self.worker.open()
                break
            except StorageError:
                await asyncio.sleep(0.2)
        if self.polls:
            self.worker.serve()
        else:
            await self._sweep()

    async def _sweep(self) -> None:
        """As the sweepers of executors do: ring for what is due, and sleep until something is."""
        worker, looked = self.worker, 0.0
        while not self.draining:
            try:
                if self.loop.time() - looked > 1.0:
                    looked = self.loop.time()
                    await worker.free_gone()
                rang = await worker.sweep()
                if rang:
                    self.cluster.saw("bell rung by a sweep")
                left = await worker.seconds_until_due()
                timeout = _LONGEST if left is None else min(left, _LONGEST)
                await worker.wait_for_news(timeout if timeout > 0 else 0.1)
                await asyncio.sleep(0.05)
            except StorageError:
                await asyncio.sleep(0.25)

    def hear(self, bell: Doorbell) -> None:
        """A doorbell arrives."""
        if self.loop.is_dead or self.draining:
            return
        self._bells.append(bell)
        if self._handling < self.cluster.bell_slots:
            self._handling += 1
            self.loop.create_task(self._handle())

    async def _handle(self) -> None:
        try:
            while self._bells:
                bell = self._bells.pop(0)
                try:
                    outcome = await self.worker.handle(bell)
                except StorageError:
                    continue
                if outcome is Outcome.UNKNOWN_WORKFLOW:
                    self.cluster.saw("unknown workflow released")
        finally:
            self._handling -= 1

    def drain(self, grace: float, then: Callable[[], None]) -> None:
        """End as a worker that is told to; ``then`` is called when it has."""
        self.draining = True

        async def ends() -> None:
            await self.worker.drain(grace)
            await self.worker.close()
            then()

        with self.cluster.running(self.loop):
            self.loop.create_task(ends())

    def kill(self) -> None:
        """The process is gone, whatever it did."""
        self.loop.kill()
        with self.cluster.running(self.loop):
            for live in list(self.worker.kept.runs.values()):
                live.replay.close()
            self.worker.kept.runs.clear()


@dataclass(slots=True)
class Job:
    """A run that clients want."""

    key: str | None
    """None: the run is started without an idempotency key, by one caller."""
    program: list[Any]
    at: float
    """Seconds after the beginning."""
    via: int | None = None
    """The worker that starts it and begins at once; None: only the store is told."""
    callers: int = 1
    """How many ask for it, all with the same key."""
    cancel_after: float | None = None
    pause_after: float | None = None
    paused_for: float = 0.0
    terminate_after: float | None = None
    max_duration: float | None = None
    """Seconds that the run may take: far more than it needs, or too few."""
    ids: set[str] = field(default_factory=set[str])
    """The ids that callers were given."""
    results: list[object] = field(default_factory=list[object])
    """What callers were given in the end."""
    unanswered: int = 0
    """Starts of which no caller knows what came of them."""
    cancel_asked: bool = False
    cancel_accepted: bool = False
    paused_by: Client | None = None
    terminate_asked: bool = False
    terminated: bool = False


class Client:
    """A process that starts runs, and waits for what comes of them."""

    def __init__(self, cluster: Cluster, number: int, jobs: Sequence[Job]) -> None:
        self._cluster = cluster
        self.loop = make_loop(cluster.clockwork, f"client{number}")
        self.waiting: dict[asyncio.Task[None], Job] = {}
        self._operations = Operations(
            SimulatedStorage(cluster.server, self.loop), None, cluster.broker
        )
        for job in jobs:
            self._call(job, job.at)

    def _call(self, job: Job, after: float) -> None:
        task = self.loop.create_task(self._want(job, after))
        self.waiting[task] = job
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        job = self.waiting.pop(task)
        if task.cancelled():
            self._cluster.saw("caller cancelled")
            self._call(job, 0.1)  # it asks again, with the same key
        elif (exc := task.exception()) is not None:
            raise exc
        else:
            self._cluster.asked_enough()

    def cancel_caller(self, choice: int) -> None:
        """Cancel one that waits for an answer."""
        if self.waiting:
            list(self.waiting)[choice % len(self.waiting)].cancel()

    async def _want(self, job: Job, after: float) -> None:
        await asyncio.sleep(after)
        if job.key is None and job.ids:
            (run_id,) = job.ids
        else:
            run_id = await self._started(job)
            job.ids.add(run_id)
        await self._interfere(job, run_id)
        while True:
            try:
                job.results.append(await self._operations.result(run_id, 5.0, "wait"))
                return
            except TimeoutError:
                continue
            except StorageError:
                await asyncio.sleep(0.2)
            except Exception as exc:  # noqa: BLE001 - the run's own error is its result
                job.results.append(f"{type(exc).__name__}: {exc}")
                return

    async def _interfere(self, job: Job, run_id: str) -> None:
        """What the job's caller does to the run; whoever began to pause it ends that, too."""
        pauses = job.pause_after is not None and job.paused_by in (None, self)
        if pauses and job.pause_after is not None:
            job.paused_by = self
            await asyncio.sleep(job.pause_after)
            await self._control(run_id, ControlKind.PAUSE)
            await asyncio.sleep(job.paused_for)
        if job.cancel_after is not None and not job.cancel_asked:
            job.cancel_asked = True
            await asyncio.sleep(job.cancel_after)
            await self._cancel(job, run_id)
        if job.terminate_after is not None and not job.terminate_asked:
            job.terminate_asked = True
            await asyncio.sleep(job.terminate_after)
            job.terminated = await self._control(run_id, ControlKind.TERMINATE)
        if pauses:
            await self._control(run_id, ControlKind.UNPAUSE)
            job.pause_after = None

    async def _started(self, job: Job) -> str:
        if job.key is None:
            self._cluster.saw("started without a key")
        process = None if job.via is None else self._cluster.worker(job.via)
        if process is not None and not process.draining:
            job.unanswered += 1
            found = await self._in_worker(process, job)
            if found is not None:
                job.unanswered -= 1
                return found
        while True:
            job.unanswered += 1
            try:
                found = await _start(self._operations, job)
            except StorageError:
                await asyncio.sleep(0.3)
            else:
                job.unanswered -= 1
                return found

    async def _control(self, run_id: str, kind: ControlKind) -> bool:
        """Change the run's condition, as an operator does; whether it was still open."""
        change = Change(
            run_id=run_id,
            key=f"{kind}:{self._cluster.random.getrandbits(64):016x}",
            control=Control(kind, "simulated"),
            final=RunStatus.TERMINATED if kind is ControlKind.TERMINATE else None,
            events=[_TERMINATED] if kind is ControlKind.TERMINATE else (),
        )
        while True:
            try:
                await self._operations.storage.commit_one(change)
                self._cluster.saw(f"control: {kind}")
                return True
            except RunClosed:
                return False
            except StorageError:
                await asyncio.sleep(0.2)

    async def _in_worker(self, process: WorkerProcess, job: Job) -> str | None:
        """Ask a worker's process to start the run; None when it does not answer."""
        answer: asyncio.Future[str | None] = self.loop.create_future()

        def answered(found: str | Exception | None) -> None:
            if answer.done():
                return
            if isinstance(found, Exception):
                answer.set_exception(found)
            else:
                answer.set_result(found)

        async def there() -> None:
            operations = Operations(process.storage, process.worker, None)
            found: str | Exception | None
            try:
                found = await _start(operations, job)
            except StorageError:
                found = None
            except Exception as exc:  # noqa: BLE001 - the caller's to have
                found = exc
            self.loop.call_soon(answered, found)

        def begin() -> None:
            process.worker.spawn(there())

        process.loop.call_soon(begin)
        timer = self.loop.call_later(3.0, answered, None)
        try:
            return await answer
        finally:
            timer.cancel()

    async def _cancel(self, job: Job, run_id: str) -> None:
        while True:
            try:
                await self._operations.cancel(run_id, "why not")
                job.cancel_accepted = True
                return
            except RunClosed:
                return
            except StorageError:
                await asyncio.sleep(0.2)


async def _start(operations: Operations, job: Job) -> str:
    workflow: Any = VERSIONS["1"]
    options = RunOptions(idempotency_key=job.key, max_duration=job.max_duration)
    return await operations.start(workflow, (job.program,), {}, options)


_TERMINATED = Event(
    EventType.WORKFLOW_TERMINATED, EventClass.COMMAND, {"reason": "simulated", "kind": "control"}
)
