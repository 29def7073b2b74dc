"""Layers L2 and L3 (group MOD): any order of calls leaves a store equal to the reference store.

L2 lets Hypothesis look for the shortest sequence of calls after which they differ; L3 is one long
random trace that goes on until every operation and every refusal has occurred.
"""
# ruff: noqa: N802 - the ids are part of the names

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from typing import Any, Protocol, TypeVar

from pyworkflow.events import Event
from pyworkflow.runs import ErrorInfo, ItemKind, ParentRef, RunStatus
from pyworkflow.spi.storage import (
    TURN,
    Change,
    Claim,
    ClaimRef,
    ClaimRequest,
    Control,
    ControlKind,
    LeaseFor,
    NewRun,
    Put,
    RunQuery,
    Settle,
    StorageBackend,
    Update,
)
from pyworkflow_conformance._case import Case, Suite, scenario, seconds
from pyworkflow_conformance._children import dice, sizes
from pyworkflow_conformance._oracle import Pair

__all__ = ["ACTIONS", "Actions", "Chooser", "ModelChecks"]

T = TypeVar("T")
RUNS = 5
KEYS = ["k0", "k1", "k2"]
OWNERS = ["a", "b"]
QUEUES = ["default", "q"]
FLOWS = ["flow", "other"]
ITEMS = ["step:1", "step:2", "deliver:1"]
TERMINAL = sorted(status for status in RunStatus if status.is_terminal)

#: All of these must occur in a trace of L3.
EXPECTED = frozenset(
    [
        "commit",
        "duplicate",
        "create",
        "seen",
        "final",
        "update",
        "take_turn",
        "drop",
        "put",
        "RunExists",
        "RunNotFound",
        "RunClosed",
        "Fenced",
        "UnseenInput",
        "KeyTaken",
        "ValueError",
        "batch",
        "renew",
        "release",
        "announce",
        "free",
        "purge",
        "shift",
        "reopen",
        "reads",
    ]
) | {
    "claim by poll",
    "claim by ref",
    "claims in an answer",
    "event C",
    "key of a purged run",
    "event I",
    "event O",
    "release stale",
    "renew lost",
    "settle again",
    "settle gone",
    "settle keep",
    "under a claim",
    *(f"control {kind}" for kind in ControlKind),
}


class Chooser(Protocol):
    """Where choices come from: chance, or Hypothesis."""

    def choice(self, options: Sequence[T]) -> T:
        """One of them."""
        ...

    def below(self, number: int) -> int:
        """0 to ``number`` - 1."""
        ...


class Chance:
    """Choices by chance."""

    def __init__(self, source: random.Random) -> None:
        self._random = source

    def choice(self, options: Sequence[T]) -> T:
        """One of them."""
        return options[self._random.randrange(len(options))]

    def below(self, number: int) -> int:
        """A number."""
        return self._random.randrange(number)


