"""A store and the reference store, driven by the same calls and compared after each.

Nothing is approximate: the instant of each call is read off the store's own answer and given to
the reference store, so that both must end equal to the microsecond. Tokens are each store's own;
they are matched as they are issued. Where the contract leaves an order open (items that are due
at one instant) the store chooses, and the reference store follows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from itertools import count
from typing import Any, cast

from pyworkflow.errors import Refusal, RunClosed, RunNotFound, WorkflowError
from pyworkflow.events import Event
from pyworkflow.runs import ItemKind, Run, WorkItem
from pyworkflow.spi.storage import (
    Change,
    Claim,
    ClaimRef,
    ClaimRequest,
    Committed,
    NewRun,
    Put,
    RunQuery,
    Settle,
    StorageBackend,
    Update,
)
from pyworkflow.storekit import check_change, fsck
from pyworkflow.storekit.reference import ReferenceStore
from pyworkflow_conformance._clock import shift_clock
from pyworkflow_conformance._told import differences

__all__ = ["Divergence", "Pair"]

Open = Callable[[], Awaitable[StorageBackend]]


class Divergence(AssertionError):
    """The store is not what the contract says."""


class Pair:
    """A store under check, and its oracle. Calls are named as those of the contract."""

    def __init__(self, stores: list[StorageBackend]) -> None:
        self.stores = stores
        self.oracle = ReferenceStore()
        self.log: list[str] = []
        """What was done, to be printed when it went wrong."""
        self.seen: Counter[str] = Counter()
        """Operations, answers and refusals that occurred."""
        self.runs: list[str] = []
        """Ids that were tried; not all are there."""
        self.claims: list[Claim] = []
        """Claims as the store gave them, alive or not, the last ones."""
        self.changes: list[Change] = []
        """Accepted changes, to be sent again."""
        self.keys: list[str] = []
        """Idempotency keys that were tried."""
        self._turn = 0
        self._ours: dict[str, str] = {}  # a token of the store → the oracle's
        self._theirs: dict[str, str] = {}
        self._issued = count(1)

    @property
    def store(self) -> StorageBackend:
        """One of the objects on the store, each in turn."""
        self._turn += 1
        return self.stores[self._turn % len(self.stores)]

    # --- calls --------------------------------------------------------------------------------

    async def commit(self, change: Change) -> Committed | None:
        """Commit on both; None when both refuse, in the same words."""
        self.log.append(f"commit {_short(change)}")
        if change.run_id not in self.runs:
            self.runs.append(change.run_id)
        new = change.create
        if new is not None and new.idempotency_key and new.idempotency_key not in self.keys:
            self.keys.append(new.idempotency_key)
        answer: Committed | None = None
        refusal: Exception | None = None
        now = await self.stores[0].now()
        try:
            answer = await self.store.commit_one(change)
            now = answer.now
        except (WorkflowError, ValueError) as error:
            refusal = error
        self._follow(change, answer, refusal, now)
        await self.compare(change.run_id)
        return answer

    async def commit_all(self, changes: Sequence[Change]) -> None:
        """Commit in one call on the store, one after the other on the oracle."""
        self.log.append("commit " + "; ".join(map(_short, changes)))
        self.seen["batch"] += 1
        now = await self.stores[0].now()
        answers = await self.store.commit(changes)
        self.equal("the number of answers", len(answers), len(changes))
        for change, answer in zip(changes, answers, strict=True):
            if isinstance(answer, Committed):
                self._follow(change, answer, None, answer.now)
            else:
                self._follow(change, None, answer, now)
        for run_id in dict.fromkeys(change.run_id for change in changes):
            await self.compare(run_id)

    def _follow(
        self, change: Change, answer: Committed | None, refusal: Exception | None, now: datetime
    ) -> None:
        expected: Committed | None = None
        problem: Exception | None = None
        try:
            check_change(change, max_payload=2**24, max_events=10_000)
            expected, _ = self.oracle.commit(self._to_oracle(change), now=now, token=self._token)
        except (WorkflowError, ValueError) as error:
            problem = error
        if refusal is not None or problem is not None:
            self.equal("the refusal", _facts(refusal), _facts(problem))
            self.seen[type(refusal).__name__] += 1
            return
        assert answer is not None
        assert expected is not None
        self._pair(answer.claims, expected.claims)
        self.equal("the answer", _plain(answer), _plain(self._committed(expected)))
        self.seen["duplicate" if answer.duplicate else "commit"] += 1
        self.seen.update(_parts(change))
        if not answer.duplicate:
            self.changes.append(change)
        if answer.claims:
            self.seen["claims in an answer"] += 1
            run = self.oracle.get_run(change.run_id, now=now)
            assert run is not None
            self.claims += [Claim(item=item, run=run) for item in answer.claims]

    async def claim(self, request: ClaimRequest) -> list[Claim]:
        """Claim on the store; the oracle says whether these were the ones to give."""
        self.log.append(f"claim {_short(request)}")
        claimed = await self.store.claim(request)
        claims, now = list(claimed.claims), claimed.now
        refs = [(c.item.run_id, c.item.item_id) for c in claims]
        follow = request
        if request.items is None:
            candidates = self._candidates(request, now)
            order = [(-i.priority, i.due_at) for i in candidates][: request.limit]
            due = {(i.run_id, i.item_id): (-i.priority, i.due_at) for i in candidates}
            self.equal("what the poll chose", [due.get(ref) for ref in refs], order)
            self.equal("an item is given once", len(set(refs)), len(refs))
            follow = replace(request, items=refs, limit=max(1, len(refs)))
        self.seen["claim by poll" if request.items is None else "claim by ref"] += 1
        expected, _ = self.oracle.claim(follow, now=now, token=self._token)
        self.equal("the items", refs, [(c.item.run_id, c.item.item_id) for c in expected])
        self._pair([c.item for c in claims], [c.item for c in expected])
        for got, want in zip(claims, expected, strict=True):
            want = replace(want, item=self._item(want.item))
            self.equal("the claim", _plain(got), _plain(want))
        self.claims += claims
        for run_id in dict.fromkeys(run_id for run_id, _ in refs):
            await self.compare(run_id)
        return claims

    def _candidates(self, request: ClaimRequest, now: datetime) -> list[WorkItem]:
        found: list[WorkItem] = []
        for run_id in self.runs:
            run = self.oracle.get_run(run_id, now=now)
            if run is None:
                continue
            for item in self.oracle.list_work(run_id):
                delivery = item.kind is ItemKind.DELIVER
                if (
                    item.due_at <= now
                    and (item.lease is None or item.lease.until <= now)
                    and (not run.paused or delivery)
                    and (request.queues is None or item.queue in request.queues)
                    and (request.kinds is None or item.kind in request.kinds)
                    and (request.workflows is None or delivery or run.workflow in request.workflows)
                ):
                    found.append(item)
        return sorted(found, key=lambda i: (-i.priority, i.due_at))

    async def renew(self, refs: Sequence[ClaimRef], lease: timedelta) -> None:
        """Renew; how many are kept, and until when."""
        self.log.append(f"renew {refs} {lease}")
        kept = await self.store.renew(refs, lease)
        now = await self.stores[0].now()
        for ref, ok in zip(refs, kept, strict=True):
            held = {i.item_id: i for i in await self.stores[0].list_work(ref.run_id)}
            item = held.get(ref.item_id)
            if ok and item is not None and item.lease is not None:
                now = item.lease.until - lease
        expected, _ = self.oracle.renew([self._ref(r) for r in refs], lease, now=now)
        self.equal("what was renewed", kept, expected)
        for ok in kept:
            self.seen["renew" if ok else "renew lost"] += 1
        for run_id in dict.fromkeys(ref.run_id for ref in refs):
            await self.compare(run_id)

    async def release(self, ref: ClaimRef, delay: timedelta | None) -> None:
        """Give an item back."""
        self.log.append(f"release {ref} {delay}")
        done = await self.store.release(ref, delay=delay)
        now = await self.stores[0].now()
        if done and delay is not None:
            held = {i.item_id: i for i in await self.stores[0].list_work(ref.run_id)}
            now = held[ref.item_id].due_at - delay
        expected, _ = self.oracle.release(self._ref(ref), delay, now=now)
        self.equal("whether it was released", done, expected)
        self.seen["release" if done else "release stale"] += 1
        await self.compare(ref.run_id)

    async def announce(self, mute: timedelta) -> None:
        """What is due and nobody was told of."""
        self.log.append(f"announce {mute}")
        items = await self.store.announce(1000, mute)
        self.seen["announce"] += 1
        remembers = type(self.stores[0]).announce is not StorageBackend.announce
        if not remembers:
            return
        now = await self.stores[0].now()
        if items:
            assert items[0].rung_at is not None
            now = items[0].rung_at
        expected, _ = self.oracle.announce(1000, mute, now=now)
        by_place = {(i.run_id, i.item_id): i for i in map(self._item, expected)}
        found = {(i.run_id, i.item_id): i for i in items}
        self.equal("what was announced", found, by_place)
        order = [(-i.priority, i.due_at) for i in items]
        self.equal("the order of what was announced", order, sorted(order))

    async def free(self, owner: str) -> None:
        """End the leases of an owner."""
        self.log.append(f"free {owner}")
        before = {
            (item.run_id, item.item_id)
            for run_id in self.runs
            for item in self.oracle.list_work(run_id)
            if item.lease is not None and item.lease.owner == owner
        }
        freed = await self.store.free(owner)
        now = await self.stores[0].now()
        for run_id in {run_id for run_id, _ in before}:
            for item in await self.stores[0].list_work(run_id):
                place = (item.run_id, item.item_id)
                if place in before and item.lease is not None and item.lease.until <= now:
                    mine = {i.item_id: i for i in self.oracle.list_work(run_id)}[item.item_id]
                    if mine.lease is not None and mine.lease.until != item.lease.until:
                        now = item.lease.until
        expected, _ = self.oracle.free(owner, now=now)
        self.equal("how many leases were ended", freed, expected)
        self.seen["free"] += freed > 0
        for run_id in {run_id for run_id, _ in before}:
            await self.compare(run_id)

    async def purge(self, before: datetime, key_retention: timedelta) -> None:
        """Remove what ended."""
        self.log.append(f"purge {before} {key_retention}")
        removed = await self.store.purge(before=before, key_retention=key_retention)
        now = await self.stores[0].now()
        expected, _ = self.oracle.purge(
            before=before, limit=1000, key_retention=key_retention, now=now
        )
        self.equal("how many runs were purged", removed, expected)
        self.seen["purge"] += removed > 0
        owners = [self.oracle.find_run(key, now=now) for key in self.keys]
        gone = [owner for owner in owners if owner and self.oracle.get_run(owner, now=now) is None]
        self.seen["key of a purged run"] += bool(gone)
        await self.compare_all()

    async def shift(self, by: timedelta) -> None:
        """Move the clock."""
        self.log.append(f"shift {by}")
        await shift_clock(self.store, by)
        self.seen["shift"] += 1

    async def reopen(self, opened: Open) -> None:
        """Close one object and make another."""
        self.log.append("reopen")
        self._turn += 1
        place = self._turn % len(self.stores)
        await self.stores[place].close()
        self.stores[place] = await opened()
        self.seen["reopen"] += 1
        await self.compare_all()

    # --- comparing ----------------------------------------------------------------------------

    async def compare(self, run_id: str) -> None:
        """The run is equal in both."""
        store = self.store
        before = await store.now()
        run = await store.get_run(run_id)
        after = await store.now()
        views = [self.oracle.get_run(run_id, now=now) for now in (before, after)]
        if run != views[0] and run != views[1]:
            self.equal(f"the run {run_id}", _plain(run), _plain(views[1]))
        self.equal(
            f"the history of {run_id}",
            await store.get_events(run_id),
            self.oracle.get_events(run_id),
        )
        items = [self._item(item) for item in self.oracle.list_work(run_id)]
        self.equal(f"the items of {run_id}", await store.list_work(run_id), items)

    async def compare_all(self) -> None:
        """All that the reads show is equal, and nothing is unsound."""
        for run_id in self.runs:
            await self.compare(run_id)
        await self.compare_reads(RunQuery(limit=3), self.keys)
        store = self.store
        before = await store.now()
        listed: list[Run] = []
        cursor: str | None = None
        while True:
            page = await store.list_runs(RunQuery(limit=7), cursor)
            listed += page.items
            cursor = page.cursor
            if cursor is None:
                break
        expected = self.oracle.list_runs(RunQuery(limit=1000), None, now=before).items
        self.equal("the listing", [r.run_id for r in listed], [r.run_id for r in expected])
        holders = await store.holders()
        stats = await store.stats()
        due = await store.next_due()
        after = await store.now()
        if holders != self.oracle.holders(now=before):
            self.equal("the holders", holders, self.oracle.holders(now=after))
        counted = [self.oracle.stats(now=now) for now in (before, after)]
        if not any(
            all(want.get(k) == v for k, v in stats.items() if k in want) for want in counted
        ):
            self.equal("the numbers", dict(stats), dict(counted[1]))
        wanted = self.oracle.next_due(queues=None, workflows=None, now=after)
        # Of what can be claimed already it does not matter since when.
        if due is None or wanted is None or max(due, wanted) > after:
            self.equal("when something is due", due, wanted)
        violations = await fsck(store)
        if violations:
            raise Divergence(self._told("fsck: " + "; ".join(map(str, violations[:5]))))

    async def compare_reads(self, query: RunQuery, keys: Sequence[str]) -> None:
        """Filtered listings and keys."""
        store = self.store
        before = await store.now()
        page = await store.list_runs(query)
        owners = [await store.find_run(key) for key in keys]
        after = await store.now()
        self.seen["reads"] += 1
        wanted = [self.oracle.list_runs(query, None, now=now).items for now in (before, after)]
        if page.items not in wanted:
            self.equal(f"the listing {query}", page.items, wanted[1])
        expected = [[self.oracle.find_run(k, now=n) for k in keys] for n in (before, after)]
        if owners not in expected:
            self.equal("the owners of keys", owners, expected[1])

    def equal(self, what: str, found: object, expected: object) -> None:
        """Raise with the whole story when they differ."""
        if found != expected:
            raise Divergence(
                self._told(f"{what} differs\n  " + "\n  ".join(differences(found, expected)))
            )

    def _told(self, what: str) -> str:
        steps = "\n".join(f"  {n}. {line}" for n, line in enumerate(self.log[-40:], 1))
        return f"{what}\nafter (the last 40 of {len(self.log)}):\n{steps}"

    # --- tokens -------------------------------------------------------------------------------

    def _token(self) -> str:
        return f"oracle-{next(self._issued)}"

    def _pair(self, theirs: Sequence[WorkItem], ours: Sequence[WorkItem]) -> None:
        mine = {(i.run_id, i.item_id): i for i in ours}
        for item in theirs:
            own = mine.get((item.run_id, item.item_id))
            if own is None or own.lease is None or item.lease is None:
                continue  # told by the comparison of the answers
            token = self._ours.setdefault(item.lease.token, own.lease.token)
            self.equal("a token given before", token, own.lease.token)
            self._theirs[own.lease.token] = item.lease.token

    def _ref(self, ref: ClaimRef) -> ClaimRef:
        return replace(ref, token=self._ours.get(ref.token, ref.token))

    def _to_oracle(self, change: Change) -> Change:
        return change if change.claim is None else replace(change, claim=self._ref(change.claim))

    def _item(self, item: WorkItem) -> WorkItem:
        if item.lease is None:
            return item
        token = self._theirs.get(item.lease.token, item.lease.token)
        return replace(item, lease=replace(item.lease, token=token))

    def _committed(self, answer: Committed) -> Committed:
        return replace(answer, claims=[self._item(item) for item in answer.claims])


def _plain(value: Any) -> Any:
    """With lists for all sequences: which kind an answer has is the backend's affair."""
    if isinstance(value, Committed | Claim):
        names = value.__dataclass_fields__
        return {name: _plain(getattr(value, name)) for name in names}
    if isinstance(value, list | tuple) and not isinstance(value, Event):
        return [_plain(one) for one in cast("Sequence[Any]", value)]
    return value


