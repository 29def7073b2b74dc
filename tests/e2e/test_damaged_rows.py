"""A damaged row of a SQLite store concerns its own run: that run stalls, the others continue."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from pyworkflow import sleep, step, workflow
from pyworkflow._engine.damaged import DamagedWork
from pyworkflow._engine.worker import Worker
from pyworkflow.errors import StorageDamaged
from pyworkflow.events import Event
from pyworkflow.runs import RunStatus
from pyworkflow.spi import (
    Change,
    ClaimRequest,
    Control,
    ControlKind,
    ItemKind,
    LeaseFor,
    Put,
    RunQuery,
    Settle,
)
from pyworkflow.storekit import fsck
from pyworkflow_storage_sql import SQLiteStorageBackend
from tests.core._driving import Bench, eventually, settings

calls: list[str] = []


@step
async def damaged_row_step(name: str) -> str:
    calls.append(name)
    return name


@workflow
async def damaged_row_flow(name: str) -> str:
    await damaged_row_step(name)
    await sleep("1h")
    return await damaged_row_step(name + "!")


def change(path: Path, sql: str, run_id: str) -> None:
    """Change one row of the run behind the store's back."""
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        run = "(select id from runs where run_id = ?)"
        assert other.execute(f"{sql} and run = {run}", (run_id,)).rowcount == 1


