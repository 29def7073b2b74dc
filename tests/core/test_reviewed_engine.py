"""Workers under stress: threads that do not end, pauses, renewals, limits of a store, its bugs."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from pyworkflow import Client, sleep, step, step_context, workflow
from pyworkflow._engine import keeper as keeper_module
from pyworkflow._engine import leases as leases_module
from pyworkflow._engine import worker as worker_module
from pyworkflow._engine.interrupts import obeyed
from pyworkflow._engine.owner import is_gone, owner_of
from pyworkflow._engine.worker import Worker
from pyworkflow._replay import replay
from pyworkflow.errors import PayloadTooLarge, StepError, StepTimeout
from pyworkflow.events import EventType
from pyworkflow.runs import RunStatus
from pyworkflow.spi import Change, ClaimRequest
from pyworkflow.spi.storage import Claimed, ClaimRef, Committed, Control, ControlKind
from pyworkflow.storage.file import FileStorageBackend
from pyworkflow.storage.memory import MemoryStorageBackend
from tests.core._driving import bench, eventually

# --- the slots of sync steps --------------------------------------------------------------------


@pytest.mark.parametrize("ends", ["given up", "timed out"])
def test_the_slot_of_a_sync_step_is_free_when_its_thread_has_ended(ends: str) -> None:
    free = threading.Event()
    order: list[str] = []

    @step(max_retries=0, timeout="50ms" if ends == "timed out" else None)
    def re_long() -> None:
        free.wait(20)
        order.append("long has ended")

    @step(max_retries=0, timeout="90ms")
    def re_quick() -> str:
        order.append("quick")
        return "quick"

    @workflow
    async def re_one_slot() -> str:
        try:
            async with asyncio.timeout(0.05):
                await re_long()
        except (TimeoutError, StepTimeout):
            pass
        return await re_quick()

    async def main() -> None:
        async with bench(threads=1) as b:
            run_id = await b.start(re_one_slot)

            async def quick_waits() -> bool:
                # Longer than its timeout, if that were counted while it waits for the slot.
                return any(
                    e.data["name"] == "re_quick" for e in await b.events(run_id, "step.scheduled")
                )

            await eventually(quick_waits)
            assert order == []
            free.set()
            assert await b.result(run_id) == "quick"
        assert order == ["long has ended", "quick"]

    asyncio.run(main())


# --- coroutines -----------------------------------------------------------------------------------


def test_stalled_tries_evictions_and_closes_leave_no_coroutine_behind(tmp_path: Path) -> None:
    file = tmp_path / "file"

    @workflow
    async def re_stalls() -> None:
        file.touch()

    @workflow
    async def re_naps(n: int) -> int:
        try:
            await sleep("1h")
        finally:
            str(n)
        return n

    @workflow
    async def re_stays() -> None:
        await sleep("10d")

    before = set(replay._alive)

    async def main() -> None:
        async with bench(sessions=2) as b:
            assert b.worker is not None
            stalls = [await b.start(re_stalls) for _ in range(5)]
            naps = [await b.start(re_naps, n) for n in range(8)]
            stays = await b.start(re_stays)
            for run_id in [*naps, stays]:
                await b.asleep(run_id)
            tries: Counter[str] = Counter()
            for _ in range(3):
                for run_id in stalls:
                    await b.until(run_id, "stalled")

                async def settled() -> bool:
                    for run_id in stalls:
                        turn = (await b.items(run_id))["turn"]
                        if turn.lease is not None or turn.claims <= tries[run_id]:
                            return False
                    return True

                await eventually(settled)
                for run_id in stalls:
                    tries[run_id] = (await b.items(run_id))["turn"].claims
                await b.pass_time("11s")
            b.worker.evictor.flush()
            # What is kept is what the settings say; what stalled and what was evicted is gone.
            assert len(replay._alive - before) <= 2 + len(b.worker._turns)
            await b.pass_time("2h")
            assert [await b.result(r) for r in naps] == list(range(8))
        assert replay._alive - before == set()
        assert not file.exists()

    asyncio.run(main())


# --- the end of a worker --------------------------------------------------------------------------


def test_drain_leaves_the_claim_of_a_step_alone_whose_thread_still_runs() -> None:
    free = threading.Event()
    beside = threading.Lock()
    tries: list[bool] = []

    @step
    def re_threaded() -> str:
        tries.append(beside.acquire(blocking=False))
        free.wait(20)
        beside.release()
        return "done"

    @step
    async def re_awaits() -> str:
        if not free.is_set():
            await asyncio.Event().wait()
        return "done"

    @workflow
    async def re_in_a_thread() -> str:
        return await re_threaded()

    @workflow
    async def re_in_the_loop() -> str:
        return await re_awaits()

    async def main() -> None:
        async with bench() as b:
            in_thread, in_loop = await b.start(re_in_a_thread), await b.start(re_in_the_loop)
            for run_id in (in_thread, in_loop):
                await b.has(run_id, "step.scheduled")
            assert b.worker is not None
            runner = b.worker.runner
            await b.rest()
            assert all(i.lease is None for i in (await b.items(in_loop)).values())
            assert (await b.items(in_thread))["step:1#1:step"].lease is not None
            second = await b.work()
            assert await second.claim_due([(in_thread, "step:1#1:step")]) == []
            assert tries == [True]
            free.set()
            await eventually(lambda: not runner.in_threads(in_thread))
            assert await b.result(in_loop) == "done"
            await b.pass_time("31s")
            assert await b.result(in_thread) == "done"
        assert tries == [True, True]

    asyncio.run(main())


PROGRAM = """
import sys, time
from pyworkflow import configure, start, step, workflow
from pyworkflow._config import settings
from pyworkflow.worker import create_runtime, serve_here

