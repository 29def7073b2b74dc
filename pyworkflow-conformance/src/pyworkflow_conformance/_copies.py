"""Group CPY: runs move between stores by ``export_run``, ``export_keys`` and ``import_delta``."""
# ruff: noqa: N802 - the ids are part of the names

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from pyworkflow.errors import ConfigurationError, KeyTaken
from pyworkflow.runs import ErrorInfo, ParentRef, RunStatus
from pyworkflow.spi._delta import Delta, KeyMark, RunDelta
from pyworkflow.spi.storage import (
    Control,
    ControlKind,
    NewRun,
    RunQuery,
    Settle,
    StorageBackend,
    Update,
)
from pyworkflow.testing.internals import MemoryStorageBackend, copy_store
from pyworkflow_conformance._case import (
    Case,
    Suite,
    command,
    deliver,
    incoming,
    note,
    overrides,
    scenario,
    seconds,
    started,
    step,
    turn,
    under,
)

__all__ = ["CopyChecks"]

_ALL = RunQuery(limit=1000)


class CopyChecks(Suite):
    """CPY."""

    @scenario
    async def test_CPY_01_export_run_complete(self, t: Case) -> None:
        """CPY-01: an export names every field, item and kept answer of a run.

        What it leaves out is lost in every copy. Usual cause: a column that came later.
        """
        assert await t.store.export_run("nobody") is None
        await _fill(t)
        for run_id in ("rich", "done", "paused"):
            exported = await t.store.export_run(run_id)
            assert exported is not None
            assert (exported.run_id, exported.events, exported.removed) == (run_id, [], False)
            run = await t.run(run_id)
            assert exported.fields["args"] == run.args_text
            for name in ("workflow", "version", "created_at", "updated_at"):
                assert exported.fields[name] == getattr(run, name)
            assert exported.fields.get("seen_seq", 0) == run.seen_seq
            assert bool(exported.fields.get("paused")) == run.paused
            ended = run.status if run.status.is_terminal else None
            assert exported.fields.get("final") == ended
            items = sorted(exported.items, key=lambda item: item.item_id)
            assert items == list(await t.store.list_work(run_id))
            if _keeps_answers(t.store):
                assert "start" in {r.key for r in exported.records if r.token is None}
                assert exported.fields["create_key"] == "start"

    @scenario
    async def test_CPY_02_export_keys_with_purged(self, t: Case) -> None:
        """CPY-02: all idempotency keys are listed once, those of purged runs with their end.

        Without them a copy would let an old order run again (hazard 27).
        """
        for n in range(7):
            await t.start(f"run-{n}", idempotency_key=f"key-{n}")
        await t.start("without")
        await t.end("run-3")
        ended = (await t.run("run-3")).finished_at
        assert ended is not None
        before = await t.store.now() + timedelta(days=1)
        assert await t.store.purge(before=before, key_retention=seconds(5000)) == 1
        marks = await _keys(t.store)
        expected = {f"key-{n}": KeyMark(f"run-{n}") for n in range(7)}
        if _keeps_answers(t.store):
            expected["key-3"] = KeyMark("run-3", ended + seconds(5000))
        else:
            del expected["key-3"]
        assert marks == expected

    @scenario
    async def test_CPY_03_import_makes_an_equal_run(self, t: Case) -> None:
        """CPY-03: what was exported and imported is equal, field by field, and is found again.

        Usual cause: an import that goes through the rules of ``commit`` and stamps new times.
        """
        source, target = await _source(t), await _target(t)
        for run_id in ("rich", "done", "paused"):
            await _move(source, target, run_id)
            assert await t.picture(run_id) == await _picture(source, run_id)
            assert await _exported(target, run_id) == await _exported(source, run_id)
        assert await target.find_run("order") == "rich"
        # Listed as the newest, in the order in which they came.
        pages = await target.list_runs(_ALL)
        assert [run.run_id for run in pages.items] == ["paused", "done", "rich"]

    @scenario
    async def test_CPY_04_import_again_changes_nothing(self, t: Case) -> None:
        """CPY-04: a part sent again is skipped where it stands; so a copy can be resumed."""
        source, target = await _source(t), await _target(t)
        for _ in range(2):
            await _move(source, target, "rich", at_once=2)
            assert await t.picture("rich") == await _picture(source, "rich")
        assert (await target.stats())["runs"] == 1

    @scenario
    async def test_CPY_05_import_with_a_gap_refused(self, t: Case) -> None:
        """CPY-05: events beyond the next seq are a ``ValueError``, and nothing is written."""
        source, target = await _source(t), await _target(t)
        part = await source.export_run("rich")
        assert part is not None
        events = await source.get_events("rich")
        for given in ([events[1]], [*events[2:]]):
            with pytest.raises(ValueError):  # noqa: PT011 - the text is the backend's own
                await target.import_delta(
                    Delta([replace(part, events=given)], {"order": KeyMark("rich")})
                )
            assert await target.get_run("rich") is None
            assert await target.find_run("order") is None
        await target.import_delta(
            Delta([replace(part, events=events[:2])], {"order": KeyMark("rich")})
        )
        with pytest.raises(ValueError):  # noqa: PT011 - the text is the backend's own
            await target.import_delta(Delta([RunDelta("rich", events=events[3:])]))
        assert len(await target.get_events("rich")) == 2

    @scenario
    async def test_CPY_06_import_all_or_nothing(self, t: Case) -> None:
        """CPY-06 (I1): parts of several runs and keys arrive together, or none of them."""
        source, target = await _source(t), await _target(t)
        parts: list[RunDelta] = []
        for run_id in ("done", "rich"):
            part = await source.export_run(run_id)
            assert part is not None
            parts.append(replace(part, events=await source.get_events(run_id)))
        torn = replace(parts[1], events=parts[1].events[1:])
        with pytest.raises(ValueError):  # noqa: PT011 - the text is the backend's own
            await target.import_delta(Delta([parts[0], torn], {"k": KeyMark("done")}))
        assert (await target.stats())["runs"] == 0
        assert await target.find_run("k") is None
        await target.import_delta(Delta(parts, {"k": KeyMark("done"), "order": KeyMark("rich")}))
        assert (await target.stats())["runs"] == 2
        assert await target.find_run("k") == "done"

    @scenario
    async def test_CPY_07_imported_run_goes_on(self, t: Case) -> None:
        """CPY-07: a copied run is worked on as before: keys stand, work is due, seqs go on.

        Usual cause: an index that only ``commit`` fills.
        """
        source, target = await _source(t), await _target(t)
        await _move(source, target, "rich")
        length = (await t.run("rich")).history_length
        again = await t.start("rich", idempotency_key="order")
        assert again.duplicate
        sent = await t.store.commit_one(t.outside("rich", key="signal:1", events=[incoming()]))
        assert (sent.duplicate, list(sent.seqs)) == (True, [4])
        answer = await t.send(note(key="n"), incoming("new"), run_id="rich")
        assert answer.skipped == frozenset({0})
        assert answer.seqs[1] == length + 1
        claim = await t.turn("rich")
        assert claim.events[-1].seq == length + 1
        assert {c.item.item_id for c in await t.claim(limit=9)} == {"step:1"}
        await t.store.commit_one(
            under(claim, seen=length + 1, events=[command()], final=RunStatus.COMPLETED)
        )
        new = NewRun(workflow="flow", version="1", args="[]", idempotency_key="order")
        create = t.outside("another", create=new, events=[started()])
        await t.refused(KeyTaken, create, run_id="another")
        await t.start("later")
        assert (await target.list_runs(_ALL)).items[0].run_id == "later"

    @scenario
    async def test_CPY_08_keys_imported_and_freed(self, t: Case) -> None:
        """CPY-08: a purged run's key stays taken in the copy until its time is over."""
        target = await _target(t)
        until = await target.now() + seconds(1000)
        await target.import_delta(Delta(taken={"old": KeyMark("gone", until)}))
        assert await target.find_run("old") == "gone"
        await t.shift(1001)
        assert await target.find_run("old") is None
        await target.import_delta(Delta(taken={"other": KeyMark("gone")}, freed=["absent"]))
        await target.import_delta(Delta(freed=["other"]))
        assert await target.find_run("other") is None
        await t.start(idempotency_key="other")

    @scenario
    async def test_CPY_09_copy_there_and_back(self, t: Case) -> None:
        """CPY-09: ``pyworkflow storage copy`` to another store and back again leaves all equal.

        Also with runs that are written to between two copies.
        """
        await _target(t)
        await _fill(t)
        async with MemoryStorageBackend() as memory:
            report = await copy_store(t.store, memory)
            assert (report.runs, report.copied) == (3, 3)
            await copy_store(t.store, memory)
            back = await t.open(t.namespace + "-back")
            await copy_store(memory, back)
            for run_id in ("rich", "done", "paused"):
                assert await _unheld(back, run_id) == await _unheld(t.store, run_id)
            assert await _keys(back) == await _keys(t.store)

    @scenario
    async def test_CPY_10_import_while_in_use(self, t: Case) -> None:
        """CPY-10: imports and commits of others at the same time do not disturb each other."""
        source, target = await _source(t), await _target(t)
        await t.start("busy")
        other = await t.open()

        async def work() -> None:
            for n in range(20):
                await other.commit_one(t.outside("busy", key=f"b{n}", events=[note()]))

        async def move() -> None:
            for run_id in ("rich", "done", "paused"):
                await _move(source, target, run_id, at_once=1)

        await asyncio.gather(work(), move())
        assert (await t.run("busy")).history_length == 21
        for run_id in ("rich", "done", "paused"):
            assert await t.picture(run_id) == await _picture(source, run_id)


