"""A cluster in one thread under one seed: a store, workers, clients, and what goes wrong."""

from __future__ import annotations

import logging
from asyncio import events
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from random import Random
from typing import Any

from pyworkflow.errors import ConfigurationError
from pyworkflow.runs import WorkItem
from pyworkflow.spi.capabilities import ExecutorCapabilities
from pyworkflow.spi.executor import Doorbell
from pyworkflow.spi.storage import Change, Committed, StorageBackend
from pyworkflow.testing.internals import (
    MemoryStorageBackend,
    Settings,
    Step,
    Workflow,
    find_step,
    find_workflow,
)
from pyworkflow_conformance.simulation._checks import Broken, Checks
from pyworkflow_conformance.simulation._faults import LEASE, Fault, Faults, Plan
from pyworkflow_conformance.simulation._loop import Clockwork, ProcessLoop
from pyworkflow_conformance.simulation._network import Server
from pyworkflow_conformance.simulation._processes import Client, Job, WorkerProcess
from pyworkflow_conformance.simulation._programs import STEPS, kinds_of
from pyworkflow_conformance.simulation._reality import in_world

__all__ = ["Cluster", "Ended"]

_MOST_STEPS = 200_000
_PATIENCE = 150.0
"""Seconds of virtual time from the last fault in which everything must have ended."""
_PROMPT = timedelta(seconds=1.5)
"""As long as an item waits at most while nothing goes wrong and everybody has room."""
_NAME = "sim_program"


class _Broker:
    """The executor that clients ring with."""

    name = "simulated"
    capabilities = ExecutorCapabilities(contract_version=2)

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    async def notify(self, bells: Sequence[Doorbell]) -> None:
        self._cluster.notify(bells)


@dataclass(slots=True)
class Ended:
    """What a cluster left behind when everything had ended."""

    jobs: list[Job]
    store: StorageBackend
    checks: Checks
    seen: Counter[str]
    bodies: Counter[tuple[str, str, int, str]]
    """(run, op, try, name of the step) → how often that body began."""
    calls: int
    steps: int
    seconds: float
    """Virtual."""
    losses: int
    """Faults that may have cost an item a claim."""
    trace: list[str] = field(default_factory=list[str])


