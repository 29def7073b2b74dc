"""A failure whose caller is cancelled leaves no "never retrieved" message (found.md L4)."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from typing import Any

import pytest

from pyworkflow._engine.outages import Outages
from pyworkflow._engine.pipeline import Pipeline, StorageClock
from pyworkflow._operations import Operations
from pyworkflow.errors import StorageUnavailable
from pyworkflow.spi import Answer, Change
from pyworkflow.storage.memory import MemoryStorageBackend
from pyworkflow_storage_sql.postgres._batches import Batches

AWAY = StorageUnavailable("connection reset")


class Resets(MemoryStorageBackend):
    """Its connection is reset when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.reset: asyncio.Future[None] | None = None

    async def _fails(self) -> Any:
        self.reset = asyncio.get_running_loop().create_future()
        await self.reset
        raise AWAY

    async def commit(self, changes: Sequence[Change]) -> list[Answer]:
        return list(await self._fails())

    async def watch(self, run_id: str | None, *, after: int, timeout: timedelta) -> bool:
        return bool(await self._fails())


async def _through_a_pipeline(store: Resets) -> None:
    pipeline = Pipeline(store, StorageClock(), 0.0, outages=Outages(store.now, "me"))
    await pipeline.commit(Change(run_id="run", key="key"))


async def _through_batches(store: Resets) -> None:
    async def send(requests: Sequence[str]) -> list[str]:
        return list(await store._fails())

    await Batches(send, 1).add("request")


async def _through_a_result(store: Resets) -> None:
    operations = Operations(store, None, None)
    await operations._watch("run", timedelta(seconds=60))


@pytest.mark.parametrize("wait", [_through_a_pipeline, _through_batches, _through_a_result])
def test_l04_a_reset_while_the_caller_is_cancelled_says_nothing(
    wait: Callable[[Resets], Awaitable[None]],
) -> None:
    said: list[dict[str, Any]] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _loop, context: said.append(context))
        store = Resets()
        await store.open()
        for rounds in range(6):  # the turn of the loop in which both come together differs
            caller = asyncio.ensure_future(wait(store))
            while store.reset is None:  # noqa: ASYNC110 - turns of the loop are counted here
                await asyncio.sleep(0)
            reset, store.reset = store.reset, None
            reset.set_result(None)
            for _ in range(rounds):
                await asyncio.sleep(0)
            caller.cancel()
            await asyncio.gather(caller, return_exceptions=True)
            for _ in range(10):
                await asyncio.sleep(0)
            del caller, reset
            gc.collect()

    asyncio.run(main())
    gc.collect()
    assert said == []
