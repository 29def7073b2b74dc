"""One seed: its programs, its plan, its undisturbed run, and the verdict."""

from __future__ import annotations

from asyncio import events
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random

from pyworkflow.spi.storage import StorageBackend
from pyworkflow.testing.internals import MemoryStorageBackend
from pyworkflow_conformance.simulation._checks import Broken
from pyworkflow_conformance.simulation._cluster import Cluster, Ended
from pyworkflow_conformance.simulation._faults import PROFILES, Fault, Plan, make_plan
from pyworkflow_conformance.simulation._processes import Job
from pyworkflow_conformance.simulation._programs import FAR, make_program
from pyworkflow_conformance.simulation._verdict import judge

__all__ = ["MakeStore", "Report", "jobs_of", "simulate"]

MakeStore = Callable[[], StorageBackend]

_SHARED = 4
"""Seeds that have the same programs, so that these need only one undisturbed run."""
_EXPECTED: OrderedDict[tuple[int, int, int], list[object]] = OrderedDict()


@dataclass(frozen=True, slots=True)
class Report:
    """What came of one seed."""

    seed: int
    profile: str
    seen: Counter[str] = field(default_factory=Counter[str])
    """Paths of recovery, and how often each was taken."""
    calls: int = 0
    """Calls of the store."""
    steps: int = 0
    """Callbacks."""
    seconds: float = 0.0
    """Of virtual time."""
    trace: tuple[str, ...] = ()
    """What happened, when that was asked for."""
    broken: Broken | None = None
    """The property that does not hold, or None."""
    faults: tuple[Fault, ...] = ()
    """The plan's faults."""


def programs_of(seed: int, runs: int, size: int) -> list[list[object]]:
    """The programs of a seed; some seeds share them."""
    random = Random(f"programs {seed // _SHARED}")
    return [make_program(random, size) for _ in range(runs)]


def jobs_of(plan: Plan) -> list[Job]:
    """What the clients of a seed want."""
    random = Random(f"jobs {plan.profile} {plan.seed}")
    others = Random(f"controls {plan.profile} {plan.seed}")
    setup = plan.setup
    jobs: list[Job] = []
    for number, program in enumerate(programs_of(plan.seed, setup.runs, setup.size)):
        job = Job(
            key=f"job {number}",
            program=program,
            at=random.choice((0.0, 0.0, 0.01, 0.3)),
            via=random.randrange(len(setup.workers)) if random.random() < 0.4 else None,
        )
        if plan.profile != "calm":
            job.callers = random.choice((1, 1, 1, 2))
            if random.random() < 0.2:
                job.cancel_after = random.choice((0.0, 0.005, 0.05, 0.4, random.random() * 3))
            if random.random() < 0.2:
                job.max_duration = random.choice((FAR, FAR, 0.02, 0.3, random.random() * 3))
            if others.random() < 0.25:
                job.pause_after = others.choice((0.0, 0.005, 0.05, others.random() * 3))
                job.paused_for = others.choice((0.0, 0.05, 0.7, 3.0))
            elif others.random() < 0.06:
                job.terminate_after = others.choice((0.0, 0.05, others.random() * 3))
        if job.callers == 1 and others.random() < 0.3:
            job.key = None
        jobs.append(job)
    return jobs


def simulate(
    seed: int,
    profile: str = "all",
    *,
    faults: tuple[Fault, ...] | None = None,
    tracing: bool = False,
    make_store: MakeStore = MemoryStorageBackend,
    on_trace: Callable[[str], None] | None = None,
) -> Report:
    """Run a seed, and say what came of it. Same arguments, same report, byte for byte.

    Args:
        seed: Decides everything.
        profile: What goes wrong, see ``PROFILES``.
        faults: These instead of the plan's own.
        tracing: The report says everything that happened.
        make_store: Makes an empty store of the backend under test; see ``docs/how-to/simulate.md``.
        on_trace: With ``tracing``, called with each line as it comes.

    Raises:
        ValueError: No such profile, or no such seed.
        ConfigurationError: ``make_store`` makes no store that can be simulated.
        RuntimeError: An event loop is running, or another simulation.
    """
    if profile not in PROFILES:
        raise ValueError(f"no such profile: profile={profile!r}; there are {', '.join(PROFILES)}")
    if type(seed) is not int or seed < 0:
        raise ValueError(f"no such seed: seed={seed!r}; give 0 or more")
    if events._get_running_loop() is not None:
        raise RuntimeError("simulate() brings its own event loops; call it where none is running")
    plan = make_plan(seed, profile)
    if faults is not None:
        plan = Plan(seed, profile, plan.setup, faults)
    cluster = Cluster(
        plan, jobs_of(plan), make_store=make_store, tracing=tracing, on_trace=on_trace
    )
    try:
        expected = _undisturbed(plan)
        ended = cluster.run()
        judge(ended, plan.setup.last_version, expected)
    except Broken as broken:
        return _report(plan, cluster, broken)
    return _report(plan, cluster, None)


def _report(plan: Plan, cluster: Cluster, broken: Broken | None) -> Report:
    return Report(
        seed=plan.seed,
        profile=plan.profile,
        seen=cluster.seen,
        calls=cluster.calls,
        steps=cluster.clockwork.steps,
        seconds=cluster.clockwork.now,
        trace=tuple(cluster.lines),
        broken=broken,
        faults=plan.faults,
    )


def _undisturbed(plan: Plan) -> list[object] | None:
    """What the plan's programs come to when nothing goes wrong."""
    if plan.profile == "calm":
        return None
    setup = plan.setup
    key = (plan.seed // _SHARED, setup.runs, setup.size)
    found = _EXPECTED.get(key)
    if found is None:
        quiet = replace(
            setup,
            workers=("polls",),
            versions=("1",),
            last_version="1",
            heals_at=0.0,
            skews=(0.0,),
            sessions=10_000,
            concurrency=100,
            latency=0.0,
        )
        calm = Plan(plan.seed, "calm", quiet, ())
        jobs = jobs_of(calm)
        for job in jobs:
            job.at, job.via = 0.0, 0
        ended: Ended = Cluster(calm, jobs).run()
        found = _EXPECTED[key] = judge(ended, "1", None)
        if len(_EXPECTED) > 64:
            _EXPECTED.popitem(last=False)
    return found
