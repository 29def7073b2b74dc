"""Workflows whose runs are in the stores that 0.1.0 wrote. What they do never changes."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal

from pydantic import BaseModel

from pyworkflow import FatalError, sleep, step, step_context, workflow

__all__ = [
    "Order",
    "Receipt",
    "cancelled",
    "done",
    "failed",
    "flaky",
    "large",
    "sleeper",
    "stalled",
]


@dataclass
class Order:
    """An argument that is recorded under this module's name."""

    number: int
    at: datetime
    tags: set[str]


class Receipt(BaseModel):
    """A result that is recorded under this module's name."""

    order: int
    price: Decimal


ORDER = Order(7, datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), {"blue", "red"})


@step
async def v010_price(order: Order) -> Decimal:
    return Decimal("1.50") * order.number


@step
def v010_double(x: int) -> int:
    return 2 * x


@step
async def v010_refuse(what: str) -> None:
    raise FatalError(f"refused: {what}")


@step(max_retries=3, retry_delay="1s")
async def v010_flaky() -> int:
    """Fails once, where the store was written; the next attempt is made by a later release."""
    attempt = step_context().attempt
    if attempt == 1:
        raise ConnectionError("not yet")
    return attempt


@workflow(name="v010_done")
async def done(order: Order) -> Receipt:
    return Receipt(order=order.number, price=await v010_price(order))


@workflow(name="v010_failed")
async def failed(what: str) -> None:
    await v010_refuse(what)


@workflow(name="v010_sleeper")
async def sleeper(x: int) -> list[int]:
    first, second = await asyncio.gather(v010_double(x), v010_double(x + 1))
    await sleep("2s")
    return [first, second, await v010_double(first)]


@workflow(name="v010_flaky_run")
async def flaky() -> int:
    return await v010_flaky()


@workflow(name="v010_large")
async def large(size: int) -> str:
    """Its result is compressed."""
    return "x" * size


@workflow(name="v010_cancelled")
async def cancelled() -> None:
    await sleep("30d")


@workflow(name="v010_stalled")
async def stalled(x: int) -> int:
    """Stalls where the store was written; the code that a later release has is right."""
    if os.environ.get("V010_WRONG"):
        await asyncio.to_thread(int)
    return await v010_double(x)
