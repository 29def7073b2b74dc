"""What the end of a run does to steps that are still pending or running."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from pyworkflow import NonDeterminism, sleep, step, step_context, workflow
from pyworkflow._engine.worker import Worker
from pyworkflow._replay.transitions import AFTER_END, TABLE, OpKind, OpState
from pyworkflow.spi import Answer, Change, Control, ControlKind, Event, RunStatus
from pyworkflow.storage.memory import MemoryStorageBackend
from pyworkflow.testing import History, replay
from tests.core._driving import Bench, bench, eventually

seen: Counter[str] = Counter()


@step
async def ends_quick() -> str:
    return "first"


@step(queue="elsewhere")
async def ends_never_claimed() -> None:
    seen["elsewhere"] += 1


@step(max_retries=0)
async def ends_fails() -> None:
    raise LookupError("no")


async def _accepts_its_history(b: Bench, run_id: str) -> list[Event]:
    """The history, which replays, with each ``step.cancelled`` in the commit of the end."""
    history = await History.fetch(run_id, b.storage)
    result = replay(history)
    result.check()
    assert result.status == history.run.status
    return list(history.events)


def _by_end(events: Sequence[Event]) -> list[str]:
    return [str(e.data["name"]) for e in events if e.data.get("by") == "end"]


def test_r04_the_loser_of_a_race_ends_with_the_run() -> None:
    cancelled = threading.Event()
    began = asyncio.Event()

    @step
    async def ends_winner() -> str:
        await began.wait()
        return "first"

    @step
    async def ends_loser() -> None:
        began.set()
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    @workflow
    async def ends_race() -> str:
        tasks = [asyncio.ensure_future(ends_winner()), asyncio.ensure_future(ends_loser())]
        done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        return str(next(iter(done)).result())

    async def main() -> None:
        async with bench() as b:
            run_id = await b.start(ends_race)
            assert await b.result(run_id) == "first"
            await eventually(cancelled.is_set, "the body of the loser is cancelled")
            events = await _accepts_its_history(b, run_id)
            assert _by_end(events) == ["ends_loser"]
            closing = events[-1]
            assert closing.type == "workflow.completed"
            (end,) = [e for e in events if e.type == "step.cancelled"]
            assert end.seq == closing.seq - 1
            assert end.timestamp == closing.timestamp
            assert await b.items(run_id) == {}

    asyncio.run(main())


def test_r04_a_thread_reads_that_its_step_is_cancelled() -> None:
    began, ended = threading.Event(), threading.Event()

    @step
    def ends_in_a_thread() -> None:
        context = step_context()
        assert not context.is_cancelled
        began.set()
        limit = threading.Event()
        for _ in range(6000):
            if context.is_cancelled:
                ended.set()
                return
            limit.wait(0.01)

    @step(max_retries=0)
    async def ends_fails_later() -> None:
        await eventually(began.is_set)
        raise LookupError("no")

    @workflow
    async def ends_gather() -> None:
        await asyncio.gather(ends_in_a_thread(), ends_fails_later(), ends_never_claimed())

    async def main() -> None:
        async with bench(work=False) as b:
            b.worker = Worker(b.storage, b.settings, queues=["default"])
            await b.worker.open()
            b.worker.serve()
            run_id = await b.start(ends_gather)
            with pytest.raises(LookupError):
                await b.result(run_id)
            await eventually(ended.is_set, "the thread reads the flag")
            events = await _accepts_its_history(b, run_id)
            assert sorted(_by_end(events)) == ["ends_in_a_thread", "ends_never_claimed"]
            assert await b.items(run_id) == {}
            assert seen["elsewhere"] == 0

    asyncio.run(main())


def test_r04_a_timed_out_thread_reads_that_it_is_cancelled() -> None:
    ended = threading.Event()

    @step(timeout=0.05, max_retries=0)
    def ends_too_late() -> None:
        limit = threading.Event()
        for _ in range(6000):
            if step_context().is_cancelled:
                ended.set()
                return
            limit.wait(0.01)

    @workflow
    async def ends_by_timeout() -> None:
        await ends_too_late()

    async def main() -> None:
        async with bench() as b:
            with pytest.raises(TimeoutError):
                await b.run(ends_by_timeout)
            await eventually(ended.is_set)

    asyncio.run(main())


def test_r04_a_step_that_another_worker_runs_is_cancelled_there() -> None:
    began, cancelled = asyncio.Event(), asyncio.Event()

    @step(queue="ends-there")
    async def ends_far_away() -> None:
        began.set()
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    @step
    async def ends_when_begun() -> str:
        await began.wait()
        return "first"

    @workflow
    async def ends_two_workers() -> str:
        far = asyncio.ensure_future(ends_far_away())
        first = await ends_when_begun()
        assert not far.done()
        return first

    async def main() -> None:
        async with bench(work=False, lease=0.9) as b:
            other = Worker(b.storage, b.settings, queues=["ends-there"])
            b.worker = Worker(b.storage, b.settings, queues=["default"])
            for worker in (other, b.worker):
                await worker.open()
                worker.serve()
            try:
                run_id = await b.start(ends_two_workers)
                assert await b.result(run_id) == "first"
                await asyncio.wait_for(cancelled.wait(), 60)
                events = await _accepts_its_history(b, run_id)
                assert _by_end(events) == ["ends_far_away"]
            finally:
                await other.drain(0)
                await other.close()

    asyncio.run(main())


class _LateInput(MemoryStorageBackend):
    """An input arrives while the change that ends a run is on its way."""

    late: Event | None = None

    async def commit(self, changes: Sequence[Change]) -> list[Answer]:
        for change in changes:
            late = self.late
            if change.final is not None and late is not None:
                self.late = None
                await super().commit([Change(run_id=change.run_id, key="late", events=[late])])
        return await super().commit(changes)


@pytest.mark.parametrize("type", ["cancel.requested", "step.completed"])
def test_r04_an_input_that_the_end_did_not_know_is_taken_first(type: str) -> None:
    @step(queue="elsewhere")
    async def ends_elsewhere() -> str:
        return ""

    @workflow
    async def ends_with_input() -> str:
        pending = asyncio.ensure_future(ends_elsewhere())
        await sleep("1s")
        assert not pending.done()
        return await ends_quick()

    async def main() -> None:
        store = _LateInput()
        async with bench(store, work=False) as b:
            b.worker = Worker(b.storage, b.settings, queues=["default"])
            await b.worker.open()
            b.worker.serve()
            run_id = await b.start(ends_with_input)
            await b.has(run_id, "sleep.created")
            (scheduled,) = await b.events(run_id, "step.scheduled")
            data: dict[str, Any] = {"reason": "late"}
            if type == "step.completed":
                data = {
                    "name": "ends_elsewhere", "digest": scheduled.data["digest"],
                    "attempt": 1, "result": '""',
                }  # fmt: skip
            op = scheduled.op if type == "step.completed" else None
            store.late = Event(type, "I", data, op, f"step:{op}" if op else None)
            await b.pass_time("2s")
            assert await b.result(run_id) == "first"
            assert store.late is None
            events = await _accepts_its_history(b, run_id)
            expected = [] if type == "step.completed" else ["ends_elsewhere"]
            assert _by_end(events) == expected

    asyncio.run(main())


def test_r04_more_steps_than_one_change_takes() -> None:
    @workflow
    async def ends_wide() -> str:
        for _ in range(45):
            asyncio.ensure_future(ends_never_claimed())  # noqa: RUF006 - left behind on purpose
        await sleep("1s")
        return await ends_quick()

    async def main() -> None:
        async with bench(work=False) as b:
            b.worker = Worker(b.storage, b.settings, queues=["default"])
            b.worker.max_events = 20
            await b.worker.open()
            b.worker.serve()
            run_id = await b.start(ends_wide)
            await b.has(run_id, "sleep.created")
            await b.pass_time("2s")
            assert await b.result(run_id) == "first"
            events = await _accepts_its_history(b, run_id)
            assert len(_by_end(events)) == 45
            assert events[-1].type == "workflow.completed"
            assert await b.items(run_id) == {}

    asyncio.run(main())


def test_r04_a_step_in_place_that_the_code_cancels_is_recorded_too() -> None:
    began = asyncio.Event()

    @step
    async def ends_given_up() -> None:
        began.set()
        await asyncio.sleep(600)

    @step
    async def ends_once_begun() -> None:
        await began.wait()

    @workflow
    async def ends_cancels() -> str:
        task = asyncio.ensure_future(ends_given_up())
        await ends_once_begun()
        task.cancel()
        await asyncio.wait([task])
        return await ends_quick()

    async def main() -> None:
        async with bench() as b:
            run_id = await b.start(ends_cancels)
            assert await b.result(run_id) == "first"
            events = await _accepts_its_history(b, run_id)
            cancelled = [e for e in events if e.type == "step.cancelled"]
            assert [dict(e.data) for e in cancelled] == [{"name": "ends_given_up"}]

    asyncio.run(main())


def test_r04_terminate_leaves_a_history_that_replays() -> None:
    @workflow
    async def ends_terminated() -> None:
        await asyncio.gather(ends_never_claimed(), sleep("1h"))

    async def main() -> None:
        async with bench(work=False) as b:
            b.worker = Worker(b.storage, b.settings, queues=["default"])
            await b.worker.open()
            b.worker.serve()
            run_id = await b.start(ends_terminated)
            await b.has(run_id, "sleep.created")
            await b.storage.commit_one(
                Change(
                    run_id=run_id,
                    key="terminate",
                    control=Control(ControlKind.TERMINATE, "enough"),
                    events=[Event("workflow.terminated", "O", {"reason": "enough"})],
                    final=RunStatus.TERMINATED,
                )
            )
            await b.until(run_id, "terminated")
            assert _by_end(await _accepts_its_history(b, run_id)) == []
            assert await b.items(run_id) == {}

    asyncio.run(main())


def test_r04_cancelled_by_the_end_is_valid_only_after_the_end() -> None:
    for state in (OpState.EMITTED, OpState.RECORDED):
        assert TABLE[OpKind.STEP, state, "step.cancelled"][0] is OpState.CANCELLED
        assert (state, "step.cancelled") in AFTER_END

    @workflow
    async def ends_waits() -> None:
        await ends_never_claimed()

    async def main() -> None:
        async with bench(work=False) as b:
            b.worker = Worker(b.storage, b.settings, queues=["default"])
            await b.worker.open()
            b.worker.serve()
            run_id = await b.start(ends_waits)
            await b.has(run_id, "step.scheduled")
            await b.until(run_id, "suspended", "running")
            history = await History.fetch(run_id, b.storage)
            last = history.events[-1]
            data: dict[str, Any] = {"name": "ends_never_claimed", "by": "end"}
            wrong = Event("step.cancelled", "C", data, "1#1:step", None, run_id, last.seq + 1)
            changed = History(
                run=history.run, seen_seq=history.seen_seq, events=(*history.events, wrong)
            )
            assert isinstance(replay(changed).mismatch, NonDeterminism)

    asyncio.run(main())
