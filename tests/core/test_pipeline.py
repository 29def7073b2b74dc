"""The way of changes to the storage: in batches, of which several may be under way at once."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import ModuleType
from typing import Any

import pytest

from pyworkflow import Client, step, workflow
from pyworkflow._engine import keeper as keeper_module
from pyworkflow._engine import leases, pipeline
from pyworkflow._engine.outages import Outages
from pyworkflow._engine.pipeline import DIVISIBLE, Pipeline, StorageClock
from pyworkflow.errors import StorageError, StorageUnavailable
from pyworkflow.events import Event
from pyworkflow.runs import ItemKind
from pyworkflow.spi import (
    Answer,
    Change,
    Claimed,
    ClaimRef,
    ClaimRequest,
    Committed,
    LeaseFor,
    NewRun,
    Put,
    StorageInfo,
)
from pyworkflow.spi.storage import TURN
from pyworkflow.storage.memory import MemoryStorageBackend
from pyworkflow.storekit import fsck


class Gated(MemoryStorageBackend):
    """A store that takes several batches at once, and answers when it is told to."""

    def __init__(self, batches: int) -> None:
        super().__init__()
        self._batches = batches
        self.sent: list[list[Change]] = []
        self.gates: list[asyncio.Event] = []
        self.failing = 0
        """So many batches find the storage unavailable."""

    def info(self) -> StorageInfo:
        return replace(super().info(), batches=self._batches)

    async def commit(self, changes: Sequence[Change]) -> list[Answer]:
        gate = asyncio.Event()
        self.sent.append(list(changes))
        self.gates.append(gate)
        fails, self.failing = self.failing > 0, max(0, self.failing - 1)
        await gate.wait()
        if fails:
            raise StorageUnavailable("no answer; try again")
        return await super().commit(changes)

    @property
    def runs(self) -> list[list[str]]:
        """The runs of every batch so far."""
        return [[change.run_id for change in batch] for batch in self.sent]


def created(run_id: str) -> Change:
    started = Event("workflow.started", "I", {}, None, "started")
    new = NewRun(workflow="w", version="1", args="{}")
    return Change(run_id=run_id, key="create", create=new, events=[started])


def added(run_id: str, number: int) -> Change:
    line = Event("log.info", "O", {"message": str(number), "fields": {}})
    return Change(run_id=run_id, key=f"add:{number}", events=[line])


async def turns(number: int = 5) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


class Way:
    """A pipeline, and the answers that came out of it, in their order."""

    def __init__(self, storage: Gated, patience: float = 10.0) -> None:
        self.storage = storage
        self.clock = StorageClock()
        self.pipeline = Pipeline(storage, self.clock, patience)
        self.answers: list[tuple[str, str, Answer | Exception]] = []

    def send(self, *changes: Change) -> None:
        for change in changes:
            self.pipeline.submit(change, self._done(change))

    def _done(self, change: Change) -> Callable[[Answer | Exception], None]:
        return lambda answer: self.answers.append((change.run_id, change.key, answer))

    async def end(self) -> list[tuple[str, str]]:
        while True:
            for gate in self.storage.gates:
                gate.set()
            if not self.pipeline._senders:
                break
            await asyncio.sleep(0)
        assert all(isinstance(answer, Committed) for _, _, answer in self.answers), self.answers
        return [(run, key) for run, key, _ in self.answers]


def test_one_batch_is_under_way_unless_the_storage_says_otherwise() -> None:
    async def main() -> None:
        way = Way(Gated(1))
        way.send(created("a"))
        await turns()
        way.send(created("b"), created("c"))
        await turns()
        assert way.storage.runs == [["a"]]
        await way.end()
        assert way.storage.runs == [["a"], ["b", "c"]]

    asyncio.run(main())


def test_a_run_is_in_one_batch_at_a_time_and_its_changes_keep_their_order() -> None:
    async def main() -> None:
        way = Way(Gated(2))
        way.send(created("a"), added("a", 1))
        await turns()
        way.send(added("a", 2), created("b"), added("a", 3))
        await turns()
        way.send(added("a", 4), added("b", 1), created("c"))
        await turns()
        # Both are at the storage: "a" waits for the first, and all else of "b" for the second.
        assert way.storage.runs == [["a", "a"], ["b"]]
        way.storage.gates[1].set()
        await turns()
        assert way.storage.runs[2:] == [["b", "c"]]
        done = await way.end()
        assert [key for run, key in done if run == "a"] == [
            "create", "add:1", "add:2", "add:3", "add:4",
        ]  # fmt: skip
        assert way.storage.runs[3:] == [["a", "a", "a"]]

    asyncio.run(main())


def test_many_changes_are_divided_among_the_batches() -> None:
    async def main() -> None:
        way = Way(Gated(2))
        number = 2 * DIVISIBLE
        way.send(*[created(f"r{i}") for i in range(number)])
        await turns()
        assert [len(batch) for batch in way.storage.sent] == [DIVISIBLE, DIVISIBLE]
        assert len(await way.end()) == number

        few = Way(Gated(2))
        few.send(*[created(f"r{i}") for i in range(DIVISIBLE)])
        await turns()
        assert [len(batch) for batch in few.storage.sent] == [DIVISIBLE]
        await few.end()

    asyncio.run(main())


def test_a_batch_that_is_sent_again_holds_up_its_own_runs_alone() -> None:
    async def main() -> None:
        way = Way(Gated(2))
        way.storage.failing = 1
        way.send(created("a"))
        await turns()
        way.send(created("b"), added("a", 1))
        way.storage.gates[0].set()
        await turns()
        way.storage.gates[1].set()
        await turns()
        way.send(added("b", 1))
        await turns()
        way.storage.gates[2].set()
        await turns()
        assert way.storage.runs == [["a"], ["b"], ["b"]]
        assert [run for run, _, _ in way.answers] == ["b", "b"]
        assert [run for run, _ in await way.end()] == ["b", "b", "a", "a"]
        assert way.storage.runs[3:] == [["a"], ["a"]]

    asyncio.run(main())


def test_idle_waits_for_every_batch() -> None:
    async def main() -> None:
        way = Way(Gated(2))
        way.send(created("a"))
        await turns()
        way.send(created("b"))
        await turns()
        waiter = asyncio.create_task(way.pipeline.idle(timeout=60))
        way.storage.gates[1].set()
        await turns(10)
        assert not waiter.done()
        way.storage.gates[0].set()
        await waiter
        assert sorted(run for run, _, _ in way.answers) == ["a", "b"]
        await way.pipeline.idle(timeout=60)

    asyncio.run(main())


def test_answers_that_overtake_each_other_do_not_set_the_clock_back() -> None:
    clock = StorageClock()
    now = datetime(2030, 1, 1, tzinfo=UTC)
    clock.update(now)
    asked = clock._at - 1.0
    clock.update(now + timedelta(seconds=5), asked)
    latest = clock.micros()
    clock.update(now + timedelta(seconds=4), asked)
    assert clock.micros() >= latest
    clock.update(now - timedelta(hours=1))  # a storage whose own clock was set back is followed
    assert clock.micros() < latest


@step
async def pl_echo(x: int) -> int:
    return x


@step(dispatch="queue")
async def pl_queued(x: int) -> int:
    await asyncio.sleep(0)
    return x


@workflow
async def pl_flow(n: int) -> int:
    total = 0
    for i in range(n):
        total += sum(await asyncio.gather(pl_echo(i), pl_queued(i), pl_queued(1)))
        await asyncio.sleep(0)
    return total


class Late(MemoryStorageBackend):
    """Answers in any order, and now and then not at all, though the changes are stored."""

    def __init__(self, batches: int, seed: int) -> None:
        super().__init__()
        self._batches = batches
        self._random = random.Random(seed)
        self.most = self._now = 0
        self._runs: list[str] = []

    def info(self) -> StorageInfo:
        return replace(super().info(), batches=self._batches)

    async def commit(self, changes: Sequence[Change]) -> list[Answer]:
        runs = {change.run_id for change in changes}
        assert not runs.intersection(self._runs), "a run is in two batches"
        self._runs += runs
        self._now += 1
        self.most = max(self.most, self._now)
        try:
            await turns(self._random.randrange(8))
            answers = await super().commit(changes)
            await turns(self._random.randrange(8))
            if self._random.random() < 0.02:
                raise StorageUnavailable("the answer was lost")
            return answers
        finally:
            self._now -= 1
            for run in runs:
                self._runs.remove(run)


@pytest.mark.parametrize("batches", [2, 3])
def test_runs_end_as_they_do_with_one_batch(batches: int) -> None:
    async def main() -> Any:
        storage = Late(batches, seed=batches)
        async with storage, Client(storage=storage) as client:
            ids = await asyncio.gather(*[client.start(pl_flow, 3) for _ in range(60)])
            results = await asyncio.gather(*[client.result(i) for i in ids])
            report = [str(v) for v in await fsck(storage)]
            return results, report, storage.most

    results, report, most = asyncio.run(main())
    assert results == [9] * 60
    assert report == []
    assert most == batches


class Watch:
    """A clock that a test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
        self.now = 0.0
        monkeypatch.setattr(module, "monotonic", lambda: self.now)


