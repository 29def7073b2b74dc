from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyworkflow.errors import (
    Fenced,
    KeyTaken,
    PayloadTooLarge,
    RunClosed,
    RunExists,
    RunNotFound,
    SchemaTooNew,
    SerializationError,
    UnseenInput,
)
from pyworkflow.events import Event
from pyworkflow.runs import ErrorInfo, ItemKind, ParentRef, RunStatus
from pyworkflow.spi import (
    Change,
    ClaimRef,
    ClaimRequest,
    Control,
    ControlKind,
    LeaseFor,
    NewRun,
    Put,
    RunQuery,
    Settle,
    Update,
)
from pyworkflow.storekit._fsck import fsck
from pyworkflow.storekit.reference import Delta, ReferenceStore, check_change

T0 = datetime(2026, 1, 1, tzinfo=UTC)
RUNS = ("a", "b", "c")
STEPS = ("1", "2")


class World:
    """A store, the clock and tokens it is given, and a follower that only sees journaled deltas."""

    def __init__(self):
        self.store = ReferenceStore()
        self.follower = ReferenceStore()
        self.now = T0
        self.tokens = count(1)
        self.claims = []
        self.number = 0
        self.refused = set()

    def token(self):
        return f"t{next(self.tokens)}"

    def journal(self, delta):
        if delta is not None:
            line = json.dumps(delta.to_json(), allow_nan=False)
            again = Delta.from_json(json.loads(line))
            assert again == delta
            self.follower.apply(again)

    def commit(self, change):
        check_change(change, max_payload=1000, max_events=100)
        before = image(self.store)
        try:
            answer, delta = self.store.commit(change, now=self.now, token=self.token)
        except (RunExists, RunNotFound, RunClosed, Fenced, UnseenInput, KeyTaken) as error:
            self.refused.add(type(error))
            assert image(self.store) == before
            return None
        self.journal(delta)
        repeated, none = self.store.commit(change, now=self.now, token=self.token)
        if delta is not None:
            assert none is None
            assert repeated.duplicate
            assert (repeated.seqs, repeated.skipped) == (answer.seqs, answer.skipped)
            assert list(repeated.unseen_events) == list(answer.unseen_events)
            assert list(repeated.claims) == list(answer.claims)
        return answer

    def claim(self, **fields):
        request = ClaimRequest(**{"owner": "w", "lease": timedelta(seconds=60), **fields})
        claims, delta = self.store.claim(request, now=self.now, token=self.token)
        self.journal(delta)
        self.claims += [c.ref for c in claims]
        return claims


def image(store):
    return [delta.to_json() for delta in store.snapshot()]


def claimable(world, kinds=None, workflows=None):
    """What may be claimed, by looking at everything."""
    found = set()
    for run_id in RUNS:
        run = world.store.get_run(run_id, now=world.now)
        for item in world.store.list_work(run_id):
            free = item.lease is None or item.lease.until <= world.now
            shown = not run.paused or item.kind is ItemKind.DELIVER
            wanted = kinds is None or item.kind in kinds
            known = workflows is None or run.workflow in workflows
            if item.due_at <= world.now and free and shown and wanted and known:
                found.add((run_id, item.item_id))
    return found


def seen(world, run_id):
    run = world.store.get_run(run_id, now=world.now)
    return 0 if run is None else run.history_length


runs = st.sampled_from(RUNS)
delays = st.sampled_from([-5, 0, 1, 30, 3600])
events = st.lists(
    st.tuples(st.sampled_from("CIO"), st.sampled_from([None, "k1", "k2"])), max_size=3
)
puts = st.lists(
    st.tuples(
        st.sampled_from([ItemKind.STEP, ItemKind.DELIVER, ItemKind.TURN]),
        st.sampled_from(STEPS),
        delays,
        st.booleans(),
    ),
    max_size=2,
)
OPS = st.one_of(
    st.tuples(st.just("create"), runs, st.sampled_from([None, "key"]), puts, st.booleans()),
    st.tuples(st.just("outside"), runs, events, puts),
    st.tuples(st.just("control"), runs, st.sampled_from(ControlKind)),
    st.tuples(
        st.just("inside"),
        st.integers(0, 50),
        events,
        puts,
        st.sampled_from(["", "gone", "again", "keep", "final", "stall", "take"]),
        delays,
    ),
    st.tuples(st.just("claim"), st.integers(1, 3), st.booleans()),
    st.tuples(st.just("renew"), st.integers(0, 50)),
    st.tuples(st.just("release"), st.integers(0, 50), st.sampled_from([None, 5])),
    st.tuples(st.just("free")),
    st.tuples(st.just("announce")),
    st.tuples(st.just("purge"), st.sampled_from([0, 100])),
    st.tuples(st.just("tick"), st.sampled_from([1, 61, 4000, -30])),
)