class Actions:
    """Calls of the contract with chosen arguments, made on a pair of stores."""

    def __init__(self, pair: Pair, opened: Callable[[], Awaitable[StorageBackend]]) -> None:
        self.pair = pair
        self._opened = opened
        self._number = 0
        self._runs = [f"r{n}" for n in range(RUNS)]

    # --- what changes are made of -------------------------------------------------------------

    def _event(self, pick: Chooser) -> Event:
        self._number += 1
        kind, klass = pick.choice(
            [("timer.fired", "I"), ("sleep.created", "C"), ("log.info", "O"), ("signal", "I")]
        )
        key = pick.choice([None, None, *KEYS])
        op = pick.choice([None, "1#1:sleep"])
        return Event(kind, klass, {"n": self._number, "t": "\u00e9"}, op=op, key=key)

    def _events(self, pick: Chooser) -> list[Event]:
        return [self._event(pick) for _ in range(pick.choice([0, 1, 1, 2, 3]))]

    async def _due(self, pick: Chooser) -> datetime | None:
        by = pick.choice([None, None, -50, 10, 1000])
        return None if by is None else await self.pair.store.now() + seconds(by)

    async def _puts(self, pick: Chooser) -> list[Put]:
        made: list[Put] = []
        for _ in range(pick.choice([0, 0, 1, 2])):
            kind = pick.choice(list(ItemKind))
            fields: dict[str, Any] = {"due_at": await self._due(pick)}
            if pick.below(3) == 0:
                fields |= {"queue": pick.choice(QUEUES), "priority": pick.below(3)}
            if pick.below(3) == 0:
                fields["payload"] = {"p": pick.below(5)}
            if pick.below(4) == 0:
                fields["claimed"] = self._held(pick)
            else:
                fields["notified"] = pick.below(3) == 0
            name = TURN if kind is ItemKind.TURN else f"{kind}:{pick.choice(['1', '2'])}"
            made.append(Put(item_id=name, kind=kind, **fields))
        return made

    def _held(self, pick: Chooser) -> LeaseFor:
        return LeaseFor(owner=pick.choice(OWNERS), lease=seconds(pick.choice([20, 500])))

    def _update(self, pick: Chooser) -> Update | None:
        error = ErrorInfo(type="m:E", message="x", details={"a": [1]})
        return pick.choice(
            [
                None,
                None,
                Update(result="[1]"),
                Update(error=error, next="r9"),
                Update(attributes={pick.choice(["a", "b"]): pick.below(9)}),
                Update(attributes={"a": {"deep": [None, 1.5, 2**60]}}),
            ]
        )

    def _key(self) -> str:
        self._number += 1
        return f"outside:{self._number}"

    # --- calls --------------------------------------------------------------------------------

    async def start(self, pick: Chooser) -> None:
        """Create a run, perhaps one that is there, perhaps under a key that is taken."""
        now = await self.pair.store.now()
        if pick.below(4) == 0:
            # Runs that ended and still owe a delivery would be all that is left.
            self._number += 1
            self._runs[pick.below(RUNS)] = f"r{self._number}"
        fields: dict[str, Any] = {}
        if pick.below(2):
            # New ones, too: a run that is never ended keeps its own for ever.
            fields["idempotency_key"] = pick.choice([*KEYS, f"key-{self._number // 40}"])
        if pick.below(3) == 0:
            fields |= {"queue": pick.choice(QUEUES), "priority": pick.below(3), "tags": ("a",)}
        if pick.below(4) == 0:
            fields |= {
                "parent": ParentRef(run_id=pick.choice(self._runs), op="1#1:child"),
                "root": "r0",
                "attributes": {"a": 1},
                "deadline": now + seconds(1000),
            }
        first = Event("workflow.started", "I", {"workflow": "flow", "args": "[]"})
        events = pick.choice([[first], [first], [first, self._event(pick)]])
        await self.pair.commit(
            Change(
                run_id=pick.choice(self._runs),
                key=pick.choice(["start", "start", self._key()]),
                create=NewRun(workflow=pick.choice(FLOWS), version="1", args="[]", **fields),
                events=events,
                update=self._update(pick),
                put=await self._puts(pick),
                final=pick.choice([None] * 8 + [RunStatus.FAILED]),
            )
        )

    async def _outside(self, pick: Chooser) -> Change:
        take = self._held(pick) if pick.below(4) == 0 else None
        return Change(
            run_id=pick.choice(self._runs),
            key=self._key(),
            events=self._events(pick),
            update=self._update(pick),
            put=await self._puts(pick),
            take_turn=take,
        )

    async def send(self, pick: Chooser) -> None:
        """A change from outside."""
        await self.pair.commit(await self._outside(pick))

    async def send_many(self, pick: Chooser) -> None:
        """Several at once, over several runs."""
        changes = [await self._outside(pick) for _ in range(1 + pick.below(4))]
        await self.pair.commit_all(changes)

    async def send_again(self, pick: Chooser) -> None:
        """A change that was accepted before, as somebody sends who did not get the answer."""
        if self.pair.changes:
            await self.pair.commit(pick.choice(self.pair.changes[-30:]))

    async def control(self, pick: Chooser) -> None:
        """Pause, heal, cancel or terminate a run from outside."""
        kind = pick.choice(list(ControlKind))
        closes = kind in (ControlKind.CANCEL, ControlKind.TERMINATE)
        final = pick.choice([RunStatus.CANCELLED, RunStatus.TERMINATED]) if closes else None
        await self.pair.commit(
            Change(
                run_id=pick.choice(self._runs),
                key=self._key(),
                control=Control(kind, pick.choice(["", "why"])),
                events=self._events(pick) if pick.below(2) else [],
                final=final,
            )
        )

    async def claim_by_ref(self, pick: Chooser) -> None:
        """Named items."""
        items = [
            (pick.choice(self._runs), pick.choice([TURN, TURN, *ITEMS]))
            for _ in range(1 + pick.below(3))
        ]
        known = {run_id: pick.below(4) for run_id, _ in items if pick.below(3) == 0}
        await self.pair.claim(
            ClaimRequest(
                owner=pick.choice(OWNERS),
                lease=seconds(pick.choice([20, 500])),
                items=items,
                limit=1 + pick.below(3),
                known=known,
            )
        )

    async def claim_by_poll(self, pick: Chooser) -> None:
        """Whatever is due, with filters."""
        kinds = frozenset({pick.choice(list(ItemKind))})
        await self.pair.claim(
            ClaimRequest(
                owner=pick.choice(OWNERS),
                lease=seconds(pick.choice([20, 500])),
                limit=1 + pick.below(4),
                queues=pick.choice([None, None, frozenset({"q"}), frozenset(QUEUES)]),
                kinds=pick.choice([None, None, kinds]),
                workflows=pick.choice([None, frozenset({"flow"})]),
            )
        )

    def _claim(self, pick: Chooser) -> Claim | None:
        """One of the last claims: more often than not it still holds."""
        claims = self.pair.claims[-12:]
        return pick.choice([*claims, *claims[-3:], *claims[-3:]]) if claims else None

    async def work(self, pick: Chooser) -> None:
        """A change under a claim, alive or not."""
        claim = self._claim(pick)
        if claim is None:
            return
        run_id, item = claim.item.run_id, claim.item
        length = len(self.pair.oracle.get_events(run_id))
        is_turn = item.item_id == TURN or pick.below(12) == 0
        # One in flight at a time: the same key twice is the same change, which send_again does.
        seen = pick.choice([None, 1, length, length, length])
        if pick.below(10) == 9:
            seen = length + 9
        final = pick.choice([None, None, None, pick.choice(TERMINAL)])
        stall = Control(ControlKind.STALL, pick.choice(["x", "y"]))
        control = pick.choice([None, None, None, None, stall, Control(ControlKind.UNSTALL)])
        again = await self._due(pick)
        payload = pick.choice([None, None, {"try": pick.below(3)}])
        settle = pick.choice(
            [
                None,
                Settle(),
                Settle(reschedule_at=again or await self.pair.store.now(), payload=payload),
                Settle(keep=True, payload=payload),
            ]
        )
        await self.pair.commit(
            Change(
                run_id=run_id,
                key=f"{claim.ref.token}:{self._key()}",
                claim=claim.ref,
                seen=seen if is_turn else None,
                final=None if control is not None else final,
                control=control if final is None and is_turn else None,
                events=self._events(pick),
                update=self._update(pick),
                drop=pick.choice([(), (), ["step:1"], ["step:2", "deliver:1"]]) if is_turn else (),
                settle=settle,
                put=await self._puts(pick),
                take_turn=self._held(pick) if pick.below(3) == 0 else None,
            )
        )

    async def renew(self, pick: Chooser) -> None:
        """Keep claims, alive or not."""
        if claim := self._claim(pick):
            refs = [claim.ref]
            if pick.below(3) == 0:
                refs.append(ClaimRef(pick.choice(self._runs), TURN, "no-such-token"))
            await self.pair.renew(refs, seconds(pick.choice([20, 500])))

    async def release(self, pick: Chooser) -> None:
        """Give something back."""
        if claim := self._claim(pick):
            delay = pick.choice([None, seconds(0), seconds(100)])
            await self.pair.release(claim.ref, delay)

    async def announce(self, pick: Chooser) -> None:
        """Ring for what is due."""
        await self.pair.announce(seconds(pick.choice([0, 30])))

    async def free(self, pick: Chooser) -> None:
        """A process is gone."""
        await self.pair.free(pick.choice(OWNERS))

    async def purge(self, pick: Chooser) -> None:
        """Remove old runs."""
        now = await self.pair.store.now()
        before = now + seconds(pick.choice([-100, 1000]))
        await self.pair.purge(before, seconds(pick.choice([0, 2000])))

    async def retire(self, pick: Chooser) -> None:
        """A run is terminated, what it owes is delivered, and it is purged."""
        run_id = pick.choice(self._runs)
        control = Control(ControlKind.TERMINATE, "over")
        await self.pair.commit(
            Change(run_id=run_id, key=self._key(), control=control, final=RunStatus.TERMINATED)
        )
        await self.pair.shift(seconds(1100))
        owed = [item.item_id for item in self.pair.oracle.list_work(run_id)]
        if owed:
            items = [(run_id, item_id) for item_id in owed]
            request = ClaimRequest(owner="a", lease=seconds(20), items=items, limit=len(items))
            for claim in await self.pair.claim(request):
                key = f"{claim.ref.token}:{self._key()}"
                await self.pair.commit(
                    Change(run_id=run_id, key=key, claim=claim.ref, settle=Settle())
                )
        before = await self.pair.store.now() + seconds(1000)
        await self.pair.purge(before, seconds(pick.choice([0, 9000])))

    async def advance(self, pick: Chooser) -> None:
        """Time passes."""
        await self.pair.shift(seconds(pick.choice([5, 25, 25, 700, 3000])))

    async def set_back(self, pick: Chooser) -> None:
        """Somebody sets the clock back."""
        await self.pair.shift(seconds(-pick.choice([5, 40])))

    async def reopen(self, pick: Chooser) -> None:
        """A client restarts."""
        await self.pair.reopen(self._opened)

    async def read(self, pick: Chooser) -> None:
        """Listings and keys."""
        status = frozenset({pick.choice(list(RunStatus)), pick.choice(list(RunStatus))})
        query = RunQuery(
            status=pick.choice([None, status]),
            workflow=pick.choice([None, *FLOWS]),
            limit=pick.choice([1, 3, 100]),
        )
        await self.pair.compare_reads(query, self.pair.keys[-6:])