@step(name="re_hold")
def hold():
    print("begun", flush=True)
    time.sleep(600)

@workflow(name="re_holds")
async def holds():
    return await hold()

if __name__ == "__main__":
    configure(storage="file:" + sys.argv[2], drain="0.1s")
    if sys.argv[1] == "script":
        start(holds)
    else:
        serve_here(create_runtime())
"""


@pytest.mark.parametrize("kind", ["script", "worker"])
def test_a_process_ends_while_a_sync_step_runs_and_another_goes_on_at_once(
    kind: str, tmp_path: Path
) -> None:
    program = tmp_path / "re_program.py"
    program.write_text(PROGRAM)

    @step(name="re_hold")
    def hold() -> str:
        return "held"

    @workflow(name="re_holds")
    async def holds() -> str:
        return await hold()

    async def main() -> None:
        storage = FileStorageBackend(tmp_path / "store")
        async with bench(storage, work=False) as b:
            run_id = "" if kind == "script" else await b.start(holds)
            process = subprocess.Popen(  # noqa: ASYNC220 - begun, not waited for
                [sys.executable, str(program), kind, str(tmp_path / "store")],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            try:
                assert process.stdout is not None
                line = await asyncio.to_thread(process.stdout.readline)
                assert line == "begun\n", process.communicate()[1]
                if kind == "script":
                    (run,) = (await b.ops.list_runs(None, None, 10, None)).items
                    run_id = run.run_id
                await b.has(run_id, "step.scheduled")
                process.send_signal(signal.SIGINT if kind == "script" else signal.SIGTERM)
                out, err = await asyncio.to_thread(process.communicate, timeout=20)
            finally:
                process.kill()
                process.communicate()
            assert out == ""
            assert "Traceback" not in err, err
            assert process.returncode == 0
            # Nobody waits for a lease: the process is gone, and what it held is free.
            await b.work()
            assert await b.result(run_id, timeout=60) == "held"
        await storage.close()

    asyncio.run(main())


def test_a_process_is_gone_when_it_has_ended_and_not_before() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    owner = f"{owner_of(process.pid)}/1"
    assert not is_gone(owner)
    assert not is_gone(f"{owner_of(os.getpid())}/1")
    assert process.stdin is not None
    process.stdin.close()
    end = time.monotonic() + 15
    while not is_gone(owner):  # not waited for: it has ended all the same
        assert time.monotonic() < end
        time.sleep(0.005)
    process.wait()
    assert is_gone(owner)
    assert is_gone(owner.replace(f"/{process.pid}/", f"/{os.getpid()}/"))


class AnswersLate(MemoryStorageBackend):
    """Keeps one answer back that gives the asker a claim: of a hand-off, a result or a claim."""

    def __init__(self, which: str) -> None:
        super().__init__()
        self.which = which
        self.kept, self.go = asyncio.Event(), asyncio.Event()

    async def _keep(self, which: str) -> None:
        if which == self.which and not self.kept.is_set():
            self.kept.set()
            await self.go.wait()

    async def commit(self, changes: Any) -> Any:
        answers = await super().commit(changes)
        for change, answer in zip(changes, answers, strict=True):
            claimed = isinstance(answer, Committed) and bool(answer.claims)
            if claimed and change.claim is not None:
                await self._keep("hand-off" if change.put else "result")
        return answers

    async def claim(self, request: ClaimRequest) -> Any:
        claimed = await super().claim(request)
        if claimed.claims:
            await self._keep("claim")
        return claimed


@pytest.mark.parametrize("which", ["hand-off", "result", "claim"])
def test_a_drained_worker_leaves_no_claim_behind_that_an_answer_gave_it(which: str) -> None:
    @step(dispatch="queue")
    async def re_item() -> int:
        return 1

    handed_off: list[asyncio.Event] = []

    @step
    async def re_slow() -> int:
        if which == "hand-off":
            await handed_off[0].wait()  # however long the machine takes
        return 1

    @workflow
    async def re_answered() -> int:
        return await re_item() + await re_slow()

    async def main() -> None:
        storage = AnswersLate(which)
        handed_off.append(storage.kept)
        async with bench(storage) as b:
            worker = b.worker
            assert worker is not None
            run_id = await b.start(re_answered)
            await asyncio.wait_for(storage.kept.wait(), 60)
            assert any(i.lease is not None for i in (await b.items(run_id)).values())
            draining = asyncio.create_task(worker.drain(0))
            await eventually(lambda: worker.is_stopping)
            if which == "hand-off":
                # The session that asked has been cut off before the answer comes.
                await eventually(lambda: not worker.is_busy)
            storage.go.set()
            await draining
            await worker.close()
            b.worker = None
            assert await storage.holders() == []
            await b.work()
            assert await b.result(run_id) == 2

    asyncio.run(main())


# --- pauses, renewals -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["async", "sync"])
def test_after_a_pause_longer_than_the_lease_a_worker_keeps_its_own_running_work(
    kind: str,
) -> None:
    async def main() -> None:
        gate, free = asyncio.Event(), threading.Event()
        begun: list[str] = []

        @step(max_retries=0)
        async def re_async() -> str:
            begun.append("async")
            await gate.wait()
            return "done"

        @step(max_retries=0)
        def re_sync() -> str:
            begun.append("sync")
            free.wait(20)
            return "done"

        @workflow
        async def re_paused() -> str:
            return await (re_async() if kind == "async" else re_sync())

        async with bench() as b:
            worker = b.worker
            assert worker is not None
            run_id = await b.start(re_paused)
            await b.has(run_id, "step.scheduled")
            for _ in range(3):
                held = worker.leases.held()
                assert len(held) == 1
                # As if the process had stood still: to its claims, and by its own clock.
                worker.leases.asked_at -= 31
                await b.pass_time("31s")
                assert await worker.claim_due() == []
                assert worker.leases.held() == held
            gate.set()
            free.set()
            assert await b.result(run_id) == "done"
            assert begun == [kind]
            (item,) = [e for e in await b.events(run_id) if e.type == "step.completed"]
            assert item.data["attempt"] == 1

    asyncio.run(main())


@pytest.mark.parametrize("during", ["claim", "renew"])
def test_a_worker_that_stands_still_while_it_asks_does_not_claim_its_own_work(
    monkeypatch: pytest.MonkeyPatch, during: str
) -> None:
    ahead = 0.0
    for module in (worker_module, leases_module, keeper_module):
        monkeypatch.setattr(module, "monotonic", lambda: time.monotonic() + ahead)

    class StandsStill(MemoryStorageBackend):
        at = ""

        async def stand_still(self) -> None:
            nonlocal ahead
            self.at = ""
            ahead += 31
            await self.shift_clock(timedelta(seconds=31))

        async def claim(self, request: ClaimRequest) -> Claimed:
            answer = await super().claim(request)
            if self.at == "claim":
                await self.stand_still()
            return answer

        async def renew(self, refs: Sequence[ClaimRef], lease: timedelta) -> list[bool]:
            answer = await super().renew(refs, lease)
            if self.at == "renew":
                await self.stand_still()
            return answer

    async def main() -> None:
        begun: list[None] = []
        gate = asyncio.Event()

        @step
        async def re_waits_here() -> str:
            begun.append(None)
            await gate.wait()
            return "done"

        @workflow
        async def re_stands_still() -> str:
            return await re_waits_here()

        storage = StandsStill()
        async with bench(storage) as b:
            worker = b.worker
            assert worker is not None
            run_id = await b.start(re_stands_still)
            await eventually(lambda: worker._steps.adopted(run_id))
            if during == "renew":
                worker.leases.asked_at -= 31
            storage.at = during
            for _ in range(3):
                assert await worker.claim_due() == []
            assert not storage.at
            gate.set()
            assert await b.result(run_id) == "done"
            assert len(begun) == 1

    asyncio.run(main())


def test_after_a_pause_work_that_another_worker_took_is_given_up() -> None:
    async def main() -> None:
        calls: list[str] = []

        @step
        async def re_taken() -> str:
            calls.append("begun")
            try:
                if len(calls) == 1:
                    await asyncio.Event().wait()
            finally:
                calls.append("ended")
            return "by the other"

        @workflow
        async def re_is_taken() -> str:
            return await re_taken()

        async with bench() as b:
            worker = b.worker
            assert worker is not None
            run_id = await b.start(re_is_taken)
            await b.has(run_id, "step.scheduled")
            other = Worker(b.storage, b.settings)
            await b.pass_time("31s")
            assert len(await other.claim_due()) == 1
            worker.leases.asked_at -= 31
            await worker.claim_due()
            assert await b.result(run_id) == "by the other"
            await eventually(lambda: calls.count("ended") == 2)
            assert calls.count("begun") == 2
            await other.settle_down()
            await other.close()

    asyncio.run(main())


class RenewsAtCommits(MemoryStorageBackend):
    """A renewal asks for a step's claim when its result is written and not yet answered."""

    worker: Worker | None = None
    met = 0

    async def commit(self, changes: Any) -> Any:
        answers = await super().commit(changes)
        keeper = self.worker.leases if self.worker is not None else None
        for change in changes:
            ref = change.claim
            if keeper is None or ref is None or not ref.item_id.startswith("step:"):
                continue
            if change.settle is None or change.settle.keep:
                continue
            if not (await self.renew([ref], timedelta(seconds=60)))[0]:
                self.met += 1
                keeper.discard(ref)
                asyncio.get_running_loop().call_soon_threadsafe(keeper._on_lost, ref)
        await asyncio.sleep(0)
        return answers