class Cluster:
    """Runs the jobs of a plan; raises ``Broken`` when something does not hold."""

    def __init__(
        self,
        plan: Plan,
        jobs: list[Job],
        *,
        make_store: Callable[[], StorageBackend] = MemoryStorageBackend,
        tracing: bool = False,
        on_trace: Callable[[str], None] | None = None,
    ) -> None:
        self.plan = plan
        self.jobs = jobs
        self.tracing = tracing
        # A step that never ends keeps its slot, and with few slots all that waits for one waits
        # for ever: that is how it should be.
        endless = any("forever" in repr(job.program) for job in jobs)
        slots = 100 if endless else plan.setup.concurrency
        self.bell_slots = 100 if endless else 4
        """Doorbells that a worker process handles at once."""
        self.settings = Settings(
            lease=timedelta(seconds=LEASE),
            renew_every=timedelta(seconds=LEASE / 3),
            mute=timedelta(seconds=0.6),
            sessions=plan.setup.sessions,
            concurrency=slots,
            threads=slots,
        )
        self.random = Random(f"secrets {plan.seed}")
        self.clockwork = Clockwork(
            f"order {plan.profile} {plan.seed}", shuffled=plan.setup.shuffled
        )
        self.faults = _Carried(self, plan.faults)
        self.seen: Counter[str] = Counter()
        for job in jobs:
            self.seen.update(f"program: {kind}" for kind in kinds_of(job.program))
        self.bodies: Counter[tuple[str, str, int, str]] = Counter()
        self.rings = "bells" in plan.setup.workers
        self.broker: Any = _Broker(self) if self.rings else None
        self.jumped = 0.0
        self.evicted: set[tuple[str, str]] = set()
        """(process, run) whose coroutine was put aside."""
        self.lost_bells: set[tuple[str, str]] = set()
        self.lines: list[str] = []
        self._make_store = make_store
        self._on_trace = on_trace
        self._broken: Broken | None = None
        self._workers: list[WorkerProcess | None] = []
        self._boots = 0
        self._clients: list[Client] = []
        self._rung = 0
        self._calm = False

    # --- the world, as the engine sees it -------------------------------------------------------

    def monotonic(self) -> float:
        """Seconds of virtual time."""
        return self.clockwork.now

    def wall(self) -> float:
        """What the wall clock of the machine shows that runs now."""
        loop: Any = events._get_running_loop()
        if loop is None or loop is self.server.loop:
            return self.clockwork.now + self.jumped
        skew: float = loop.skew
        return self.clockwork.now + skew

    def _process(self) -> WorkerProcess | None:
        loop: Any = events._get_running_loop()
        found: WorkerProcess | None = None if loop is None else loop.process
        return found

    def find_workflow(self, name: str) -> Workflow[Any, Any] | None:
        """The workflow that the running process has."""
        if name != _NAME:
            return find_workflow(name)
        process = self._process()
        found: Workflow[Any, Any] | None = None if process is None else process.workflow
        return found

    def find_step(self, name: str) -> Step[Any, Any] | None:
        """The step of the simulated programs."""
        return STEPS.get(name) or find_step(name)

    def workflow_names(self) -> frozenset[str]:
        """What the running process has."""
        process = self._process()
        return frozenset() if process is None or process.workflow is None else frozenset((_NAME,))

    def new_owner(self) -> str:
        """A name for the worker of the running process."""
        loop: Any = events._get_running_loop()
        return f"simulated/{loop.name}"

    def is_gone(self, owner: str) -> bool:
        """Whether that process has ended, and the running one can see it."""
        gone = self.plan.setup.one_machine and not any(
            w is not None and w.owner == owner for w in self._workers
        )
        if gone:
            self.saw("leases of a process that is gone freed")
        return gone

    def told(self, record: logging.LogRecord) -> None:
        """An error that the engine logged with a traceback is a fault of its own.

        But for what ``observers`` logs: the errors of runs and steps.
        """
        if record.module == "observers":
            return
        if record.exc_info is not None and record.exc_info[1] is not None:
            self.broke(Broken("engine", "-", f"{record.getMessage()}: {record.exc_info[1]!r}"))

    def body(self, run_id: str, op: str, attempt: int, name: str) -> Callable[[], None]:
        """The body of a step begins; what is returned is called at its end."""
        self.bodies[run_id, op, attempt, name] += 1
        loop: Any = events._get_running_loop()
        owner = loop.process.owner
        if self.tracing:
            self.trace(loop.name, f"body of {name} begins: run={run_id} op={op} try={attempt}")
        try:
            self.checks.begins(owner, run_id, op, attempt)
        except Broken as problem:
            self.broke(problem)
        return lambda: self.checks.ends(owner, run_id, op)

    @property
    def calls(self) -> int:
        """Calls of the store so far."""
        return self.server.calls if self._workers else 0

    # --- what happens ---------------------------------------------------------------------------

    def saw(self, what: str) -> None:
        """A path of recovery was taken."""
        self.seen[what] += 1

    def broke(self, problem: object) -> None:
        """A property does not hold: the run ends at the next look."""
        if self._broken is None:
            self._broken = (
                problem if isinstance(problem, Broken) else Broken("checks", "-", repr(problem))
            )
            self.clockwork.halted = True
            if self.tracing:
                self.trace("-", f"BROKEN {self._broken}")

    def trace(self, who: str, what: str) -> None:
        """Something happened."""
        line = f"{self.clockwork.now:10.6f} {who}: {what}"
        self.lines.append(line)
        if self._on_trace is not None:
            self._on_trace(line)

    def latency(self) -> float:
        """How long a message takes."""
        most = self.plan.setup.latency
        return most * self.clockwork.random.random() if most else 0.0

    @contextmanager
    def running(self, loop: ProcessLoop) -> Generator[None]:
        """Act as the process of this loop."""
        before = events._get_running_loop()
        events._set_running_loop(loop)
        try:
            yield
        finally:
            events._set_running_loop(before)

    # --- doorbells --------------------------------------------------------------------------------

    def notify(self, bells: Sequence[Doorbell]) -> None:
        """Send doorbells to whatever worker takes them."""
        for bell in bells:
            self._rung += 1
            fault = None if self._calm else self.faults.of_bell(self._rung)
            if fault is not None:
                self.saw(fault.kind.replace("_", " "))
                if self.tracing:
                    self.trace("broker", f"{fault.kind} {bell.run_id}/{bell.item_id}")
                if fault.kind == "bell_lost":
                    self.lost_bells.add((bell.run_id, bell.item_id))
                    continue
            late = fault.seconds if fault is not None and fault.kind == "bell_delayed" else 0.0
            for _ in range(2 if fault is not None and fault.kind == "bell_doubled" else 1):
                self.server.loop.call_later(self.latency() + late, self._deliver, bell)

    def _deliver(self, bell: Doorbell) -> None:
        hearing = [w for w in self._workers if w is not None and not w.polls and not w.draining]
        if hearing:
            worker = hearing[int(self.clockwork.random.random() * len(hearing))]
            worker.loop.call_soon(worker.hear, bell)

    # --- workers ----------------------------------------------------------------------------------

    def worker(self, index: int) -> WorkerProcess | None:
        """The worker of this number, if it lives."""
        return self._workers[index % len(self._workers)]

    def boot(self, index: int, version: str) -> None:
        """A worker's process begins."""
        if self._workers[index] is None:
            self._boots += 1
            self._workers[index] = WorkerProcess(self, index, self._boots, version)
            if self.tracing:
                self.trace("operator", f"worker{index} boots as {self._boots} version={version}")

    def kill(self, index: int, *, again_after: float, version: str | None = None) -> None:
        """A worker's process dies, and begins again later."""
        worker = self._workers[index]
        if worker is None:
            return
        if self.tracing:
            self.trace("operator", f"{worker.loop.name} dies")
        self._workers[index] = None
        self.checks.losses += 1
        worker.kill()
        self.server.loop.call_later(again_after, self.boot, index, version or worker.version)

    def drain(self, index: int, grace: float, *, again_after: float, version: str | None) -> None:
        """A worker is told to end, and begins again later."""
        worker = self._workers[index]
        if worker is None or worker.draining:
            return
        self.saw("worker drained")
        if self.tracing:
            self.trace("operator", f"{worker.loop.name} drains version={version}")

        def ended() -> None:
            if self._workers[index] is worker:
                self.server.loop.call_soon(self._drained, index, again_after, version)

        worker.drain(grace, ended)

    def _drained(self, index: int, again_after: float, version: str | None) -> None:
        self.kill(index, again_after=again_after, version=version)

    def live_clients(self) -> list[Client]:
        """The clients."""
        return self._clients

    # --- the whole --------------------------------------------------------------------------------

    def run(self) -> Ended:
        """From the first start until everything has ended and stays so."""
        with in_world(self):
            self.begin_server(self._make_store())
            try:
                self._begin()
                self._until_ended()
                self._linger()
            finally:
                for worker in self._workers:
                    if worker is not None:
                        worker.kill()
                for client in self._clients:
                    client.loop.kill()
                self.server.loop.kill()
        return Ended(
            jobs=self.jobs,
            store=self.server.inner,
            checks=self.checks,
            seen=self.seen,
            bodies=self.bodies,
            calls=self.server.calls,
            steps=self.clockwork.steps,
            seconds=self.clockwork.now,
            losses=self.checks.losses,
            trace=self.lines,
        )

    def begin_server(self, store: object) -> None:
        """Have a server for this store, which a callable of anybody's has made."""
        if not isinstance(store, StorageBackend):
            raise ConfigurationError(f"make_store made {store!r:.80}; let it make an empty store")
        self.server = Server(self, store)

    def _begin(self) -> None:
        self.checks = Checks(self.server.inner.clone(), self.saw)
        if self.plan.profile == "calm" and self.settings.concurrency == 100:
            self.checks.longest_wait = _PROMPT
        self.checks.on_commit = self._committed
        self.checks.on_announce = self._announced
        setup = self.plan.setup
        self._workers = [None] * len(setup.workers)
        for index, version in enumerate(setup.versions):
            self.boot(index, version)
        numbers = 1 + any(job.callers > 1 for job in self.jobs)
        for number in range(numbers):
            jobs = [job for job in self.jobs if job.callers > number]
            loop_jobs = Client(self, number, jobs)
            self._clients.append(loop_jobs)
        self.server.loop.call_later(setup.heals_at, self._heal)
        self.clockwork.at_step = self.faults.due
        self.faults.calm_at = 60.0

    def _heal(self) -> None:
        """Every worker has what it will have in the end."""
        last = self.plan.setup.last_version
        self.faults.deploys = False
        for index, worker in enumerate(self._workers):
            if worker is None:
                self.server.loop.call_later(1.0, self._heal)
            elif worker.version != last:
                worker.loop.go_on()
                self.kill(index, again_after=0.1, version=last)

    def asked_enough(self) -> None:
        """A caller has its answer."""
        if not any(client.waiting for client in self._clients):
            self.clockwork.halted = True

    def _look(self) -> None:
        if self._broken is not None:
            raise self._broken
        if self.clockwork.problems:
            raise Broken("loop", "-", self.clockwork.problems[0])

    def _until_ended(self) -> None:
        clockwork = self.clockwork
        while any(client.waiting for client in self._clients):
            end = max(self.faults.last, self.plan.setup.heals_at) + _PATIENCE
            left = _MOST_STEPS - clockwork.steps
            if clockwork.now < end and left > 0 and (clockwork.steps == 0 or clockwork.busy):
                clockwork.run(until=end, most=left)
                self._look()
                continue
            waiting = [job for client in self._clients for job in client.waiting.values()]
            ids = sorted({i for job in waiting for i in job.ids}) or ["-"]
            raise Broken(
                "liveness", ids[0],
                f"still waiting for {len(waiting)} results at {clockwork.now:.1f} s "
                f"(last fault at {self.faults.last:.1f} s) after {self.server.calls} calls",
            )  # fmt: skip

    def check_work(self) -> None:
        """Calls of the store are bounded by what happens, and by time that passes."""
        calls, events, seconds = self.server.calls, self.checks.length, self.clockwork.now
        bound = 600 + 60 * (events + seconds * len(self._workers))
        if calls > bound:
            what = f"{calls} calls of the store in {seconds:.1f} s, for {events} events"
            self.broke(Broken("work", "-", what))

    def _linger(self) -> None:
        """Let the rest go on: zombies wake, bells come late, and nothing may come of it."""
        self._calm = True
        self.faults.stop()
        for worker in self._workers:
            if worker is not None:
                worker.loop.go_on()
        self.clockwork.run(
            until=self.clockwork.now + (LEASE / 4 if self.plan.faults else 0.05), most=_MOST_STEPS
        )
        self._look()

    def _committed(self, who: str, run_id: str, change: Change, answer: Committed) -> None:
        """A change was accepted."""
        for event in change.events:
            path = _PATHS.get(event.type)
            if path is not None:
                self.saw(path)
        if any(item.claimed is not None for item in change.put):
            self.saw("step handed off")
        if change.take_turn is not None and answer.claims:
            self.saw("turn taken with a result")
        if answer.unseen_events:
            self.saw("inputs of others delivered")
        if self.evicted and (who, run_id) in self.evicted:
            self.evicted.discard((who, run_id))
            self.saw("evicted and reloaded")

    def _announced(self, items: Sequence[WorkItem]) -> None:
        for item in items:
            if (item.run_id, item.item_id) in self.lost_bells:
                self.lost_bells.discard((item.run_id, item.item_id))
                self.saw("bell lost and swept")


