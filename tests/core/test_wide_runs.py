"""Wide runs: what answers bring grows with the number of steps, not with its square."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from pyworkflow import step, workflow
from pyworkflow.spi import Answer, Change, Committed
from pyworkflow.spi.storage import TURN
from pyworkflow.storage.memory import MemoryStorageBackend
from tests.core._driving import bench


@step(dispatch="queue")
async def wide_dispatched(n: int) -> int:
    return n


@step
async def wide_in_place(n: int) -> int:
    return n


class _Counting(MemoryStorageBackend):
    """Counts the events of others that answers bring."""

    brought = 0

    async def commit(self, changes: Sequence[Change]) -> list[Answer]:
        answers = await super().commit(changes)
        for change, answer in zip(changes, answers, strict=True):
            if isinstance(answer, Committed):
                self.brought += len(answer.unseen_events)
                turn = any(item.item_id == TURN for item in answer.claims)
                if change.claim is None or (change.claim.item_id != TURN and not turn):
                    assert list(answer.unseen_events) == []
        return answers


@pytest.mark.parametrize("made", [wide_dispatched, wide_in_place], ids=lambda made: made.name)
def test_o04_answers_of_a_wide_run_grow_with_its_steps(made: object) -> None:
    @workflow
    async def wide_run(number: int) -> int:
        return sum(await asyncio.gather(*(made(n) for n in range(number))))  # type: ignore[operator]

    async def brought(number: int) -> int:
        store = _Counting()
        async with bench(store) as b:
            assert await b.run(wide_run, number) == sum(range(number))
        return store.brought

    few, many = asyncio.run(brought(100)), asyncio.run(brought(400))
    assert many <= 6 * max(few, 200)