def test_a_renewal_that_meets_the_commit_of_a_result_cancels_nothing() -> None:
    @step(dispatch="queue")
    async def re_queued(n: int) -> int:
        return n

    @step
    async def re_handed_off(n: int) -> int:
        worker, this = storage.worker, step_context()
        assert worker is not None
        await eventually(lambda: worker.task_of((this.run_id, f"step:{this.step_id}")))
        return n

    @workflow
    async def re_meets() -> list[int]:
        first = [await re_queued(n) for n in range(3)]
        return first + list(await asyncio.gather(*(re_handed_off(n) for n in range(3))))

    storage = RenewsAtCommits()

    async def main() -> None:
        async with bench(storage) as b:
            storage.worker = b.worker
            # Without a word from the clock: nothing waits for a lease to end.
            assert await b.run(re_meets) == [0, 1, 2, 0, 1, 2]
            assert storage.met == 6
            storage.worker = None

    asyncio.run(main())


# --- limits of a store ----------------------------------------------------------------------------


class Narrow(MemoryStorageBackend):
    """Takes 50 events in one change; tells when a timer fires, or steps get items once more."""

    def __init__(self) -> None:
        super().__init__()
        self.fired, self.scheduled = asyncio.Event(), asyncio.Event()
        self.hand_offs = 0

    def info(self) -> Any:
        return replace(super().info(), max_events_per_commit=50)

    def _check(self, change: Change) -> None:
        if any(e.type == EventType.TIMER_FIRED for e in change.events):
            self.fired.set()
        if any(e.type == EventType.STEP_SCHEDULED for e in change.events):
            self.hand_offs += 1
            if self.hand_offs > 1:
                self.scheduled.set()
        if len(change.events) > 50:
            raise PayloadTooLarge("the number of events in one change", len(change.events), 50)
        super()._check(change)


