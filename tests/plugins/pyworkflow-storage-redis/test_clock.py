"""The clock of Redis stores: after a server's clock that was ahead, time continues at its pace."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from redis.asyncio import Redis

from pyworkflow.spi import Change, ClaimRequest, ItemKind, NewRun, Put
from pyworkflow_storage_redis import RedisStorageBackend
from tests.servers import GivenServer, ValkeyServer

TWO_DAYS = timedelta(days=2)
REQUEST = ClaimRequest(owner="o", lease=timedelta(milliseconds=300))


def create(run_id: str, due: datetime) -> Change:
    return Change(
        run_id=run_id,
        key="start",
        create=NewRun(workflow="w", version="1", args="[]"),
        put=[Put(item_id="turn", kind=ItemKind.TURN, due_at=due)],
    )


async def claimed(store: RedisStorageBackend) -> int:
    """How many items are claimed, once there are any."""
    async with asyncio.timeout(60):
        while not (claims := (await store.claim(REQUEST)).claims):  # noqa: ASYNC110 - the server's time passes
            await asyncio.sleep(0.02)
    return len(claims)


@pytest.fixture
def store(valkey: ValkeyServer | GivenServer) -> RedisStorageBackend:
    return RedisStorageBackend(valkey.url, namespace=uuid4().hex)


async def was_ahead(store: RedisStorageBackend, valkey: Any) -> datetime:
    """Leave behind what a server leaves whose clock was two days ahead; the latest reading."""
    latest = datetime.now(UTC) + TWO_DAYS
    async with Redis.from_url(valkey.url) as client:
        micros = int(latest.timestamp() * 1_000_000)
        await client.hset(f"pyworkflow:{{{store.namespace}}}:meta", "latest", str(micros))
    return datetime.fromtimestamp(micros / 1_000_000, UTC)


def test_found_h05_after_a_server_clock_that_was_ahead_time_passes_at_its_pace(
    store: RedisStorageBackend, valkey: ValkeyServer | GivenServer
) -> None:
    async def main() -> None:
        async with store:
            await store.commit_one(create("first", await store.now()))
            latest = await was_ahead(store, valkey)
            first = await store.now()
            assert latest <= first < latest + timedelta(seconds=30)
            await store.commit_one(create("timer", first + timedelta(seconds=0.5)))
            assert await claimed(store) == 1
            async with asyncio.timeout(60):
                while (await store.now()) < first + timedelta(seconds=0.5):  # noqa: ASYNC110 - the server's time passes
                    await asyncio.sleep(0.02)
            assert await claimed(store) >= 1  # the timer, and the lease that has ended
            now = await store.now()
            assert now - datetime.now(UTC) < TWO_DAYS + timedelta(seconds=1)

    asyncio.run(main())


def test_found_h05_reads_alone_let_the_clock_continue(
    store: RedisStorageBackend, valkey: ValkeyServer | GivenServer
) -> None:
    async def main() -> None:
        async with store:
            await store.commit_one(create("first", await store.now()))
            latest = await was_ahead(store, valkey)
            readings = [await store.now() for _ in range(20)]
            assert latest <= readings[0]
            assert readings == sorted(readings)
            assert readings[0] < readings[-1]

    asyncio.run(main())


def test_found_h05_a_small_correction_does_not_drive_the_clock_ahead(
    store: RedisStorageBackend, valkey: ValkeyServer | GivenServer
) -> None:
    async def main() -> None:
        async with store, Redis.from_url(valkey.url) as client:
            await store.commit_one(create("first", await store.now()))
            meta = f"pyworkflow:{{{store.namespace}}}:meta"
            for _ in range(20):
                ahead = (datetime.now(UTC) + timedelta(seconds=0.2)).timestamp()
                await client.hset(meta, "latest", str(int(ahead * 1_000_000)))
                assert await store.now() >= datetime.fromtimestamp(ahead - 0.001, UTC)
            assert await client.hget(meta, "lead") is None

    asyncio.run(main())


def test_found_h05_a_lead_is_taken_away_and_no_token_comes_a_second_time(
    store: RedisStorageBackend, valkey: ValkeyServer | GivenServer
) -> None:
    async def main() -> None:
        async with store:
            await store.commit_one(create("first", await store.now()))
            await was_ahead(store, valkey)
            assert await store.now() - datetime.now(UTC) > TWO_DAYS - timedelta(seconds=30)
            (before,) = (await store.claim(REQUEST)).claims
            await store.recover()
            await store.shift_clock(datetime.now(UTC) - await store.now())
            assert abs(await store.now() - datetime.now(UTC)) < timedelta(seconds=30)
            (item,) = await store.list_work("first")
            assert item.lease is None
            assert item.due_at < await store.now() + timedelta(seconds=30)
            (after,) = (await store.claim(REQUEST)).claims
            assert int(after.ref.token[1:]) - int(before.ref.token[1:]) > 2**32

    asyncio.run(main())
