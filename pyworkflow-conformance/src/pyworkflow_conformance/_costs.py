"""Group COST: what a call costs does not grow with the number of stored runs.

Shortest of many times, each beside the others: what a loaded machine adds is left out.
"""
# ruff: noqa: N802 - the ids are part of the names

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from itertools import count
from time import perf_counter
from typing import Any, TypeAlias, cast
from uuid import uuid4

import pytest

from pyworkflow.runs import RunStatus
from pyworkflow.spi import Delta
from pyworkflow.spi.storage import (
    TURN,
    Change,
    ClaimRequest,
    Control,
    ControlKind,
    LeaseFor,
    NewRun,
    RunQuery,
    StorageBackend,
)
from pyworkflow.storekit import ReferenceStore
from pyworkflow_conformance._case import (
    BATCH,
    Case,
    Suite,
    note,
    overrides,
    scenario,
    seconds,
    started,
    turn,
)

__all__ = ["CostChecks", "Costs"]

Call: TypeAlias = Callable[[], Awaitable[Any]]

#: So many times as much is no growth, nor is what stays below so many seconds.
FACTOR, FLOOR_S = 4.0, 0.0006
#: Looks at each call; and rounds of them for calls that seem slow.
LOOKS, ROUNDS = 15, 12
#: Looks at a call that has taken so many seconds; seconds after which no further round begins.
FEWEST, ENOUGH_S, PATIENCE_S = 3, 0.5, 20.0
#: Runs before the many: some of each kind.
FEW = 60
OWNERS = 2
#: Events of a long history, and of a short one.
EVENTS, KEYED = 100_000, 20
_TRIED = ("large_history", "indexed_filters", "purge_by_age")


class Costs:
    """The shortest times of calls in a small store, and in a large one."""

    def __init__(self) -> None:
        self.small: dict[str, float] = {}
        self.large: dict[str, float] = {}

    def grown(self) -> list[str]:
        """The calls that cost more in the large one."""
        return [
            name
            for name, seconds in self.large.items()
            if seconds > max(FACTOR * self.small[name], FLOOR_S)
        ]

    def text(self, name: str) -> str:
        """Both times."""
        small, large = self.small[name], self.large[name]
        return f"{name}: {small * 1e3:.2f} ms, then {large * 1e3:.2f} ms ({large / small:.0f}x)"


async def shortest(calls: Mapping[str, Call], found: dict[str, float]) -> None:
    """Time the calls in turn, and keep the shortest of each. A call gives what undoes it, or not.

    A call that takes long is looked at less often.
    """
    spent = dict.fromkeys(calls, 0.0)
    for look in range(LOOKS):
        for name, call in calls.items():
            if look >= FEWEST and spent[name] > ENOUGH_S:
                continue
            start = perf_counter()
            undo = await call()
            took = perf_counter() - start
            spent[name] += took
            found[name] = min(took, found.get(name, took))
            if callable(undo):
                await cast("Call", undo)()


async def grown(costs: Costs, calls: Mapping[str, Call]) -> str:
    """Time the calls in the large store, the slow ones again and again; what has grown."""
    start = perf_counter()
    await shortest(calls, costs.large)
    for _ in range(ROUNDS):
        slow = {name: calls[name] for name in costs.grown()}
        if not slow or perf_counter() - start > PATIENCE_S:
            break
        await shortest(slow, costs.large)
    return "; ".join(map(costs.text, costs.grown()))


class CostChecks(Suite):
    """COST, PAY-05."""

    #: Runs with which the store is filled.
    many_runs: int = 20_000

    @scenario
    async def test_COST_01_flat_with_many_runs(self, t: Case) -> None:
        """COST-01: with 20,000 runs, a call costs what it cost with 60.

        With ``large_history`` claims, leases, wake-ups, reads and commits; with
        ``indexed_filters`` filtered lists; with ``purge_by_age`` a purge that finds nothing. A
        store grows for years. Usual cause: an index is missing, or a query that does not fit it.
        """
        declared = self.capabilities
        if not (declared.large_history or declared.indexed_filters or declared.purge_by_age):
            pytest.skip(f"does not apply: COST-01 needs one of {', '.join(_TRIED)}")
        # In a namespace of its own: the state check at the end would read every run.
        many = await t.open(f"{t.namespace}-many")
        costs, store = Costs(), getattr(many, "recorded", many)
        now = await store.now()
        await store.commit([_few(n) for n in range(FEW)])
        paused = t.outside("few-0001", control=Control(ControlKind.PAUSE, "wait"), events=[note()])
        await store.commit_one(paused)
        calls = _calls(self, store, now)
        await shortest(calls, costs.small)
        for first in range(0, self.many_runs, BATCH):
            last = min(first + BATCH, self.many_runs)
            await _fill(store, [_many(n, now) for n in range(first, last)], now)
        assert (await store.get_run(f"many-{self.many_runs - 1:06}")) is not None
        told = await grown(costs, calls)
        assert not told, f"costs with {FEW} and with {self.many_runs} runs: {told}"

    @scenario(needs=("large_history",))
    async def test_PAY_05_100k_event_log(self, t: Case) -> None:
        """PAY-05: a history of 100,000 events is read in pages, and appended to as a short one.

        Runs live for months. Usual cause: the history is read or rewritten whole with each change,
        or there is no index of event keys.
        """
        await t.start()
        await t.start("short")
        await t.send(*[note(key=f"k{n}") for n in range(KEYED)], run_id="short")
        batch = min(5000, t.store.info().max_events_per_commit)
        for first in range(0, EVENTS, batch):
            await t.send(*[note("n", key=f"k{n}") for n in range(first, first + batch)])
        length = (await t.run()).history_length
        assert length > EVENTS
        page = await t.store.get_events("run", after=length - 10, limit=100)
        assert [e.seq for e in page] == list(range(length - 9, length + 1))
        assert (await t.send(note())).last_seq == length + 1
        costs, store = Costs(), getattr(t.store, "recorded", t.store)
        await shortest(_appends(store, "short"), costs.small)
        told = await grown(costs, _appends(store, "run"))
        assert not told, f"costs with {KEYED} and with {EVENTS} events: {told}"