def test_a_gather_of_12000_short_steps_fits_into_changes() -> None:
    calls: Counter[int] = Counter()

    @step
    async def re_fast(n: int) -> int:
        calls[n] += 1
        return n

    @workflow
    async def re_wide() -> int:
        return sum(await asyncio.gather(*(re_fast(n) for n in range(12_000))))

    async def main() -> None:
        async with bench() as b:
            assert await b.run(re_wide) == 71_994_000
        assert set(calls.values()) == {1}

    asyncio.run(main())


def test_everything_at_once_fits_into_the_changes_of_a_narrow_store() -> None:
    calls: Counter[int] = Counter()

    @step
    async def re_short(n: int) -> int:
        calls[n] += 1
        return n

    @step
    async def re_longer(n: int) -> int:
        calls[n] += 1
        await asyncio.sleep(0.12)
        return n

    @step(dispatch="queue")
    async def re_by_item(n: int) -> int:
        calls[n] += 1
        return n

    @step(retry_delay=0, max_retries=1)
    async def re_twice(n: int) -> int:
        calls[n] += 1
        if calls[n] == 1:
            raise ConnectionError
        return n

    @workflow
    async def re_crowd(kind: str) -> int:
        async def nap(n: int) -> int:
            await asyncio.sleep(0.05)
            await sleep(0.05)
            return n

        one = {"short": re_short, "longer": re_longer, "item": re_by_item, "twice": re_twice}
        if kind != "mixed":
            body: Any = nap if kind == "nap" else one[kind]
            return sum(await asyncio.gather(*(body(n) for n in range(120))))
        bodies: list[Any] = [nap, re_short, re_longer, re_by_item]
        return sum(await asyncio.gather(*(bodies[n % 4](n) for n in range(240))))

    async def main() -> None:
        storage = Narrow()
        async with bench(storage, concurrency=300) as b:
            for kind in ("short", "longer", "item", "twice", "nap"):
                calls.clear()
                assert await b.run(re_crowd, kind) == 7_140, kind
                assert set(calls.values()) <= {2 if kind == "twice" else 1}, kind
            calls.clear()
            assert await b.run(re_crowd, "mixed") == 28_680
            assert set(calls.values()) == {1}

    asyncio.run(main())


