"""Groups PAG, PAY, UNI, TIM, GC: listings, sizes, texts, time, and what purge leaves."""
# ruff: noqa: N802 - the ids are part of the names

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

from pyworkflow.errors import KeyTaken, PayloadTooLarge, SerializationError
from pyworkflow.events import Event, Json
from pyworkflow.runs import ParentRef, RunStatus
from pyworkflow.spi.storage import NewRun, RunQuery, Settle, Update
from pyworkflow_conformance._case import (
    Case,
    Suite,
    command,
    deliver,
    incoming,
    note,
    scenario,
    seconds,
    started,
    step,
    turn,
    under,
)
from pyworkflow_conformance._clock import shift_clock

__all__ = ["ValueChecks"]

TEXTS = (
    "",
    "a\x00b",
    "".join(map(chr, range(256))),
    "e\u0301 \u00e9",
    "\u05d0\u0628\u202e!",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467\U0001f1eb\U0001f1f7",
    "\u2028\u2029\ufeff\uffff\U0010ffff",
    "' \" \\ / \r\n\t \x7f %s {} $1 ; --",
)


class ValueChecks(Suite):
    """PAG, PAY, UNI, TIM, GC."""

    async def _listed(self, t: Case, **query: Any) -> list[list[str]]:
        pages: list[list[str]] = []
        cursor: str | None = None
        while True:
            page = await t.store.list_runs(RunQuery(**query), cursor)
            pages.append([run.run_id for run in page.items])
            cursor = page.cursor
            if cursor is None:
                return pages

    @scenario
    async def test_PAG_01_exact_page_edge(self, t: Case) -> None:
        """PAG-01: a last page that is exactly full is the last.

        A page that is exactly full is the last one. Usual cause: the cursor is given whenever the
        page is full.
        """
        for n in range(4):
            await t.start(f"run-{n}")
        assert await self._listed(t, limit=2) == [["run-3", "run-2"], ["run-1", "run-0"]]
        assert await self._listed(t, limit=4) == [["run-3", "run-2", "run-1", "run-0"]]
        assert await self._listed(t, limit=3) == [["run-3", "run-2", "run-1"], ["run-0"]]

    @scenario
    async def test_PAG_02_empty(self, t: Case) -> None:
        """PAG-02: an empty store has one empty page.

        New installations list nothing. Usual cause: a cursor for a page without items.
        """
        assert await self._listed(t) == [[]]
        await t.start()
        assert await self._listed(t, workflow="nothing") == [[]]

    @scenario
    async def test_PAG_03_cursor_survives_reopen(self, t: Case) -> None:
        """PAG-03: a cursor is good in another process.

        A list is paged through by several requests, to several processes. Usual cause: cursors that
        the server holds open.
        """
        for n in range(3):
            await t.start(f"run-{n}")
        page = await t.store.list_runs(RunQuery(limit=1))
        rest = await (await t.open()).list_runs(RunQuery(limit=5), page.cursor)
        assert [r.run_id for r in rest.items] == ["run-1", "run-0"]

    @scenario
    async def test_PAG_04_bad_cursor_error(self, t: Case) -> None:
        """PAG-04: what is no cursor is a ValueError, never a wrong page.

        A cursor comes back from browsers and scripts. Usual cause: it is decoded without a check,
        and the driver's error shows.
        """
        await t.start()
        for cursor in ("", "nonsense", "run-", "run-\u0661", "-1", "\x00", "9" * 5000):
            try:
                await t.store.list_runs(RunQuery(), cursor)
            except ValueError:
                continue
            raise AssertionError(f"accepted as a cursor: {cursor!r}")

    @scenario
    async def test_PAG_05_insert_during_scan(self, t: Case) -> None:
        """PAG-05: while runs come and end, a listing shows each old run exactly once.

        Copies and purges page through a store in use. Usual cause: offsets, or an order that ties.
        """
        for n in range(10):
            await t.start(f"run-{n}")
        seen: list[str] = []
        cursor: str | None = None
        for n in range(100):
            page = await t.store.list_runs(RunQuery(limit=2), cursor)
            seen += [r.run_id for r in page.items]
            cursor = page.cursor
            if cursor is None:
                break
            await t.start(f"new-{n}")
            await t.end(f"run-{n}")
        assert seen == [f"run-{n}" for n in reversed(range(10))]

    @scenario
    async def test_PAG_06_filters_compose(self, t: Case) -> None:
        """PAG-06: status and workflow both hold, on every page.

        Dashboards filter by status and workflow at once. Usual cause: the filter is applied after
        the limit.
        """
        for n in range(8):
            await t.start(f"run-{n}", workflow="even" if n % 2 == 0 else "odd")
        for n in (0, 1, 4):
            await t.end(f"run-{n}")
        done = frozenset({RunStatus.COMPLETED})
        assert await self._listed(t, workflow="even", status=done, limit=1) == [
            ["run-4"],
            ["run-0"],
        ]
        assert await self._listed(t, status=done) == [["run-4", "run-1", "run-0"]]
        assert await self._listed(t, workflow="odd", limit=2) == [
            ["run-7", "run-5"],
            ["run-3", "run-1"],
        ]
        assert await self._listed(t, status=frozenset[RunStatus]()) == [[]]

    @scenario
    async def test_PAG_07_limit_bounds(self, t: Case) -> None:
        """PAG-07: 1 to 1,000 runs a page; everything else is a ValueError.

        A limit is the caller's protection. Usual cause: no check, or a limit that is cut in
        silence.
        """
        await t.start()
        for limit in (1, 1000):
            assert await self._listed(t, limit=limit) == [["run"]]
        for limit in (0, -1, 1001):
            try:
                await t.store.list_runs(RunQuery(limit=limit))
            except ValueError:
                continue
            raise AssertionError(f"accepted as a limit: {limit}")

    async def _round_trip(self, t: Case, value: Json) -> None:
        data = {"value": value}
        answer = await t.send(Event("log.info", "O", data))
        (event,) = await (await t.open()).get_events("run", after=answer.last_seq - 1)
        assert event.data == data

    @scenario
    async def test_PAY_01_1mb_event(self, t: Case) -> None:
        """PAY-01 (I12): a megabyte comes back.

        Steps return documents. Usual cause: a limit of a column, a row or a message of the driver.
        """
        await t.start()
        await self._round_trip(t, "x" * 2**20)
        await self._round_trip(t, ["\u00e9" * 2**18, {"k": "y" * 2**18}])

    @scenario
    async def test_PAY_02_256kb_edge(self, t: Case) -> None:
        """PAY-02: nothing happens at a power of two.

        256 KB is what every backend must hold. Usual cause: the limit counts the envelope, or
        characters for bytes.
        """
        await t.start()
        for size in (2**16, 2**18):
            for edge in (-1, 0, 1):
                await self._round_trip(t, "x" * (size + edge))

    @scenario
    async def test_PAY_03_over_limit_typed_error(self, t: Case) -> None:
        """PAY-03: what is too large is refused as such, in bytes, and nothing is written.

        The user is told what is too large, and the run goes on. Usual cause: the driver's error
        comes through, or half is written.
        """
        limit = t.store.info().max_payload
        if limit > 64 * 2**20:
            return
        await t.start()
        wide = "\u00e9" * (limit // 2)
        await t.store.commit_one(t.outside(update=Update(result=wide)))
        whole = (await (await t.open()).get_run("run") or await t.run()).result_text == wide
        assert whole, "a result at the limit did not come back"
        refusal = await t.refused(PayloadTooLarge, t.outside(update=Update(result=wide + "xx")))
        assert refusal.limit == limit
        large = Event("log.info", "O", {"a": ["x" * (limit + 1)]})
        await t.refused(PayloadTooLarge, t.outside(events=[note(), large]))
        await t.refused(PayloadTooLarge, t.outside(put=[step(payload={"a": "x" * (limit + 1)})]))
        number = t.store.info().max_events_per_commit
        if number <= 20_000:
            await t.refused(PayloadTooLarge, t.outside(events=[note()] * (number + 1)))

    @scenario
    async def test_PAY_04_1000_events_one_batch(self, t: Case) -> None:
        """PAY-04: many events in one change are one change.

        A fan-out schedules a thousand steps in one turn. Usual cause: a limit on parameters of a
        statement.
        """
        await t.start()
        number = min(1000, t.store.info().max_events_per_commit)
        answer = await t.send(*(note(str(n), key=f"k{n}") for n in range(number)))
        assert list(answer.seqs) == list(range(2, number + 2))
        assert len(await t.store.get_events("run")) == number + 1

    @scenario
    async def test_PAY_06_null_empty_bigint_float(self, t: Case) -> None:
        """PAY-06 (I12): JSON comes back equal and of equal type; what is not JSON is refused.

        What a step returned is what the workflow gets on replay. Usual cause: numbers pass through
        floats, or null through "absent".
        """
        await t.start()
        values: list[Json] = [
            None,
            True,
            False,
            0,
            -1,
            2**53 + 1,
            -(10**40),
            0.1,
            -0.0,
            1e308,
            5e-324,
            1.0,
            {},
            [],
            {"": {}},
            [[[[[]]]]],
            {"1": 1, "true": True, "null": None},
        ]
        await self._round_trip(t, values)
        data = (await t.store.get_events("run"))[-1].data["value"]
        assert repr(data) == repr(values), "a value changed its type or sign"
        nested: Json = "x"
        for _ in range(100):
            nested = [{"a": nested}]
        await self._round_trip(t, nested)
        for bad in (math.nan, math.inf, -math.inf, b"bytes", {1: 1}, (1,), {1}, object()):
            event = Event("log.info", "O", {"value": bad})  # type: ignore[dict-item]  # what must be refused
            await t.refused(SerializationError, t.outside(events=[event]))

    @scenario
    async def test_PAY_07_binary_and_nul(self, t: Case) -> None:
        """PAY-07: control characters and NUL are text like any other.

        Payloads hold base64 and control characters. Usual cause: C strings, or a text column that
        ends at NUL.
        """
        await t.start(args="a\x00b")
        await self._round_trip(t, "".join(map(chr, range(256))) * 10)
        assert (await t.run()).args_text == "a\x00b"

    @scenario
    async def test_UNI_01_texts(self, t: Case) -> None:
        """UNI-01: every text comes back, as value and as key.

        Names and messages are in every language. Usual cause: a column or file that is not UTF-8,
        or text that is normalised.
        """
        await t.start()
        await self._round_trip(t, list(TEXTS))
        await self._round_trip(t, {text: text for text in TEXTS})
        for n, text in enumerate(TEXTS):
            key = f"{n}{text}"
            await t.store.commit_one(t.outside(key=key, events=[note(key=key)]))
            assert (await t.store.commit_one(t.outside(key=key, events=[note()]))).duplicate

    @scenario
    async def test_UNI_02_nul_in_string(self, t: Case) -> None:
        """UNI-02: NUL ends nothing: not ids, keys, queues or payloads.

        Users paste anything. Usual cause: a text type that refuses NUL, and no escape for it.
        """
        await t.start("a\x00b", queue="q\x00r", idempotency_key="k\x00l")
        await t.start("a\x00c", queue="q\x00s", idempotency_key="k\x00m", key="2")
        assert await t.store.find_run("k\x00l") == "a\x00b"
        assert await t.store.get_run("a") is None
        claims = await t.claim(queues=frozenset({"q\x00s"}), limit=5)
        assert [c.run.run_id for c in claims] == ["a\x00c"]

    @scenario
    async def test_UNI_03_lone_surrogate_rejected_typed(self, t: Case) -> None:
        """UNI-03: half a character is refused by type, wherever it stands.

        What cannot be stored must be refused before anything is written. Usual cause: the driver
        fails halfway, with an error of its own.
        """
        await t.start()
        bad = "a\ud800"
        changes: tuple[dict[str, Any], ...] = (
            {"events": [note(bad)]},
            {"events": [note(key=bad)]},
            {"events": [Event("log.info", "O", {bad: 1})]},
            {"update": Update(result=bad)},
            {"update": Update(attributes={"a": [bad]})},
            {"put": [step(bad)]},
            {"put": [step(payload={"a": bad})]},
        )
        for fields in changes:
            await t.refused(SerializationError, t.outside(**fields))
        new = NewRun(workflow=bad, version="1", args="[]")
        await t.refused(SerializationError, t.outside("x", create=new), run_id="x")

    @scenario
    async def test_UNI_04_ids_are_opaque(self, t: Case) -> None:
        """UNI-04: ids are names of nothing else: no path, pattern, line or separator.

        Ids come from users and go into file names and keys. Usual cause: ids in paths or separators
        without escaping.
        """
        ids = ["a/b", "../a", "..", ".", "a\nb", "*", "%", "a:b", "a b", "{a}", "CON", "a'b", "~"]
        for run_id in ids:
            await t.start(run_id, put=[step("../x"), deliver("a\nb")])
        for run_id in ids:
            assert (await t.run(run_id)).run_id == run_id
            assert set(await t.items(run_id)) == {"turn", "step:../x", "deliver:a\nb"}
        assert [r for page in await self._listed(t) for r in page] == ids[::-1]

    @scenario
    async def test_UNI_05_longest_names(self, t: Case) -> None:
        """UNI-05: names of the greatest length are names, down to their last byte.

        Names that users give have up to 255 bytes of UTF-8, those that the engine makes of them
        512. Usual cause: a limit of an index or of a file name, or an index of a prefix.
        """
        name, made = "é" * 126 + "n", "k" * 503
        for last in "12":
            one, key = f"{name}{last}x", f"{made}{last}"
            await t.start(one, workflow=one, queue=one, idempotency_key=one, key=key)
            assert (await t.start(one, key=key)).duplicate
        for last in "12":
            one, key = f"{name}{last}x", f"{made}{last}"
            (claim,) = await t.claim(queues=frozenset({one}), workflows=frozenset({one}))
            assert claim.run.run_id == one
            puts, notes = [step(f"{made}{n}") for n in "12"], [note(key=f"{key}{n}") for n in "12"]
            answer = await t.store.commit_one(under(claim, seen=1, put=puts, events=notes))
            assert not answer.skipped
            assert await t.store.find_run(one) == one
            assert set(await t.items(one)) == {"turn", *(f"step:{made}{n}" for n in "12")}

    @scenario
    async def test_UNI_06_case_and_normalisation_distinct(self, t: Case) -> None:
        """UNI-06: names that merely look alike are different.

        Two ids that look alike are two runs. Usual cause: a collation or a file system that folds
        case.
        """
        ids = ["a", "A", "\u00e9", "e\u0301", "a ", "\u212b", "\u00c5"]
        for n, run_id in enumerate(ids):
            await t.start(run_id, idempotency_key=run_id, args=str(n))
        for run_id in ids:
            met = ids[int((await t.run(run_id)).args_text or 0)]
            assert met == run_id, f"the run ids {run_id!r} and {met!r} are taken for one"
            owner = await t.store.find_run(run_id)
            assert owner == run_id, f"the keys {run_id!r} and {owner!r} are taken for one"

    @scenario
    async def test_TIM_01_due_uses_storage_clock(self, t: Case) -> None:
        """TIM-01: shifting the storage's clock is all that time needs; every object sees it.

        Timers fire by one clock. Usual cause: due times are compared with the clock of the process.
        """
        other = await t.open()
        before = await t.store.now()
        await t.start(events=[], put=[turn(due_at=before + seconds(3000))])
        await shift_clock(other, seconds(3600))
        assert await t.store.now() - before >= seconds(3600)
        (claim,) = await t.claim(lease=60)
        assert claim.item.lease is not None
        assert claim.item.lease.until >= before + seconds(3660)

    @scenario
    async def test_TIM_02_writers_clock_is_ignored(self, t: Case) -> None:
        """TIM-02: timestamps, seqs and run ids that a writer puts on events mean nothing.

        Clocks of machines differ. Usual cause: the client sends its time.
        """
        await t.start()
        claimed = note()._replace(
            timestamp=datetime(2100, 1, 1, tzinfo=UTC), seq=77, run_id="another"
        )
        answer = await t.send(claimed)
        event = (await t.store.get_events("run"))[-1]
        assert (event.seq, event.run_id, event.timestamp) == (2, "run", answer.timestamp)
        assert abs(answer.timestamp - await t.store.now()) < seconds(60)

    @scenario
    async def test_TIM_03_clock_back_no_double_fire(self, t: Case) -> None:
        """TIM-03: a clock set back gives nothing twice; what is held stays held.

        Clocks are set back. Usual cause: a timer is found by a window of time.
        """
        await t.start()
        due = await t.store.now() + seconds(10)
        wait = under(await t.turn(), seen=1, settle=Settle(reschedule_at=due))
        await t.store.commit_one(wait)
        await t.shift(11)
        claim = await t.turn(lease=60)
        await t.shift(-3600)
        assert await t.claim(("run", "turn"), owner="b") == []
        assert await t.claim(owner="b") == []
        done = under(claim, events=[incoming("timer")], settle=Settle(reschedule_at=due))
        await t.store.commit_one(done)
        assert (await t.store.commit_one(done)).duplicate
        assert len(await t.store.get_events("run")) == 2

    @scenario
    async def test_TIM_04_far_future_due_2100(self, t: Case) -> None:
        """TIM-04: a timer may lie a lifetime ahead.

        Sleeping for decades is allowed. Usual cause: 32 bits.
        """
        due = datetime(2100, 2, 28, 23, 59, 59, 999_999, tzinfo=UTC)
        await t.start(events=[], put=[turn(due_at=due)], deadline=due)
        assert (await t.items())["turn"].due_at == due == await t.store.next_due()
        assert (await t.run()).deadline == due
        assert await t.claim() == []

    @scenario
    async def test_TIM_05_microsecond_roundtrip(self, t: Case) -> None:
        """TIM-05: instants keep their microseconds.

        Instants are compared for equality. Usual cause: floats or milliseconds.
        """
        base = datetime(2033, 5, 18, 3, 33, 20, tzinfo=UTC)
        for n, micros in enumerate((1, 999_999, 123_457, 500_000)):
            due = base + timedelta(microseconds=micros)
            await t.start(f"run-{n}", events=[], put=[turn(due_at=due)])
            found = (await t.items(f"run-{n}"))["turn"].due_at
            assert (found, found.utcoffset()) == (due, timedelta(0))

    @scenario
    async def test_TIM_06_zones_are_instants(self, t: Case) -> None:
        """TIM-06: an instant in another zone is the same instant.

        Workers run in many zones. Usual cause: naive instants in the database's zone.
        """
        now = await t.store.now()
        zone = timezone(timedelta(hours=-9, minutes=-30))
        await t.start(events=[], put=[turn(due_at=(now + seconds(5)).astimezone(zone))])
        assert await t.claim() == []
        assert await t.store.next_due() == now + seconds(5)
        await t.shift(6)
        await t.turn()

    @scenario
    async def test_TIM_07_many_timers_same_instant(self, t: Case) -> None:
        """TIM-07: what is due at one instant is all given, once each.

        Campaigns wake everybody at nine. Usual cause: an order by due alone, so that pages skip or
        repeat.
        """
        due = await t.store.now() + seconds(3600)
        for n in range(500):
            await t.start(f"run-{n}", events=[], put=[turn(due_at=due)])
        await t.shift(3601)
        found: list[str] = []
        while claims := await t.claim(limit=64):
            found += [c.run.run_id for c in claims]
        assert sorted(found) == sorted(f"run-{n}" for n in range(500))

    async def _purge(self, t: Case, **fields: Any) -> int:
        before = await t.store.now() + timedelta(days=1)
        given: dict[str, Any] = {"before": before, **fields}
        return await t.store.purge(**given)

    @scenario
    async def test_GC_01_purge_terminal_only(self, t: Case) -> None:
        """GC-01: only runs that ended, own nothing and whose parent is done are removed.

        What is open, or owes a message, is still needed. Usual cause: age alone decides.
        """
        await t.start("open")
        await t.start("child", parent=ParentRef(run_id="open", op="1"))
        await t.start("orphan", parent=ParentRef(run_id="gone", op="1"))
        await t.start("owing", put=[deliver()])
        await t.start("done")
        for run_id in ("child", "orphan", "owing", "done"):
            await t.end(run_id)
        assert await self._purge(t) == 2
        assert {r for page in await self._listed(t) for r in page} == {"open", "child", "owing"}
        await t.end("open")
        (delivery,) = await t.claim()
        await t.store.commit_one(under(delivery, settle=Settle()))
        assert await self._purge(t) == 3
        assert await self._purge(t) == 0

    @scenario
    async def test_GC_02_purge_age_limit(self, t: Case) -> None:
        """GC-02: ``before`` compares with the end of the run.

        Retention is a promise in both directions. Usual cause: the start counts instead of the end.
        """
        await t.start("old")
        await t.end("old")
        await t.shift(100)
        await t.start("young")
        await t.end("young")
        ended = (await t.run("young")).finished_at
        assert await self._purge(t, before=ended) == 1
        assert await t.store.get_run("old") is None
        assert await self._purge(t, before=ended) == 0

    @scenario
    async def test_GC_03_purge_keeps_keys(self, t: Case) -> None:
        """GC-03 (hazard 27): a purged run's key stays taken until ``key_retention`` is over.

        A start that is repeated after the purge must not run again. Usual cause: keys lie in the
        run's row.
        """
        await t.start(idempotency_key="order")
        await t.end()
        assert await self._purge(t, key_retention=seconds(1000)) == 1
        assert await t.store.find_run("order") == "run"
        new = NewRun(workflow="flow", version="1", args="[]", idempotency_key="order")
        create = t.outside("run-2", create=new, events=[started()])
        refusal = await t.refused(KeyTaken, create, run_id="run-2")
        assert refusal.owner == "run"
        await t.shift(1001)
        assert await t.store.find_run("order") is None
        await t.store.commit_one(create)
        assert await t.store.find_run("order") == "run-2"
        await self._purge(t)
        assert await t.store.find_run("order") == "run-2"

    @scenario
    async def test_GC_04_purge_in_parts(self, t: Case) -> None:
        """GC-04: purge removes at most ``limit`` runs, and goes on where it stopped.

        Millions are removed in portions. Usual cause: the limit is ignored, or what is skipped is
        counted.
        """
        for n in range(7):
            await t.start(f"run-{n}")
            await t.end(f"run-{n}")
        counts = [await self._purge(t, limit=3) for _ in range(4)]
        assert counts == [3, 3, 1, 0]

    @scenario
    async def test_GC_05_no_orphans_after_purge(self, t: Case) -> None:
        """GC-05: a purged run leaves nothing under its id; the id may be used again.

        What is left of a purged run comes back with the next run of the id. Usual cause: a table
        that the purge forgets.
        """
        await t.start()
        await t.send(note(key="k"))
        await t.end()
        removed = await self._purge(t)
        assert removed == 1, f"runs removed: {removed}"
        left = await t.picture()
        assert left == (None, [], []), f"left of the purged run: {left}"
        answer = await t.start()
        assert (answer.duplicate, answer.last_seq) == (False, 1)
        assert (await t.send(note(key="k"))).skipped == frozenset()
        claim = await t.turn()
        assert len(claim.events) == 2
        await t.store.commit_one(under(claim, seen=1, events=[command()]))