async def _fill(store: StorageBackend, changes: Sequence[Change], now: datetime) -> None:
    if store.info().capabilities.batched or not overrides(store, "import_delta"):
        await store.commit(changes)
        return
    # One by one, twenty thousand commits wait for the disk: as a copy they arrive at once.
    rows, delta = ReferenceStore(), Delta()
    for change in changes:
        _, made = rows.commit(change, now=now, token=lambda: uuid4().hex)
        assert made is not None
        delta.parts += made.parts
        delta.taken.update(made.taken)
    await store.import_delta(delta)


def _new(workflow: str, key: str) -> NewRun:
    return NewRun(workflow=workflow, version="1", args="[]", idempotency_key=key)


def _few(n: int) -> Change:
    """Runs that are rare among the many: held ones, due ones, and two that ended."""
    run_id = f"few-{n:04}"
    fields: dict[str, Any] = {"create": _new("rare", f"key-{run_id}"), "events": [started()]}
    if n < 2:
        pass
    elif n < 4:
        fields |= {"events": [note()], "final": RunStatus.FAILED}
    else:
        fields["take_turn"] = LeaseFor(f"owner-{n % OWNERS}", seconds(86_400))
    return Change(run_id=run_id, key="start", **fields)


def _many(n: int, now: datetime) -> Change:
    """Due, asleep, completed."""
    run_id = f"many-{n:06}"
    fields: dict[str, Any] = {"create": _new("usual", f"key-{run_id}")}
    if n % 3 == 0:
        fields["events"] = [started()]
    elif n % 3 == 1:
        fields["put"] = [turn(due_at=now + seconds(86_400 + n))]
    else:
        fields |= {"events": [note()], "final": RunStatus.COMPLETED}
    return Change(run_id=run_id, key="start", **fields)


def _appends(store: StorageBackend, run_id: str) -> dict[str, Call]:
    """Calls on a run whose events ``k0`` and so on are there."""
    numbers = count()

    def commit(*keys: str) -> Call:
        events = [note(key=key) for key in keys]

        async def send() -> object:
            n = next(numbers)
            change = Change(run_id=run_id, key=f"cost-{run_id}-{n}", events=events)
            return await store.commit_one(change)

        return send

    async def read() -> object:
        run = await store.get_run(run_id)
        assert run is not None
        return await store.get_events(run_id, after=run.history_length - 10)

    known = [f"k{n}" for n in range(KEYED)]
    return {"commit of known events": commit(*known), "the last events": read}


def _calls(suite: Suite, store: StorageBackend, now: datetime) -> dict[str, Call]:
    """What is measured, by name."""
    numbers = count()

    def claims(**fields: Any) -> Call:
        async def claim() -> Call:
            request = ClaimRequest(owner="cost", lease=seconds(60), **fields)
            (claim,) = (await store.claim(request)).claims
            return lambda: store.release(claim.ref)

        return claim

    async def commit() -> object:
        n = next(numbers)
        event = note(key=f"cost-{n}")
        return await store.commit_one(Change(run_id="few-0000", key=f"cost-{n}", events=[event]))

    def lists(limit: int = 10, **fields: Any) -> Call:
        return lambda: store.list_runs(RunQuery(limit=limit, **fields))

    calls: dict[str, Call] = {}
    if suite.capabilities.large_history:
        calls |= {
            "claim": claims(),
            "claim by reference": claims(items=[("few-0000", TURN)]),
            "commit": commit,
            "next_due": store.next_due,
            "get_run": lambda: store.get_run("few-0003"),
            "list_work": lambda: store.list_work("few-0003"),
            "get_events": lambda: store.get_events("few-0003"),
            "find_run": lambda: store.find_run("key-few-0003"),
        }
        own: dict[str, Call] = {
            "holders": store.holders,
            "leases": lambda: store.leases("owner-0"),
            "free": lambda: store.free("nobody"),
        }
        # The defaults of the contract page through all runs. Not announce: it may look at some
        # thousand items that were rung for, however many there are.
        calls |= {name: call for name, call in own.items() if overrides(store, name)}
    if suite.capabilities.indexed_filters:
        failed, pending = frozenset({RunStatus.FAILED}), frozenset({RunStatus.PENDING})
        closed = frozenset({RunStatus.FAILED, RunStatus.TERMINATED, RunStatus.CANCELLED})
        calls |= {
            "list_runs": lists(),
            "list_runs by workflow": lists(workflow="rare"),
            "list_runs by status": lists(status=failed),
            "list_runs by three statuses": lists(status=closed),
            "list_runs by paused": lists(status=frozenset({RunStatus.PAUSED})),
            "list_runs by workflow and status": lists(workflow="rare", status=failed),
            "list_runs by workflow and pending": lists(workflow="rare", status=pending),
        }
    if suite.capabilities.purge_by_age:
        before = now - seconds(86_400)
        calls["purge of nothing"] = lambda: store.purge(before=before)
    return calls
