"""Group MIG: a store is made and brought forward by whoever comes first, and by all at once.

``write_sample`` and ``check_sample`` are for backends that keep a dump of each released schema:
the dump is of a store that ``write_sample`` has filled.
"""
# ruff: noqa: N802 - the ids are part of the names

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, cast

import pytest

from pyworkflow.errors import SchemaTooNew
from pyworkflow.events import Event
from pyworkflow.runs import RunStatus
from pyworkflow.spi.storage import (
    TURN,
    Change,
    ClaimRequest,
    NewRun,
    RunQuery,
    Settle,
    StorageBackend,
    Update,
)
from pyworkflow_conformance import _worker
from pyworkflow_conformance._at_once import by_processes
from pyworkflow_conformance._case import (
    Case,
    Suite,
    command,
    deliver,
    given,
    incoming,
    note,
    scenario,
    seconds,
    step,
    turn,
    under,
)
from pyworkflow_conformance._children import Child, dice, opened_or_refused, sizes, sound
from pyworkflow_conformance._fresh import all_work

__all__ = ["MigrationChecks", "check_sample", "write_sample"]


class MigrationChecks(Suite):
    """MIG."""

    @scenario
    async def test_MIG_01_fresh(self, t: Case) -> None:
        """MIG-01: a namespace that nobody used before is made by the first who opens it, empty.

        Usual cause: a store has to be set up by hand, or shows what another namespace has.
        """
        assert (await t.store.stats())["runs"] == 0
        assert (await t.store.list_runs(RunQuery())).items == []
        assert await t.store.next_due() is None
        assert await t.store.holders() == []
        await write_sample(t.store)
        await check_sample(t.store)

    @scenario
    async def test_MIG_02_every_released_schema(self, t: Case) -> None:
        """MIG-02: what each released version wrote is read, and written to, by this one.

        The suite names the versions of which it has a dump (``released``) and puts one in place
        (``make_released``). Usual cause: a migration that was never run on a real store.
        """
        # The version that is about to be released is one of them.
        await write_sample(t.store)
        await t.store.close()
        t.store = await t.open()
        await t.store.migrate()
        await check_sample(t.store)
        versions = cast("Sequence[str]", getattr(self, "released", ()))
        for n, version in enumerate(versions):
            namespace = f"{t.namespace}-{n}"
            put = cast("Callable[[str, str], Awaitable[None]]", getattr(self, "make_released"))  # noqa: B009 - not every suite has it
            await put(version, namespace)
            store = await t.open(namespace)
            await check_sample(store)
            await sound(store)

    @scenario
    async def test_MIG_03_twice(self, t: Case) -> None:
        """MIG-03: migrating what is up to date changes nothing, in use or not.

        Usual cause: a migration that is not noted in the same transaction.
        """
        await write_sample(t.store)
        before = [await t.picture(run_id) for run_id in ("open", "done")]
        other = await t.open()
        for store in (t.store, other, t.store):
            await store.migrate()
        await asyncio.gather(t.store.migrate(), other.migrate())
        assert [await t.picture(run_id) for run_id in ("open", "done")] == before
        await check_sample(t.store)

    @scenario(needs=("multi_process", "url"))
    async def test_MIG_04_8_processes_at_once(self, t: Case) -> None:
        """MIG-04: eight processes that start on a new store at once all get to work.

        On an empty database if the suite has ``make_fresh``, else on new namespaces. A deployment
        does this. Usual cause: "create if absent" is checked and done in two steps.
        """
        for round_ in range(sizes(1, 5)):
            namespaces = [f"{t.namespace}-{round_}", f"{t.namespace}-{round_}-other"]
            # Where nothing was made at all, if the suite has such a place.
            fresh = await self.make_fresh() if given(self, "make_fresh") else None
            url = fresh or self.url(namespaces[0])
            assert url is not None
            problems = await asyncio.to_thread(by_processes, url, namespaces)
            assert not problems, f"eight processes: {'; '.join(problems)}"
            await all_work(t, fresh, namespaces)

    @scenario(needs=("url",))
    async def test_MIG_05_killed_midway(self, t: Case) -> None:
        """MIG-05: a migration that was killed anywhere is ended by the next process.

        On an empty database if the suite has ``make_fresh``. Usual cause: a migration is several transactions, and its steps cannot be repeated.
        """
        chance = dice(t, "MIG-05")
        for round_ in range(sizes(4)):
            namespace = f"{t.namespace}-{round_}"
            fresh = await self.make_fresh() if given(self, "make_fresh") else None
            options: dict[str, Any] = {"namespace": namespace, "url": fresh, "run_id": "run"}
            for _ in range(2):
                async with Child(t, "opens", **options, gate=True) as child:
                    await child.go()
                    await asyncio.sleep(chance.random() * 0.04)
                    await child.kill()
            async with Child(t, "opens", **options) as child:
                await child.finished()
            store = await t.open(namespace, url=fresh)
            assert await store.get_run("run") is not None
            await write_sample(store)
            await check_sample(store)
            await sound(store)
            await store.close()

    @scenario
    async def test_MIG_06_newer_schema_refused(self, t: Case) -> None:
        """MIG-06 (rolling upgrade): a store of a newer version is refused, and not touched.

        Needs ``make_newer`` of the suite. Usual cause: the version is looked at after the first
        write, or not at all.
        """
        make_newer = getattr(self, "make_newer", None)
        if make_newer is None or getattr(Suite, "make_newer", None) is getattr(
            type(self), "make_newer", None
        ):
            pytest.skip("does not apply: MIG-06 needs the suite's make_newer")
        namespace = f"{t.namespace}-newer"
        store = await t.open(namespace)
        await write_sample(store)
        await store.close()
        await make_newer(namespace)
        for _ in range(2):
            refused = await self.make(namespace)
            try:
                with pytest.raises(SchemaTooNew) as caught:
                    await refused.open()
            finally:
                await refused.close()
            assert caught.value.found > caught.value.supported
        assert await opened_or_refused(t, namespace) is None

    @scenario
    async def test_MIG_07_dry_run_writes_nothing(self, t: Case) -> None:
        """MIG-07: what would be migrated can be asked without doing it.

        Applies to backends with ``pending_migrations``. Usual cause: asking opens, and opening
        migrates.
        """
        namespace = f"{t.namespace}-fresh"
        fresh = await self.make(namespace)
        try:
            first = await fresh.pending_migrations()
            if not first:
                pytest.skip("does not apply: MIG-07 needs a backend that has migrations")
            assert await fresh.pending_migrations() == first, "asking has migrated"
        finally:
            await fresh.close()
        store = await t.open(namespace)
        assert await store.pending_migrations() == []
        await write_sample(store)


