"""Layer L7 (group ENG): the engine on the backend, under hostile profiles.

Thirty programs run on real workers, and end as they do on an undisturbed memory store. What the
profiles stand for: ``always_suspend``, no coroutine is kept between turns; ``no_in_place``, every
step becomes an item of its own; ``cache_0``, each turn may go to another worker, which has nothing
but the history; ``lease_1s``; ``duplicate_all``, each call is made twice and each doorbell rung
twice; ``drop_30%``, calls or their answers are lost, and nobody is told of work; ``one_thread``.
"""
# ruff: noqa: N802 - the ids are part of the names

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar, cast

import pytest

from pyworkflow.errors import (
    ConfigurationError,
    IdempotencyConflict,
    StorageUnavailable,
)
from pyworkflow.runs import Run
from pyworkflow.spi import Delta, RunDelta
from pyworkflow.spi.storage import StorageBackend
from pyworkflow.testing.internals import MemoryStorageBackend
from pyworkflow_conformance._case import Case, Suite, scenario
from pyworkflow_conformance._clock import shift_clock
from pyworkflow_conformance.faults import Fault, FaultPlan, FaultyStorage

# The engine is loaded by the checks that need it: whoever proves a backend at another level does
# not import it, and no workflow is registered.
if TYPE_CHECKING:
    from pyworkflow.spi.executor import Doorbell
    from pyworkflow.testing.internals import Operations, Settings, Worker
    from pyworkflow_conformance._programs import Program

__all__ = ["EngineChecks"]

R = TypeVar("R")
#: Seconds for all programs under one profile.
PATIENCE = 120.0
#: Not ``claim``: a step whose claims are lost three times fails as one that kills its workers.
DISTURBED = ("commit", "renew", "release", "get_run", "get_events")


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """How the engine is made to run."""

    workers: int = 1
    settings: dict[str, Any]
    spread: bool = False
    faults: tuple[Fault, ...] = ()
    rate: float = 0.0
    doubled_bells: bool = False
    uncertain: bool = False
    """Claims can be lost, and with them at-most-once steps."""


DEFAULT = Profile(settings={})
PROFILES: dict[str, Profile] = {
    "default": DEFAULT,
    "always_suspend": Profile(settings={"sessions": 0}),
    "no_in_place": Profile(settings={}, spread=True),
    "cache_0": Profile(settings={"sessions": 0}, workers=3),
    "lease_1s": Profile(
        settings={"lease": timedelta(seconds=1), "renew_every": timedelta(seconds=0.2)},
        workers=2,
        uncertain=True,
    ),
    "duplicate_all": Profile(
        settings={}, faults=(Fault.DOUBLED,), rate=1.0, doubled_bells=True, workers=2
    ),
    "drop_30%": Profile(
        settings={}, faults=(Fault.BEFORE, Fault.AFTER), rate=0.3, workers=2, uncertain=True
    ),
    "one_thread": Profile(settings={"concurrency": 1, "threads": 1}),
}