def records(caplog: pytest.LogCaptureFixture, run_id: str) -> list[logging.LogRecord]:
    """The warnings and errors that name the run."""
    return [r for r in caplog.records if r.levelno >= logging.WARNING and run_id in r.getMessage()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    calls.clear()
    return tmp_path / "runs.db"


async def claims_of(b: Bench, run_id: str, number: int) -> None:
    """Let the worker claim the run's turn again, that often: each one is due when it was left."""
    for _ in range(number):
        before = (await b.items(run_id))["turn"].due_at
        await b.pass_time((before - await b.storage.now()).total_seconds() + 0.001)

        async def is_left(before: Any = before) -> bool:
            turn = (await b.items(run_id))["turn"]
            return turn.lease is None and turn.due_at > before

        await eventually(is_left)


SEQ_1 = "update events set data = replace(data, 'workflow', 'workflaw') where seq = 1"
MIDDLE = "update events set data = data || ' ' where seq = 3"
LAST = (
    "update events set data = 'no JSON' where seq = "
    "(select max(e.seq) from events e where e.run = events.run)"
)
KEYED = "update events set key = key || 'x' where key = 'started'"


@pytest.mark.parametrize("sql", [SEQ_1, LAST, KEYED], ids=["first", "last", "key"])
def test_a_pending_run_with_a_damaged_event_stalls_once_and_can_be_ended(
    path: Path, caplog: pytest.LogCaptureFixture, sql: str
) -> None:
    async def main() -> None:
        b = Bench(SQLiteStorageBackend(path), settings())
        await b.storage.open()
        bad, good = await b.start(damaged_row_flow, "bad"), await b.start(damaged_row_flow, "good")
        change(path, sql, bad)
        await b.work()
        run = await b.until(bad, "stalled")
        assert "StorageDamaged" in str(run.stalled)
        assert "runs cancel" in str(run.stalled)
        await b.asleep(good)
        await claims_of(b, bad, 5)
        assert [r.levelno for r in records(caplog, bad)] == [logging.ERROR]
        found = await fsck(b.storage)
        assert {(v.rule, v.run_id) for v in found} == {("damaged", bad)}
        await b.ops.cancel(bad, "not needed")
        assert (await b.get(bad)).status == "cancelled"
        await b.pass_time("1h")
        assert await b.result(good) == "good!"
        await b.rest()
        await b.storage.close()

    asyncio.run(main())
    assert calls == ["good", "good!"]
    assert not [r for r in caplog.records if "cannot be committed" in r.getMessage()]


def test_a_pending_run_with_a_damaged_event_can_be_cancelled_without_a_worker(path: Path) -> None:
    async def main() -> None:
        b = Bench(SQLiteStorageBackend(path), settings())
        await b.storage.open()
        bad = await b.start(damaged_row_flow, "bad")
        change(path, SEQ_1, bad)
        await b.ops.cancel(bad, "not needed")
        assert (await b.get(bad)).status == "cancelled"
        await b.storage.close()

    asyncio.run(main())


@pytest.mark.parametrize("sql", [SEQ_1, MIDDLE, LAST], ids=["first", "middle", "last"])
def test_a_suspended_run_with_a_damaged_event_stalls_once(
    path: Path, caplog: pytest.LogCaptureFixture, sql: str
) -> None:
    async def main() -> None:
        b = Bench(SQLiteStorageBackend(path), settings())
        await b.storage.open()
        await b.work()
        bad, good = await b.start(damaged_row_flow, "bad"), await b.start(damaged_row_flow, "good")
        await b.asleep(bad)
        await b.asleep(good)
        await b.rest()
        # An input that the run has not seen: it is damaged where the last event is.
        late = Event("signal.received", "I", {"name": "x"}, None, "late")
        await b.storage.commit_one(Change(run_id=bad, key="late", events=[late]))
        change(path, sql, bad)
        await b.work()
        await b.until(bad, "stalled")
        await claims_of(b, bad, 3)
        assert [r.levelno for r in records(caplog, bad)] == [logging.ERROR]
        await b.pass_time("1h")
        assert await b.result(good) == "good!"
        await b.ops.cancel(bad, "not needed")
        assert (await b.get(bad)).status == "cancelled"
        await b.rest()
        await b.storage.close()

    asyncio.run(main())
    assert calls == ["bad", "good", "good!"] or calls == ["good", "bad", "good!"]


@pytest.mark.parametrize(
    "sql",
    [
        "update run_data set tags = '[' where true",
        "update run_data set attributes = 'x' where true",
        "update work_items set payload = '{' where item_id = 'turn'",
    ],
    ids=["tags", "attributes", "payload"],
)
def test_a_row_that_cannot_be_read_is_left_alone_for_longer_each_time(
    path: Path, caplog: pytest.LogCaptureFixture, sql: str
) -> None:
    async def main() -> None:
        storage = SQLiteStorageBackend(path)
        b = Bench(storage, settings())
        await storage.open()
        bad, good = await b.start(damaged_row_flow, "bad"), await b.start(damaged_row_flow, "good")
        change(path, sql, bad)
        request = ClaimRequest(owner="w", limit=10, lease=timedelta(days=1))
        assert [c.item.run_id for c in (await storage.claim(request)).claims] == [good]
        pauses = []
        for _ in range(10):
            due = await storage.next_due()
            assert due is not None
            pauses.append(due - await storage.now())
            await storage.shift_clock(pauses[-1])
            rung = [item.run_id for item in await storage.announce(10, mute=timedelta(0))]
            assert rung == ([] if "payload" in sql else [bad])
            assert (await storage.claim(request)).claims == []
        listed = {run.run_id: run for run in (await storage.list_runs(RunQuery())).items}
        assert set(listed) == {bad, good}
        assert listed[good].stalled is None
        if "payload" not in sql:
            assert str(listed[bad].status) == "stalled"
            assert f"run_id={bad}" in str(listed[bad].stalled)
            with pytest.raises(StorageDamaged, match=bad):
                await storage.get_run(bad)
        assert {(v.rule, v.run_id) for v in await fsck(storage)} == {("damaged", bad)}
        assert [round(p.total_seconds()) for p in pauses] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300]
        await storage.close()

    asyncio.run(main())
    assert [r.levelno for r in records(caplog, "")] == [logging.ERROR]


def test_a_kept_answer_that_is_damaged_takes_no_other_change_along(path: Path) -> None:
    async def main() -> None:
        b = Bench(SQLiteStorageBackend(path), settings())
        await b.storage.open()
        await b.work()
        bad, good = await b.start(damaged_row_flow, "bad"), await b.start(damaged_row_flow, "good")
        await b.asleep(bad)
        await b.asleep(good)
        assert b.worker is not None

        def note(run_id: str) -> Change:
            return Change(run_id=run_id, key="note", events=[Event("log.info", "O", {})])

        await b.storage.commit_one(note(bad))
        change(path, "update answers set answer = '{' where key = 'note'", bad)
        commit = b.worker.pipeline.commit
        broken, sound = await asyncio.gather(
            commit(note(bad)), commit(note(good)), return_exceptions=True
        )
        assert isinstance(broken, StorageDamaged)
        assert not isinstance(sound, BaseException)
        assert len(sound.seqs) == 1
        await b.rest()
        await b.storage.close()

    asyncio.run(main())