def put_all(world, wanted):
    made = []
    for kind, name, delay, claimed in wanted:
        item_id = "turn" if kind is ItemKind.TURN else f"{kind}:{name}"
        due = world.now + timedelta(seconds=delay)
        held = LeaseFor(owner="born", lease=timedelta(seconds=20)) if claimed else None
        made.append(Put(item_id=item_id, kind=kind, due_at=due, claimed=held))
    return made


def event_all(wanted):
    return [Event("log.info" if k == "O" else "timer.fired", k, {}, key=key) for k, key in wanted]


def perform(world, op):
    world.number += 1
    key = f"op{world.number}"
    match op:
        case ("create", run_id, idempotency, wanted, take):
            new = NewRun(workflow=f"w{run_id}", version="1", args="[]", idempotency_key=idempotency)
            first = Event("workflow.started", "I", {})
            held = LeaseFor(owner="w", lease=timedelta(seconds=9)) if take else None
            change = Change(
                run_id=run_id,
                key=key,
                create=new,
                events=[first],
                put=put_all(world, wanted),
                take_turn=held,
            )
            world.commit(change)
        case ("outside", run_id, some, wanted):
            world.commit(
                Change(run_id=run_id, key=key, events=event_all(some), put=put_all(world, wanted))
            )
        case ("control", run_id, kind):
            final = {
                ControlKind.CANCEL: RunStatus.CANCELLED,
                ControlKind.TERMINATE: RunStatus.TERMINATED,
            }.get(kind)
            world.commit(Change(run_id=run_id, key=key, control=Control(kind, "why"), final=final))
        case ("inside", index, some, wanted, how, delay) if world.claims:
            ref = world.claims[index % len(world.claims)]
            change = Change(run_id=ref.run_id, key=f"{ref.token}:{world.number}", claim=ref)
            change.events, change.put = event_all(some), put_all(world, wanted)
            if ref.item_id == "turn":
                change.seen = seen(world, ref.run_id)
            again = Settle(reschedule_at=world.now + timedelta(seconds=delay))
            if how in ("gone", "final"):
                change.settle = Settle()
            elif how in ("again", "stall"):
                change.settle = again
            elif how == "keep":
                change.settle = Settle(keep=True, payload={"n": world.number})
            if how == "final":
                change.final = RunStatus.COMPLETED
                change.update = Update(result="1", error=ErrorInfo(type="a", message="b"))
            if how == "stall":
                change.control = Control(ControlKind.STALL, "why")
            if how == "take":
                change.settle = Settle()
                change.take_turn = LeaseFor(owner="w", lease=timedelta(seconds=60))
            answer = world.commit(change)
            if answer is not None:
                world.claims += [
                    ClaimRef(i.run_id, i.item_id, i.lease.token) for i in answer.claims
                ]
        case ("claim", limit, filtered):
            kinds = frozenset({ItemKind.TURN, ItemKind.DELIVER}) if filtered else None
            workflows = frozenset({"wa", "wb"}) if filtered else None
            expected = claimable(world, kinds, workflows)
            due = world.store.next_due(queues=None, workflows=None, now=world.now)
            assert (due is not None and due <= world.now) == bool(claimable(world))
            claims = world.claim(limit=limit, kinds=kinds, workflows=workflows)
            got = {(c.item.run_id, c.item.item_id) for c in claims}
            assert got <= expected
            assert len(got) == min(limit, len(expected))
        case ("renew", index) if world.claims:
            ref = world.claims[index % len(world.claims)]
            _, delta = world.store.renew([ref], timedelta(seconds=60), now=world.now)
            world.journal(delta)
        case ("release", index, delay) if world.claims:
            ref = world.claims[index % len(world.claims)]
            gap = None if delay is None else timedelta(seconds=delay)
            world.journal(world.store.release(ref, gap, now=world.now)[1])
        case ("free",):
            _, delta = world.store.free("w", now=world.now)
            world.journal(delta)
            assert "w" not in world.store.holders(now=world.now)
        case ("announce",):
            due = claimable(world)
            rung, delta = world.store.announce(100, timedelta(0), now=world.now)
            world.journal(delta)
            assert {(i.run_id, i.item_id) for i in rung} == due
        case ("purge", retention):
            world.journal(
                world.store.purge(
                    before=world.now,
                    limit=2,
                    key_retention=timedelta(seconds=retention),
                    now=world.now,
                )[1]
            )
        case ("tick", by):
            world.now += timedelta(seconds=by)


