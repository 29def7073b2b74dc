"""The rules in the server are those of the reference store: the same changes, the same answers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from itertools import count
from random import Random
from typing import Any

import pytest

from pyworkflow.spi import (
    Change,
    ClaimRef,
    ClaimRequest,
    Committed,
    Control,
    ControlKind,
    ErrorInfo,
    Event,
    ItemKind,
    Json,
    LeaseFor,
    NewRun,
    Put,
    RunStatus,
    Settle,
    Update,
)
from pyworkflow.storekit import ReferenceStore
from pyworkflow_storage_sql import PostgresStorageBackend
from tests.servers import GivenServer, PostgresServer

_NAMES = count()
_LEASE = timedelta(seconds=30)
_ODD: list[Json] = ["a\x00\x01b", 1e308, -0.0, 2**70, {"\x00": [None, True]}, "é\u2028", 1e5]


class _Pair:
    """A store and the reference beside it, which is told the store's clock and tokens."""

    def __init__(self, store: PostgresStorageBackend, seed: int) -> None:
        self.store = store
        self.reference = ReferenceStore()
        self.random = Random(seed)
        self.refs: list[ClaimRef] = []
        self.sent: list[Change] = []
        self.numbers = count(1)
        self.runs = ["r1", "r\x00" + "x" * 1000, "r3"]
        self.kinds: set[str] = set()

    async def commit(self, change: Change) -> None:
        answer: Any
        try:
            answer = await self.store.commit_one(change)
            now = answer.now
        except Exception as error:  # noqa: BLE001 - compared with the reference's
            answer = error
            now = await self.store.now()
        tokens: Iterator[str] = iter([])
        if isinstance(answer, Committed):
            tokens = iter([i.lease.token for i in answer.claims if i.lease is not None])
        expected: Any
        try:
            expected, _ = self.reference.commit(
                change, now=now, token=lambda: next(tokens, f"gone-{next(self.numbers)}")
            )
        except Exception as error:  # noqa: BLE001 - compared
            expected = error
        self.kinds.add(type(expected).__name__)
        if isinstance(expected, Committed):
            assert isinstance(answer, Committed), (change, answer, expected)
            assert _plain(answer) == _plain(expected), change
            self.refs += [
                ClaimRef(i.run_id, i.item_id, i.lease.token)
                for i in answer.claims
                if i.lease is not None
            ]
        else:
            assert type(answer) is type(expected), (change, answer, expected)
            if type(expected).__name__ == "UnseenInput":
                # A refusal has no clock of its own.
                fixed = [e._replace(timestamp=now) for e in answer.inputs]
                assert fixed == [e._replace(timestamp=now) for e in expected.inputs]
            else:
                assert answer.args == expected.args, change

    async def claim(self) -> None:
        choice = self.random.random()
        run_id = self.random.choice(self.runs)
        items = [item.item_id for item in await self.store.list_work(run_id)]
        request = ClaimRequest(
            owner=f"o{self.random.randrange(2)}",
            lease=_LEASE,
            limit=self.random.choice([1, 3, 50]),
            items=[(run_id, i) for i in items] if choice < 0.6 else None,
            workflows=frozenset({"flow"}) if choice < 0.2 else None,
            known={run_id: 2} if choice > 0.5 else {},
        )
        if request.items is None:
            request = replace(request, limit=50)  # ties may be broken in any order
        claimed = await self.store.claim(request)
        by_ref = {(c.item.run_id, c.item.item_id): c.item.lease for c in claimed.claims}
        wanted = replace(request, items=list(by_ref) or [("nothing", "")])
        tokens = iter([lease.token for lease in by_ref.values() if lease is not None])
        expected, _ = self.reference.claim(
            wanted if request.items is None else request,
            now=claimed.now,
            token=lambda: next(tokens),
        )
        for one, two in zip(claimed.claims, expected, strict=True):
            assert (one.item, list(one.events), one.after, one.cut) == (
                *(two.item, list(two.events), two.after, two.cut),
            )
            assert one.run == two.run
        self.refs += [c.ref for c in expected]

    def change(self) -> Change:
        r = self.random
        if self.sent and r.random() < 0.1:
            return r.choice(self.sent)
        run_id = r.choice(self.runs)
        key = f"k{next(self.numbers)}" if r.random() < 0.9 else "k" + "y" * 3000
        fields: dict[str, Any] = {}
        claim = None
        if self.refs and r.random() < 0.7:
            claim = r.choice(self.refs[-6:])
            run_id, key = claim.run_id, f"{claim.token}:{r.randrange(40)}"
        elif r.random() < 0.25:
            fields["create"] = NewRun(
                workflow=r.choice(["flow", "other"]),
                version="1",
                args="[\x00]",
                idempotency_key=r.choice([None, "idem", "i" * 2500]),
                tags=("a\x00", "b"),
                attributes={"x": r.choice(_ODD)},
                priority=r.randrange(2),
            )
            key = f"create-{r.randrange(4)}"
        fields["events"] = [
            Event(
                "some.thing",
                r.choice("CIO"),
                {"v": r.choice(_ODD)},
                key=r.choice([None, None, "e1", "e2", "e3" * 900]),
                v=r.choice([1, 1, 2]),
            )
            for _ in range(r.choice([0, 0, 1, 1, 2, 3]))
        ]
        if claim is not None:
            if r.random() < 0.5:
                fields["seen"] = r.randrange(12)
            if r.random() < 0.1:
                fields["drop"] = ["step:1", "step:2"]
            if r.random() < 0.5:
                fields["settle"] = Settle(
                    reschedule_at=r.choice(
                        [None, datetime.fromisoformat("2020-01-01T00:00:00+02:00")]
                    ),
                    payload=r.choice([None, {"p": r.choice(_ODD)}]),
                    keep=r.random() < 0.4,
                )
        if r.random() < 0.3:
            fields["update"] = Update(
                result=r.choice([None, "1\x00"]),
                error=r.choice([None, ErrorInfo(type="a:b", message="\x00")]),
                attributes=r.choice([None, {}, {"x": 1, "y": r.choice(_ODD)}, {"\x00": 1}]),
                next=r.choice([None, "n"]),
            )
        if r.random() < 0.15 and "create" not in fields:
            kind = r.choice(list(ControlKind))
            fields["control"] = Control(kind, r.choice(["", "why\x00"]))
            if kind in (ControlKind.CANCEL, ControlKind.TERMINATE):
                fields["final"] = RunStatus.CANCELLED
        elif r.random() < 0.07:
            fields["final"] = r.choice([RunStatus.COMPLETED, RunStatus.FAILED])
        closes = "final" in fields
        fields["put"] = [
            Put(
                item_id=name,
                kind=ItemKind.TURN if name == "turn" else ItemKind(name.partition(":")[0]),
                due_at=r.choice([None, None, datetime.fromisoformat("2090-01-01T00:00:00+00:00")]),
                notified=r.random() < 0.3,
                payload={"q": r.choice(_ODD)},
                claimed=LeaseFor("me\x00", _LEASE) if r.random() < 0.3 and not closes else None,
            )
            for name in ("turn", "step:1", "step:2", "deliver:" + "z" * 800)
            if r.random() < 0.12
        ]
        if r.random() < 0.3:
            fields["take_turn"] = LeaseFor("me", _LEASE)
        change = Change(run_id=run_id, key=key, claim=claim, **fields)
        self.sent.append(change)
        return change

    async def compare(self) -> None:
        now = await self.store.now()
        for run_id in self.runs:
            assert await self.store.list_work(run_id) == self.reference.list_work(run_id)
            assert await self.store.get_events(run_id) == self.reference.get_events(run_id)
            assert await self.store.get_run(run_id) == self.reference.get_run(run_id, now=now)
            one, two = await self.store.export_run(run_id), self.reference.export_run(run_id)
            assert (one is None) == (two is None)
            if one is not None and two is not None:
                assert {**one.fields, "number": 0} == {**two.fields, "number": 0}
                key = lambda record: (record.token is not None, record.token or record.key)  # noqa: E731 - read once
                assert sorted(one.records, key=key) == sorted(two.records, key=key)
                last = [r.token for r in two.records if r.token is not None]
                assert [r.token for r in one.records if r.token is not None] == last


def _plain(answer: Committed) -> Committed:
    return replace(
        answer,
        seqs=list(answer.seqs),
        unseen_events=list(answer.unseen_events),
        claims=list(answer.claims),
    )


@pytest.mark.parametrize("seed", range(6))
def test_every_rule_is_the_references_rule(
    postgres: PostgresServer | GivenServer, seed: int
) -> None:
    async def main() -> set[str]:
        namespace = f"rules-{seed}-{next(_NAMES)}"
        async with PostgresStorageBackend(postgres.database(), namespace=namespace) as store:
            pair = _Pair(store, seed)
            for step in range(250):
                dice = pair.random.random()
                if dice < 0.15:
                    await pair.claim()
                elif dice < 0.18:
                    await store.shift_clock(timedelta(seconds=20))
                else:
                    await pair.commit(pair.change())
                if step % 10 == 0:
                    await pair.compare()
            await pair.compare()
            return pair.kinds

    assert {"Committed", "Fenced"} <= asyncio.run(main())