@pytest.mark.parametrize("kind", [ControlKind.STALL, ControlKind.TERMINATE])
def test_what_needs_no_code_is_committed_and_answered_again_beside_a_damaged_event(
    path: Path, kind: ControlKind
) -> None:
    async def main() -> None:
        b = Bench(SQLiteStorageBackend(path), settings())
        await b.storage.open()
        bad = await b.start(damaged_row_flow, "bad")
        change(path, SEQ_1, bad)
        request = ClaimRequest(owner="w", limit=1, lease=timedelta(seconds=30))
        (claim,) = (await b.storage.claim(request)).claims
        asked = Change(
            run_id=bad,
            key="key",
            claim=claim.ref,
            control=Control(kind, "why"),
            settle=None if kind is ControlKind.TERMINATE else Settle(keep=True),
            final=RunStatus.CANCELLED if kind is ControlKind.TERMINATE else None,
        )
        for duplicate in (False, True):
            answer = await b.storage.commit_one(asked)
            assert (answer.duplicate, list(answer.unseen_events)) == (duplicate, [])
        log = Event("log.info", "O", {})
        if kind is ControlKind.STALL:  # what is given to code must be readable
            with pytest.raises(StorageDamaged):
                await b.storage.commit_one(
                    Change(run_id=bad, key="next", claim=claim.ref, events=[log])
                )
        await b.storage.close()

    asyncio.run(main())


def test_the_end_of_a_step_is_recorded_though_the_turn_it_would_take_is_damaged(
    path: Path,
) -> None:
    async def main() -> None:
        b = Bench(SQLiteStorageBackend(path), settings())
        await b.storage.open()
        worker = Worker(b.storage, b.settings)
        await worker.open()
        bad = await b.start(damaged_row_flow, "bad")
        put = Put(item_id="step:1", kind=ItemKind.STEP, payload={})
        await b.storage.commit_one(Change(run_id=bad, key="put", put=[put]))
        change(path, SEQ_1, bad)
        request = ClaimRequest(
            owner="w", limit=1, lease=timedelta(seconds=30), kinds=frozenset({ItemKind.STEP})
        )
        (claim,) = (await b.storage.claim(request)).claims
        answer = await worker.pipeline.commit(
            Change(
                run_id=bad,
                key="end",
                claim=claim.ref,
                events=[Event("step.completed", "I", {}, "1", "step:1")],
                settle=Settle(),
                take_turn=LeaseFor("w", timedelta(seconds=30)),
            )
        )
        assert (list(answer.seqs), answer.turn) == ([2], None)
        assert list(await b.items(bad)) == ["turn"]
        await worker.drain(0)
        await worker.close()
        await b.storage.close()

    asyncio.run(main())


def test_damage_that_a_worker_meets_again_and_again_is_logged_once_and_left_for_longer(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        storage = SQLiteStorageBackend(path)
        await storage.open()
        given_up: list[None] = []
        damaged = DamagedWork(storage, lambda: given_up.append(None))
        b = Bench(storage, settings())
        bad = await b.start(damaged_row_flow, "bad")
        request = ClaimRequest(owner="w", limit=1, lease=timedelta(seconds=30))

        async def broken() -> None:
            raise StorageDamaged("file", 0, "a row")

        pauses = []
        for _ in range(11):
            (claim,) = (await storage.claim(request)).claims
            await damaged.attempt(broken(), claim.ref)
            turn = (await b.items(bad))["turn"]
            pause = turn.due_at - await storage.now()
            pauses.append(round(pause.total_seconds()))
            assert turn.lease is None
            await storage.shift_clock(pause)
        assert pauses == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]
        assert len(given_up) == 11
        with pytest.raises(StorageDamaged):
            await damaged.attempt(broken(), None)
        await storage.close()

    asyncio.run(main())
    assert [r.levelno for r in records(caplog, "")] == [logging.ERROR]