class Reads:
    """As much of a backend as fsck needs."""

    def __init__(self, store, now):
        self.store, self.at = store, now

    async def now(self):
        return self.at

    async def list_runs(self, query, cursor=None):
        return self.store.list_runs(query, cursor, now=self.at)

    async def get_run(self, run_id):
        return self.store.get_run(run_id, now=self.at)

    async def get_events(self, run_id, *, after=0, limit=None):
        return self.store.get_events(run_id, after=after, limit=limit)

    async def list_work(self, run_id):
        return self.store.list_work(run_id)

    async def find_run(self, key):
        return self.store.find_run(key, now=self.at)


@settings(max_examples=200)
@given(st.lists(OPS, min_size=5, max_size=60))
def test_any_history_of_calls_keeps_the_invariants_and_the_journal_equal(ops):
    world = World()
    for op in ops:
        perform(world, op)
    assert image(world.follower) == image(world.store)
    rebuilt = ReferenceStore()
    for data in image(world.store):
        rebuilt.apply(Delta.from_json(json.loads(json.dumps(data))))
    assert image(rebuilt) == image(world.store)
    for store in (world.store, world.follower, rebuilt):
        assert asyncio.run(fsck(Reads(store, world.now))) == []
    request = ClaimRequest(owner="z", lease=timedelta(seconds=1), limit=99)
    expected = claimable(world)
    for store in (world.store, world.follower, rebuilt):
        claims, _ = store.claim(request, now=world.now, token=world.token)
        assert {(c.item.run_id, c.item.item_id) for c in claims} == expected


def create(run_id="a", **fields):
    new = NewRun(workflow="w", version="1", args="[]", **fields)
    return Change(run_id=run_id, key="s", create=new, events=[Event("workflow.started", "I", {})])


def test_every_field_survives_the_journal():
    world = World()
    world.commit(
        create(
            idempotency_key="",
            parent=ParentRef(run_id="p", op="o"),
            root="p",
            queue="",
            priority=-3,
            tags=("x", "x"),
            attributes={"a": {"b": [1.5, None, 10**30]}},
            deadline=T0 + timedelta(microseconds=1),
        )
    )
    error = ErrorInfo(type="m:E", message="é", traceback="tb", portable=True, details={"a": [1]})
    world.commit(Change(run_id="a", key="u", update=Update(result="r", error=error, next="b")))
    assert image(world.follower) == image(world.store)
    run = world.follower.get_run("a", now=T0)
    assert run == world.store.get_run("a", now=T0)
    assert (run.queue, run.idempotency_key, run.error) == ("", "", error)


def test_a_delta_of_a_newer_version_is_refused():
    with pytest.raises(SchemaTooNew):
        Delta.from_json({"v": 2, "runs": []})


