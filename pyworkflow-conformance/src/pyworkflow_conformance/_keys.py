"""Group IDM: keys of changes, events and runs make retries harmless."""
# ruff: noqa: N802 - the ids are part of the names

from __future__ import annotations

import asyncio
from datetime import timedelta

from pyworkflow.errors import KeyTaken, UnseenInput
from pyworkflow.runs import RunStatus
from pyworkflow.spi.storage import Change, LeaseFor, NewRun, Settle
from pyworkflow_conformance._case import (
    Case,
    Suite,
    command,
    incoming,
    note,
    scenario,
    seconds,
    started,
    step,
    turn,
    under,
)

__all__ = ["KeyChecks"]


class KeyChecks(Suite):
    """IDM."""

    @scenario
    async def test_IDM_01_dedup_returns_first_seq(self, t: Case) -> None:
        """IDM-01 (I7): an event whose key stands is skipped, the rest of its change is applied.

        A delivery that is repeated must not be a second input. Usual cause: the seq of the standing
        event is not looked up.
        """
        await t.start()
        first = await t.send(incoming("signal", n=1))
        second = await t.send(note("new"), incoming("signal", n=2), incoming("signal", n=3))
        assert (list(second.seqs), second.skipped) == ([3, 2, 2], frozenset({1, 2}))
        twice = await t.send(note("x", key="own"), note("y", key="own"))
        assert (list(twice.seqs), twice.skipped) == ([4, 4], frozenset({1}))
        events = await t.store.get_events("run")
        assert events[first.seqs[0] - 1].data == {"n": 1}
        assert len(events) == 4

    @scenario
    async def test_IDM_02_dedup_scope_is_run(self, t: Case) -> None:
        """IDM-02: event and change keys of one run mean nothing in another.

        Keys are chosen per run: two runs may use the same. Usual cause: a unique index without the
        run.
        """
        for run_id in ("a", "b"):
            await t.start(run_id)
            answer = await t.store.commit_one(t.outside(run_id, key="same", events=[note(key="k")]))
            assert (list(answer.seqs), answer.duplicate) == ([2], False)

    @scenario
    async def test_IDM_03_dedup_after_terminal(self, t: Case) -> None:
        """IDM-03: a change repeated after the run's end is answered as it was, not refused.

        The sender cannot know that the run has ended since. Usual cause: ``RunClosed`` is checked
        before the duplicate.
        """
        await t.start()
        change = t.outside(key="cancel", events=[incoming("cancel")])
        first = await t.store.commit_one(change)
        claim = await t.turn()
        final = under(claim, seen=2, events=[command()], final=RunStatus.COMPLETED)
        ended = await t.store.commit_one(final)
        for sent, answer in ((change, first), (final, ended)):
            again = await t.store.commit_one(sent)
            assert again.duplicate
            assert (again.seqs, again.last_seq) == (answer.seqs, answer.last_seq)
        assert (await t.start()).duplicate

    @scenario
    async def test_IDM_04_dedup_survives_reopen(self, t: Case) -> None:
        """IDM-04: keys are stored, not remembered by an object.

        The sender repeats after the server restarted. Usual cause: answers are kept in memory.
        """
        await t.start()
        claim = await t.turn()
        inside = under(claim, seen=1, events=[command()])
        outside = t.outside(key="in", events=[incoming("in")])
        answers = [await t.store.commit_one(inside), await t.store.commit_one(outside)]
        first, t.store = t.store, await t.open()
        await first.close()
        for change, answer in zip((inside, outside), answers, strict=True):
            again = await t.store.commit_one(change)
            assert again.duplicate
            assert list(again.seqs) == list(answer.seqs)
        assert (await t.start()).duplicate
        assert (await t.run()).history_length == 3

    @scenario
    async def test_IDM_05_key_conflict_names_owner(self, t: Case) -> None:
        """IDM-05: a second run with an idempotency key is refused and told who has it.

        The client shows which run has the key. Usual cause: a unique violation is reported without
        a look at the owner.
        """
        await t.start(idempotency_key="order")
        new = NewRun(workflow="flow", version="1", args="[]", idempotency_key="order")
        change = t.outside("run-2", create=new, events=[started()])
        refusal = await t.refused(KeyTaken, change, run_id="run-2")
        assert (refusal.key, refusal.owner) == ("order", "run")
        assert await t.store.get_run("run-2") is None
        assert await t.store.find_run("order") == "run"

    @scenario
    async def test_IDM_06_same_start_again_is_success(self, t: Case) -> None:
        """IDM-06: a start whose answer was lost is sent again and finds itself.

        A start whose answer was lost is sent again, by its key. Usual cause: ``KeyTaken`` names the
        run that just asked.
        """
        await t.start(idempotency_key="order")
        assert (await t.start(idempotency_key="order")).duplicate
        assert (await t.store.stats())["runs"] == 1

    @scenario
    async def test_IDM_08_key_rolls_back_with_batch(self, t: Case) -> None:
        """IDM-08: a refused create leaves its idempotency key free.

        A start that was refused may be made again with the key. Usual cause: the key is reserved
        before the change is decided.
        """
        new = NewRun(workflow="flow", version="1", args="[]", idempotency_key="order")
        bad = t.outside("x", create=new, events=[started()], final=RunStatus.COMPLETED)
        await t.refused(UnseenInput, bad, run_id="x")
        assert await t.store.find_run("order") is None
        await t.start(idempotency_key="order")

    @scenario
    async def test_IDM_09_100_concurrent_starts_one_run(self, t: Case) -> None:
        """IDM-09: of many starts with one key one wins, and all learn which.

        Webhooks arrive many times at once. Usual cause: the key is read and written in two steps.
        """

        async def start(n: int) -> str:
            try:
                await t.start(f"run-{n}", key=f"start-{n}", idempotency_key="order")
            except KeyTaken as refusal:
                return refusal.owner
            return f"run-{n}"

        winners = await asyncio.gather(*(start(n) for n in range(100)))
        assert len(set(winners)) == 1
        assert (await t.store.stats())["runs"] == 1
        assert await t.store.find_run("order") == winners[0]

    @scenario
    async def test_IDM_11_answer_repeated_with_claims(self, t: Case) -> None:
        """IDM-11: the repeated answer holds seqs, others' events and the claims still held.

        A worker that lost the answer must learn what it holds. Usual cause: the answer is computed
        anew, after others wrote.
        """
        held = LeaseFor(owner="me", lease=timedelta(seconds=60))
        created = await t.start(put=[turn(claimed=held)])
        again = await t.start(put=[turn(claimed=held)])
        assert list(again.claims) == list(created.claims)
        await t.send(incoming("other", n=1))
        change = under(
            created.claims[0],
            seen=1,
            events=[command(), incoming("other", n=2)],
            settle=Settle(),
            put=[step(claimed=held)],
            take_turn=held,
        )
        first = await t.store.commit_one(change)
        assert [e.seq for e in first.unseen_events] == [2]
        assert (list(first.seqs), first.skipped) == ([3, 2], frozenset({1}))
        assert {i.item_id for i in first.claims} == {"step:1", "turn"}
        await t.send(note("later"))
        again = await t.store.commit_one(change)
        assert again.duplicate
        assert (list(again.seqs), again.skipped, list(again.unseen_events)) == (
            list(first.seqs),
            first.skipped,
            list(first.unseen_events),
        )
        assert (again.last_seq, again.seen_seq, again.timestamp) == (3, 1, first.timestamp)
        assert {i.item_id for i in again.claims} == {"step:1", "turn"}
        await t.shift(120)
        await t.claim(("run", "step:1"), owner="thief")
        again = await t.store.commit_one(change)
        # What another took over is no longer in the answer; what merely ended still is.
        assert [i.item_id for i in again.claims] == ["turn"]

    @scenario
    async def test_IDM_12_last_change_of_64_claims(self, t: Case) -> None:
        """IDM-12: the last change of each of a run's last 64 claims is known.

        A turn that was long delayed is repeated. Usual cause: answers are kept for the last claim
        only, or for all changes of it.
        """
        await t.start()
        changes: list[Change] = []
        for _ in range(64):
            claim = await t.turn()
            await t.store.commit_one(under(claim, 1, events=[note()]))
            change = under(
                claim, 2, events=[note()], settle=Settle(reschedule_at=claim.item.due_at)
            )
            await t.store.commit_one(change)
            changes.append(change)
        length = (await t.run()).history_length
        for change in changes:
            assert (await t.store.commit_one(change)).duplicate
        assert (await t.run()).history_length == length

    @scenario
    async def test_IDM_13_outside_keys_last_as_long_as_the_run(self, t: Case) -> None:
        """IDM-13: the key of an input from outside is never forgotten while the run is there.

        Senders repeat after hours. Usual cause: answers are dropped by age or by number, like those
        of claims.
        """
        await t.start()
        changes = [t.outside(key=f"in:{n}", events=[note(str(n))]) for n in range(200)]
        for change in changes:
            await t.store.commit_one(change)
        for n, change in enumerate(changes):
            again = await t.store.commit_one(change)
            assert (again.duplicate, list(again.seqs)) == (True, [n + 2])
        await t.shift(seconds(86400 * 60).total_seconds())
        assert (await t.store.commit_one(changes[0])).duplicate

    @scenario
    async def test_IDM_14_commit_answers_each(self, t: Case) -> None:
        """IDM-14: changes sent together are accepted or refused each alone, in order per run.

        One refused start must not undo the others. Usual cause: one transaction for all, or an
        exception for the first refusal.
        """
        await t.start()
        answers = await t.store.commit(
            [
                t.outside(events=[note("a")]),
                t.outside("nobody", events=[note("b")]),
                t.outside(events=[note("c")]),
            ]
        )
        assert [type(a).__name__ for a in answers] == ["Committed", "RunNotFound", "Committed"]
        messages = [e.data.get("message") for e in await t.store.get_events("run", after=1)]
        assert messages == ["a", "c"]