def test_timers_that_fire_while_steps_end_fit_into_the_changes_of_a_narrow_store() -> None:
    async def main() -> None:
        storage = Narrow()

        @step
        async def re_at_the_same_time() -> int:
            await storage.fired.wait()
            return 1

        @workflow
        async def re_timers_and_steps() -> int:
            async def nap() -> int:
                await asyncio.sleep(0.03)
                await sleep(0.01)
                return 1

            bodies = [*(nap() for _ in range(100)), *(re_at_the_same_time() for _ in range(40))]
            return sum(await asyncio.gather(*bodies))

        async with bench(storage) as b:
            assert await b.run(re_timers_and_steps) == 140

    asyncio.run(main())


@pytest.mark.parametrize("how", ["crash", "pause"])
def test_what_a_crash_or_a_pause_leaves_fits_into_the_changes_of_a_narrow_store(how: str) -> None:
    async def main() -> None:
        gate = asyncio.Event()
        calls: Counter[int] = Counter()

        @step
        async def re_waits(n: int) -> int:
            calls[n] += 1
            await gate.wait()
            return n

        @workflow
        async def re_wide_crash() -> int:
            return sum(await asyncio.gather(*(re_waits(n) for n in range(60))))

        async with bench(Narrow()) as b:
            run_id = await b.start(re_wide_crash)
            await eventually(lambda: len(calls) == 60)
            if how == "crash":
                # Before any is handed off: the next claim of the turn is careful with all of them.
                await b.crash()
                await b.pass_time("31s")
                await b.work()
                await eventually(lambda: sum(calls.values()) >= 61)
            else:
                control = Control(ControlKind.PAUSE)
                await b.storage.commit_one(Change(run_id=run_id, key="p", control=control))
            gate.set()
            if how == "pause":

                async def given_back() -> bool:
                    return all(i.lease is None for i in (await b.items(run_id)).values())

                await eventually(given_back)
                control = Control(ControlKind.UNPAUSE)
                await b.storage.commit_one(Change(run_id=run_id, key="u", control=control))
            assert await b.result(run_id) == 1_770
            assert (await b.get(run_id)).status == RunStatus.COMPLETED

    asyncio.run(main())


