"""Random programs on real workers over a hostile store: disturbance changes no result."""

from __future__ import annotations

import asyncio
import gc
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from time import monotonic
from typing import Any, Self, TypeVar

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from pyworkflow import step, workflow
from pyworkflow._client import Operations
from pyworkflow._config import Settings
from pyworkflow._definitions import RunOptions
from pyworkflow._engine import dispatched, session
from pyworkflow._engine.worker import Worker
from pyworkflow._memory import MemoryStorageBackend
from pyworkflow._replay.commands import EmitLog, StartSleep
from pyworkflow._replay.context import RunContext
from pyworkflow._replay.replay import Replay
from pyworkflow._serialization import decode
from pyworkflow.errors import StorageUnavailable
from pyworkflow.events import Event
from pyworkflow.runs import ItemKind, Run, RunStatus
from pyworkflow.spi.storage import (
    Answer,
    Claimed,
    ClaimRequest,
)
from pyworkflow.storekit._fsck import fsck
from tests.core.programs import examples, ok, on_body, program, programs, run_plain

pytestmark = pytest.mark.filterwarnings(
    # Code in a ``finally`` that is refused while a coroutine is closed leaves such traces.
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore:coroutine .* was never awaited:RuntimeWarning",
)

T = TypeVar("T")
#: No shrinking: which call is disturbed depends on how far each worker is by then.
PHASES = (Phase.explicit, Phase.generate)
LEASE = timedelta(seconds=60)
PATIENCE = 30.0

