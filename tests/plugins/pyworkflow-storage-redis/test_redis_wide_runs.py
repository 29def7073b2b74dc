"""Wide runs on Redis: the server's time grows with the number of dispatched steps, not its square."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from pyworkflow import Client, step, workflow
from pyworkflow_storage_redis import RedisStorageBackend
from tests.servers import ValkeyServer

FEW, MANY = 300, 1500


@step(dispatch="queue")
async def redis_wide_step(n: int) -> int:
    return n


@workflow
async def redis_wide(number: int) -> int:
    return sum(await asyncio.gather(*(redis_wide_step(n) for n in range(number))))


def test_o04_a_wide_run_on_redis_costs_in_proportion_to_its_steps(
    make_valkey: Callable[..., ValkeyServer],
) -> None:
    server = make_valkey()

    async def cost(steps: int) -> float:
        async with (
            RedisStorageBackend(server.url, namespace=f"wide{steps}") as store,
            Client(storage=store, executor="local://") as client,
        ):
            before = server.cpu_seconds()
            assert await client.result(await client.start(redis_wide, steps)) == sum(range(steps))
            return server.cpu_seconds() - before

    few = asyncio.run(cost(FEW))
    # Linear is 5 times, quadratic 25.
    assert asyncio.run(cost(MANY)) <= 12 * max(few, 0.05)