LEASE = timedelta(seconds=10)


async def taken_over(storage: MemoryStorageBackend) -> None:
    """All leases run out, and another worker takes what was held."""
    await storage.shift_clock(2 * LEASE)
    assert (await storage.claim(ClaimRequest(owner="other", lease=LEASE, limit=9))).claims


@pytest.mark.parametrize(("lost", "silent"), [(True, False), (False, False), (True, True)])
def test_of_a_late_answer_only_claims_that_stand_are_told(
    monkeypatch: pytest.MonkeyPatch, lost: bool, silent: bool
) -> None:
    watch = Watch(monkeypatch, pipeline)

    class Late(MemoryStorageBackend):
        async def commit(self, changes: Sequence[Change]) -> list[Answer]:
            assert not watch.now, "what is answered is not asked again"
            answers = await super().commit(changes)
            watch.now = 6.0
            if lost:
                await taken_over(self)
            return answers

        async def renew(self, refs: Sequence[ClaimRef], lease: timedelta) -> list[bool]:
            if silent:
                raise StorageError("no more")
            return await super().renew(refs, lease)

    async def main() -> None:
        storage = Late()
        way = Pipeline(storage, StorageClock(), LEASE.total_seconds())
        turn = Put(item_id=TURN, kind=ItemKind.TURN, claimed=LeaseFor("me", LEASE))
        plain, claiming = await asyncio.gather(
            way.commit(created("b")), way.commit(replace(created("a"), put=[turn]))
        )
        assert not plain.claims
        assert [item.item_id for item in claiming.claims] == ([TURN] if silent or not lost else [])

    asyncio.run(main())


