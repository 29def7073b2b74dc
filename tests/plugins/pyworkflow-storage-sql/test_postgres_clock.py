"""The clock of PostgreSQL stores: after a server's clock that was ahead, time continues at its pace."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from pyworkflow.spi import Change, ClaimRequest, ItemKind, NewRun, Put
from pyworkflow_storage_sql import PostgresStorageBackend
from tests.servers import GivenServer, PostgresServer

TWO_DAYS = timedelta(days=2)
SECOND = timedelta(seconds=1)
REQUEST = ClaimRequest(owner="o", lease=timedelta(milliseconds=300))


def create(run_id: str, due: datetime) -> Change:
    return Change(
        run_id=run_id,
        key="start",
        create=NewRun(workflow="w", version="1", args="[]"),
        put=[Put(item_id="turn", kind=ItemKind.TURN, due_at=due)],
    )


async def claimed(store: PostgresStorageBackend) -> int:
    """How many items are claimed, once there are any."""
    async with asyncio.timeout(60):
        while not (claims := (await store.claim(REQUEST)).claims):  # noqa: ASYNC110 - time passes
            await asyncio.sleep(0.02)
    return len(claims)


@pytest.fixture
def url(postgres: PostgresServer | GivenServer) -> str:
    return postgres.database()


def was_ahead(postgres: PostgresServer | GivenServer, url: str, by: timedelta) -> datetime:
    """Leave behind what a server leaves whose clock was ahead; the latest reading."""
    micros = int((datetime.now(UTC) + by).timestamp() * 1_000_000)
    postgres.sql(f"SELECT setval('pyworkflow.clock', {micros})", url=url)
    return datetime.fromtimestamp(micros / 1_000_000, UTC)


def test_found_h05_after_a_server_clock_that_was_ahead_time_passes_at_its_pace(
    postgres: PostgresServer | GivenServer, url: str
) -> None:
    async def main() -> None:
        async with PostgresStorageBackend(url) as store:
            await store.commit_one(create("first", await store.now()))
            latest = was_ahead(postgres, url, TWO_DAYS)
            first = await store.now()
            assert latest <= first < latest + 30 * SECOND
            await store.commit_one(create("timer", first + 0.5 * SECOND))
            assert await claimed(store) == 1
            async with asyncio.timeout(60):
                while (await store.now()) < first + 0.5 * SECOND:  # noqa: ASYNC110 - time passes
                    await asyncio.sleep(0.02)
            assert await claimed(store) >= 1  # the timer, or the lease that has ended
            assert await store.now() - datetime.now(UTC) < TWO_DAYS + SECOND

    asyncio.run(main())


@pytest.mark.parametrize("call", ["commit", "claim", "now"])
def test_found_h05_each_call_alone_lets_the_clock_continue(
    postgres: PostgresServer | GivenServer, url: str, call: str
) -> None:
    async def main() -> None:
        async with PostgresStorageBackend(url) as store:
            await store.commit_one(create("first", await store.now()))
            latest = was_ahead(postgres, url, TWO_DAYS)
            readings: list[datetime] = []
            for n in range(10):
                if call == "commit":
                    readings.append(
                        (await store.commit_one(create(f"r{n}", latest + TWO_DAYS))).now
                    )
                elif call == "claim":
                    readings.append((await store.claim(REQUEST)).now)
                else:
                    readings.append(await store.now())
            assert latest <= readings[0] < readings[-1] < latest + 30 * SECOND
            assert readings == sorted(readings)

    asyncio.run(main())


def test_found_h05_clients_that_find_it_at_once_agree(
    postgres: PostgresServer | GivenServer, url: str
) -> None:
    async def main() -> None:
        stores = [PostgresStorageBackend(url) for _ in range(6)]
        try:
            await stores[0].commit_one(create("first", await stores[0].now()))
            await asyncio.gather(*(store.now() for store in stores))
            latest = was_ahead(postgres, url, TWO_DAYS)
            times = await asyncio.gather(*(store.now() for store in stores * 5))
            assert latest <= min(times)
            assert max(times) < latest + 30 * SECOND
            lead = await stores[0].now() - datetime.now(UTC)
            assert abs(lead - TWO_DAYS) < SECOND
        finally:
            for store in stores:
                await store.close()

    asyncio.run(main())


def test_found_h05_a_small_correction_does_not_drive_the_clock_ahead(
    postgres: PostgresServer | GivenServer, url: str
) -> None:
    async def main() -> None:
        async with PostgresStorageBackend(url) as store:
            await store.commit_one(create("first", await store.now()))
            for _ in range(10):
                latest = was_ahead(postgres, url, timedelta(seconds=0.3))
                assert await store.now() >= latest
            assert postgres.sql("SELECT last_value FROM pyworkflow.lead", url=url) == "0"

    asyncio.run(main())


def test_found_h05_a_lead_is_taken_away(postgres: PostgresServer | GivenServer, url: str) -> None:
    async def main() -> None:
        async with PostgresStorageBackend(url) as store:
            await store.commit_one(create("first", await store.now()))
            was_ahead(postgres, url, TWO_DAYS)
            assert await store.now() - datetime.now(UTC) > TWO_DAYS - 30 * SECOND
            (before,) = (await store.claim(REQUEST)).claims
            await store.recover()
            await store.shift_clock(datetime.now(UTC) - await store.now())
            for _ in range(3):
                assert abs(await store.now() - datetime.now(UTC)) < 30 * SECOND
            (after,) = (await store.claim(REQUEST)).claims
            assert after.ref.token != before.ref.token
            assert after.item.claims == 1

    asyncio.run(main())