#: How often each is done, relative to the others.
ACTIONS: dict[str, int] = {
    "start": 8,
    "send": 8,
    "send_many": 3,
    "send_again": 5,
    "control": 5,
    "claim_by_ref": 8,
    "claim_by_poll": 9,
    "work": 22,
    "renew": 3,
    "release": 3,
    "announce": 2,
    "free": 1,
    "purge": 2,
    "retire": 2,
    "advance": 4,
    "set_back": 1,
    "reopen": 1,
    "read": 3,
}


class ModelChecks(Suite):
    """MOD."""

    @scenario
    async def test_MOD_01_equal_to_the_reference(self, t: Case) -> None:
        """MOD-01 (L2): whatever is called in whatever order, the store equals the reference store.

        Rows, histories, items, answers and refusals, to the microsecond. Usual cause: a rule of
        ``commit`` was written anew instead of calling ``decide``.
        """
        from pyworkflow_conformance._stateful import explore

        seed = int(getattr(self, "seed", 0))
        await asyncio.to_thread(explore, self, t.namespace, seed, sizes(20, 150), sizes(30, 60))

    @scenario
    async def test_MOD_02_long_trace(self, t: Case) -> None:
        """MOD-02 (L3): one long trace, until every operation and every refusal has occurred.

        Usual cause: what goes wrong only after purges, restarts and hours.
        """
        chance = dice(t, "MOD-02")
        pair = Pair([t.store, await t.open()])
        actions = Actions(pair, t.open)
        pick = Chance(chance)
        weighted = [name for name, weight in ACTIONS.items() for _ in range(weight)]
        least, most = sizes(500, 6000), sizes(4000, 12_000)
        missing = EXPECTED
        for n in range(most):
            missing = EXPECTED - {name for name, times in pair.seen.items() if times}
            if n >= least and not missing:
                break
            await getattr(actions, chance.choice(weighted))(pick)
        else:
            raise AssertionError(f"in {most} calls these never occurred: {sorted(missing)}")
        await pair.compare_all()
        t.store = pair.stores[0]
