"""The kit for servers: one load per transaction, and a wait that backs off."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta

import pytest

from pyworkflow._memory import MemoryStorageBackend
from pyworkflow.errors import KeyTaken, RunExists
from pyworkflow.events import Event
from pyworkflow.runs import ItemKind, RunStatus
from pyworkflow.spi import (
    Change,
    Claim,
    ClaimRequest,
    Committed,
    Control,
    ControlKind,
    LeaseFor,
    NewRun,
    Put,
    Settle,
    StorageBackend,
)
from pyworkflow.storekit.remote import Look, Poller, Touched, touched
from tests.core.remote_store import RemoteBackend, Server

S = timedelta(seconds=1)
NOW = datetime(2026, 1, 1, tzinfo=UTC)
FIRST = Event("workflow.started", "I", {"workflow": "flow", "args": "[]"})


def new(run_id: str, key: str | None = None) -> Change:
    create = NewRun(workflow="flow", version="1", args="[]", idempotency_key=key)
    return Change(run_id=run_id, key=f"start:{run_id}", create=create, events=[FIRST])


def under(claim: Claim, n: int, **fields: object) -> Change:
    token = claim.ref.token
    return Change(run_id=claim.item.run_id, key=f"{token}:{n}", claim=claim.ref, **fields)


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.stop()


Body = Callable[[RemoteBackend], Awaitable[None]]


def carry_out(server: Server, body: Body) -> None:
    async def main() -> None:
        async with RemoteBackend(server.port, "default") as store:
            await body(store)

    asyncio.run(main())


def test_d01_each_kind_of_change_is_decided_after_one_load(server: Server) -> None:
    async def once(store: StorageBackend, change: Change) -> Committed:
        server.calls.clear()
        answer = await store.commit_one(change)
        assert server.calls.count("load") == 1, change
        return answer

    async def body(store: RemoteBackend) -> None:
        await once(store, new("run", "a key"))
        request = ClaimRequest(owner="w", lease=60 * S)
        (claim,) = (await store.claim(request)).claims
        puts = [
            Put(item_id="step:1", kind=ItemKind.STEP, claimed=LeaseFor("w", 60 * S)),
            Put(item_id="step:2", kind=ItemKind.STEP),
            Put(item_id="deliver:1", kind=ItemKind.DELIVER),
        ]
        events = [Event("sleep.created", "C", {}, op="1#1:sleep", key="k1")]
        await once(
            store, under(claim, 1, seen=1, events=events, put=puts, settle=Settle(keep=True))
        )
        timer = Event("timer.fired", "I", {}, key="timer")
        await once(store, Change(run_id="run", key="outside", events=[timer]))
        await once(store, under(claim, 2, drop=["step:1"], events=events, settle=Settle(keep=True)))
        pause = Control(ControlKind.PAUSE)
        await once(store, Change(run_id="run", key="pause", control=pause))
        await once(store, Change(run_id="run", key="unpause", control=Control(ControlKind.UNPAUSE)))
        done = [Event("workflow.completed", "C", {"result": "null"})]
        await once(store, under(claim, 3, seen=3, events=done, final=RunStatus.COMPLETED))

    carry_out(server, body)


def test_d01_a_change_sent_again_reads_what_its_answer_needs(server: Server) -> None:
    async def body(store: RemoteBackend) -> None:
        await store.commit_one(new("run"))
        (claim,) = (await store.claim(ClaimRequest(owner="w", lease=60 * S))).claims
        timer = Event("timer.fired", "I", {}, key="timer")
        await store.commit_one(Change(run_id="run", key="outside", events=[timer]))
        born = Put(item_id="step:1", kind=ItemKind.STEP, claimed=LeaseFor("w", 60 * S))
        change = under(claim, 1, seen=1, put=[born], settle=Settle(keep=True))
        first = await store.commit_one(change)
        await store.commit_one(Change(run_id="run", key="later", events=[FIRST]))
        again = await store.commit_one(change)
        assert again.duplicate
        assert list(again.unseen_events) == list(first.unseen_events) != []
        assert list(again.claims) == list(first.claims) != []

    carry_out(server, body)


def test_d01_changes_of_one_batch_see_each_other(server: Server) -> None:
    async def body(store: RemoteBackend) -> None:
        timer = Event("timer.fired", "I", {}, key="timer")
        answers = await store.commit(
            [
                new("b", "a key"),
                Change(run_id="b", key="one", events=[timer]),
                new("a", "a key"),
                Change(run_id="b", key="two", events=[timer]),
                Change(run_id="b", key="one", events=[timer]),
                Change(run_id="b", key="other", create=new("b").create, events=[FIRST]),
            ]
        )
        created, one, taken, two, again, exists = answers
        assert isinstance(created, Committed)
        assert isinstance(one, Committed)
        assert one.seqs == [2]
        assert isinstance(taken, KeyTaken)
        assert isinstance(two, Committed)
        assert two.skipped == {0}
        assert isinstance(again, Committed)
        assert again.duplicate
        assert isinstance(exists, RunExists)
        assert server.calls.count("load") == 1
        assert [event.seq for event in await store.get_events("b")] == [1, 2]
        assert await store.get_run("a") is None

    carry_out(server, body)


def test_d01_what_two_changes_touch_is_joined() -> None:
    def reads(after: int | None, *, unseen: bool = False) -> Touched:
        return Touched(run_id="run", after=after, unseen=unseen)

    assert reads(None) | reads(None) == reads(None)
    assert reads(None) | reads(4, unseen=True) == reads(4, unseen=True)
    assert reads(3, unseen=True) | reads(4, unseen=True) == reads(3, unseen=True)
    assert reads(3) | reads(4, unseen=True) == reads(3)
    joined = touched(new("run", "k")) | touched(Change(run_id="run", key="c", drop=["step:1"]))
    assert joined.owners == {"k"}
    assert joined.items == {"turn", "step:1"}
    assert joined.answers == {"start:run", "c"}


class Counted(MemoryStorageBackend):
    """A store with the inherited wait, whose looks are counted."""

    looks = 0

    async def next_due(self, **filters: object) -> datetime | None:
        self.looks += 1
        return await super().next_due(**filters)

    watch = StorageBackend.watch


def test_d05_the_inherited_wait_of_an_idle_worker_backs_off() -> None:
    async def main() -> None:
        async with Counted() as store:
            assert await store.watch(None, after=0, timeout=S)  # the first look
            for _ in range(2):
                assert not await store.watch(None, after=0, timeout=S)
            store.looks = 0
            assert not await store.watch(None, after=0, timeout=S)
            assert store.looks <= 4
            waiting = asyncio.ensure_future(store.watch(None, after=0, timeout=60 * S))
            await store.commit_one(new("run"))
            assert await waiting

    asyncio.run(main())


def test_d05_a_poller_serves_all_waiters_with_one_look_and_backs_off() -> None:
    async def main() -> None:
        looks: list[frozenset[str]] = []
        third = asyncio.Event()
        progress: dict[str, tuple[int, bool]] = {"a": (1, False), "b": (1, False)}
        due: list[datetime | None] = [None]

        async def look(run_ids: frozenset[str]) -> Look:
            looks.append(run_ids)
            if len(looks) == 3:
                third.set()
            return Look(progress=progress, due=due[0])

        poller = Poller(look)
        assert await poller.wait(None, after=0, timeout=S)
        waits = [poller.wait(run_id, after=1, timeout=60 * S) for run_id in ("a", "b", "b")]
        tasks = [asyncio.ensure_future(each) for each in waits]
        await third.wait()
        assert looks[-1] == {"a", "b"}
        progress["b"] = (2, False)
        assert await asyncio.gather(*tasks[1:]) == [True, True]
        progress["a"] = (1, True)
        assert await tasks[0]
        looks.clear()
        for _ in range(3):
            assert not await poller.wait(None, after=0, timeout=S)
        assert len(looks) <= 14
        worker = asyncio.ensure_future(poller.wait(None, after=0, timeout=60 * S))
        due[0] = NOW
        assert await worker
        await poller.close()

    asyncio.run(main())


def test_d05_an_error_of_a_look_reaches_the_waiters_and_the_next_wait_looks_again() -> None:
    async def main() -> None:
        broken = True

        async def look(run_ids: frozenset[str]) -> Look:
            if broken:
                raise ConnectionError("gone")
            return Look(progress=dict.fromkeys(run_ids, (1, False)))

        poller = Poller(look)
        with pytest.raises(ConnectionError):
            await poller.wait("run", after=0, timeout=60 * S)
        broken = False
        assert await poller.wait("run", after=0, timeout=60 * S)
        # A wait right after the last one ended has a look of its own.
        assert await poller.wait("run", after=0, timeout=60 * S)
        waiting = asyncio.ensure_future(poller.wait("run", after=9, timeout=60 * S))
        await asyncio.sleep(0)
        await poller.close()
        assert not await waiting

    asyncio.run(main())
