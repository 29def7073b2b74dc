"""Group META: nothing is left out, and what the backend declares is what the checks see."""
# ruff: noqa: N802 - the ids are part of the names

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from time import perf_counter

import pytest

from pyworkflow.spi.capabilities import CONTRACT_VERSION
from pyworkflow.spi.storage import Answer, Change, Committed, NewRun, RunQuery
from pyworkflow_conformance._case import Case, Suite, note, scenario, seconds, started
from pyworkflow_conformance._levels import PROOFS, checks, own_proofs
from pyworkflow_conformance._told import differences

__all__ = ["MetaChecks"]

MANY = 200
#: A loaded machine may make any one try slow.
TRIES = 5


class MetaChecks(Suite):
    """META."""

    def test_META_01_no_overrides(self) -> None:
        """META-01: every check is there, as it was written, or marked ``xfail`` with a reason.

        A suite that leaves checks out proves nothing. Usual cause: a check that fails was
        overridden or set to None; declare it in ``Capabilities.gaps`` instead. What is deselected
        on pytest's command line cannot be seen from here; the report of ``pyworkflow
        conformance`` names what is missing.
        """
        from pyworkflow_conformance.storage import StorageConformance

        mine = type(self)
        assert getattr(mine, "__test__", True), "__test__ is False: pytest collects no check"
        skips = {mark.name for mark in _marks(mine)} & {"skip", "skipif"}
        assert not skips, "the class is marked to be skipped: declare gaps with their reasons"
        for check in checks().values():
            test = getattr(mine, check.name, None)
            marks = {mark.name: mark for mark in _marks(test)}
            if test is getattr(StorageConformance, check.name):
                continue
            reason = marks["xfail"].kwargs.get("reason") if "xfail" in marks else None
            assert reason, f"{check.name} is overridden: declare a gap with its reason"

    @scenario
    async def test_META_02_info_valid(self, t: Case) -> None:
        """META-02: ``info`` needs no connection, and states limits that the engine can live with.

        The engine reads limits and capabilities before it opens the store. Usual cause: a
        backend written for another version of the contract, or capabilities that the test class
        and the backend state differently.
        """
        store = await self.make(t.namespace)
        info = store.info()
        await store.close()
        assert info.contract_version == CONTRACT_VERSION, (
            f"versions of the contract: backend={info.contract_version} suite={CONTRACT_VERSION}"
        )
        assert info.name
        assert info.location
        assert info.namespace == t.namespace, "info names another namespace"
        assert info.max_payload >= 256 * 1024, f"max_payload={info.max_payload}"
        assert info.batches >= 1
        assert info.max_events_per_commit >= 100
        differ = differences(info.capabilities, self.capabilities)
        assert not differ, f"the suite and the backend must agree: {'; '.join(differ)}"

    def test_META_03_declared_caps_proved(self) -> None:
        """META-03: each capability that is declared has a check left that proves it.

        The engine relies on what is declared: a worker that believes in ``watch`` does not poll.
        Usual cause: a capability is declared, and every check of it is a gap: take the capability
        back. Or a gap names a check that does not exist, or gives no reason.
        """
        known = checks()
        for check_id, reason in self.capabilities.gaps.items():
            assert check_id in known, f"the declared gap {check_id!r} names no check"
            assert reason.strip(), f"the declared gap {check_id} has no reason"
        for name, proofs in PROOFS.items():
            if proofs and getattr(self.capabilities, name):
                gaps = self.capabilities.gaps
                left = [proof for proof in own_proofs(proofs) or proofs if proof not in gaps]
                assert left, f"{name} is declared, and every check that proves it is a gap"

    @scenario
    async def test_META_04_namespaces_isolated(self, t: Case) -> None:
        """META-04 (I11): runs, keys, items and clock of one namespace do not show in another.

        Tenants and tests share a server. Usual cause: a query, a unique index or a key in memory
        that leaves the namespace out.
        """
        other = await t.open(t.namespace + "-other")
        await t.start(idempotency_key="key")
        assert await other.get_run("run") is None
        assert await other.find_run("key") is None
        assert await other.next_due() is None
        assert await t.claim(store=other) == []
        assert await t.claim(("run", "turn"), store=other) == []
        assert await other.get_events("run") == []
        assert (await other.list_runs(RunQuery())).items == []
        assert (await other.stats())["runs"] == 0
        await t.start(idempotency_key="key", store=other, workflow="another")
        assert (await t.run()).workflow == "flow"
        before = await other.now()
        await t.shift(86_400)
        assert await other.now() - before < seconds(43_200), "the clock of the other was shifted"

    @scenario(needs=("batched",))
    async def test_META_05_commit_is_one_batch(self, t: Case) -> None:
        """META-05: ``batched`` means that 200 changes cost less than 200 commits of one.

        Starting many runs waits for one round trip, not for each: at once, they take half the time
        at most (in memory there is no trip to save). Usual cause: ``batched`` is declared, and
        ``commit`` is a loop that writes one change after the other.
        """
        store = await self.make(t.namespace)
        calls = 0
        commit = store.commit

        async def counted(changes: Sequence[Change]) -> list[Answer]:
            nonlocal calls
            calls += 1
            return await commit(changes)

        async with store:
            vars(store)["commit"] = counted
            new = NewRun(workflow="flow", version="1", args="[]")
            answers = await store.commit(
                [
                    Change(run_id=f"run-{n}", key="start", create=new, events=[started(), note()])
                    for n in range(MANY)
                ]
            )
        assert [type(answer) for answer in answers] == [Committed] * MANY
        assert calls <= 1, f"commit of {MANY} changes called itself: calls={calls}"
        assert (await t.store.stats())["runs"] == MANY
        if self.capabilities.durable or self.capabilities.multi_process:
            at_once, singly = await _times(t)
            told = f"{MANY} changes took {at_once:.3f} s at once, {singly:.3f} s one by one"
            assert 2 * at_once <= singly, told


async def _times(t: Case) -> tuple[float, float]:
    """The shortest times of many changes at once and one by one, of some tries if need be."""
    store = getattr(t.store, "recorded", t.store)
    at_once = singly = inf
    for n in range(TRIES):
        changes = [
            Change(run_id=f"run-{run}", key=f"try-{n}-{part}", events=[note()])
            for part in range(2)
            for run in range(MANY)
        ]
        start = perf_counter()
        await store.commit(changes[:MANY])
        at_once = min(at_once, perf_counter() - start)
        start = perf_counter()
        for change in changes[MANY:]:
            await store.commit([change])
        singly = min(singly, perf_counter() - start)
        if 2 * at_once <= singly:
            break
    return at_once, singly


def _marks(test: object) -> list[pytest.Mark]:
    return list(getattr(test, "pytestmark", []))
