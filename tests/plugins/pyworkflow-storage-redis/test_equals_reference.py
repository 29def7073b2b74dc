"""The rules in Lua are those of the reference store: both get the same random calls."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest

from pyworkflow.errors import RunClosed, RunNotFound
from pyworkflow.spi import (
    Change,
    Claimed,
    ClaimRef,
    ClaimRequest,
    Committed,
    Control,
    ControlKind,
    ErrorInfo,
    Event,
    ItemKind,
    LeaseFor,
    NewRun,
    ParentRef,
    Put,
    Refusal,
    RunQuery,
    RunStatus,
    Settle,
    Update,
)
from pyworkflow.storekit import ReferenceStore
from pyworkflow_storage_redis import RedisStorageBackend
from pyworkflow_storage_redis._link import Link
from tests.servers import GivenServer, ValkeyServer

RUNS = ["a", "b", "c", "ünï\0", "d" * 40]
WORKFLOWS = ["flow", "other:flow"]
QUEUES = ["default", "fast:1"]
ITEMS = ["step:1", "step:2", "deliver:1"]
TERMINAL = [status for status in RunStatus if status.is_terminal]


def seconds(number: float) -> timedelta:
    return timedelta(seconds=number)


class Pair:
    """The Redis store and the reference, which is told the instants and tokens of the other."""

    def __init__(self, store: RedisStorageBackend, seed: int) -> None:
        self.store = store
        self.reference = ReferenceStore()
        self.random = random.Random(seed)
        self.now: datetime
        self.claims: list[ClaimRef] = []
        self.sent: list[Change] = []
        self.kinds: set[str] = set()
        self.number = 0

    async def both(self, ours: Any, theirs: Callable[[], Any]) -> Any:
        """The answer of both, which must be equal."""
        refusal: Exception | None = None
        answer: Any = None
        try:
            answer = await ours
        except (Refusal, RunNotFound, RunClosed, ValueError) as error:
            refusal = error
        if refusal is not None:
            with pytest.raises(type(refusal)) as caught:
                theirs()
            assert caught.value.args == refusal.args
            self.kinds.add(type(refusal).__name__)
            return None
        assert theirs() == answer
        return answer

    def tokens(self, given: list[str]) -> Callable[[], str]:
        left = iter(given)
        return lambda: next(left, f"unused-{uuid4()}")

    async def commit(self, change: Change) -> None:
        given: list[str] = []

        async def ours() -> Committed:
            committed = await self.store.commit_one(change)
            assert not isinstance(committed.claims, str)
            leases = [item.lease for item in committed.claims]
            given.extend(lease.token for lease in leases if lease is not None)
            self.claims += [
                ClaimRef(change.run_id, item.item_id, item.lease.token)
                for item in committed.claims
                if item.lease is not None
            ]
            self.kinds.add("duplicate" if committed.duplicate else "committed")
            return plain(committed)

        def theirs() -> Committed:
            answer, _ = self.reference.commit(change, now=self.now, token=self.tokens(given))
            return plain(answer)

        await self.both(ours(), theirs)

    async def claim(self, request: ClaimRequest) -> None:
        given: list[str] = []

        async def ours() -> list[Any]:
            claimed: Claimed = await self.store.claim(request)
            given.extend(claim.ref.token for claim in claimed.claims)
            self.claims += [claim.ref for claim in claimed.claims]
            return [(c.item, c.run, list(c.events), c.after, c.cut) for c in claimed.claims]

        def theirs() -> list[Any]:
            claims, _ = self.reference.claim(request, now=self.now, token=self.tokens(given))
            return [(c.item, c.run, list(c.events), c.after, c.cut) for c in claims]

        await self.both(ours(), theirs)

    def event(self) -> Event:
        klass = self.random.choice("ICOO")
        key = self.random.choice([None, None, "k1", "k2", "k3\0", ""])
        return Event(f"type.{klass}", klass, {"n": 2**70, "f": -0.0}, op="1#1", key=key)

    def put(self) -> Put:
        pick = self.random
        name = pick.choice([*ITEMS, "turn"])
        kind = ItemKind(name.partition(":")[0])
        return Put(
            item_id=name,
            kind=kind,
            due_at=pick.choice([None, self.now + seconds(pick.randint(-20, 60))]),
            queue=pick.choice([None, *QUEUES]),
            priority=pick.choice([None, 5, -3]),
            payload=pick.choice([{}, {"p": 2**60, "s": "\0é"}]),
            notified=pick.random() < 0.3,
            claimed=LeaseFor("w", seconds(pick.randint(1, 60)))
            if kind is ItemKind.STEP and pick.random() < 0.3
            else None,
        )

    def change(self) -> Change:
        pick = self.random
        if self.sent and pick.random() < 0.12:
            return pick.choice(self.sent[-40:])
        self.number += 1
        run_id = pick.choice(RUNS)
        fields: dict[str, Any] = {"events": [self.event() for _ in range(pick.randint(0, 3))]}
        if pick.random() < 0.6:
            fields["put"] = [self.put() for _ in range(pick.randint(0, 2))]
        if pick.random() < 0.15:
            fields["update"] = Update(
                result=pick.choice([None, '{"r":1}']),
                error=pick.choice([None, ErrorInfo(type="m:E", message="x", details={"a": [1]})]),
                attributes=pick.choice([None, {"a": 1}, {"b\0": {"c": 2**65}}]),
                next=pick.choice([None, "next"]),
            )
        if pick.random() < 0.3:
            fields["take_turn"] = LeaseFor("w", seconds(pick.randint(1, 60)))
        key = f"outside:{self.number}"
        if pick.random() < 0.2:
            key = f"create:{run_id}:{pick.randint(0, 1)}"
            fields["create"] = NewRun(
                workflow=pick.choice(WORKFLOWS),
                version="1",
                args="[]",
                idempotency_key=pick.choice([None, "i1", "i2"]),
                parent=pick.choice([None, ParentRef(run_id="a", op="1")]),
                queue=pick.choice(QUEUES),
                priority=pick.choice([0, 2]),
                tags=pick.choice([(), ("x", "y")]),
                attributes=pick.choice([{}, {"z": None}]),
                deadline=pick.choice([None, self.now + seconds(9)]),
            )
            fields["events"] = [Event("workflow.started", "I", {}), *fields["events"]]
        elif self.claims and pick.random() < 0.75:
            claim = pick.choice(self.claims[-8:])
            run_id, key = claim.run_id, f"{claim.token}:{self.number}"
            fields["claim"] = claim
            if pick.random() < 0.6:
                fields["settle"] = Settle(
                    reschedule_at=pick.choice([None, self.now + seconds(pick.randint(-5, 30))]),
                    payload=pick.choice([None, {"try": 2}]),
                    keep=pick.random() < 0.4,
                )
            if pick.random() < 0.4:
                run = self.reference.get_run(run_id, now=self.now)
                fields["seen"] = pick.randint(0, 2 + (run.history_length if run else 0))
            if pick.random() < 0.2:
                fields["drop"] = [pick.choice(ITEMS)]
        control = None
        if "create" not in fields and pick.random() < 0.25:
            control = pick.choice([*ControlKind, ControlKind.PAUSE, ControlKind.UNPAUSE])
            if control is ControlKind.TERMINATE and pick.random() < 0.8:
                control = ControlKind.UNSTALL
            fields["control"] = Control(control, pick.choice(["", "reason"]))
        closes = control in (ControlKind.CANCEL, ControlKind.TERMINATE)
        if closes or (control is None and pick.random() < 0.04):
            fields["final"] = pick.choice(TERMINAL)
        change = Change(run_id=run_id, key=key, **fields)
        self.sent.append(change)
        return change

    async def step(self) -> None:
        pick, store, reference = self.random, self.store, self.reference
        kind = pick.choices(
            ["commit", "claim", "poll", "renew", "release", "announce", "free", "shift", "purge"],
            [60, 6, 8, 4, 4, 4, 1, 6, 2],
        )[0]
        self.kinds.add(kind)
        lease = seconds(pick.randint(0, 40))
        if kind == "commit":
            await self.commit(self.change())
        elif kind == "claim":
            refs = [(pick.choice(RUNS), pick.choice([*ITEMS, "turn", "turn"])) for _ in range(3)]
            await self.claim(ClaimRequest(owner="v", lease=lease, limit=2, items=refs))
        elif kind == "poll":
            await self.claim(
                ClaimRequest(
                    owner=pick.choice("vw"),
                    lease=lease,
                    limit=pick.randint(1, 3),
                    queues=pick.choice([None, None, frozenset(QUEUES[:1])]),
                    kinds=pick.choice([None, None, frozenset({ItemKind.STEP})]),
                    workflows=pick.choice([None, None, frozenset(WORKFLOWS[:1])]),
                    known={pick.choice(RUNS): pick.randint(-1, 9)},
                )
            )
        elif kind in {"renew", "release"} and self.claims:
            ref = pick.choice(self.claims[-8:])
            if kind == "renew":
                await self.both(
                    store.renew([ref, ref], lease),
                    lambda: reference.renew([ref, ref], lease, now=self.now)[0],
                )
            else:
                delay = pick.choice([None, lease])
                await self.both(
                    store.release(ref, delay=delay),
                    lambda: reference.release(ref, delay, now=self.now)[0],
                )
        elif kind == "announce":
            await self.both(
                store.announce(2, seconds(10)),
                lambda: reference.announce(2, seconds(10), now=self.now)[0],
            )
        elif kind == "free":
            await self.both(store.free("w"), lambda: reference.free("w", now=self.now)[0])
        elif kind == "shift":
            await store.shift_clock(seconds(pick.choice([1, 5, 30, -3])))
        elif kind == "purge":
            await store.now()
            before, keep = self.now - seconds(20), seconds(pick.choice([0, 60]))
            await self.both(
                store.purge(before=before, key_retention=keep),
                lambda: reference.purge(
                    before=before, limit=1000, key_retention=keep, now=self.now
                )[0],
            )

    async def compare(self) -> None:
        store, reference = self.store, self.reference
        for run_id in RUNS:
            await self.both(
                store.get_run(run_id), lambda r=run_id: reference.get_run(r, now=self.now)
            )
            assert await store.get_events(run_id) == reference.get_events(run_id)
            assert await store.list_work(run_id) == reference.list_work(run_id)
            assert await store.export_run(run_id) == reference.export_run(run_id)
        for query in (
            RunQuery(),
            RunQuery(workflow=WORKFLOWS[0]),
            RunQuery(status=frozenset({RunStatus.RUNNING, RunStatus.FAILED}), limit=2),
        ):
            await self.both(
                store.list_runs(query), lambda q=query: reference.list_runs(q, None, now=self.now)
            )
        await self.both(store.stats(), lambda: reference.stats(now=self.now))
        await self.both(store.holders(), lambda: reference.holders(now=self.now))
        await self.both(store.export_keys(), lambda: reference.export_keys(None))
        for key in ("i1", "i2"):
            await self.both(store.find_run(key), lambda k=key: reference.find_run(k, now=self.now))
        ours = await store.next_due()
        theirs = reference.next_due(queues=None, workflows=None, now=self.now)
        if ours != theirs:  # what is due already may be told by any instant of the past
            assert ours is not None
            assert theirs is not None
            assert max(ours, theirs) <= self.now


def plain(committed: Committed) -> Committed:
    """With sequences of one type."""
    committed.unseen_events, committed.claims = (
        list(committed.unseen_events),
        list(committed.claims),
    )
    committed.seqs = list(committed.seqs)
    return committed


@pytest.mark.parametrize("seed", range(6))
def test_random_calls_have_equal_answers_and_effects(
    seed: int, valkey: ValkeyServer | GivenServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with RedisStorageBackend(valkey.url, namespace=f"random-{uuid4()}") as store:
            pair = Pair(store, seed)
            ask = Link.ask

            async def asked(self: Link, script: str, *args: Any, again: bool = True) -> list[Any]:
                answer = await ask(self, script, *args, again=again)
                pair.now = datetime(1970, 1, 1, tzinfo=last.tzinfo) + timedelta(
                    microseconds=answer[1]
                )
                return answer

            last = await store.now()
            monkeypatch.setattr(Link, "ask", asked)
            await store.now()
            for number in range(700):
                await pair.step()
                if number % 10 == 9:
                    await pair.compare()
            seen.update(pair.kinds)

    seen: set[str] = set()
    asyncio.run(main())
    assert {"committed", "duplicate", "Fenced", "claim", "poll"} <= seen
