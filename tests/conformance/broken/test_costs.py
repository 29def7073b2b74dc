"""Stores that are right and too slow, or write when they need not, are failed by their checks."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest

from pyworkflow._memory import MemoryStorageBackend
from pyworkflow_conformance import StorageConformance, _costs, _meta
from tests.conformance.broken.stores import Broken

DECLARED = MemoryStorageBackend().info().capabilities


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    # Sound stores need more looks on a loaded machine; these are slow in each.
    monkeypatch.setattr(_costs, "ROUNDS", 1)


def check(kind, check_id, **members):
    made = {}

    async def make(self, namespace):
        return made.setdefault(namespace, kind(namespace=namespace)).clone()

    facts = {"capabilities": DECLARED, "many_runs": 2_000, "make": make, **members}
    suite = type("Suite", (StorageConformance,), facts)
    (name,) = (name for name in dir(suite) if name.startswith(f"test_{check_id}_"))
    getattr(suite(), name)()


class WithoutIndex(Broken):
    """Reads every row."""

    def scan(self):
        for run_id in list(self._shared.store._runs):
            json.dumps([run_id, "a row", 1, None])


class OfItems(WithoutIndex):
    async def claim(self, request):
        self.scan()
        return await super().claim(request)

    async def next_due(self, **filters):
        self.scan()
        return await super().next_due(**filters)


class OfLeases(WithoutIndex):
    async def leases(self, owner):
        self.scan()
        return await super().leases(owner)

    async def holders(self):
        self.scan()
        return await super().holders()


class OfRuns(WithoutIndex):
    async def list_runs(self, query, cursor=None):
        if query.workflow is not None or query.status is not None:
            self.scan()
        return await super().list_runs(query, cursor)


class OfEnds(WithoutIndex):
    async def purge(self, **given):
        self.scan()
        return await super().purge(**given)


class OfEventKeys(Broken):
    async def one(self, change):
        if any(event.key for event in change.events) and change.create is None:
            for event in await self.get_events(change.run_id):
                json.dumps(event.key)
        return await super().one(change)


@pytest.mark.parametrize(
    ("kind", "call"),
    [(OfItems, "next_due"), (OfLeases, "leases"), (OfRuns, "by status"), (OfEnds, "purge")],
)
def test_g15_a_missing_index_is_noticed_by_what_a_call_costs(kind, call):
    declared = replace(DECLARED, indexed_filters=True)
    with pytest.raises(AssertionError, match=rf"costs with 60 and with 2000 runs: .*{call}"):
        check(kind, "COST_01", capabilities=declared)


def test_g15_filters_that_are_not_declared_as_indexed_may_scan(monkeypatch):
    monkeypatch.setattr(_costs, "ROUNDS", 12)
    check(OfRuns, "COST_01")


def test_g15_a_missing_index_of_event_keys_is_noticed(monkeypatch):
    monkeypatch.setattr(_costs, "EVENTS", 20_000)
    with pytest.raises(AssertionError, match="costs with 20 and with 20000 events: commit"):
        check(OfEventKeys, "PAY_05")


class RoundTrip(MemoryStorageBackend):
    """A commit is one round trip."""

    def clone(self):
        other = type(self)(namespace=self._namespace)
        other._shared = self._shared
        return other

    async def commit(self, changes):
        await asyncio.sleep(0.001)
        return await super().commit(changes)


class BatchPerChange(Broken):
    """A commit is a loop over a private one."""

    async def one(self, change):
        await asyncio.sleep(0.001)
        return await super().one(change)


def test_g19_a_commit_that_is_a_loop_is_noticed_by_its_time(monkeypatch):
    monkeypatch.setattr(_meta, "TRIES", 1)
    far = replace(DECLARED, multi_process=True)
    with pytest.raises(AssertionError, match="200 changes took"):
        check(BatchPerChange, "META_05", capabilities=far)
    check(RoundTrip, "META_05", capabilities=far)


class Writes(Broken):
    """Counts what it writes, as a server does."""

    written = 0

    async def one(self, change):
        Writes.written += 1
        return await super().one(change)


class ClaimOfNothingWrites(Writes):
    async def claim(self, request):
        found = await super().claim(request)
        if not found.claims:
            Writes.written += 2
        return found


def test_g16_a_claim_of_nothing_that_writes_is_noticed():
    def writes(self, namespace):
        return Writes.written

    with pytest.raises(AssertionError, match="claims of nothing wrote"):
        check(ClaimOfNothingWrites, "CLM_32", writes=writes)
    check(Writes, "CLM_32", writes=writes)
    with pytest.raises(AssertionError, match="does not notice"):
        check(Writes, "CLM_32", writes=lambda self, namespace: 0)