_PATHS = {
    "workflow.stalled": "run stalled",
    "workflow.unstalled": "stalled and healed",
    "workflow.resumed": "run resumed from its history",
    "step.retrying": "step retried",
    "step.cancelled": "dispatched step cancelled",
    "cancel.requested": "cancel delivered",
    "workflow.deadline": "deadline passed",
    "version.marked": "version marked",
}


class _Carried(Faults):
    """The plan's faults, carried out on a cluster."""

    def __init__(self, cluster: Cluster, faults: Sequence[Fault]) -> None:
        super().__init__(faults)
        self._cluster = cluster
        self._armed: list[tuple[int, Fault]] = []
        self._stopped = False
        self.deploys = True
        self.calm_at = 60.0
        self.last = 0.0
        """When the last fault was over."""

    def stop(self) -> None:
        """Nothing goes wrong any more."""
        self._stopped = True

    def _over(self) -> bool:
        return self._stopped or self._cluster.clockwork.now > self.calm_at

    def _did(self, fault: Fault) -> None:
        cluster = self._cluster
        now = cluster.clockwork.now
        self.last = max(self.last, now + abs(fault.seconds) % 3600)
        if cluster.tracing:
            cluster.trace("fault", str(fault))

    def of_call(self, number: int, write: int, method: str) -> Fault | None:
        """What happens to the call of this number; arms what comes a little later.

        ``write``: it is the so manieth commit or claim; 0 when it is neither.
        """
        others = self.others
        while others and others[0].at <= number:
            fault = others.pop(0)
            clockwork = self._cluster.clockwork
            self._armed.append((clockwork.steps + 1 + fault.steps, fault))
            self._armed.sort(key=lambda entry: entry[0])
            clockwork.next_step = self._armed[0][0]
        found = self.writes.get(write, self.calls.get(number))
        if found is None or self._over():
            return None
        if found.kind == "doubles" and method not in ("commit", "renew"):
            return None
        if method == "watch":
            return None
        self._did(found)
        self._cluster.saw(f"call: {found.kind}")
        if method == "claim" or found.seconds > LEASE / 2:
            self._cluster.checks.losses += 1
        return found

    def of_bell(self, number: int) -> Fault | None:
        """What happens to the doorbell of this number."""
        if number not in self.bells or self._over():
            return None
        self._did(self.bells[number])
        return self.bells[number]

    def due(self) -> int:
        """Carry out what is due at this step; the next one's step."""
        steps = self._cluster.clockwork.steps
        while self._armed and self._armed[0][0] <= steps:
            _, fault = self._armed.pop(0)
            if not self._over():
                self._happen(fault)
        return self._armed[0][0] if self._armed else -1

    def _happen(self, fault: Fault) -> None:
        cluster = self._cluster
        number = len(cluster.plan.setup.workers)
        index = fault.target % number
        worker = cluster.worker(index)
        self._did(fault)
        match fault.kind:
            case "kill":
                if worker is not None:
                    cluster.saw("worker killed")
                    cluster.kill(index, again_after=fault.seconds)
            case "drain" if worker is not None and fault.choice >= 8:
                # It is told to end while it stands still, and has lost what it gives back.
                cluster.checks.losses += 1
                cluster.checks.stood_still = True
                cluster.saw("worker told to end past its lease")
                worker.loop.stop_running()
                cluster.drain(index, 0.0, again_after=fault.seconds, version=None)
                cluster.server.loop.call_later(LEASE * 1.5, worker.loop.go_on)
            case "drain":
                cluster.drain(
                    index,
                    (0.0, 0.2, 2.0)[fault.choice % 3],
                    again_after=fault.seconds,
                    version=None,
                )
            case "pause":
                if worker is not None:
                    cluster.saw(
                        "worker stopped past its lease"
                        if fault.seconds > LEASE
                        else "worker stopped"
                    )
                    cluster.checks.losses += fault.seconds > LEASE
                    cluster.checks.stood_still = True
                    worker.loop.stop_running()
                    cluster.server.loop.call_later(fault.seconds, worker.loop.go_on)
            case "evict":
                if worker is not None:
                    kept = list(worker.worker.kept.runs)
                    cluster.evicted |= {(worker.loop.name, run_id) for run_id in kept}
                    with cluster.running(worker.loop):
                        worker.worker.evict()
            case "caller":
                clients = cluster.live_clients()
                clients[fault.target % len(clients)].cancel_caller(fault.choice)
            case "outage":
                cluster.saw("outage")
                cluster.checks.losses += 1
                cluster.server.down = True
                cluster.server.loop.call_later(fault.seconds, self._up)
            case "jump":
                cluster.saw("clock forward" if fault.seconds > 0 else "clock back")
                cluster.checks.losses += 1
                cluster.checks.clock_jumped(back=fault.seconds < 0)
                cluster.jumped += fault.seconds
            case "deploy":
                if self.deploys:
                    cluster.saw("version changed")
                    cluster.kill(index, again_after=fault.seconds, version=self._version(fault))
            case _:
                raise AssertionError(fault.kind)

    def _up(self) -> None:
        self._cluster.server.down = False

    def _version(self, fault: Fault) -> str:
        setup = self._cluster.plan.setup
        if not setup.heals_at:
            return "1"
        if setup.last_version == "2":
            return ("1", "2")[fault.choice % 2]
        return ("1", "broken", "missing")[fault.choice % 3]