def test_a_snapshot_is_cut_into_bounded_pieces():
    world = World()
    world.commit(create())
    for n in range(12):
        big = Event("log.info", "O", {"message": "x" * 100_000})
        world.store.commit(Change(run_id="a", key=f"k{n}", events=[big]), now=T0, token=world.token)
    assert max(len(json.dumps(d)) for d in image(world.store)) < 400_000
    rebuilt = ReferenceStore()
    for delta in world.store.snapshot():
        rebuilt.apply(delta)
    assert rebuilt.get_events("a") == world.store.get_events("a")


def test_listing_goes_on_after_a_snapshot_with_the_same_cursor():
    world = World()
    for run_id in ("a", "b", "c"):
        world.commit(create(run_id))
    page = world.store.list_runs(RunQuery(limit=1), None, now=T0)
    rebuilt = ReferenceStore()
    for delta in world.store.snapshot():
        rebuilt.apply(delta)
    rest = rebuilt.list_runs(RunQuery(limit=9), page.cursor, now=T0)
    assert [r.run_id for r in rest.items] == ["b", "a"]


def test_heaps_do_not_grow_with_what_was_replaced():
    world = World()
    for n in range(50):
        world.store.commit(create(f"r{n}"), now=T0, token=world.token)
    now = T0
    for n in range(5000):
        now += timedelta(seconds=1)
        put = Put(item_id="step:1", kind=ItemKind.STEP, due_at=T0 + timedelta(days=99_999 - n))
        change = Change(run_id="r1", key=f"k{n}", put=[put])
        world.store.commit(change, now=now, token=world.token)
    buckets = world.store._index._buckets.values()
    assert sum(len(b.waiting) + len(b.ready) for b in buckets) < 300


def test_claiming_one_of_many_does_not_look_at_all():
    world = World()
    for n in range(3000):
        put = Put(item_id="turn", kind=ItemKind.TURN, due_at=T0 + timedelta(seconds=n + 1))
        change = Change(
            run_id=f"r{n}",
            key="s",
            create=NewRun(workflow="w", version="1", args="[]"),
            put=[put],
        )
        world.store.commit(change, now=T0, token=world.token)
    world.now = T0 + timedelta(seconds=2)
    claims = world.claim(limit=10)
    assert [c.item.run_id for c in claims] == ["r0", "r1"]
    (bucket,) = world.store._index._buckets.values()
    assert (len(bucket.ready), len(bucket.waiting)) == (0, 3000)


@pytest.mark.parametrize(
    "fields",
    [
        {"settle": Settle()},
        {"seen": 1},
        {"drop": ["step:1"]},
        {"claim": ClaimRef("other", "turn", "t")},
        {"control": Control(ControlKind.CANCEL)},
        {"control": Control(ControlKind.PAUSE), "final": RunStatus.CANCELLED},
        {"final": RunStatus.RUNNING},
        {"put": [Put(item_id="turn", kind=ItemKind.STEP)]},
        {"put": [Put(item_id="t", kind=ItemKind.TURN)]},
        {"put": [Put(item_id="x", kind=ItemKind.STEP, due_at=datetime(2026, 1, 1))]},  # noqa: DTZ001
    ],
)
def test_fields_that_do_not_go_together_are_refused(fields):
    with pytest.raises(ValueError, match=r"[a-z]"):
        check_change(Change(run_id="a", key="k", **fields), max_payload=99, max_events=9)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ("x" * 100, PayloadTooLarge),
        ("é" * 50, PayloadTooLarge),
        ([10**5000], SerializationError),
        (float("nan"), SerializationError),
        ((1,), SerializationError),
        ({1: 1}, SerializationError),
        ("\udfff", SerializationError),
    ],
)
def test_what_cannot_be_stored_is_refused_by_type(value, error):
    change = Change(run_id="a", key="k", events=[Event("log.info", "O", {"v": value})])
    with pytest.raises(error):
        check_change(change, max_payload=99, max_events=9)


def test_seen_beyond_the_history_is_an_error():
    world = World()
    world.commit(create())
    (claim,) = world.claim()
    change = Change(run_id="a", key=f"{claim.ref.token}:1", claim=claim.ref, seen=2)
    with pytest.raises(ValueError, match="seen=2"):
        world.store.commit(change, now=T0, token=world.token)