async def _fill(t: Case) -> None:
    """Runs that have one of everything; nothing is held."""
    now = await t.store.now()
    far = now + timedelta(days=9)
    await t.start(
        "rich",
        idempotency_key="order",
        parent=ParentRef(run_id="p", op="1#1:child"),
        root="p",
        queue="q",
        priority=4,
        tags=("a", "b"),
        attributes={"a": 2**70, "b": {"c": [None, -0.0]}},
        deadline=far,
        put=[step(payload={"x": 1}), deliver(due_at=far, payload={"to": "p"})],
    )
    claim = await t.turn("rich")
    error = ErrorInfo(type="m:E", message="\u00e9", details={"args": [1]}, portable=True)
    await t.store.commit_one(
        under(
            claim,
            seen=1,
            events=[command(), note("\u00e9\x00", key="n")],
            update=Update(error=error, next="later", attributes={"d": 1}),
            settle=Settle(reschedule_at=far, payload={"later": True}),
        )
    )
    await t.store.commit_one(t.outside("rich", key="signal:1", events=[incoming("i")]))
    await t.start("done", put=[deliver(notified=True)])
    await t.end("done")
    await t.start("paused", put=[turn(due_at=far)])
    await t.store.commit_one(t.outside("paused", control=Control(ControlKind.PAUSE)))