def _facts(error: Exception | None) -> object:
    """What a refusal says. Of events without the instant, which the refusal does not tell."""
    if error is None:
        return "accepted"
    if not isinstance(error, Refusal | RunNotFound | RunClosed):
        return type(error).__name__
    facts = {k: v for k, v in vars(error).items() if not k.startswith("_")}
    inputs = facts.get("inputs")
    if inputs is not None:
        facts["inputs"] = [event._replace(timestamp=None) for event in inputs]
    return type(error).__name__, facts


def _parts(change: Change) -> list[str]:
    """What the change was made of, for the account of what occurred."""
    found = [
        name for name in ("create", "seen", "final", "update", "take_turn") if _has(change, name)
    ]
    found += [name for name in ("drop", "put") if _has(change, name)]
    found += [f"event {event.klass}" for event in change.events]
    if change.control is not None:
        found.append(f"control {change.control.kind}")
    if change.claim is not None:
        settle = change.settle
        if settle is None:
            found.append("under a claim")
        elif settle.keep:
            found.append("settle keep")
        elif settle.reschedule_at is None:
            found.append("settle gone")
        else:
            found.append("settle again")
    return found


def _has(change: Change, name: str) -> bool:
    return getattr(change, name) not in (None, (), [])


def _brief(value: Any) -> str:
    if isinstance(value, Event):
        key = "" if value.key is None else f" key={value.key}"
        return f"<{value.klass} {value.type}{key}>"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_brief, cast('Sequence[Any]', value)))}]"
    if isinstance(value, NewRun | Put | Update | Settle):
        return _short(value)
    if isinstance(value, ClaimRef):
        return f"{value.item_id}@{value.token}"
    if isinstance(value, datetime):
        return f"{value:%H:%M:%S.%f}"
    return repr(value)


def _short(value: Any) -> str:
    """Fields that are not the default."""
    shown: list[str] = []
    for name, spec in value.__dataclass_fields__.items():
        field = getattr(value, name)
        if field not in (None, (), [], {}, frozenset()) and field != spec.default:
            shown.append(f"{name}={_brief(field)}")
    return f"{type(value).__name__}({', '.join(shown)})"
