"""Context variables of steps: the same wherever and whenever a step runs."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar

from pyworkflow import sleep, step, step_context, workflow
from tests.core._driving import bench

tenant: ContextVar[str] = ContextVar("tenant", default="unset")


@step
async def ctx_async() -> str:
    step_context()
    before = tenant.get()
    tenant.set("left behind")
    return before


@step
def ctx_sync() -> str:
    step_context()
    before = tenant.get()
    tenant.set("left behind")
    return before


@step(dispatch="queue")
async def ctx_dispatched() -> str:
    before = tenant.get()
    tenant.set("left behind")
    return before


@step(dispatch="queue")
def ctx_dispatched_sync() -> str:
    return tenant.get()


@step(max_retries=1, retry_delay=0.01)
async def ctx_retried() -> str:
    if step_context().attempt == 1:
        tenant.set("left behind")
        raise OSError
    return tenant.get()


@workflow
async def ctx_look() -> list[str]:
    found = [tenant.get(), await ctx_async(), await ctx_sync(), await ctx_async()]
    found += [await ctx_dispatched(), await ctx_dispatched_sync(), await ctx_retried()]
    found += await asyncio.gather(ctx_async(), ctx_sync(), ctx_dispatched())
    await sleep("1ms")
    return [*found, await ctx_async(), await ctx_sync(), await ctx_dispatched(), tenant.get()]


def test_r07_a_step_sees_no_context_variable_of_its_caller() -> None:
    async def main() -> None:
        tenant.set("ann")
        async with bench() as b:
            tenant.set("bob")
            assert set(await b.run(ctx_look)) == {"unset"}
            assert set(await b.run(ctx_look)) == {"unset"}

    asyncio.run(main())