async def _source(t: Case) -> StorageBackend:
    """A memory store with the runs, whose clock is the target's."""
    source = MemoryStorageBackend()
    await source.open()
    beside = Case(t.suite, t.namespace)
    beside.store = source
    await _fill(beside)
    return source


async def _target(t: Case) -> StorageBackend:
    """The store, if it takes copies."""
    try:
        await t.store.import_delta(Delta())
    except ConfigurationError:
        pytest.skip("does not apply: CPY needs import_delta of the backend")
    return t.store


def _keeps_answers(store: StorageBackend) -> bool:
    """Whether the backend exports more than the contract's reads show."""
    return overrides(store, "export_run")


async def _move(
    source: StorageBackend, target: StorageBackend, run_id: str, *, at_once: int = 100
) -> None:
    """Copy one run in parts."""
    part = await source.export_run(run_id)
    assert part is not None
    events = await source.get_events(run_id)
    taken: dict[str, KeyMark] = {}
    if "idempotency_key" in part.fields:
        taken[str(part.fields["idempotency_key"])] = KeyMark(run_id)
    first, rest = events[:at_once], events[at_once:]
    await target.import_delta(Delta([replace(part, events=first)], taken))
    while rest:
        await target.import_delta(Delta([RunDelta(run_id, events=rest[:at_once])]))
        rest = rest[at_once:]


async def _picture(store: StorageBackend, run_id: str) -> object:
    run = await store.get_run(run_id)
    return (
        run and replace(run, status=RunStatus.PENDING),
        await store.get_events(run_id),
        await store.list_work(run_id),
    )


async def _unheld(store: StorageBackend, run_id: str) -> object:
    """What a copy keeps: all but leases and who was told of what."""
    run = await store.get_run(run_id)
    items = await store.list_work(run_id)
    return (
        run and replace(run, status=RunStatus.PENDING),
        await store.get_events(run_id),
        [replace(item, lease=None, rung_at=None) for item in items],
    )


async def _exported(store: StorageBackend, run_id: str) -> Any:
    """The export without its own order, and without the number, which is each store's own."""
    part = await store.export_run(run_id)
    assert part is not None
    fields = {name: value for name, value in part.fields.items() if name != "number"}
    records = sorted(part.records, key=lambda record: (record.token or "", record.key))
    return fields, sorted(part.items, key=lambda item: item.item_id), records


async def _keys(store: StorageBackend) -> dict[str, KeyMark]:
    """All idempotency keys, each listed once."""
    found: dict[str, KeyMark] = {}
    cursor: str | None = None
    while True:
        page = await store.export_keys(cursor)
        for key, mark in page.items:
            assert key not in found, f"a key is listed twice: {key!r}"
            found[key] = mark
        cursor = page.cursor
        if cursor is None:
            return found
