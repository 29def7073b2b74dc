"""Lists, counts, purges and searches for leases of the reference store: right, and not by scanning."""

import random
import time
from datetime import UTC, datetime, timedelta
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyworkflow.events import Event
from pyworkflow.runs import ItemKind, RunStatus
from pyworkflow.spi import (
    Change,
    ClaimRequest,
    Control,
    ControlKind,
    NewRun,
    Put,
    RunQuery,
    Settle,
)
from pyworkflow.storekit._listing import OrderedRuns
from pyworkflow.storekit.reference import ReferenceStore

T0 = datetime(2026, 1, 1, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


class Shop:
    """A store with a clock, tokens, and the claims that were given."""

    def __init__(self):
        self.store = ReferenceStore()
        self.now = T0
        self.claims = []
        self._tokens = count(1)

    def token(self):
        return f"t{next(self._tokens)}"

    def commit(self, **fields):
        return self.store.commit(Change(**fields), now=self.now, token=self.token)

    def start(self, run_id, workflow="w", *, due=timedelta(0), key=None):
        self.commit(
            run_id=run_id,
            key="start",
            create=NewRun(workflow=workflow, version="1", args="[]", idempotency_key=key),
            events=[Event("workflow.started", "I", {})],
            put=[Put(item_id="turn", kind=ItemKind.TURN, due_at=self.now + due)],
        )

    def claim(self, limit=1):
        request = ClaimRequest(owner="w", lease=MINUTE, limit=limit)
        claims, _ = self.store.claim(request, now=self.now, token=self.token)
        self.claims += [claim.ref for claim in claims]
        return claims

    def settle(self, ref, **fields):
        return self.commit(run_id=ref.run_id, key=f"{ref.token}:1", claim=ref, **fields)

    def sleep(self, run_id, delay):
        """Start a run that waits for a timer."""
        self.start(run_id)
        (claim,) = self.claim()
        self.settle(claim.ref, seen=1, settle=Settle(reschedule_at=self.now + delay))

    def finish(self, run_id, status=RunStatus.COMPLETED):
        self.start(run_id)
        (claim,) = self.claim()
        self.settle(claim.ref, seen=1, settle=Settle(), final=status)

    def shown(self, **query):
        """All pages of a listing."""
        found, cursor = [], None
        while True:
            page = self.store.list_runs(RunQuery(**query), cursor, now=self.now)
            found += [run.run_id for run in page.items]
            cursor = page.cursor
            if cursor is None:
                return found

    def everything(self):
        """All runs, newest first, each as ``get_run`` shows it."""
        found = [self.store.get_run(run_id, now=self.now) for run_id in self.store._runs]
        return found[::-1]


OPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["start", "claim", "sleep", "end", "pause", "unpause", "stall", "wait", "back", "list"]
        ),
        st.integers(0, 9),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(OPS)
def test_found_l09_lists_and_counts_agree_with_the_status_of_each_run(ops):
    shop = Shop()
    for number, (op, n) in enumerate(ops):
        run_id = f"r{n}"
        run = shop.store.get_run(run_id, now=shop.now)
        if op == "start" and run is None:
            shop.start(run_id, f"w{n % 3}", due=timedelta(seconds=30 * (n % 4)))
        elif op == "claim":
            shop.claim()
        elif op in {"sleep", "end", "stall"} and shop.claims:
            ref = shop.claims.pop(n % len(shop.claims))
            item = [i for i in shop.store.list_work(ref.run_id) if i.item_id == ref.item_id]
            if not item or item[0].lease is None or item[0].lease.token != ref.token:
                continue
            if op == "sleep":
                reschedule_at = shop.now + timedelta(seconds=45 * (n % 3))
                shop.settle(ref, seen=1, settle=Settle(reschedule_at=reschedule_at))
            elif op == "end":
                shop.settle(ref, seen=1, settle=Settle(), final=RunStatus.COMPLETED)
            else:
                shop.settle(ref, control=Control(ControlKind.STALL, "why"), settle=Settle())
        elif op in {"pause", "unpause"} and run is not None and not run.status.is_terminal:
            shop.commit(run_id=run_id, key=f"c{number}", control=Control(ControlKind(op)))
        elif op == "wait":
            shop.now += timedelta(seconds=10 * n)
        elif op == "back":
            shop.now -= timedelta(seconds=10 * n)
        else:
            shop.shown()
        compare(shop)


def compare(shop):
    runs = shop.everything()
    for workflow in (None, "w0", "w1", "unknown"):
        for status in (None, *({s} for s in RunStatus), {RunStatus.RUNNING, RunStatus.PENDING}):
            wanted = [
                run.run_id
                for run in runs
                if (workflow is None or run.workflow == workflow)
                and (status is None or run.status in status)
            ]
            query = {"workflow": workflow, "status": status and frozenset(status)}
            assert shop.shown(limit=2, **query) == wanted
    counts = shop.store.stats(now=shop.now)
    assert counts["runs"] == len(runs)
    assert counts["events"] == sum(run.history_length for run in runs)
    assert counts["items"] == sum(len(shop.store.list_work(run.run_id)) for run in runs)
    for status in RunStatus:
        assert counts[status] == sum(run.status == status for run in runs)


