"""Listings on Redis: runs with few statuses are found without a look at all open runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta

from redis import Redis

from pyworkflow import RunStatus
from pyworkflow.spi import Change, ClaimRequest, RunQuery
from pyworkflow_storage_redis import RedisStorageBackend
from tests.servers import ValkeyServer
from tests.statuses import (
    MINUTE,
    check_listings,
    created,
    make_every_status,
    sleepers,
    turns,
)

STATES = ("stalled", "paused", "unstarted", "started")
PREFIX = "pyworkflow:{default}:"


def test_found_m03_open_statuses_are_found_in_their_lists(
    make_valkey: Callable[..., ValkeyServer],
) -> None:
    async def main() -> None:
        async with RedisStorageBackend(make_valkey().url) as store:
            await make_every_status(store)
            await check_listings(store)

    asyncio.run(main())


def test_found_m03_a_store_of_layout_1_gets_the_lists_when_it_is_opened(
    make_valkey: Callable[..., ValkeyServer],
) -> None:
    server = make_valkey()
    lists = [f"{PREFIX}runs:{state}{tail}" for state in STATES for tail in ("", ":flow")]
    lists.append(f"{PREFIX}tried")

    def members() -> list[list[str]]:
        with Redis.from_url(server.url, decode_responses=True) as redis:
            return [redis.zrange(name, 0, -1) for name in lists]

    async def fill() -> None:
        async with RedisStorageBackend(server.url) as store:
            await make_every_status(store)
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
    assert [len(found) for found in before] == [2, 2, 2, 2, 1205, 1205, 4, 4, 1]


def test_found_m03_a_listing_looks_at_no_more_runs_in_a_larger_store(
    make_valkey: Callable[..., ValkeyServer],
) -> None:
    server = make_valkey()

    def calls() -> int:
        """Reads of rows and of items so far."""
        with Redis.from_url(server.url) as redis:
            stats = redis.info("commandstats")
        return int(stats["cmdstat_hmget"]["calls"] + stats["cmdstat_hgetall"]["calls"])

    async def cost(store: RedisStorageBackend, *statuses: str, workflow: str | None = None) -> int:
        await store.list_runs(RunQuery())
        before = calls()
        wanted = frozenset(RunStatus(s) for s in statuses)
        query = RunQuery(status=wanted, workflow=workflow, limit=100)
        assert (await store.list_runs(query)).items == []
        return calls() - before

    async def main() -> None:
        async with RedisStorageBackend(server.url) as store:
            far = await store.now() + timedelta(days=9)
            asked = [["stalled"], ["paused"], ["running"], ["running", "failed"]]
            found = []
            for size in (100, 2000):
                await sleepers(store, [f"r{size}-{n}" for n in range(size)])
                await store.commit(
                    [created(f"p{size}-{n}", workflow="later", due_at=far) for n in range(size)]
                )
                costs = [await cost(store, *statuses) for statuses in asked]
                costs.append(await cost(store, "pending", workflow="flow"))
                costs.append(await cost(store, "suspended", "running", workflow="later"))
                found.append(costs)
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