class EngineChecks(Suite):
    """ENG, IDM-10."""

    @scenario
    async def test_IDM_10_different_args_reported(self, t: Case) -> None:
        """IDM-10: the same key with other arguments is told to the caller, with what differs.

        Usual cause: ``KeyTaken`` without its owner, or the owner's arguments altered.
        """
        from pyworkflow.testing.internals import Operations, RunOptions
        from pyworkflow_conformance._programs import PROGRAMS

        client = Operations(t.store, None, None)
        flow = PROGRAMS["idempotent"].workflow
        options = RunOptions(idempotency_key="order")
        run_id = await client.start(flow, ("a",), {}, options)
        assert await client.start(flow, ("a",), {}, options) == run_id
        with pytest.raises(IdempotencyConflict) as caught:
            await client.start(flow, ("b",), {}, options)
        assert (caught.value.run_id, set(caught.value.differences)) == (run_id, {"order"})
        assert (await t.store.stats())["runs"] == 1

    @scenario
    async def test_ENG_01_default(self, t: Case) -> None:
        """ENG-01 (L7): the thirty programs end on this store as they do in memory."""
        await _prove(t, "default")

    @scenario
    async def test_ENG_02_always_suspend(self, t: Case) -> None:
        """ENG-02 (L7): the same when every turn is replayed from the history that was stored."""
        await _prove(t, "always_suspend")

    @scenario
    async def test_ENG_03_no_in_place(self, t: Case) -> None:
        """ENG-03 (L7): the same when no step runs within its turn."""
        from pyworkflow.testing.internals import dispatched, session

        with pytest.MonkeyPatch.context() as patch:
            for module in (session, dispatched):
                patch.setattr(module, "FLUSH", 0.0)
            await _prove(t, "no_in_place")

    @scenario
    async def test_ENG_04_cache_0(self, t: Case) -> None:
        """ENG-04 (L7): the same when three workers share the turns and keep nothing."""
        await _prove(t, "cache_0")

    @scenario
    async def test_ENG_05_lease_1s(self, t: Case) -> None:
        """ENG-05 (L7): the same with leases that end after a second without renewal."""
        await _prove(t, "lease_1s")

    @scenario
    async def test_ENG_06_duplicate_all(self, t: Case) -> None:
        """ENG-06 (L7): the same when every call is made twice and every doorbell rings twice."""
        await _prove(t, "duplicate_all")

    @scenario
    async def test_ENG_07_drop_30(self, t: Case) -> None:
        """ENG-07 (L7): the same when of ten calls three, or their answers, are lost."""
        await _prove(t, "drop_30%")

    @scenario
    async def test_ENG_08_one_thread(self, t: Case) -> None:
        """ENG-08 (L7): the same when one step runs at a time."""
        await _prove(t, "one_thread")

    @scenario
    async def test_ENG_09_golden_histories(self, t: Case) -> None:
        """ENG-09 (L7): histories that were written elsewhere are replayed from this store.

        Those of the programs, and the files that the suite names in ``golden``: the recorded
        histories of released versions, whose workflows must be imported.
        """
        from pyworkflow.spi._delta import row_of
        from pyworkflow.testing import History, replay

        histories: list[Any] = list((await _expected()).histories.values())
        histories += [
            History.load(path) for path in cast("Sequence[Path]", getattr(self, "golden", ()))
        ]
        for n, history in enumerate(histories):
            run_id = f"{n}-{history.run.run_id}"
            row = {**row_of(replace(history.run, run_id=run_id)), "seen_seq": history.seen_seq}
            row.pop("idempotency_key", None)
            events = [event._replace(run_id=run_id) for event in history.events]
            try:
                await t.store.import_delta(Delta([RunDelta(run_id, row, events)]))
            except ConfigurationError:
                pytest.skip("does not apply: ENG-09 needs import_delta of the backend")
            found = await History.fetch(run_id, t.store)
            assert list(found.events) == events
            # The run's id is part of what its chance is drawn from.
            back = tuple(event._replace(run_id=history.run.run_id) for event in found.events)
            replay(replace(history, events=back)).check()
        # Runs in the middle owe work, which histories do not hold.
        t.store = await t.open(t.namespace + "-empty")
        t.namespace += "-empty"


@dataclass(slots=True)
class Outcome:
    """How the programs ended, and their histories."""

    ends: dict[str, object]
    histories: dict[str, Any]


_undisturbed: Outcome | None = None


async def _expected() -> Outcome:
    """How the programs end in memory; worked out once."""
    global _undisturbed
    if _undisturbed is None:
        async with MemoryStorageBackend() as store:
            _undisturbed = await _run(store, DEFAULT, [], 0)
        problems = [n for n, e in _undisturbed.ends.items() if "stalled" in repr(e)]
        assert not problems, problems
    return _undisturbed


async def _prove(t: Case, name: str) -> None:
    profile = PROFILES[name]
    expected = await _expected()
    others = [await t.open() for _ in range(profile.workers - 1)]
    found = await _run(t.store, profile, others, int(getattr(t.suite, "seed", 0)))
    for program, end in found.ends.items():
        wanted = expected.ends[program]
        if profile.uncertain and _programs()[program].uncertain:
            assert isinstance(end, list), f"{program} under {name}: {end!r}"
            assert {str(one) for one in cast("list[object]", end)} <= {"0", "1", "interrupted"}
            continue
        assert end == wanted, (
            f"{program} ended otherwise under {name}: {end!r}, in memory {wanted!r}"
        )


def _programs() -> dict[str, Program]:
    from pyworkflow_conformance._programs import PROGRAMS

    return PROGRAMS