def test_a_list_keeps_its_order_whatever_the_order_of_arrival():
    chooser = random.Random(7)
    listed, there = OrderedRuns(), set()
    for _ in range(30_000):
        key = chooser.randrange(12_000)
        if key in there:
            listed.remove(key)
            there.remove(key)
        else:
            listed.add(key, f"r{key}")
            there.add(key)
    assert list(listed) == [(key, f"r{key}") for key in sorted(there)]
    assert listed.size == len(there)
    for bound in (0, 1, 5000, 12_001):
        wanted = sorted((key for key in there if key < bound), reverse=True)
        assert list(listed.below(bound)) == [(key, f"r{key}") for key in wanted]
    with pytest.raises(KeyError):
        listed.remove(next(key for key in range(12_000) if key not in there))


def least(act, tries=7):
    """The least CPU seconds of several calls."""
    taken = []
    for _ in range(tries):
        began = time.process_time()
        act()
        taken.append(time.process_time() - began)
    return min(taken)


def filled(runs):
    shop = Shop()
    for n in range(runs):
        if n % 2:
            shop.sleep(f"r{n}", timedelta(days=9))
        else:
            shop.finish(f"r{n}")
        shop.now += timedelta(seconds=1)
    shop.start("leased")
    shop.claim()
    shop.store.stats(now=shop.now)  # what is new was counted
    return shop


def test_found_m06_searches_for_leases_and_lists_cost_the_same_beside_many_runs():
    few, many = filled(1000), filled(20_000)
    deep = {shop: f"run-{len(shop.store._runs) // 10}" for shop in (few, many)}
    failed = frozenset({RunStatus.FAILED})
    stalled = frozenset({RunStatus.STALLED, RunStatus.PENDING})
    calls = {
        "holders": lambda shop: shop.store.holders(now=shop.now),
        "free": lambda shop: shop.store.free("gone", now=shop.now),
        "stats": lambda shop: shop.store.stats(now=shop.now),
        "next_due": lambda shop: shop.store.next_due(queues=None, workflows=None, now=shop.now),
        "first page": lambda shop: shop.store.list_runs(RunQuery(limit=50), None, now=shop.now),
        "deep page": lambda shop: shop.store.list_runs(
            RunQuery(limit=50), deep[shop], now=shop.now
        ),
        "failed": lambda shop: shop.store.list_runs(RunQuery(status=failed), None, now=shop.now),
        "open": lambda shop: shop.store.list_runs(RunQuery(status=stalled), None, now=shop.now),
        "workflow": lambda shop: shop.store.list_runs(RunQuery(workflow="x"), None, now=shop.now),
        "purge": lambda shop: shop.store.purge(
            before=T0, limit=1000, key_retention=MINUTE, now=shop.now
        ),
        "keys": lambda shop: shop.store.export_keys(None),
    }
    for name, call in calls.items():
        small, large = (least(lambda shop=shop, call=call: call(shop)) for shop in (few, many))
        assert large < 3 * small + 0.0005, (name, small, large)


def test_a_purge_takes_the_runs_that_ended_first_and_stops_at_the_instant_itself():
    shop = Shop()
    ends = {}
    for n in range(5):
        shop.finish(f"r{n}")
        ends[n] = shop.now
        shop.now += timedelta(milliseconds=300)
    later = shop.now + timedelta(days=1)
    arguments = {"key_retention": MINUTE, "now": later}
    assert shop.store.purge(before=ends[3], limit=2, **arguments)[0] == 2
    assert shop.shown() == ["r4", "r3", "r2"]
    assert shop.store.purge(before=ends[3], limit=9, **arguments)[0] == 1
    assert shop.store.purge(before=ends[3], limit=9, **arguments)[0] == 0
    assert shop.shown() == ["r4", "r3"]


def test_keys_of_purged_runs_are_free_when_their_time_is_over():
    shop = Shop()
    shop.start("a", key="k")
    (claim,) = shop.claim()
    shop.settle(claim.ref, seen=1, settle=Settle(), final=RunStatus.COMPLETED)
    ended = shop.now
    shop.now += MINUTE
    shop.store.purge(before=shop.now, limit=9, key_retention=5 * MINUTE, now=shop.now)
    assert shop.store.find_run("k", now=shop.now) == "a"
    assert [key for key, _ in shop.store.export_keys(None).items] == ["k"]
    shop.now = ended + 5 * MINUTE
    assert shop.store.find_run("k", now=shop.now) is None
    _, delta = shop.store.purge(before=ended, limit=9, key_retention=MINUTE, now=shop.now)
    assert delta is not None
    assert delta.freed == ["k"]
    assert shop.store.export_keys(None).items == []
