"""Listings on SQLite: what a page reads does not grow with the number of open runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from pyworkflow import RunStatus
from pyworkflow.spi import (
    Change,
    ClaimRef,
    ClaimRequest,
    Committed,
    Control,
    ControlKind,
    Event,
    ItemKind,
    LeaseFor,
    NewRun,
    Put,
    RunQuery,
    Settle,
)
from pyworkflow_storage_sql import SQLiteStorageBackend
from pyworkflow_storage_sql.sqlite import _reader, _reads

MINUTE = timedelta(minutes=1)
OPEN = [status for status in RunStatus if not status.is_terminal]


def created(run_id: str, *, claimed: bool = False, **fields: Any) -> Change:
    held = LeaseFor(owner="w", lease=MINUTE) if claimed else None
    return Change(
        run_id=run_id,
        key="start",
        create=NewRun(workflow="flow", version="1", args="[]", **fields),
        events=[Event("workflow.started", "I", {"workflow": "flow"})],
        put=[Put(item_id="turn", kind=ItemKind.TURN, claimed=held)],
    )


async def turns(store: SQLiteStorageBackend, names: list[str]) -> list[ClaimRef]:
    """New runs whose turn is claimed."""
    found = []
    for answer in await store.commit([created(name, claimed=True) for name in names]):
        assert isinstance(answer, Committed)
        (item,) = answer.claims
        assert item.lease is not None
        found.append(ClaimRef(item.run_id, item.item_id, item.lease.token))
    return found


async def sleepers(store: SQLiteStorageBackend, names: list[str]) -> None:
    far = await store.now() + timedelta(days=9)
    await store.commit(
        [
            Change(
                run_id=ref.run_id, key="sleep", claim=ref, seen=1, settle=Settle(reschedule_at=far)
            )
            for ref in await turns(store, names)
        ]
    )


@pytest.fixture
def instructions(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """SQLite's instructions for reads so far, in tens."""
    counted = 0

    def count() -> int:
        nonlocal counted
        counted += 1
        return 0

    execute = _reader._Connection.execute

    def executed(self: _reader._Connection, sql: str, values: Any = (), /) -> Any:
        self.set_progress_handler(count, 10)
        return execute(self, sql, values)

    monkeypatch.setattr(_reader._Connection, "execute", executed)
    return lambda: counted


def test_found_m03_a_page_of_an_open_status_reads_no_more_in_a_larger_store(
    tmp_path: Path, instructions: Callable[[], int]
) -> None:
    asked = [[status] for status in OPEN if status is not RunStatus.SUSPENDED]
    asked += [[RunStatus.STALLED, RunStatus.RUNNING, RunStatus.FAILED]]

    async def main() -> None:
        async with SQLiteStorageBackend(tmp_path / "store.db") as store:

            async def cost(statuses: list[RunStatus]) -> int:
                query = RunQuery(status=frozenset(statuses))
                before = instructions()
                assert (await store.list_runs(query)).items == []
                return instructions() - before

            found = []
            for size in (100, 2000):
                await sleepers(store, [f"r{size}-{n}" for n in range(size)])
                found.append([await cost(statuses) for statuses in asked])
            for few, many in zip(*found, strict=True):
                assert many <= 1.5 * few + 50

    asyncio.run(main())


@pytest.mark.parametrize("most", [1000, 2], ids=["few awake", "many awake"])
def test_found_m03_open_statuses_are_those_of_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(_reads, "_MOST_AWAKE", most)

    async def main() -> None:
        async with SQLiteStorageBackend(tmp_path / "store.db") as store:
            await store.commit([created("pending"), created("first", priority=5, queue="q")])
            await store.commit([created("pending-paused"), created("second", queue="q")])
            await sleepers(store, ["suspended", "suspended-paused"])
            stalled, both = await turns(store, ["stalled", "stalled-paused"])
            await turns(store, ["leased"])
            stall = Control(ControlKind.STALL, reason="no code")
            for ref in (stalled, both):
                await store.commit_one(
                    Change(
                        run_id=ref.run_id, key="stall", claim=ref, control=stall, settle=Settle()
                    )
                )
            for run_id in ("pending-paused", "suspended-paused", both.run_id):
                await store.commit_one(
                    Change(run_id=run_id, key="pause", control=Control(ControlKind.PAUSE))
                )
            # Claimed once, then free again: due, and seen before.
            request = ClaimRequest(owner="w", lease=MINUTE, limit=2, queues=frozenset({"q"}))
            for claim in (await store.claim(request)).claims:
                await store.commit_one(
                    Change(run_id=claim.item.run_id, key="seen", claim=claim.ref, seen=1)
                )
            await store.shift_clock(2 * MINUTE)

            runs = (await store.list_runs(RunQuery())).items
            assert {run.status for run in runs} == set(OPEN)
            filters = [frozenset({status}) for status in OPEN]
            filters += [frozenset(OPEN), frozenset(OPEN[:3]), frozenset(OPEN[1:4])]
            for statuses in filters:
                for workflow in (None, "flow", "absent"):
                    query = RunQuery(status=statuses, workflow=workflow)
                    page = await store.list_runs(query)
                    wanted = [
                        r.run_id for r in runs if r.status in statuses and workflow != "absent"
                    ]
                    assert [r.run_id for r in page.items] == wanted, statuses

    asyncio.run(main())
