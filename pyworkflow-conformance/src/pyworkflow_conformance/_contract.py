"""Groups CON, ORD: what is stored comes back, in order, and refusals write nothing."""
# ruff: noqa: N802 - the ids are part of the names

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

from pyworkflow.errors import (
    Fenced,
    KeyTaken,
    RunClosed,
    RunExists,
    RunNotFound,
    StorageError,
    UnseenInput,
)
from pyworkflow.events import Event
from pyworkflow.runs import ErrorInfo, ItemKind, ParentRef, RunStatus
from pyworkflow.spi.storage import (
    ClaimRef,
    Control,
    ControlKind,
    LeaseFor,
    NewRun,
    RunQuery,
    Settle,
    Update,
)
from pyworkflow_conformance._case import (
    Case,
    Suite,
    command,
    deliver,
    incoming,
    note,
    scenario,
    started,
    turn,
    under,
)

__all__ = ["ContractChecks"]


class ContractChecks(Suite):
    """CON, ORD."""

    @scenario
    async def test_CON_01_create_then_get(self, t: Case) -> None:
        """CON-01: every field of a new run comes back equal.

        The engine decides by these fields, and people search by them. Usual cause: a column that is
        missing, or a default that wins over the value given.
        """
        now = await t.store.now()
        given: dict[str, Any] = {
            "workflow": "flow",
            "version": "7",
            "args": '{"a": [1]}',
            "idempotency_key": "order-1",
            "parent": ParentRef(run_id="p", op="1#1:child"),
            "root": "p",
            "queue": "fast",
            "priority": 3,
            "tags": ("x", "y"),
            "attributes": {"a": 1, "b": {"c": [None, True, 1.5]}},
            "deadline": now + timedelta(days=1),
        }
        committed = await t.start(**given)
        run = await t.run()
        shown = {name: getattr(run, "args_text" if name == "args" else name) for name in given}
        assert shown == given
        assert (run.run_id, run.status, run.history_length) == ("run", RunStatus.PENDING, 1)
        assert (run.seen_seq, run.paused, run.stalled) == (0, False, None)
        assert now <= run.created_at == run.updated_at == committed.timestamp
        assert (run.started_at, run.finished_at, run.result_text, run.error) == (None,) * 4
        assert (committed.last_seq, committed.seqs, committed.duplicate) == (1, [1], False)
        assert committed.skipped == frozenset()
        item = (await t.items())["turn"]
        assert (item.kind, item.queue, item.priority) == (ItemKind.TURN, "fast", 3)

    @scenario
    async def test_CON_02_create_existing_refused(self, t: Case) -> None:
        """CON-02: a run id is created once; the same create again is the same success.

        A client that got no answer sends its start again. Usual cause: "insert or ignore" without a
        look at whose change stands there.
        """
        first = await t.start()
        new = NewRun(workflow="other", version="1", args="[]")
        refusal = await t.refused(RunExists, t.outside(create=new, events=[started()]))
        assert refusal.run_id == "run"
        again = await t.start()
        assert again.duplicate
        assert (again.last_seq, again.timestamp) == (first.last_seq, first.timestamp)
        assert (await t.run()).workflow == "flow"

    @scenario
    async def test_CON_03_commit_absent_refused(self, t: Case) -> None:
        """CON-03: without a run there is nothing to change.

        A message to a run that was purged must not bring half of it back. Usual cause: upserts.
        """
        refusal = await t.refused(RunNotFound, t.outside(events=[note()]))
        assert refusal.run_id == "run"
        assert await t.store.get_run("run") is None

    @scenario
    async def test_CON_04_terminal_refuses_commands(self, t: Case) -> None:
        """CON-04 (I8): a run that ended is refused everything but observations.

        What was reported as the result of a run stays the result. Usual cause: the status is read
        before the transaction begins.
        """
        await t.start()
        await t.end()
        run = await t.run()
        assert (run.status, run.finished_at) == (RunStatus.COMPLETED, run.updated_at)
        assert await t.items() == {}
        changes: tuple[dict[str, Any], ...] = (
            {"events": [incoming()]},
            {"events": [command()]},
            {"events": [note(), incoming()]},
            {"control": Control(ControlKind.PAUSE)},
            {"control": Control(ControlKind.TERMINATE), "final": RunStatus.TERMINATED},
            {"update": Update(result="1")},
            {"put": [turn()]},
            {"put": [deliver()]},
        )
        for fields in changes:
            refusal = await t.refused(RunClosed, t.outside(**fields))
            assert (refusal.run_id, refusal.status) == ("run", "completed")

    @scenario
    async def test_CON_05_terminal_accepts_observations(self, t: Case) -> None:
        """CON-05 (I8): a late log line is kept, and changes nothing else.

        Steps that were running when a run was terminated still log. Usual cause: a blanket refusal
        once a run has ended, or an ``updated_at`` that is moved.
        """
        await t.start()
        await t.end()
        before = await t.run()
        committed = await t.send(note("late"))
        run = await t.run()
        assert committed.last_seq == run.history_length == before.history_length + 1
        assert (run.status, run.finished_at) == (before.status, before.finished_at)

    @scenario
    async def test_CON_06_refusal_order(self, t: Case) -> None:
        """CON-06: when several refusals fit, the first of the documented order is given.

        A sender reacts to the refusal it gets: it gives up, reads again or starts anew. Usual
        cause: rules written anew instead of calling ``decide``.
        """
        stale = ClaimRef("run", "turn", "no-such-token")
        create = NewRun(workflow="w", version="1", args="[]", idempotency_key="taken")
        await t.refused(RunNotFound, t.outside(claim=stale, events=[note()]))
        await t.start(idempotency_key="taken")
        # RunExists before KeyTaken.
        await t.refused(RunExists, t.outside(create=create, events=[started()]))
        # UnseenInput before KeyTaken.
        ending: dict[str, Any] = {
            "create": create,
            "events": [started()],
            "final": RunStatus.FAILED,
        }
        await t.refused(UnseenInput, t.outside("other", **ending), run_id="other")
        unseen = t.outside("other", create=create, events=[started()])
        await t.refused(KeyTaken, unseen, run_id="other")
        # Fenced before UnseenInput.
        await t.refused(Fenced, t.outside(claim=stale, final=RunStatus.FAILED))
        claim = await t.turn()
        await t.refused(UnseenInput, under(claim, 1, final=RunStatus.FAILED))
        done = under(claim, 2, seen=1, events=[command()], final=RunStatus.COMPLETED)
        await t.store.commit_one(done)
        # Duplicate before RunClosed, RunClosed before Fenced.
        assert (await t.store.commit_one(done)).duplicate
        await t.refused(RunClosed, under(claim, 3, seen=1, final=RunStatus.COMPLETED))
        # Observations are not RunClosed: what is left to say is that the claim is over.
        await t.refused(Fenced, under(claim, 3, events=[note()]))

    @scenario
    async def test_CON_07_refusal_writes_nothing(self, t: Case) -> None:
        """CON-07 (I1): events, fields and items of a refused change leave no trace.

        After a refusal the engine goes on from what it knew. Usual cause: several statements
        without a transaction, or a change key that is noted first.
        """
        await t.start()
        claim = await t.turn()
        await t.send(incoming())
        refusal = await t.refused(
            UnseenInput,
            under(
                claim,
                events=[command(), note()],
                seen=1,
                update=Update(result="1", attributes={"a": 1}),
                put=[deliver()],
                final=RunStatus.COMPLETED,
            ),
        )
        assert [e.seq for e in refusal.inputs] == [2]
        # The key of a refused change is not taken: with the input seen it goes through.
        await t.store.commit_one(
            under(claim, seen=2, events=[command()], final=RunStatus.COMPLETED)
        )

    @scenario
    async def test_CON_08_patch_merges(self, t: Case) -> None:
        """CON-08: an update sets what it names; attributes merge key by key.

        Two steps may set attributes of one run. Usual cause: the whole document is replaced.
        """
        await t.start(attributes={"a": 1, "b": 1})
        error = ErrorInfo(type="m:E", message="x", details={"args": [1, "é"]}, portable=True)
        await t.store.commit_one(t.outside(update=Update(attributes={"b": 2, "c": None})))
        await t.store.commit_one(t.outside(update=Update(result="[1]", next="run-2")))
        await t.store.commit_one(t.outside(update=Update(error=error)))
        run = await t.run()
        assert run.attributes == {"a": 1, "b": 2, "c": None}
        assert (run.result_text, run.next, run.error) == ("[1]", "run-2", error)

    @scenario
    async def test_CON_09_empty_batch_noop(self, t: Case) -> None:
        """CON-09: a change of nothing changes nothing, and is answered.

        Turns that bring nothing still settle their item. Usual cause: SQL without rows, or a due
        time touched in passing.
        """
        await t.start()
        before = await t.picture()
        committed = await t.store.commit_one(t.outside())
        assert (committed.last_seq, list(committed.seqs)) == (1, [])
        assert await t.picture() == before

    @scenario
    async def test_CON_10_get_missing_none(self, t: Case) -> None:
        """CON-10: reads of what is not there are empty, never errors.

        Clients ask for runs that may be purged. Usual cause: an index into an empty result.
        """
        assert await t.store.get_run("nobody") is None
        assert await t.store.find_run("nothing") is None
        assert await t.store.get_events("nobody") == []
        assert await t.store.list_work("nobody") == []
        assert await t.store.next_due() is None
        assert await t.claim(("nobody", "turn")) == []

    @scenario
    async def test_CON_11_close_reopen_same_state(self, t: Case) -> None:
        """CON-11: another object, or the same store after a restart, shows the same.

        Workers are restarted at any time. Usual cause: something is kept in the object alone: a
        counter, a key, the answers to changes.
        """
        await t.start(idempotency_key="key", put=[deliver(due_at=None, payload={"to": "x"})])
        claim = await t.turn()
        await t.store.commit_one(under(claim, seen=1, events=[command(), note("é")]))
        before = await t.picture()
        first, t.store = t.store, await t.open()
        await first.close()
        assert await t.picture() == before
        assert await t.store.find_run("key") == "run"
        assert (await t.store.commit_one(under(claim, 2, events=[note()]))).last_seq == 4

    @scenario
    async def test_CON_12_open_twice_idempotent(self, t: Case) -> None:
        """CON-12: open and migrate may be called by everybody at any time.

        Every process opens the store when it starts. Usual cause: "create" without "if absent", or
        a migration that is not noted.
        """
        await t.start()
        before = await t.picture()
        await t.store.open()
        await t.store.migrate()
        await t.store.migrate()
        assert await t.picture() == before
        async with t.store.clone() as clone:
            assert (await clone.get_run("run")) == await t.run()

    @scenario
    async def test_CON_13_use_after_close_raises(self, t: Case) -> None:
        """CON-13: a closed object says so; closing again is fine; others are not disturbed.

        A worker that stops must not hang, nor write on. Usual cause: a pool that reconnects by
        itself, or one that all objects share.
        """
        store = await t.open()
        await store.close()
        await store.close()
        for call in (
            lambda: store.get_run("run"),
            lambda: store.commit_one(t.outside()),
            store.now,
        ):
            try:
                await call()
            except StorageError:
                pass
            else:
                raise AssertionError("a closed object answered")
        await t.start()

    @scenario
    async def test_CON_14_unknown_event_type_roundtrip(self, t: Case) -> None:
        """CON-14: what a newer version wrote is kept as it is.

        Versions run side by side during a deployment. Usual cause: a check of the type or a fixed
        list of columns.
        """
        await t.start()
        event = Event("future.happened", "O", {"x": 1}, op="9#9:new", key="k", v=99)
        await t.send(event)
        found = (await t.store.get_events("run"))[-1]
        assert (found.type, found.klass, found.data, found.op, found.key, found.v) == (
            *event[:5],
            99,
        )

    @scenario
    async def test_CON_15_unknown_fields_preserved(self, t: Case) -> None:
        """CON-15: data and payloads are opaque: unknown fields come back.

        A later version adds fields that an earlier one has to carry. Usual cause: data is parsed
        into a model and written back.
        """
        await t.start(put=[turn(payload={"later": {"x": [1]}})])
        await t.send(Event("log.info", "O", {"message": "m", "later": {"y": None}}))
        assert (await t.store.get_events("run"))[-1].data["later"] == {"y": None}
        assert (await t.items())["turn"].payload == {"later": {"x": [1]}}

    @scenario
    async def test_CON_16_stats_counts(self, t: Case) -> None:
        """CON-16: runs are counted, by status.

        ``pyworkflow storage stats`` and dashboards show these numbers. Usual cause: a counter that
        is kept beside the rows and drifts.
        """
        for n in range(3):
            await t.start(f"run-{n}")
        await t.end("run-0")
        stats = await t.store.stats()
        assert (stats["runs"], stats["pending"], stats["completed"]) == (3, 2, 1)

    @scenario
    async def test_CON_17_born_claimed(self, t: Case) -> None:
        """CON-17: an item can be born held by its writer, counted and with a token.

        A worker starts steps in place without a second round trip. Usual cause: the item is stored
        free and claimed after the commit.
        """
        held = LeaseFor(owner="me", lease=timedelta(seconds=60))
        committed = await t.start(put=[turn(claimed=held), deliver(claimed=held)])
        assert {i.item_id for i in committed.claims} == {"turn", "deliver:1"}
        assert {i.item_id: i for i in committed.claims} == await t.items()
        assert all(i.claims == 1 for i in committed.claims)
        assert await t.claim(limit=10) == []
        first = next(i for i in committed.claims if i.item_id == "turn")
        answer = await t.store.commit_one(under(first, seen=1, settle=Settle(), events=[command()]))
        assert list(answer.claims) == []
        assert "turn" not in await t.items()

    @scenario
    async def test_ORD_01_seq_dense_from_1(self, t: Case) -> None:
        """ORD-01 (I2): seq counts 1, 2, 3 … whatever comes and is refused or skipped.

        Replay and readers rely on there being no gap. Usual cause: a sequence of the database,
        which loses numbers when a change is refused.
        """
        await t.start()
        await t.send(note("a", key="k"))
        committed = await t.send(note("b"), note("c", key="k"), note("d"))
        assert (list(committed.seqs), committed.skipped) == ([3, 2, 4], frozenset({1}))
        assert [e.seq for e in await t.store.get_events("run")] == [1, 2, 3, 4]

    @scenario
    async def test_ORD_02_multi_event_batch_contiguous(self, t: Case) -> None:
        """ORD-02: the events of a change stand together, with one timestamp.

        What a turn did is one moment. Usual cause: events are numbered or stamped one by one.
        """
        await t.start()
        answers = await asyncio.gather(
            *(t.send(*(note(f"{n}.{m}") for m in range(5))) for n in range(8))
        )
        for answer in answers:
            first = answer.seqs[0]
            assert list(answer.seqs) == list(range(first, first + 5))
            events = await t.store.get_events("run", after=first - 1, limit=5)
            assert {e.timestamp for e in events} == {answer.timestamp}

    @scenario
    async def test_ORD_03_arrival_order_is_log_order(self, t: Case) -> None:
        """ORD-03: what was acknowledged first stands first.

        Inputs are delivered in the order in which they were accepted. Usual cause: sorting by time,
        or writes that pass each other in a pool.
        """
        await t.start()
        for n in range(20):
            await t.send(note(str(n)))
        messages = [e.data.get("message") for e in await t.store.get_events("run", after=1)]
        assert messages == [str(n) for n in range(20)]

    @scenario
    async def test_ORD_04_ts_nondecreasing(self, t: Case) -> None:
        """ORD-04 (I2): the clock goes back, timestamps do not.

        Durations computed from a history are never negative. Usual cause: ``now`` is stored as it
        is when the machine's clock was set back.
        """
        first = await t.start()
        await t.shift(-3600)
        second = await t.send(note())
        assert second.timestamp >= first.timestamp
        assert second.now < first.now
        run = await t.run()
        assert run.updated_at >= run.created_at

    @scenario
    async def test_ORD_05_read_after_excludes(self, t: Case) -> None:
        """ORD-05: get_events gives seq > after, at most limit.

        Readers follow a history by its last seq. Usual cause: ``>=`` for ``>``, no order, or limit
        0 read as none.
        """
        await t.start()
        await t.send(*(note(str(n)) for n in range(9)))
        for after, limit, expected in (
            (0, None, range(1, 11)),
            (3, 2, range(4, 6)),
            (9, 5, range(10, 11)),
            (10, None, range(0)),
            (99, 1, range(0)),
            (0, 0, range(0)),
        ):
            found = await t.store.get_events("run", after=after, limit=limit)
            assert [e.seq for e in found] == list(expected)

    @scenario
    async def test_ORD_06_events_immutable(self, t: Case) -> None:
        """ORD-06 (I2): later changes leave earlier events as they are.

        A replay that saw an event must see the same again. Usual cause: an upsert by key that
        overwrites.
        """
        await t.start()
        await t.send(note("a", key="k"))
        before = await t.store.get_events("run")
        await t.send(note("b", key="k"), incoming())
        await t.end()
        assert (await t.store.get_events("run"))[:2] == before

    @scenario
    async def test_ORD_07_runs_independent(self, t: Case) -> None:
        """ORD-07: each run counts for itself.

        Thousands of runs write at once. Usual cause: one counter for all.
        """
        for run_id in ("a", "b"):
            await t.start(run_id)
        for n in range(3):
            await t.send(note(str(n)), run_id="a")
        assert (await t.send(note(), run_id="b")).seqs == [2]
        assert (await t.run("a")).history_length == 4

    @scenario
    async def test_ORD_08_interleaved_writers_no_gap(self, t: Case) -> None:
        """ORD-08: writers on several objects number one sequence.

        Many workers and clients write to one run. Usual cause: the next seq is cached in the
        object.
        """
        await t.start()
        stores = [t.store, await t.open(), await t.open()]
        for n in range(12):
            answer = await stores[n % 3].commit_one(t.outside(events=[note(str(n))]))
            assert answer.seqs == [n + 2]

    @scenario
    async def test_ORD_09_list_runs_stable_under_insert(self, t: Case) -> None:
        """ORD-09: newest first; a run that appears while one pages moves nothing.

        People page through a list that grows. Usual cause: a cursor made of an offset.
        """
        for n in range(6):
            await t.start(f"run-{n}")
        page = await t.store.list_runs(RunQuery(limit=3))
        await t.start("run-6")
        rest = await t.store.list_runs(RunQuery(limit=3), page.cursor)
        assert [r.run_id for r in page.items] == ["run-5", "run-4", "run-3"]
        assert [r.run_id for r in rest.items] == ["run-2", "run-1", "run-0"]
        assert rest.cursor is None