def test_steps_that_end_while_their_run_is_being_paused_are_recorded_once() -> None:
    async def main() -> None:
        storage = Narrow()
        calls: Counter[int] = Counter()

        @step
        async def re_ends_meanwhile(n: int) -> int:
            calls[n] += 1
            await storage.scheduled.wait()
            return n

        @workflow
        async def re_pausing() -> int:
            return sum(await asyncio.gather(*(re_ends_meanwhile(n) for n in range(60))))

        async with bench(storage) as b:
            run_id = await b.start(re_pausing)
            await eventually(lambda: len(calls) == 60)
            pause = Control(ControlKind.PAUSE)
            await storage.commit_one(Change(run_id=run_id, key="p", control=pause))

            async def recorded() -> bool:
                ended = len(await b.events(run_id, "step.completed"))
                items = (await b.items(run_id)).values()
                return ended == 60 and all(i.lease is None for i in items)

            await eventually(recorded)
            order: dict[str, list[str]] = {}
            for event in await b.events(run_id):
                if event.op is not None and event.klass != "O":
                    order.setdefault(event.op, []).append(str(event.type))
            assert {tuple(types) for types in order.values()} <= {
                ("step.completed",),
                ("step.scheduled", "step.completed"),
            }
            unpause = Control(ControlKind.UNPAUSE)
            await storage.commit_one(Change(run_id=run_id, key="u", control=unpause))
            assert await b.result(run_id) == 1_770
        assert set(calls.values()) == {1}

    asyncio.run(main())


# --- clients and claims ---------------------------------------------------------------------------


class Counting(MemoryStorageBackend):
    """Notes who claims, and how often; takes a moment to open, as most stores do."""

    def __init__(self) -> None:
        super().__init__()
        self.claims: Counter[str] = Counter()
        self.opened = False

    async def open(self) -> None:
        if not self.opened:
            await asyncio.sleep(0.001)
        await super().open()
        self.opened = True

    async def claim(self, request: ClaimRequest) -> Any:
        self.claims[request.owner] += 1
        return await super().claim(request)


def test_concurrent_first_calls_of_a_client_share_one_worker() -> None:
    @workflow
    async def re_called(n: int) -> int:
        return n

    async def main() -> None:
        storage = Counting()
        client = Client(storage=storage)
        ids = await asyncio.gather(*(client.start(re_called, n) for n in range(5)))
        assert [await client.result(i, timeout=60) for i in ids] == [0, 1, 2, 3, 4]
        await client.close()
        assert len(storage.claims) == 1
        assert asyncio.all_tasks() == {asyncio.current_task()}
        # A closed client opens again when it is used again.
        assert await client.run(re_called, 5, timeout=60) == 5
        await client.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_a_worker_without_a_free_slot_does_not_ask_again_and_again() -> None:
    async def main() -> None:
        gate = asyncio.Event()
        done: list[int] = []

        @step(dispatch="queue")
        async def re_slot(n: int) -> int:
            await gate.wait()
            done.append(n)
            return n

        @workflow
        async def re_full() -> int:
            return sum(await asyncio.gather(*(re_slot(n) for n in range(6))))

        storage = Counting()
        async with bench(storage, concurrency=1, threads=1) as b:
            worker = b.worker
            assert worker is not None
            run_id = await b.start(re_full)
            await eventually(lambda: worker._steps.room() == 0)
            since, began = storage.claims[worker.owner], time.monotonic()
            # One more may be on its way, and one is owed to the news that came with the steps.
            await eventually(lambda: storage.claims[worker.owner] >= since + 5)
            assert time.monotonic() - began > 0.3
            gate.set()
            began = time.monotonic()
            assert await b.result(run_id) == 15
            assert sorted(done) == [0, 1, 2, 3, 4, 5]

    asyncio.run(main())


# --- faults of a backend --------------------------------------------------------------------------


