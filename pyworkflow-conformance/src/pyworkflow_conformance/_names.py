"""Group UNI, the part about names: two that differ in any way are two, in every position."""
# ruff: noqa: N802 - the ids are part of the names

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from pyworkflow.runs import ParentRef, RunStatus
from pyworkflow.spi.storage import Control, ControlKind, RunQuery
from pyworkflow_conformance._case import Case, Suite, note, scenario, step, under

__all__ = ["ALIKE", "NameChecks"]

#: Names that a prefix index, a collation or a file system takes for one another.
ALIKE: Sequence[str] = (
    "name",
    "Name",
    "NAME",
    "n\u00e1me",
    "na\u0301me",
    "name ",
    " name",
    "name\u200b",
    "\uff4eame",
    "strasse",
    "stra\u00dfe",
    *(f"{'n' * 254}{last}" for last in "12"),  # the greatest length that users may give
)
#: The same for names that the engine makes, which may be longer.
ALIKE_MADE: Sequence[str] = (*ALIKE, *(f"{'k' * 500}{last}" for last in "12"))


class NameChecks(Suite):
    """UNI-07 to UNI-12."""

    @scenario
    async def test_UNI_07_run_ids_in_pairs(self, t: Case) -> None:
        """UNI-07: run ids that differ in a last character, case, accent or blank are two runs.

        Also as the parent of a run, which purge asks for. Usual cause: an index on a prefix (191
        or 3,072 bytes), or a collation that ignores case, accents or trailing blanks.
        """
        for n, run_id in enumerate(ALIKE):
            answer = await t.start(run_id, key=f"start-{n}", args=str(n))
            assert not answer.duplicate, f"{run_id!r} met another run"
        for n, run_id in enumerate(ALIKE):
            run = await t.run(run_id)
            assert (run.run_id, run.args_text) == (run_id, str(n)), f"{run_id!r} met {run.run_id!r}"
            assert {event.run_id for event in await t.store.get_events(run_id)} == {run_id}
        for run_id in ALIKE:
            claim = await t.turn(run_id)
            assert claim.run.run_id == run_id, f"{run_id!r} met {claim.run.run_id!r}"
            assert await t.store.release(claim.ref)
        # Two of them end: children of the others still have an open parent.
        for n, run_id in enumerate(ALIKE):
            await t.start(f"child-{n}", parent=ParentRef(run_id=run_id, op="1"))
            await t.end(f"child-{n}")
        ended = (0, len(ALIKE) - 2)
        for n in ended:
            await t.end(ALIKE[n])
        before = await t.store.now() + timedelta(days=1)
        while await t.store.purge(before=before):
            pass
        left = {run.run_id for run in (await t.store.list_runs(RunQuery(limit=1000))).items}
        open_ = [n for n in range(len(ALIKE)) if n not in ended]
        expected = {ALIKE[n] for n in open_} | {f"child-{n}" for n in open_}
        assert left == expected, f"purge took {expected - left}, and left {left - expected}"

    @scenario
    async def test_UNI_08_keys_in_pairs(self, t: Case) -> None:
        """UNI-08: keys of starts, changes and events are compared exactly.

        A signal with the key ``x`` must not be taken for the one with ``X``: it would be lost.
        Usual cause: the unique index has the server's default collation, or a prefix.
        """
        for n, key in enumerate(ALIKE):
            await t.start(f"run-{n}", idempotency_key=key)
        for n, key in enumerate(ALIKE):
            assert await t.store.find_run(key) == f"run-{n}", f"the idempotency key {key!r}"
        for key in ALIKE_MADE:
            answer = await t.write(t.outside("run-0", key=key, events=[note(key)]))
            assert not answer.duplicate, f"the change key {key!r} met another"
        for n, key in enumerate(ALIKE_MADE):
            answer = await t.write(t.outside("run-0", key=key, events=[note(key)]))
            assert (answer.duplicate, list(answer.seqs)) == (True, [n + 2]), f"change key {key!r}"
        notes = [note(key, key=key) for key in ALIKE_MADE]
        first = await t.send(*notes, run_id="run-1")
        skipped = [ALIKE_MADE[n] for n in sorted(first.skipped)]
        assert not skipped, f"the event keys met others: {skipped!r}"
        for n, one in enumerate(notes):
            again = await t.send(one, run_id="run-1")
            found = (set(again.skipped), again.seqs[0])
            assert found == ({0}, first.seqs[n]), f"event key {one.key!r}"
        # A purged run keeps its own key, and that alone.
        await t.end("run-0")
        before = await t.store.now() + timedelta(days=1)
        await t.store.purge(before=before, key_retention=timedelta(0))
        assert await t.store.find_run(ALIKE[0]) is None
        for n, key in enumerate(ALIKE[1:], 1):
            assert await t.store.find_run(key) == f"run-{n}", f"the idempotency key {key!r}"

    @scenario
    async def test_UNI_09_item_ids_in_pairs(self, t: Case) -> None:
        """UNI-09: items of a run whose ids look alike are claimed, released and dropped one by one.

        Usual cause: the primary key of the items has the server's default collation, or a prefix.
        """
        ids = [f"step:{name}" for name in ALIKE_MADE]
        await t.start(put=[step(name, payload={"n": n}) for n, name in enumerate(ALIKE_MADE)])
        assert set(await t.items()) == {"turn", *ids}
        for n, item_id in enumerate(ids):
            claims = await t.claim(("run", item_id), owner=f"w{n}")
            assert [(c.item.item_id, c.item.payload) for c in claims] == [(item_id, {"n": n})]
        found = await t.items()
        for n, item in enumerate(found[item_id] for item_id in ids):
            assert item.lease is not None
            assert item.lease.owner == f"w{n}", f"{item.item_id!r} has the lease of another"
        turn = await t.turn()
        for n, item_id in enumerate(ids, 1):
            await t.write(under(turn, n, drop=[item_id]))
            assert set(await t.items()) == {"turn", *ids[n:]}, f"{item_id!r} took others with it"

    @scenario
    async def test_UNI_10_queues_and_workflows_in_pairs(self, t: Case) -> None:
        """UNI-10: workers of one queue or workflow take nothing of one whose name looks alike.

        Usual cause: the filter of claims compares with the server's default collation.
        """
        now = await t.store.now()
        for n, name in enumerate(ALIKE):
            await t.start(f"queue-{n}", queue=name, workflow="flow")
            await t.start(f"flow-{n}", queue="default", workflow=name)
        for n, name in enumerate(ALIKE):
            one = frozenset({name})
            page = await t.store.list_runs(RunQuery(workflow=name))
            assert [run.run_id for run in page.items] == [f"flow-{n}"], f"workflow {name!r}"
            claims = await t.claim(queues=one, limit=50)
            assert [c.run.run_id for c in claims] == [f"queue-{n}"], f"queue {name!r}"
            claims += await t.claim(workflows=one, limit=50)
            assert [c.run.run_id for c in claims[1:]] == [f"flow-{n}"], f"workflow {name!r}"
            for which in ({"queues": one}, {"workflows": one}):
                due = await t.store.next_due(**which)
                assert due is not None
                assert due > now, f"another's work is due for {which!r}"

    @scenario
    async def test_UNI_11_owners_in_pairs(self, t: Case) -> None:
        """UNI-11: the leases of one owner are not those of one whose name looks alike.

        ``free("Host")`` must not end the leases of ``host``, which is alive. Usual cause: owners
        are compared with the server's default collation.
        """
        for n, owner in enumerate(ALIKE):
            await t.start(f"run-{n}")
            await t.turn(f"run-{n}", owner=owner)
        assert set(await t.store.holders()) == set(ALIKE)
        for n, owner in enumerate(ALIKE):
            refs = await t.store.leases(owner)
            assert [ref.run_id for ref in refs] == [f"run-{n}"], f"leases of {owner!r}"
        for n, owner in enumerate(ALIKE, 1):
            assert await t.store.free(owner) == 1, f"free({owner!r})"
            assert set(await t.store.holders()) == set(ALIKE[n:]), f"free({owner!r})"

    @scenario
    async def test_UNI_12_namespaces_in_pairs(self, t: Case) -> None:
        """UNI-12: namespaces that differ in case or in their last character are two stores.

        Usual cause: the namespace is a schema, a folder or a column that ignores case, or is cut.
        """
        names = [f"{t.namespace}-{end}" for end in ("a", "A", "a_", "a-", "b")]
        stores = [await t.open(name) for name in names]
        for n, store in enumerate(stores):
            await t.start(args=str(n), store=store)
        for n, store in enumerate(stores):
            run = await store.get_run("run")
            assert run is not None
            assert run.args_text == str(n), f"the namespace {names[n]!r} met another"
            assert (await store.stats())["runs"] == 1
        end = Control(ControlKind.TERMINATE, "over")
        for store in stores[1:]:
            over = t.outside(control=end, final=RunStatus.TERMINATED)
            await t.write(over, store=store)
        assert not (await stores[0].list_runs(RunQuery())).items[0].status.is_terminal