async def _run(
    store: StorageBackend, profile: Profile, others: list[StorageBackend], seed: int
) -> Outcome:
    """Start all programs, let workers work, pass the time; how each ended."""
    from pyworkflow.testing import History, replay
    from pyworkflow.testing.internals import Operations, RunOptions

    plan = FaultPlan(seed, rate=profile.rate, kinds=profile.faults, methods=DISTURBED)
    calm = Operations(store, None, None)
    runs: dict[str, str] = {}
    async with _workers([store, *others], profile, plan) as workers:
        for name, program in _programs().items():
            options = RunOptions(idempotency_key=f"program-{name}")
            line = Operations(FaultyStorage(store, plan), None, None)
            for _ in range(2 if program.twice else 1):
                started = await _again(
                    lambda: line.start(program.workflow, program.args, {}, options)  # noqa: B023 - awaited here
                )
                assert runs.setdefault(name, started) == started, "one key, two runs"
        await _until_ended(store, calm, workers, runs)
    ends: dict[str, object] = {}
    histories: dict[str, Any] = {}
    for name, run_id in runs.items():
        try:
            ends[name] = await calm.result(run_id, 0)
        except Exception as error:  # noqa: BLE001 - how the program ends
            ends[name] = f"{type(error).__name__}: {getattr(error, 'message', '')}"
        histories[name] = history = await History.fetch(run_id, store)
        replay(history).check()
        steps = [e.op for e in history.events if e.type in ("step.completed", "step.failed")]
        assert len(steps) == len(set(steps)), f"a step of {name} is recorded twice"
    return Outcome(ends, histories)


@asynccontextmanager
async def _workers(
    stores: list[StorageBackend], profile: Profile, plan: FaultPlan
) -> AsyncGenerator[list[Worker]]:
    from pyworkflow.testing.internals import Worker

    workers: list[Worker] = []
    bells: list[asyncio.Task[None]] = []
    try:
        for store in stores:
            worker = Worker(FaultyStorage(store, plan), _settings(profile), spread=profile.spread)
            worker.clock.update(await store.now())
            worker.serve()
            workers.append(worker)
        if profile.doubled_bells:
            bells = [asyncio.ensure_future(_ring_twice(stores[0], workers))]
        yield workers
    finally:
        plan.kinds = ()
        for task in bells:
            task.cancel()
        await asyncio.gather(*bells, return_exceptions=True)
        for worker in workers:
            await worker.drain(1)
            await worker.close()


def _settings(profile: Profile) -> Settings:
    from pyworkflow.testing.internals import Settings

    return Settings(**profile.settings)


async def _ring_twice(store: StorageBackend, workers: Sequence[Worker]) -> None:
    """Ring every worker, twice, for whatever is due."""
    from pyworkflow.spi.executor import Doorbell

    while True:
        for item in await store.announce(20, timedelta(0)):
            bell = Doorbell(item.run_id, item.item_id)
            for worker in workers:
                if not worker.is_stopping:
                    worker.spawn(_handle(worker, bell))
                    worker.spawn(_handle(worker, bell))
        await asyncio.sleep(0.02)


async def _handle(worker: Worker, bell: Doorbell) -> None:
    """As ``Worker.handle``, without waiting for the end of what it began."""
    await worker.claim_due([(bell.run_id, bell.item_id)])


async def _until_ended(
    store: StorageBackend, client: Operations, workers: Sequence[Worker], runs: dict[str, str]
) -> None:
    """Time passes only when nobody has anything to do."""
    end = monotonic() + PATIENCE
    open_runs = dict(runs)
    to_cancel = {name for name, program in _programs().items() if program.cancels}
    idle = 0
    while open_runs:
        for name, run_id in list(open_runs.items()):
            run = await store.get_run(run_id)
            assert run is not None
            if run.status.is_terminal:
                del open_runs[name]
            elif run.stalled is not None:
                raise AssertionError(f"{name} stalled: {run.stalled}")
            elif name in to_cancel and run.seen_seq > 0 and run.status == "suspended":
                to_cancel.discard(name)
                await client.cancel(run_id, "why not")
        idle = 0 if any(worker.is_busy for worker in workers) else idle + 1
        if idle > 3 and open_runs and not (to_cancel & open_runs.keys()):
            due, now = await store.next_due(), await store.now()
            if due is not None and due > now:
                await shift_clock(store, due - now)
                now = await store.now()
                for worker in workers:
                    # Whoever waits for its time in real seconds is told that it has come.
                    worker.clock.update(now)
                    worker.wake()
                idle = 0
        assert monotonic() < end, f"these do not end: {await _told(store, open_runs)}"
        await asyncio.sleep(0.002)


async def _told(store: StorageBackend, runs: dict[str, str]) -> str:
    lines: list[str] = []
    for name, run_id in runs.items():
        run: Run | None = await store.get_run(run_id)
        items = await store.list_work(run_id)
        last = [event.type for event in await store.get_events(run_id)][-3:]
        lines.append(f"{name} {run and run.status} {last} {[(i.item_id, i.claims) for i in items]}")
    return "; ".join(lines)


async def _again(call: Callable[[], Awaitable[R]]) -> R:
    """Make the same call until it is answered."""
    async with asyncio.timeout(60):
        while True:
            try:
                return await call()
            except StorageUnavailable:
                await asyncio.sleep(0)
