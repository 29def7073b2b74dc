"""Limits at their declared size, pages beyond the first, and claims of a part of what is due."""
# ruff: noqa: N802 - the ids are part of the names

from __future__ import annotations

from datetime import timedelta
from typing import Any

from pyworkflow.errors import PayloadTooLarge
from pyworkflow.events import Event
from pyworkflow.runs import RunStatus
from pyworkflow.spi._delta import KeyMark
from pyworkflow.spi.storage import Control, ControlKind, RunQuery, Settle, StorageBackend
from pyworkflow_conformance._case import (
    Case,
    Suite,
    note,
    overrides,
    scenario,
    seconds,
    started,
    step,
    turn,
    under,
)
from pyworkflow_conformance._children import dice

__all__ = ["LimitChecks"]

#: Events and bytes beyond which a declared limit is not tried.
EVENTS, BYTES = 100_000, 64 * 2**20
#: One more than the greatest page of the contract.
PAGE = 1000
MANY = PAGE + 1
PAYLOADS = 10
#: The engine's default for one payload: what ten of make up must not break a connection.
LEGAL = 2 * 2**20


class LimitChecks(Suite):
    """PAY-08 to PAY-10, PAG-08, CPY-11, CTL-09, CLM-30."""

    @scenario
    async def test_PAY_08_events_at_the_declared_limit(self, t: Case) -> None:
        """PAY-08: a change of ``max_events_per_commit`` events is stored to its last event.

        The engine fills changes up to the declared limit. Usual cause: the events are sent in
        parts, and a part is lost; or the server's own limit is smaller than the declared one.
        """
        number = min(t.store.info().max_events_per_commit, EVENTS)
        await t.start()
        answer = await t.send(*(note(str(n), key=f"k{n}") for n in range(number)))
        assert (len(answer.seqs), answer.last_seq) == (number, number + 1)
        found = await (await t.open()).get_events("run")
        assert len(found) == number + 1, f"{number} events were acknowledged"
        for n, event in enumerate(found[1:]):
            assert (event.seq, event.key, event.data) == (n + 2, f"k{n}", {"message": str(n)})
        again = await t.send(note(key=f"k{number - 1}"))
        assert again.skipped == {0}, "the key of the last event is not known"

    @scenario
    async def test_PAY_09_payload_at_the_declared_limit(self, t: Case) -> None:
        """PAY-09: a text of ``max_payload`` bytes is stored, and read to its last byte.

        In an event and in an item; PAY-03 tries a result. Usual cause: the declared limit is the
        core's, while a packet, a column or a row of the server takes less.
        """
        size = min(t.store.info().max_payload, BYTES)
        text = _text(size)
        await t.start(events=[started(), note(text)], put=[step(payload={"a": text})])
        other = await t.open()
        (item,) = [i for i in await other.list_work("run") if i.item_id == "step:1"]
        event = (await other.get_events("run"))[-1]
        found = {"event": event.data["message"], "item": item.payload["a"]}
        # Not compared by the assert: nobody reads a difference of megabytes.
        altered = [
            f"{name}: {len(str(one))} characters" for name, one in found.items() if one != text
        ]
        assert not altered, f"of {size} bytes came back {altered}"

    @scenario
    async def test_PAY_10_ten_large_payloads_in_one_change(self, t: Case) -> None:
        """PAY-10: ten payloads of legal size in one change are stored, or refused by their size.

        A fan-in of ten documents is one change, of many times the limit of one payload. Usual
        cause: the change is one packet, which the server cuts; the store says "unavailable", and
        the engine sends it again for ever.
        """
        size = min(t.store.info().max_payload, LEGAL)
        texts = [f"{n}{_text(size - 1)}" for n in range(PAYLOADS)]
        await t.start()
        change = t.outside(events=[Event("log.info", "O", {"value": text}) for text in texts])
        before = await t.picture()
        try:
            await t.write(change)
        except PayloadTooLarge:
            assert await t.picture() == before, "a refused change wrote something"
            return
        found = await (await t.open()).get_events("run", after=1)
        altered = [
            n for n, (a, b) in enumerate(zip(found, texts, strict=True)) if a.data["value"] != b
        ]
        assert not altered, f"payloads came back altered: indices={altered}"

    @scenario
    async def test_CPY_11_more_keys_than_a_page(self, t: Case) -> None:
        """CPY-11: 1,001 keys are exported, of runs that exist and of purged ones.

        A key that a copy lacks lets a late start run twice. Usual cause: the export ends with the
        first page.
        """
        ids = await t.start_many(MANY)
        expected = {f"key-of-{run_id}": KeyMark(run_id) for run_id in ids}
        assert await _keys(t.store) == expected
        await _terminate(t, ids)
        if not await _purge(t, ids):
            return
        found = await _keys(t.store)
        assert {key: mark.owner for key, mark in found.items()} == {
            key: mark.owner for key, mark in expected.items()
        }

    @scenario
    async def test_PAG_08_more_than_a_page(self, t: Case) -> None:
        """PAG-08: 1,001 runs are listed, counted, claimed, freed and purged, not 1,000.

        Usual cause: what goes through all runs ends with the first page.
        """
        ids = await t.start_many(MANY)
        first = await t.store.list_runs(RunQuery(limit=PAGE))
        assert (len(first.items), first.cursor is None) == (PAGE, False)
        rest = await t.store.list_runs(RunQuery(limit=PAGE), first.cursor)
        assert [run.run_id for run in first.items + rest.items] == ids[::-1]
        assert (await t.store.stats())["runs"] == MANY
        claims = await t.claim(limit=MANY)
        while len(claims) < MANY and (more := await t.claim(limit=MANY)):
            claims += more
        assert {claim.run.run_id for claim in claims} == set(ids)
        refs = {claim.ref for claim in claims}
        assert set(await t.store.leases("worker-a")) == refs
        assert await t.store.free("worker-a") == MANY
        assert await t.store.holders() == []
        await _terminate(t, ids)
        assert await _purge(t, ids, retention=0) is True
        assert (await t.store.stats())["runs"] == 0

    @scenario
    async def test_CTL_09_items_during_a_pause(self, t: Case) -> None:
        """CTL-09: what is put, settled, released or freed during a pause waits for its end.

        The pause hides the run's work, whenever it came. Usual cause: the pause marks the items
        that exist, and claims do not look at the run.
        """
        later = await t.store.now() + seconds(3600)
        names = ("released", "settled", "freed", "lapsed")
        await t.start(put=[*(step(name) for name in names), step("forward", due_at=later)])
        held = {name: (await t.claim(("run", f"step:{name}"), owner=name))[0] for name in names}
        holder = await t.turn()
        await t.write(t.outside(control=Control(ControlKind.PAUSE, "wait")))
        now = await t.store.now()
        await t.write(under(holder, 1, put=[step("new"), step("forward", due_at=now)]))
        await t.write(under(held["settled"], settle=Settle(reschedule_at=now)))
        assert await t.store.release(held["released"].ref)
        assert await t.store.release(holder.ref)
        assert await t.store.free("freed") == 1
        await t.shift(61)
        ids = {"turn", *(f"step:{name}" for name in (*names, "new", "forward"))}
        await self._nothing(t, ids)
        # Another object has not seen the pause.
        await self._nothing(t, ids, store=await t.open())
        await t.write(t.outside(control=Control(ControlKind.UNPAUSE)))
        assert {claim.item.item_id for claim in await t.claim(limit=20)} == ids

    async def _nothing(self, t: Case, ids: set[str], store: StorageBackend | None = None) -> None:
        by_poll = [claim.item.item_id for claim in await t.claim(limit=20, store=store)]
        assert by_poll == [], "claimed by poll during the pause"
        for item_id in sorted(ids):
            claimed = await t.claim(("run", item_id), store=store)
            assert claimed == [], f"{item_id} was claimed by reference during the pause"
        announced = await (store or t.store).announce(20, timedelta(0))
        assert [item.item_id for item in announced] == [], "announced during the pause"
        assert await (store or t.store).next_due() is None

    @scenario
    async def test_CLM_30_claims_take_the_first_of_many(self, t: Case) -> None:
        """CLM-30: of 40 due items, claims of five take the first five each time.

        Highest priority first, then oldest due: with a backlog, what waits longest is next. Usual
        cause: the limit is applied before the order, or the order is that of an index on runs.
        """
        now = await t.store.now()
        chance = dice(t, "CLM-30")
        places = list(range(20))
        chance.shuffle(places)
        expected: list[tuple[int, float, tuple[str, str]]] = []
        for n, place in enumerate(places):
            # A priority for four runs each; ages that follow neither ids nor starts.
            priority, age = place % 5, 100.0 + place
            fields: dict[str, Any] = {"priority": priority}
            puts = [turn(due_at=now - seconds(age)), step(due_at=now - seconds(age / 2))]
            await t.start(f"run-{n:02}", events=[], put=puts, **fields)
            expected.append((-priority, -age, (f"run-{n:02}", "turn")))
            expected.append((-priority, -age / 2, (f"run-{n:02}", "step:1")))
        order = [one for *_, one in sorted(expected)]
        found: list[tuple[str, str]] = []
        while claims := await t.claim(limit=5):
            found += [(claim.item.run_id, claim.item.item_id) for claim in claims]
            assert found == order[: len(found)], "not the first by priority and due"
        assert len(found) == len(order)


def _text(size: int) -> str:
    """So many bytes that no two parts of them are the same."""
    parts = "".join(f"{n:08}" for n in range(size // 8 + 1))
    return parts[:size]


async def _keys(store: StorageBackend) -> dict[str, KeyMark]:
    found: list[tuple[str, KeyMark]] = []
    cursor: str | None = None
    while True:
        page = await store.export_keys(cursor)
        found += page.items
        cursor = page.cursor
        if cursor is None:
            break
    assert len(dict(found)) == len(found), "a key is exported twice"
    return dict(found)


async def _terminate(t: Case, ids: list[str]) -> None:
    end = Control(ControlKind.TERMINATE, "over")
    await t.write_all([t.outside(one, control=end, final=RunStatus.TERMINATED) for one in ids])


async def _purge(t: Case, ids: list[str], retention: float = 5000) -> bool:
    """Purge all runs; whether the keys of purged runs are exported."""
    before = await t.store.now() + timedelta(days=1)
    counts: list[int] = []
    while removed := await t.store.purge(before=before, key_retention=seconds(retention)):
        counts.append(removed)
    assert sum(counts) == len(ids)
    assert max(counts) <= PAGE
    if not retention:
        return True
    return overrides(t.store, "export_keys")