#: What a hostile store does at a call of its methods.
CRASHES = ("lost", "failed", "killed", "evicted", "pause")


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> Iterator[None]:
    """What stands is left out of the collector's lists, which each example goes through twice."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="module")
def _short_flush() -> Iterator[None]:
    """Steps are handed off after 2 ms instead of 100: ``slow`` takes 4."""
    before = session.FLUSH, dispatched.FLUSH
    session.FLUSH = dispatched.FLUSH = 0.002  # type: ignore[misc]
    yield
    session.FLUSH, dispatched.FLUSH = before  # type: ignore[misc]


class Disturbance:
    """Decides what goes wrong, and when. Bounded, so that every run ends."""

    def __init__(self, seed: int, kinds: tuple[str, ...], rate: float, budget: int) -> None:
        self.random = random.Random(seed)
        self.kinds = kinds
        self.rate = rate
        self.budget = budget
        self.hard = 2  # a step that loses its worker more often than three times fails
        self.done: list[str] = []
        self.act: Callable[[str], Awaitable[None]] | None = None

    async def around(self, call: Callable[[], Awaitable[T]], *, write: bool) -> T:
        """Make a call of the store, disturbed or not."""
        pick = self.random
        for _ in range(pick.choice((0, 0, 0, 1, 4))):
            await asyncio.sleep(0)
        kind = ""
        if self.kinds and self.budget > 0 and pick.random() < self.rate:
            kind = pick.choice(self.kinds)
            if kind in ("lost", "killed", "shifted"):
                if self.hard == 0:
                    kind = "pause"
                self.hard -= kind != "pause"
            self.budget -= 1
            self.done.append(kind)
        if kind == "failed":
            raise StorageUnavailable("the store did not get it")
        if kind == "pause":
            await asyncio.sleep(0.003)
        elif kind in ("killed", "evicted", "shifted", "cancelled") and self.act is not None:
            if pick.random() < 0.5:
                answer = await call()
                await self.act(kind)
                return answer
            await self.act(kind)
        answer = await call()
        if kind == "lost" and write:
            raise StorageUnavailable("the answer was lost")
        return answer


class HostileStorage(MemoryStorageBackend):
    """The memory store behind a bad line."""

    def __init__(self, disturbance: Disturbance) -> None:
        super().__init__()
        self.disturbance = disturbance

    def clone(self) -> HostileStorage:
        other = HostileStorage(self.disturbance)
        other._shared = self._shared
        return other

    def calm(self) -> MemoryStorageBackend:
        """The same data without disturbance."""
        other = MemoryStorageBackend()
        other._shared = self._shared
        return other

    async def commit(self, changes: Any) -> list[Answer]:
        return await self.disturbance.around(
            lambda: super(HostileStorage, self).commit(changes), write=True
        )

    async def claim(self, request: ClaimRequest) -> Claimed:
        return await self.disturbance.around(
            lambda: super(HostileStorage, self).claim(request), write=True
        )

    async def get_events(
        self, run_id: str, *, after: int = 0, limit: int | None = None
    ) -> list[Event]:
        return await self.disturbance.around(
            lambda: super(HostileStorage, self).get_events(run_id, after=after, limit=limit),
            write=False,
        )

    async def get_run(self, run_id: str) -> Run | None:
        return await self.disturbance.around(
            lambda: super(HostileStorage, self).get_run(run_id), write=False
        )


class Cluster:
    """Workers on clones of one store; time passes only when nobody has anything to do."""

    def __init__(self, disturbance: Disturbance, workers: int, *, spread: bool = False) -> None:
        self.storage = HostileStorage(disturbance)
        self.calm = self.storage.calm()
        self.disturbance = disturbance
        self.number = workers
        self.spread = spread
        self.workers: list[Worker] = []
        self.runs: list[str] = []
        self.deaths: set[asyncio.Task[None]] = set()
        disturbance.act = self.act

    async def __aenter__(self) -> Self:
        for _ in range(self.number):
            await self.add_worker()
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.disturbance.kinds = ()
        for worker in self.workers:
            await worker.close()
        if self.deaths:
            await asyncio.wait(self.deaths)

    async def add_worker(self) -> None:
        worker = Worker(
            self.storage.clone(), Settings(lease=LEASE, renew_every=LEASE / 3), spread=self.spread
        )
        await self.storage.calm().open()
        self.workers.append(worker)
        worker.clock.update(await self.calm.now())
        worker.serve()

    async def act(self, kind: str) -> None:
        match kind:
            case "killed":
                victim = self.workers.pop(self.disturbance.random.randrange(len(self.workers)))
                death = asyncio.ensure_future(victim.close())
                self.deaths.add(death)
                await self.add_worker()
            case "evicted":
                for worker in self.workers:
                    worker.evict()
            case "shifted":
                await self.calm.shift_clock(LEASE + timedelta(seconds=1))
            case "cancelled":
                for run_id in self.runs:
                    try:
                        await Operations(self.calm, None, None).cancel(run_id, "why not")
                    except Exception:  # noqa: BLE001 - it has ended
                        pass

    async def start(self, node: Any, traced: bool) -> str:
        worker = self.disturbance.random.choice([*self.workers, None])
        storage = self.storage if worker is None else worker.storage
        operations = Operations(storage, worker, None)
        run_id = await operations.start(program, (node, traced), {}, RunOptions())
        self.runs.append(run_id)
        return run_id

    async def ended(self, run_ids: list[str]) -> list[Run]:
        """The runs, once they have ended; lets time pass when that is all there is to wait for."""
        end = monotonic() + PATIENCE
        idle = 0
        while True:
            runs = [await self.calm.get_run(r) for r in run_ids]
            if all(r is not None and r.status.is_terminal for r in runs):
                return [r for r in runs if r is not None]
            idle = 0 if any(w.is_busy for w in self.workers) else idle + 1
            if idle > 2:
                due, now = await self.calm.next_due(), await self.calm.now()
                if due is None and "cancelled" in self.disturbance.done:
                    return []  # a program swallowed the cancellation, and waits for ever
                if due is None:
                    raise AssertionError(f"nothing is owed: {await self.describe(run_ids)}")
                if due > now:
                    await self.calm.shift_clock(due - now)
                    idle = 0
            if monotonic() > end:
                raise AssertionError(await self.describe(run_ids))
            await asyncio.sleep(0.0005)

    async def describe(self, run_ids: list[str]) -> str:
        lines = [f"runs do not end; done={self.disturbance.done}"]
        for run_id in run_ids:
            run = await self.calm.get_run(run_id)
            assert run is not None
            lines.append(f"{run_id} {run.status} seen={run.seen_seq} stalled={run.stalled}")
            lines += [f"  {e.seq} {e.type} {e.op}" for e in await self.calm.get_events(run_id)]
            lines += [
                f"  {i.item_id} due={i.due_at} claims={i.claims} lease={i.lease}"
                for i in await self.calm.list_work(run_id)
            ]
        return "\n".join(lines)


async def check_history(storage: MemoryStorageBackend, run: Run) -> None:
    """What must hold of an ended run, whatever happened to it."""
    events = await storage.get_events(run.run_id)
    if events[-1].data.get("kind") == "control":
        return  # cancelled before any code ran
    replay = Replay(program, run.run_id)
    replay.feed(events)
    problem = replay.problem
    if problem is not None:
        replay.close()
    assert problem is None, (problem, [(e.seq, e.type, e.op) for e in events])
    commands = replay.take()
    assert not [c for c in commands if isinstance(c, StartSleep)]
    lines = [c.message for c in commands if isinstance(c, EmitLog)]
    recorded = [e.data["message"] for e in events if e.type.startswith("log.")]
    assert recorded == lines, "log lines are recorded once"
    ends = Counter(e.op for e in events if e.type in ("step.completed", "step.failed"))
    assert all(n == 1 for n in ends.values())
    closing = [e for e in events if e.klass == "C" and e.type.startswith("workflow.")]
    assert len(closing) == 1
    assert run.history_length == len(events)
    replay.close()


@contextmanager
def bodies(storage: MemoryStorageBackend) -> Iterator[list[tuple[str, str, int]]]:
    """Watch step bodies begin: none after its result was recorded."""
    seen: list[tuple[str, str, int]] = []
    late: list[tuple[str, str, int]] = []

    def look(run_id: str, op: str, attempt: int) -> None:
        seen.append((run_id, op, attempt))
        events = storage._shared.store.get_events(run_id)
        if any(e.op == op and e.klass == "I" for e in events):
            late.append((run_id, op, attempt))

    on_body.append(look)
    try:
        yield seen
    finally:
        on_body.remove(look)
    assert not late, f"bodies began after their results were recorded: {late}"


@contextmanager
def no_coroutine_left() -> Iterator[None]:
    """Watch that every coroutine is closed: a collector that met one would run its code.

    It would run inside whatever workflow spins at that moment, and emit ops there.
    """
    before = {id(o) for o in gc.get_objects() if type(o) is RunContext}
    gc.disable()
    try:
        yield
        left = [o for o in gc.get_objects() if type(o) is RunContext and id(o) not in before]
        unclosed = [c.run_id for c in left if not c.closed]
    finally:
        gc.enable()
    assert not unclosed, f"never closed: {unclosed}"


def run_in_a_cluster(nodes: list[Any], disturbance: Disturbance, **options: Any) -> list[Run]:
    with no_coroutine_left():
        return asyncio.run(run_programs(nodes, disturbance, **options))


async def run_programs(
    nodes: list[Any], disturbance: Disturbance, *, workers: int, traced: bool, spread: bool = False
) -> list[Run]:
    async with Cluster(disturbance, workers, spread=spread) as cluster:
        with bodies(cluster.calm) as begun:
            disturbed, disturbance.kinds = disturbance.kinds, ()
            if disturbance.random.random() < 0.5:
                disturbance.kinds = disturbed
            ids = []
            for n in nodes:
                try:
                    ids.append(await cluster.start(n, traced))
                except StorageUnavailable:
                    pass
            disturbance.kinds = disturbed
            runs = await cluster.ended(ids)
        for run in runs:
            await check_history(cluster.calm, run)
        assert await fsck(cluster.calm) == []
        assert not [
            i for r in runs for i in await cluster.calm.list_work(r.run_id)
            if i.kind is not ItemKind.DELIVER
        ]  # fmt: skip
        if not disturbance.done:
            again = [b for b, n in Counter(begun).items() if n > 1]
            assert not again, f"run twice, with nothing wrong: {again}"
        return runs


seeds = st.integers(0, 2**32)
several = st.lists(programs(confluent=True), min_size=1, max_size=3)


def compare(nodes: list[Any], runs: list[Run]) -> None:
    for node, run in zip(nodes, runs, strict=True):
        assert run.status is RunStatus.COMPLETED, run
        assert decode(run.result_text) == run_plain(node)[0], node  # type: ignore[index]


@settings(phases=PHASES, max_examples=examples(20))
@given(several, seeds, st.integers(1, 2), st.booleans())
def test_undisturbed_runs_give_what_the_ordinary_program_gives(
    nodes: list[Any], seed: int, workers: int, spread: bool
) -> None:
    calm = Disturbance(seed, (), 0, 0)
    compare(nodes, run_in_a_cluster(nodes, calm, workers=workers, traced=False, spread=spread))


@settings(phases=PHASES, max_examples=examples(40))
@given(several, seeds, st.integers(1, 3), st.booleans())
def test_crashes_evictions_and_lost_answers_change_no_result(
    nodes: list[Any], seed: int, workers: int, spread: bool
) -> None:
    crashes = Disturbance(seed, CRASHES, 0.2, 4)
    compare(nodes, run_in_a_cluster(nodes, crashes, workers=workers, traced=False, spread=spread))


@settings(phases=PHASES, max_examples=examples(20))
@given(several, seeds)
def test_eviction_at_every_call_changes_no_result(nodes: list[Any], seed: int) -> None:
    evictions = Disturbance(seed, ("evicted",), 1.0, 10_000)
    compare(nodes, run_in_a_cluster(nodes, evictions, workers=2, traced=False))


@settings(phases=PHASES, max_examples=examples(40))
@given(several, seeds, st.integers(2, 3))
def test_leases_that_end_under_living_workers_change_no_result(
    nodes: list[Any], seed: int, workers: int
) -> None:
    zombies = Disturbance(seed, ("shifted", "shifted", "evicted", "pause", "killed"), 0.2, 5)
    compare(nodes, run_in_a_cluster(nodes, zombies, workers=workers, traced=False))


@settings(phases=PHASES, max_examples=examples(40))
@given(st.lists(programs(), min_size=1, max_size=2), seeds, st.integers(1, 3), st.booleans())
def test_races_timeouts_and_cancellation_replay_as_they_ran(
    nodes: list[Any], seed: int, workers: int, spread: bool
) -> None:
    all_kinds = Disturbance(seed, (*CRASHES, "shifted", "cancelled"), 0.2, 5)
    run_in_a_cluster(nodes, all_kinds, workers=workers, traced=True, spread=spread)


# --- what the properties found, in its smallest form ----------------------------------------------


@step(dispatch="queue", max_retries=0)
async def gated(n: int) -> int:
    await _gates.setdefault(n, asyncio.Event()).wait()
    return n


_gates: dict[int, asyncio.Event] = {}


@workflow
async def waits_for_many(n: int) -> int:
    async with asyncio.timeout(3600):
        return sum(await asyncio.gather(*[gated(i) for i in range(n)]))


@workflow
async def leaves_a_step_behind() -> str:
    left = asyncio.create_task(ok(1))
    await asyncio.sleep(0)
    assert not left.done()
    return "done"


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    end = monotonic() + PATIENCE
    while not await condition():
        assert monotonic() < end, "the condition never held"
        await asyncio.sleep(0.001)


async def _started(cluster: Cluster, workflow: Any, *args: Any) -> str:
    worker = cluster.workers[0]
    operations = Operations(worker.storage, worker, None)
    return await operations.start(workflow, args, {}, RunOptions())


def calm() -> Disturbance:
    return Disturbance(0, (), 0, 0)


def test_h20_a_step_of_a_task_left_behind_never_begins() -> None:
    async def main() -> None:
        async with Cluster(calm(), 1) as cluster:
            with bodies(cluster.calm) as begun:
                run_id = await _started(cluster, leaves_a_step_behind)
                (run,) = await cluster.ended([run_id])
                assert decode(run.result_text) == "done"
            assert begun == []

    asyncio.run(main())


def test_turns_that_only_deliver_inputs_are_no_sign_of_poison() -> None:
    async def main() -> None:
        _gates.clear()
        async with Cluster(calm(), 1) as cluster:
            run_id = await _started(cluster, waits_for_many, 14)

            async def all_begun() -> bool:
                return len(_gates) == 14

            await until(all_begun)
            for n, gate in sorted(_gates.items()):
                gate.set()

                async def delivered(n: int = n) -> bool:
                    run = await cluster.calm.get_run(run_id)
                    events = await cluster.calm.get_events(run_id)
                    inputs = [e.seq for e in events if e.klass == "I"]
                    return len(inputs) == n + 2 and run is not None and run.seen_seq == inputs[-1]

                if n < 13:
                    await until(delivered)
            (run,) = await cluster.ended([run_id])
            assert decode(run.result_text) == sum(range(14))
            types = {e.type for e in await cluster.calm.get_events(run_id)}
            assert "workflow.stalled" not in types

    asyncio.run(main())


def test_a_start_whose_answer_was_lost_is_driven_at_once() -> None:
    async def main() -> None:
        once = Disturbance(1, (), 1.0, 1)
        async with Cluster(once, 1) as cluster:
            worker = cluster.workers[0]
            for _ in range(50):
                await asyncio.sleep(0)  # the worker has looked for work, and waits for news
            once.kinds = ("lost",)
            operations = Operations(worker.storage, worker, None)
            run_id = await operations.start(program, (["step", "ok", 1], False), {}, RunOptions())
            before = cluster.calm._shared.offset
            await cluster.ended([run_id])
            assert once.done == ["lost"]
            assert cluster.calm._shared.offset - before < LEASE / 2, "it waited for a lease to end"

    asyncio.run(main())


def test_a_coroutine_that_another_one_replaces_is_closed() -> None:
    async def main() -> None:
        async with Cluster(calm(), 1) as cluster:
            worker = cluster.workers[0]
            started = Event(
                "workflow.started",
                "I",
                {
                    "workflow": program.name,
                    "version": "1",
                    "args": program.encode_call((["sleep", 1_000_000], False), {}),
                    "seed": "ab" * 16,
                    "profile": 1,
                },
                run_id="run_twice",
                seq=1,
            )
            first, second = (session.LiveRun(program, "run_twice") for _ in range(2))
            for live in (first, second):
                live.replay.feed([started])
                worker.kept.keep(live)
            await worker.close()
            assert [live.replay.is_closed for live in (first, second)] == [True, True]

    asyncio.run(main())