def test_the_answer_to_an_old_change_does_not_set_the_clock_back() -> None:
    async def main() -> None:
        storage, clock = MemoryStorageBackend(), StorageClock()
        way = Pipeline(storage, clock, 60.0)
        await way.commit(created("a"))
        await storage.shift_clock(timedelta(hours=1))
        clock.update(await storage.now())
        before = clock.micros()
        assert (await way.commit(created("a"))).duplicate
        assert clock.micros() >= before

    asyncio.run(main())


@pytest.mark.parametrize(("lost", "unavailable"), [(True, False), (False, False), (True, True)])
def test_of_a_late_claim_what_others_took_is_not_begun(
    monkeypatch: pytest.MonkeyPatch, lost: bool, unavailable: bool
) -> None:
    watch = Watch(monkeypatch, leases)

    class Late(MemoryStorageBackend):
        async def claim(self, request: ClaimRequest) -> Claimed:
            claimed = await super().claim(request)
            if request.owner == "me":
                watch.now = 6.0
                if lost:
                    await taken_over(self)
            return claimed

        async def renew(self, refs: Sequence[ClaimRef], lease: timedelta) -> list[bool]:
            if unavailable:
                raise StorageUnavailable("not now; try again")
            return await super().renew(refs, lease)

    async def main() -> None:
        storage = Late()
        await storage.commit_one(replace(created("a"), put=[Put(item_id=TURN, kind=ItemKind.TURN)]))
        claimed = await leases.claim(storage, ClaimRequest(owner="me", lease=LEASE))
        assert len(claimed.claims) == (not lost or unavailable)

    asyncio.run(main())


def test_after_a_pause_what_is_taken_up_while_it_asks_is_renewed_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A turn in an answer from before the pause begins in the very round of the loop that asks.
    watch = Watch(monkeypatch, keeper_module)
    early, late = ClaimRef("run", "step:1#1", "t1"), ClaimRef("run", TURN, "t2")
    asked: list[set[ClaimRef]] = []

    class Asked(MemoryStorageBackend):
        async def renew(self, refs: Sequence[ClaimRef], lease: timedelta) -> list[bool]:
            asked.append(set(refs))
            keeper.add(late)
            return [True] * len(refs)

    async def main() -> None:
        nonlocal keeper
        storage = Asked()
        keeper = keeper_module.LeaseKeeper(
            storage, LEASE, LEASE / 3, print, outages=Outages(storage.now, "me")
        )
        keeper.add(early)
        await keeper.after_pause(storage)
        assert asked == []
        watch.now = 11.0
        await keeper.after_pause(storage)
        await keeper.after_pause(storage)
        keeper.close()
        assert asked == [{early}, {early, late}]

    keeper: keeper_module.LeaseKeeper
    asyncio.run(main())


def test_a_read_is_asked_again_while_the_storage_is_unavailable() -> None:
    async def main() -> None:
        asked: list[int] = []

        async def answer(number: int, *, fails: int) -> int:
            asked.append(number)
            if len(asked) <= fails:
                raise StorageUnavailable("not now; try again")
            return number

        answered = Outages(MemoryStorageBackend().now, "me").answered
        assert await answered(timedelta(seconds=60), answer, 7, fails=2) == 7
        assert asked == [7, 7, 7]
        with pytest.raises(StorageUnavailable):
            await answered(timedelta(0), answer, 7, fails=9)
        assert len(asked) == 4

    asyncio.run(main())
