"""Runs in every open status, and what listings must show of them, for the tests of backends."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from itertools import combinations

from pyworkflow.runs import RunStatus
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
    StorageBackend,
    WorkItem,
)

__all__ = ["MINUTE", "OPEN", "check_listings", "created", "make_every_status", "sleepers", "turns"]

MINUTE = timedelta(minutes=1)
OPEN = [status for status in RunStatus if not status.is_terminal]


def created(
    run_id: str,
    *,
    claimed: bool = False,
    workflow: str = "flow",
    due_at: datetime | None = None,
    idempotency_key: str | None = None,
) -> Change:
    """A run that has not started; its turn is due at once, and claimed when asked for."""
    held = LeaseFor(owner="w", lease=MINUTE) if claimed else None
    return Change(
        run_id=run_id,
        key="start",
        create=NewRun(workflow=workflow, version="1", args="[]", idempotency_key=idempotency_key),
        # An input would be due at once.
        events=[Event("workflow.started", "I" if due_at is None else "O", {"workflow": workflow})],
        put=[Put(item_id="turn", kind=ItemKind.TURN, due_at=due_at, claimed=held)],
    )


def ref_of(item: WorkItem) -> ClaimRef:
    assert item.lease is not None
    return ClaimRef(item.run_id, item.item_id, item.lease.token)


async def turns(store: StorageBackend, names: list[str]) -> list[ClaimRef]:
    """New runs whose turn is claimed."""
    answers = await store.commit([created(name, claimed=True) for name in names])
    return [ref_of(a.claims[0]) for a in answers if isinstance(a, Committed)]


async def sleepers(store: StorageBackend, names: list[str]) -> None:
    """New runs that sleep for days."""
    far = await store.now() + timedelta(days=9)
    changes = [
        Change(run_id=ref.run_id, key="sleep", claim=ref, seen=1, settle=Settle(reschedule_at=far))
        for ref in await turns(store, names)
    ]
    await store.commit(changes)


async def make_every_status(store: StorageBackend) -> None:
    """Runs of each open status, and of several at once."""
    await store.commit([created("pending"), created("pending-paused")])
    await sleepers(store, ["suspended", "suspended-paused", "ended-paused", "unpaused"])
    (stalled, both, unstalled) = await turns(store, ["stalled", "stalled-paused", "unstalled"])
    await turns(store, ["running"])
    # Claimed before its first turn was committed: due again, and later.
    for run_id in ("tried", "tried-later"):
        (ref,) = await turns(store, [run_id])
        assert await store.renew([ref], timedelta(0)) == [True]
    again = ClaimRequest(owner="w", lease=MINUTE, limit=1, items=[("tried-later", "turn")])
    (claim,) = (await store.claim(again)).claims
    assert await store.release(claim.ref, delay=timedelta(hours=1))
    # After it: due by the end of a lease, and by an input.
    (ref,) = await turns(store, ["due"])
    await store.commit_one(Change(run_id="due", key="seen", claim=ref, seen=1))
    assert await store.renew([ref], timedelta(0)) == [True]
    await sleepers(store, ["woken"])
    signal = Event("signal.received", "I", {"name": "go"})
    await store.commit_one(Change(run_id="woken", key="signal", events=[signal]))
    stall = Control(ControlKind.STALL, reason="no code")
    for ref in (stalled, both, unstalled):
        await store.commit_one(
            Change(run_id=ref.run_id, key="stall", claim=ref, control=stall, settle=Settle())
        )
    for run_id in ("pending-paused", "suspended-paused", "ended-paused", "unpaused", both.run_id):
        await store.commit_one(
            Change(run_id=run_id, key="pause", control=Control(ControlKind.PAUSE))
        )
    await store.commit_one(
        Change(run_id="unpaused", key="unpause", control=Control(ControlKind.UNPAUSE))
    )
    await store.commit_one(
        Change(run_id="unstalled", key="unstall", control=Control(ControlKind.UNSTALL))
    )
    await store.commit_one(
        Change(
            run_id="ended-paused",
            key="end",
            control=Control(ControlKind.TERMINATE),
            final=RunStatus.TERMINATED,
        )
    )


async def check_listings(store: StorageBackend) -> None:
    """Each filter shows what the rows of all runs say."""
    runs = (await store.list_runs(RunQuery())).items
    assert {run.status for run in runs} == {*OPEN, RunStatus.TERMINATED}
    kinds = [*OPEN, RunStatus.TERMINATED]
    filters = [frozenset(some) for n in range(1, 7) for some in combinations(kinds, n)]
    for statuses in filters:
        for workflow in (None, "flow", "absent"):
            page = await store.list_runs(RunQuery(status=statuses, workflow=workflow))
            wanted = [r.run_id for r in runs if r.status in statuses and workflow != "absent"]
            assert [r.run_id for r in page.items] == wanted, statuses
        if len(statuses) < 3:
            assert [run_id async for run_id in _one_by_one(store, statuses)] == [
                r.run_id for r in runs if r.status in statuses
            ]


async def _one_by_one(store: StorageBackend, statuses: frozenset[RunStatus]) -> AsyncIterator[str]:
    cursor = None
    while True:
        page = await store.list_runs(RunQuery(status=statuses, limit=1), cursor)
        for run in page.items:
            yield run.run_id
        cursor = page.cursor
        if cursor is None:
            return
