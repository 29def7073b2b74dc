"""Listings on Redis: runs with few statuses are found without a look at all open runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta

from redis import Redis

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
    WorkItem,
)
from pyworkflow_storage_redis import RedisStorageBackend
from tests.servers import ValkeyServer

MINUTE = timedelta(minutes=1)
OPEN = [status for status in RunStatus if not status.is_terminal]
PREFIX = "pyworkflow:{default}:"


def created(run_id: str, *, claimed: bool = False, workflow: str = "flow") -> Change:
    held = LeaseFor(owner="w", lease=MINUTE) if claimed else None
    return Change(
        run_id=run_id,
        key="start",
        create=NewRun(workflow=workflow, version="1", args="[]"),
        events=[Event("workflow.started", "I", {"workflow": workflow})],
        put=[Put(item_id="turn", kind=ItemKind.TURN, claimed=held)],
    )


def ref_of(item: WorkItem) -> ClaimRef:
    assert item.lease is not None
    return ClaimRef(item.run_id, item.item_id, item.lease.token)


async def turns(store: RedisStorageBackend, names: list[str]) -> list[ClaimRef]:
    """New runs whose turn is claimed."""
    answers = await store.commit([created(name, claimed=True) for name in names])
    return [ref_of(a.claims[0]) for a in answers if isinstance(a, Committed)]


async def sleepers(store: RedisStorageBackend, names: list[str]) -> None:
    far = await store.now() + timedelta(days=9)
    changes = [
        Change(run_id=ref.run_id, key="sleep", claim=ref, seen=1, settle=Settle(reschedule_at=far))
        for ref in await turns(store, names)
    ]
    await store.commit(changes)


async def every_status(store: RedisStorageBackend) -> None:
    """Runs of each open status, and of several at once."""
    await store.commit([created("pending"), created("pending-paused")])
    await sleepers(store, ["suspended", "suspended-paused", "ended-paused", "unpaused"])
    (stalled, both, unstalled) = await turns(store, ["stalled", "stalled-paused", "unstalled"])
    await turns(store, ["running"])
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


async def check(store: RedisStorageBackend) -> None:
    """Each filter shows what the rows of all runs say."""
    runs = (await store.list_runs(RunQuery())).items
    assert {run.status for run in runs} == {*OPEN, RunStatus.TERMINATED}
    filters = [frozenset({status}) for status in OPEN]
    filters += [frozenset(OPEN), frozenset(OPEN[:3]), frozenset({*OPEN[1:4], RunStatus.TERMINATED})]
    for statuses in filters:
        for workflow in (None, "flow", "absent"):
            page = await store.list_runs(RunQuery(status=statuses, workflow=workflow))
            wanted = [r.run_id for r in runs if r.status in statuses and workflow != "absent"]
            assert [r.run_id for r in page.items] == wanted, statuses
            paged, cursor = [], None
            while True:
                part = await store.list_runs(
                    RunQuery(status=statuses, workflow=workflow, limit=1), cursor
                )
                paged += [r.run_id for r in part.items]
                cursor = part.cursor
                if cursor is None:
                    break
            assert paged == wanted, statuses


def test_found_m03_open_statuses_are_found_in_their_lists(
    make_valkey: Callable[..., ValkeyServer],
) -> None:
    async def main() -> None:
        async with RedisStorageBackend(make_valkey().url) as store:
            await every_status(store)
            await check(store)

    asyncio.run(main())


def test_found_m03_a_store_of_layout_1_gets_the_lists_when_it_is_opened(
    make_valkey: Callable[..., ValkeyServer],
) -> None:
    server = make_valkey()
    lists = [f"{PREFIX}runs:{state}{tail}" for state in ("stalled", "paused", "unstarted")
             for tail in ("", ":flow")]  # fmt: skip

    def members() -> list[list[str]]:
        with Redis.from_url(server.url, decode_responses=True) as redis:
            return [redis.zrange(name, 0, -1) for name in lists]

    async def fill() -> None:
        async with RedisStorageBackend(server.url) as store:
            await every_status(store)
            # More than one part of the upgrade.
            await store.commit([created(f"p{n}", workflow="flow") for n in range(1200)])

    async def again() -> None:
        store = RedisStorageBackend(server.url)
        assert await store.pending_migrations() == ["0002"]
        async with store:
            assert await store.pending_migrations() == []

    asyncio.run(fill())
    before = members()
    for name in lists:
        server.command("DEL", name)
    server.command("HSET", f"{PREFIX}meta", "format", "1")
    asyncio.run(again())
    assert members() == before

    async def migrate() -> None:
        async with RedisStorageBackend(server.url) as store:
            await store.migrate()

    server.command("DEL", lists[0])  # as a worker of 0.1.0 leaves it
    asyncio.run(migrate())
    assert members() == before
    assert [len(found) for found in before] == [2, 2, 3, 3, 1206, 1206]


def test_found_m03_a_listing_looks_at_no_more_runs_in_a_larger_store(
    make_valkey: Callable[..., ValkeyServer],
) -> None:
    server = make_valkey()

    def calls() -> int:
        """Reads of rows and of items so far."""
        with Redis.from_url(server.url) as redis:
            stats = redis.info("commandstats")
        return int(stats["cmdstat_hmget"]["calls"] + stats["cmdstat_hgetall"]["calls"])

    async def cost(store: RedisStorageBackend, *statuses: str) -> int:
        await store.list_runs(RunQuery())
        before = calls()
        query = RunQuery(status=frozenset(RunStatus(s) for s in statuses), limit=100)
        assert (await store.list_runs(query)).items == []
        return calls() - before

    async def main() -> None:
        async with RedisStorageBackend(server.url) as store:
            asked = [["stalled"], ["paused"], ["pending"], ["running"], ["running", "failed"]]
            found = []
            for size in (100, 2000):
                await sleepers(store, [f"r{size}-{n}" for n in range(size)])
                found.append([await cost(store, *statuses) for statuses in asked])
            assert found[0] == found[1]
            assert sum(found[0]) > 0

    asyncio.run(main())


def test_found_m03_leases_that_ended_are_due_and_listed_as_running(
    make_valkey: Callable[..., ValkeyServer],
) -> None:
    async def main() -> None:
        async with RedisStorageBackend(make_valkey().url) as store:
            await sleepers(store, ["sleeper"])
            (ref,) = await turns(store, ["due"])
            await store.commit_one(Change(run_id="due", key="seen", claim=ref, seen=1))
            await store.shift_clock(2 * MINUTE)
            query = RunQuery(status=frozenset({RunStatus.RUNNING}))
            assert [run.run_id for run in (await store.list_runs(query)).items] == ["due"]
            assert (await store.claim(ClaimRequest(owner="w", lease=MINUTE, limit=5))).claims
            assert [run.run_id for run in (await store.list_runs(query)).items] == ["due"]

    asyncio.run(main())
