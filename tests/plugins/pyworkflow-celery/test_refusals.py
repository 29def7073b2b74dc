"""Doorbells that a process had no room for."""

from __future__ import annotations

import asyncio

from pyworkflow.errors import StorageUnavailable
from pyworkflow.spi import Doorbell, Outcome
from pyworkflow_celery import _refusals
from pyworkflow_celery._refusals import Refusals


class Room:
    """Handles what it has room for, until told that it is done with."""

    def __init__(self, room):
        self.room = room
        self.asked = []
        self.done = {}

    async def handle(self, bell):
        self.asked.append(bell.item_id)
        if len(self.done) >= self.room:
            return Outcome.BUSY
        self.done[bell.item_id] = asyncio.Event()
        await self.done[bell.item_id].wait()
        del self.done[bell.item_id]
        return Outcome.HANDLED


async def turn():
    for _ in range(10):
        await asyncio.sleep(0)


def bell(name):
    return Doorbell("run", name)


def test_what_is_refused_is_taken_when_something_is_done_with():
    async def main():
        room, refusals = Room(2), Refusals()
        tasks = [asyncio.create_task(refusals.handle(room.handle, bell(n))) for n in "abcde"]
        await turn()
        assert list(room.done) == ["a", "b"]
        for done, then in (("a", ["b", "c"]), ("b", ["c", "d"]), ("c", ["d", "e"]), ("d", ["e"])):
            room.done[done].set()
            await turn()
            assert list(room.done) == then
        room.done["e"].set()
        assert [await task for task in tasks] == [Outcome.HANDLED] * 2 + [Outcome.BUSY] * 3
        await turn()
        assert room.asked == list("abcdecde")

    asyncio.run(main())


def test_what_is_refused_although_there_is_room_is_somebody_elses():
    async def main():
        room, refusals = Room(0), Refusals()
        assert await refusals.handle(room.handle, bell("a")) is Outcome.BUSY
        await turn()
        assert room.asked == ["a"]

    asyncio.run(main())


def test_room_that_comes_while_the_store_is_asked_why_is_not_missed():
    class Slow(Room):
        """Says only later that there was no room."""

        async def handle(self, bell):
            full = len(self.done) >= self.room
            outcome = await super().handle(bell)
            if full:
                await said.wait()
            return outcome

    async def main():
        nonlocal said
        # The last one that is under way, or one of several: each ends before the refusal is heard.
        for begun, refused in (("a", "x"), ("a", "xy"), ("ab", "x"), ("ab", "xy"), ("abc", "x")):
            said = asyncio.Event()
            room, refusals = Slow(len(begun)), Refusals()
            for name in begun + refused:
                asyncio.create_task(refusals.handle(room.handle, bell(name)))  # noqa: RUF006 - ends
            await turn()
            room.done["a"].set()
            await turn()
            said.set()
            await turn()
            assert list(room.done) == [*begun[1:], "x"]
            for name in (*begun[1:], *refused):
                room.done[name].set()
                await turn()
            assert not room.done

    said = asyncio.Event()
    asyncio.run(main())


def test_it_is_not_tried_for_ever_and_keeps_no_other_from_being_tried(monkeypatch):
    monkeypatch.setattr(_refusals, "_TRIES", 3)

    async def main():
        refusals, long = Refusals(), asyncio.Event()
        asked = []

        async def handle(bell):
            asked.append(bell.item_id)
            if bell.item_id == "long":
                await long.wait()
            return Outcome.BUSY if bell.item_id == "theirs" else Outcome.HANDLED

        task = asyncio.create_task(refusals.handle(handle, bell("long")))
        await turn()
        await refusals.handle(handle, bell("theirs"))
        for _ in range(9):
            await refusals.handle(handle, bell("short"))
            await turn()
        assert asked.count("theirs") == 4
        long.set()
        await task

    asyncio.run(main())


def test_a_store_that_is_away_and_a_drain_end_it():
    async def main():
        room, refusals = Room(1), Refusals()
        task = asyncio.create_task(refusals.handle(room.handle, bell("a")))
        await turn()
        await refusals.handle(room.handle, bell("b"))

        async def away(bell):
            raise StorageUnavailable("away")

        refusals._again(away)
        await turn()
        await refusals.handle(room.handle, bell("c"))
        refusals.forget()
        room.done["a"].set()
        await task
        await turn()
        assert room.asked == ["a", "b", "c"]

    asyncio.run(main())