class Faulty(MemoryStorageBackend):
    """Raises what no backend should, once for each of some calls."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: set[str] = set()
        self.renewed = 0

    def clone(self) -> MemoryStorageBackend:
        self._fail("clone")
        return self

    async def close(self) -> None:
        """The clone of the lease keeper is this object: it stays open."""

    def _fail(self, what: str) -> None:
        if what in self.faults:
            self.faults.remove(what)
            raise ConnectionResetError(what)

    async def claim(self, request: ClaimRequest) -> Any:
        self._fail("claim")
        return await super().claim(request)

    async def next_due(self, **which: Any) -> Any:
        self._fail("next_due")
        return await super().next_due(**which)

    async def watch(self, *args: Any, **kwargs: Any) -> Any:
        self._fail("watch")
        return await super().watch(*args, **kwargs)

    async def renew(self, refs: Any, lease: timedelta) -> list[bool]:
        self._fail("renew")
        if "renew: no answer" in self.faults:
            self.faults.remove("renew: no answer")
            return []
        self.renewed += 1
        return await super().renew(refs, lease)


@pytest.mark.parametrize("call", ["claim", "next_due", "watch"])
def test_an_unexpected_exception_of_a_claim_does_not_end_the_worker(call: str) -> None:
    @workflow
    async def re_after_it() -> str:
        await sleep(0.02)
        return "went on"

    async def main() -> None:
        storage = Faulty()
        async with bench(storage) as b:
            worker = b.worker
            assert worker is not None
            storage.faults.add(call)
            worker.wake()
            await eventually(lambda: not storage.faults)
            assert await b.run(re_after_it) == "went on"
            assert worker._server is not None
            assert not worker._server.done()

    asyncio.run(main())


@pytest.mark.parametrize("call", ["renew", "clone", "renew: no answer"])
def test_an_unexpected_exception_of_a_renewal_does_not_end_renewal(call: str) -> None:
    async def main() -> None:
        gate = asyncio.Event()
        begun: list[int] = []

        @step
        async def re_renewed() -> str:
            begun.append(1)
            await gate.wait()
            return "kept"

        @workflow
        async def re_needs_it() -> str:
            return await re_renewed()

        storage = Faulty()
        async with bench(storage, lease=1.5) as b:
            storage.faults.add(call)
            run_id = await b.start(re_needs_it)
            await eventually(lambda: not storage.faults and storage.renewed >= 2)
            gate.set()
            assert await b.result(run_id) == "kept"
            assert begun == [1]

    asyncio.run(main())


# --- what steps may raise -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, GeneratorExit, SystemExit, StopIteration])
def test_whatever_a_step_raises_fails_the_step_and_nothing_else(
    kind: str, error: type[BaseException]
) -> None:
    calls: list[str] = []

    @step(max_retries=1, retry_delay=0)
    def re_sync_raises() -> None:
        calls.append("sync")
        raise error("by a library")

    @step(max_retries=1, retry_delay=0)
    async def re_async_raises() -> None:
        calls.append("async")
        raise error("by a library")

    @workflow
    async def re_hit() -> str:
        try:
            await (re_sync_raises() if kind == "sync" else re_async_raises())
        except Exception as exc:  # noqa: BLE001 - whatever comes is told
            return f"{type(exc).__name__}: {exc}"
        return "nothing"

    async def main() -> None:
        async with bench() as b:
            found = await b.run(re_hit)
            assert error.__name__ in found, found
            assert calls == [kind, kind]

    off_the_main_thread(main)


@pytest.mark.parametrize("where", ["workflow", "task"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_would_end_a_process_fails_the_run_that_raises_it(
    where: str, error: type[BaseException]
) -> None:
    async def raises() -> None:
        raise error("by a library")

    @workflow
    async def re_raises() -> None:
        if where == "workflow":
            raise error("by a library")
        await asyncio.create_task(raises())

    async def main() -> None:
        async with bench() as b:
            with pytest.raises(StepError) as failed:
                await b.run(re_raises)
            assert failed.value.type == f"builtins:{error.__name__}"
            assert failed.value.message == "by a library"

    off_the_main_thread(main)
    with obeyed(lambda: None):  # as `pyworkflow worker` does: no signal raises anything
        asyncio.run(main())


def off_the_main_thread(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """As the embedded worker does: a Ctrl-C is for the main thread, and not for this one."""
    failed: list[BaseException] = []

    def body() -> None:
        try:
            asyncio.run(main())
        except BaseException as exc:  # noqa: BLE001 - handed to the test
            failed.append(exc)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    if failed:
        raise AssertionError(repr(failed[0])) from failed[0]