async def write_sample(store: StorageBackend) -> None:
    """Fill an empty store with one of everything: what ``check_sample`` knows."""
    now = await store.now()
    due = now + seconds(86_400)
    new = NewRun(
        workflow="flow",
        version="1",
        args='["\u00e9"]',
        idempotency_key="sample-open",
        tags=("a",),
        attributes={"big": 2**70, "text": "\u00e9\x00"},
        deadline=due,
    )
    first = Event("workflow.started", "I", {"workflow": "flow", "args": "[]"})
    await store.commit_one(
        Change(
            run_id="open",
            key="start",
            create=new,
            events=[first],
            put=[step(due_at=due, payload={"n": [1, None]}), deliver(due_at=due)],
        )
    )
    request = ClaimRequest(owner="sample", lease=seconds(60), items=[("open", TURN)])
    (claim,) = (await store.claim(request)).claims
    await store.commit_one(
        under(
            claim,
            1,
            seen=1,
            events=[command(), note("kept", key="n")],
            settle=Settle(reschedule_at=due),
        )
    )
    await store.commit_one(_worker.creation("done", "sample-done"))
    request = ClaimRequest(owner="sample", lease=seconds(60), items=[("done", TURN)])
    (claim,) = (await store.claim(request)).claims
    ended = Event("workflow.completed", "C", {"result": "1"})
    await store.commit_one(
        under(
            claim,
            1,
            seen=1,
            events=[ended],
            update=Update(result="1"),
            final=RunStatus.COMPLETED,
        )
    )


async def check_sample(store: StorageBackend) -> None:
    """The store holds what ``write_sample`` wrote, and goes on with it. Call it once or often."""
    run, done = await store.get_run("open"), await store.get_run("done")
    assert run is not None
    assert done is not None
    assert (run.args_text, run.tags, run.seen_seq) == ('["\u00e9"]', ("a",), 1)
    assert run.attributes["big"] == 2**70
    assert run.attributes["text"] == "\u00e9\x00"
    assert (done.status, done.result_text, done.history_length) == (RunStatus.COMPLETED, "1", 2)
    kinds = [event.type for event in await store.get_events("open", limit=3)]
    assert kinds == ["workflow.started", "sleep.created", "log.info"]
    items = {item.item_id: item for item in await store.list_work("open")}
    assert {"step:1", "deliver:1", TURN} <= set(items)
    assert items["step:1"].payload == {"n": [1, None]}
    assert await store.find_run("sample-open") == "open"
    assert await store.find_run("sample-done") == "done"
    # Keys of events and changes stand, and the run goes on.
    seen = await store.commit_one(Change(run_id="open", key="again", events=[note("x", key="n")]))
    assert (list(seen.seqs), seen.skipped) == ([3], frozenset({0}))
    await store.commit_one(
        Change(run_id="open", key=f"input:{run.history_length}", events=[incoming()], put=[turn()])
    )
    after = await store.get_run("open")
    assert after is not None
    assert after.history_length == run.history_length + 1
