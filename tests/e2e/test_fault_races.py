"""Inputs that meet a run's turn, its last commit or its end: heard or refused, never lost."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from pyworkflow import step, workflow
from pyworkflow._operations import Operations
from pyworkflow.errors import RunCancelled, RunClosed
from pyworkflow.events import Event
from pyworkflow.runs import ItemKind, ParentRef
from pyworkflow.spi import Change, ClaimRequest, NewRun, Put, StorageBackend
from pyworkflow.spi.storage import TURN, Answer
from pyworkflow_conformance.faults import FaultPlan, FaultyStorage
from tests.core._driving import bench
from tests.e2e import _fault_program
from tests.e2e._fault_stage import begin_worker, kinds
from tests.e2e._stage import Stage, eventually, stage, start_one

__all__ = ["stage"]

ENDS = ("workflow.completed", "workflow.failed", "workflow.cancelled")
#: An input of 10,000 others may not make a worker grow by more.
GROWTH = 48 << 20


# --- 36 -------------------------------------------------------------------------------------------


def peak(pid: int) -> int:
    """The most memory that a process has had, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


@pytest.mark.parametrize("stage", kinds("sqlite"), indirect=True)
def test_f36_a_storm_of_inputs_during_one_turn_is_logged_once_and_heard(
    stage: Stage,
) -> None:
    count, writers = 10_000, 10

    async def storm(storage: StorageBackend, run_id: str, writer: int) -> None:
        for start in range(0, count // writers, 50):
            keys = [f"{writer}:{n}" for n in range(start, min(start + 50, count // writers))]
            changes = [
                Change(
                    run_id=run_id,
                    key=key,
                    events=[Event("cancel.requested", "I", {"reason": key}, None, key)],
                )
                for key in keys
            ]
            answers = await storage.commit(changes)
            assert not any(isinstance(answer, BaseException) for answer in answers)
            if start % 200 == 0:  # some come twice
                again = await storage.commit(changes[:5])
                assert all(getattr(answer, "duplicate", False) for answer in again)

    async def main(storage: StorageBackend) -> str:
        run_id = await start_one(storage, _fault_program.fault_flooded, 7, count)
        request = ClaimRequest(owner="a turn", lease=timedelta(minutes=10), items=[(run_id, TURN)])
        (claim,) = (await storage.claim(request)).claims
        others = [storage, *(storage.clone() for _ in range(3))]
        await asyncio.gather(*(storm(others[n % 4], run_id, n) for n in range(writers)))
        for other in others[1:]:
            await other.close()
        # The turn ends having seen nothing of it, and is owed again.
        await storage.release(claim.ref)
        (turn,) = await storage.list_work(run_id)
        assert turn.due_at <= await storage.now()
        return run_id

    run_id = stage.ask(main)
    process = begin_worker(stage)
    eventually(lambda: stage.ready(process), "the worker is ready", say=stage.output)
    before = peak(process.pid)
    eventually(stage.all_over, "the run ends", say=stage.output)
    assert peak(process.pid) - before < GROWTH
    (run,) = stage.runs()
    assert (str(run.status), run.result, run.run_id) == ("completed", count, run_id)
    (events,) = stage.histories().values()
    heard = [str(event.key) for event in events if event.type == "cancel.requested"]
    assert len(heard) == len(set(heard)) == count
    for writer in range(writers):
        own = [int(key.partition(":")[2]) for key in heard if key.startswith(f"{writer}:")]
        assert own == list(range(count // writers))
    stage.check()


# --- 37 and 38 ------------------------------------------------------------------------------------


@step
async def race_step() -> str:
    return "stepped"


@workflow
async def race_plain(_: int) -> str:
    await race_step()
    return await race_step()


@workflow
async def race_hears(_: int) -> str:
    heard = ""
    while True:
        try:
            await race_step()
            return heard + await race_step()
        except asyncio.CancelledError:
            heard = "heard "


class LeaseFor(FaultyStorage):
    """Writes only when it is let, so that what its user looked at is old by then."""

    def __init__(self, inner: StorageBackend) -> None:
        super().__init__(inner, FaultPlan(rate=0))
        self.asked, self.let = asyncio.Event(), asyncio.Event()

    async def commit(self, changes: Sequence[Change]) -> list[Answer]:
        self.asked.set()
        await self.let.wait()
        return await self.inner.commit(changes)


class Between(FaultyStorage):
    """Lets somebody else look just before the nth commit of a session, and write before or after.

    ``when``: both before it, both after it, or the look before and the write after it.
    """

    def __init__(self, inner: StorageBackend, nth: int, when: str) -> None:
        super().__init__(inner, FaultPlan(rate=0))
        self.left, self.when = nth, when
        self.other = LeaseFor(inner.clone())
        self.act: Callable[[Operations], Awaitable[None]] | None = None

    async def commit(self, changes: Sequence[Change]) -> list[Answer]:
        if self.act is None or all(change.claim is None for change in changes):
            return await self.inner.commit(changes)
        self.left -= 1
        if self.left:
            return await self.inner.commit(changes)
        other = Operations(self.other, None, None)
        if self.when == "across":
            acting = asyncio.ensure_future(self.act(other))
            await self.other.asked.wait()
            answers = await self.inner.commit(changes)
            self.other.let.set()
            await acting
            return answers
        self.other.let.set()
        if self.when == "before":
            await self.act(other)
        answers = await self.inner.commit(changes)
        if self.when == "after":
            await self.act(other)
        return answers


async def cancelled_at(made: StorageBackend, flow: Any, nth: int, when: str) -> str | None:
    """What became of a run that was cancelled at its nth commit; None if there was none."""
    store = Between(made, nth, when)
    accepted: list[bool] = []
    async with bench(store, work=False) as b:
        run_id = await b.start(flow, nth)

        async def cancel(other: Operations) -> None:
            try:
                await other.cancel(run_id, "enough")
            except RunClosed:
                accepted.append(False)
            else:
                accepted.append(True)

        store.act = cancel
        await b.work()
        try:
            result = await b.result(run_id)
        except RunCancelled:
            result = "cancelled"
        events = await b.events(run_id)
        run = await b.get(run_id)
    await store.other.close()
    (end,) = [event for event in events if event.type in ENDS]
    asked = [event.seq for event in events if event.type == "cancel.requested"]
    assert asked == [] or asked[0] < end.seq, "what was accepted came before the end"
    assert run.seen_seq >= max(asked, default=0), "what was accepted was delivered"
    if not accepted:
        return None
    assert len(asked) == accepted[0], "what was refused is not there"
    return f"{result}{'' if accepted[0] else ', refused'}"


def every_place(stage: Stage, flow: Any) -> dict[str, set[str]]:
    """What becomes of runs that are cancelled before, after and across each of their commits."""

    async def main(storage: StorageBackend) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for when in ("before", "after", "across"):
            for nth in range(1, 20):
                async with storage.clone() as made:
                    outcome = await cancelled_at(made, flow, nth, when)
                if outcome is None:
                    break
                found.setdefault(when, set()).add(outcome)
        return found

    return dict(stage.ask(main))


def test_f37_an_input_at_any_commit_is_heard_or_refused(stage: Stage) -> None:
    # "stepped" alone: it came when the code had returned, and stands before the end.
    assert every_place(stage, race_hears) == {
        "before": {"heard stepped", "stepped"},
        "after": {"heard stepped", "stepped", "stepped, refused"},
        "across": {"heard stepped", "stepped", "stepped, refused"},
    }


def test_f38_a_cancel_at_any_commit_leaves_one_end(stage: Stage) -> None:
    assert every_place(stage, race_plain) == {
        "before": {"cancelled", "stepped"},
        "after": {"cancelled", "stepped", "stepped, refused"},
        "across": {"cancelled", "stepped", "stepped, refused"},
    }


@pytest.mark.parametrize("stage", ["sqlite", "postgresql"], indirect=True)
def test_f37_f38_cancels_that_race_with_a_working_process_are_accepted_or_refused(
    stage: Stage,
) -> None:
    process = begin_worker(stage)
    eventually(lambda: stage.ready(process), "the worker is ready", say=stage.output)

    async def main(storage: StorageBackend) -> list[tuple[str, bool]]:
        async def one(number: int) -> tuple[str, bool]:
            run_id = await start_one(storage, _fault_program.fault_pair, number)
            seen = await storage.watch(run_id, after=number % 6, timeout=timedelta(seconds=10))
            assert seen
            try:
                await Operations(storage, None, None).cancel(run_id, "enough")
            except RunClosed:
                return run_id, False
            return run_id, True

        return list(await asyncio.gather(*(one(n) for n in range(60))))

    asked = stage.ask(main)
    eventually(stage.all_over, "all runs end", say=stage.output)
    statuses = {run.run_id: str(run.status) for run in stage.runs()}
    for events in stage.histories().values():
        ends = [event for event in events if event.type in ENDS]
        cancels = [event for event in events if event.type == "cancel.requested"]
        assert len(ends) == 1
        accepted = dict(asked)[events[0].run_id]
        assert len(cancels) <= accepted
        if not accepted:
            assert statuses[events[0].run_id] == "completed"
    stage.check()


# --- 40 -------------------------------------------------------------------------------------------


def owing(parent: str, child: str) -> Change:
    """A run that owes the start of another, and has nothing else to do."""
    from pyworkflow._engine.deliver import run_payload

    new = NewRun(workflow="fault_pair", version="1", args='{"args":[1]}', root=parent)
    data = {"workflow": "fault_pair", "version": "1", "seed": "ab" * 16}
    started = {**data, "args": '{"args":[2]}'}
    owed = NewRun(
        workflow="fault_pair",
        version="1",
        args='{"args":[2]}',
        root=parent,
        parent=ParentRef(run_id=parent, op="1#1:child"),
    )
    message = Put(
        item_id="deliver:child", kind=ItemKind.DELIVER, payload=run_payload(child, owed, started)
    )
    first = Event("workflow.started", "I", {**data, "args": '{"args":[1]}'}, None, "started")
    return Change(
        run_id=parent,
        key="start:parent",
        create=new,
        events=[first],
        put=[message, Put(item_id=TURN, kind=ItemKind.TURN)],
    )


@pytest.mark.parametrize("stage", kinds("file", "postgresql"), indirect=True)
def test_f40_a_worker_killed_between_the_start_of_another_run_and_its_note_starts_one(
    stage: Stage,
) -> None:
    stage.ask(lambda storage: storage.commit_one(owing("parent", "child")))
    died = begin_worker(stage, "after", "create")
    assert died.wait(60) == -signal.SIGKILL, stage.output()
    assert {run.run_id for run in stage.runs()} == {"parent", "child"}
    # The message stands: its settle was not written, and it is carried out once more.
    assert "deliver:child" in {
        item.item_id for item in stage.ask(lambda storage: storage.list_work("parent"))
    }
    begin_worker(stage)
    eventually(stage.all_over, "both runs end", say=stage.output)

    def settled() -> bool:
        return stage.ask(lambda storage: storage.list_work("parent")) == []

    eventually(settled, "the message is settled", say=stage.output)
    assert {run.run_id: str(run.status) for run in stage.runs()} == {
        "parent": "completed",
        "child": "completed",
    }
    events = stage.ask(lambda storage: storage.get_events("child"))
    assert [event.type for event in events].count("workflow.started") == 1
    stage.check()
