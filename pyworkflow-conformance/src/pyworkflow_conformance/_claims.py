"""Group CLM: one holder at a time, fenced by tokens, and what claims by poll choose."""
# ruff: noqa: N802 - the ids are part of the names

from __future__ import annotations

from typing import Any

from pyworkflow.errors import Fenced, UnseenInput
from pyworkflow.runs import ItemKind, RunStatus
from pyworkflow.spi.storage import Control, ControlKind, LeaseFor, Settle
from pyworkflow_conformance._case import (
    Case,
    Suite,
    command,
    deliver,
    incoming,
    note,
    scenario,
    seconds,
    step,
    turn,
    under,
)

__all__ = ["ClaimChecks"]


class ClaimChecks(Suite):
    """CLM."""

    @scenario
    async def test_CLM_01_claim_due(self, t: Case) -> None:
        """CLM-01: a due item is claimed, with its run and history; nothing but the item changes.

        The worker decides by what the claim brings. Usual cause: the run or its events are read
        after the claim, and are newer.
        """
        await t.start(put=[turn(payload={"a": 1})])
        before = await t.run()
        claim = await t.turn(owner="me")
        lease = claim.item.lease
        assert lease is not None
        assert (lease.owner, lease.until - await t.store.now() <= seconds(60)) == ("me", True)
        assert (claim.item.claims, claim.item.payload) == (1, {"a": 1})
        assert (claim.run.run_id, claim.run.status) == ("run", RunStatus.RUNNING)
        assert (list(claim.events), claim.after, claim.cut) == (
            await t.store.get_events("run"),
            0,
            False,
        )
        after = await t.run()
        assert (after.updated_at, after.history_length) == (before.updated_at, 1)
        assert (await t.items())["turn"] == claim.item

    @scenario
    async def test_CLM_02_claim_notdue(self, t: Case) -> None:
        """CLM-02: what is due later is not given, and next_due says when it will be.

        Timers must not fire early. Usual cause: the due is not in the query that claims.
        """
        now = await t.store.now()
        await t.start(events=[], put=[turn(due_at=now + seconds(100))])
        assert await t.claim(("run", "turn")) == []
        assert await t.claim(limit=5) == []
        assert await t.store.next_due() == now + seconds(100)
        await t.shift(101)
        assert len(await t.claim()) == 1

    @scenario
    async def test_CLM_03_claim_busy_until(self, t: Case) -> None:
        """CLM-03 (I6): a held item is nobody else's; next_due is the lease's end.

        A turn that two workers run does its work twice. Usual cause: the lease is checked and set
        in two steps.
        """
        await t.start()
        claim = await t.turn(lease=50)
        assert claim.item.lease is not None
        assert await t.claim(("run", "turn"), owner="b") == []
        assert await t.claim(owner="b", limit=5) == []
        assert await t.store.next_due() == claim.item.lease.until
        assert await t.store.holders() == ["worker-a"]

    @scenario
    async def test_CLM_04_claim_after_expiry(self, t: Case) -> None:
        """CLM-04: when a lease has ended the item is free, and the next claim counts.

        Workers die; their work must go on. Usual cause: a held item is not claimable whatever its
        lease says.
        """
        await t.start()
        await t.turn(lease=50)
        await t.shift(51)
        assert await t.store.holders() == []
        assert (await t.run()).status == RunStatus.RUNNING
        claim = await t.turn(owner="b")
        assert claim.item.claims == 2

    @scenario
    async def test_CLM_05_tokens_never_repeat(self, t: Case) -> None:
        """CLM-05 (I4): each claim of any item has a token of its own.

        The token is all that fences a slow worker. Usual cause: counters that start anew with the
        process or the item.
        """
        tokens: list[str] = []
        for n in range(3):
            await t.start(f"run-{n}", put=[step("1"), step("2")])
        for _ in range(5):
            claims = await t.claim(limit=20)
            assert len(claims) == 9
            tokens += [c.ref.token for c in claims]
            for claim in claims:
                await t.store.release(claim.ref)
        assert len(set(tokens)) == len(tokens)

    @scenario
    async def test_CLM_06_token_dies_with_its_item(self, t: Case) -> None:
        """CLM-06: an item made again under the same id is not the one that was held.

        An item that is put again is another item. Usual cause: the token is kept by item id.
        """
        await t.start(put=[step()])
        await t.send(incoming())
        (old,) = await t.claim(("run", "step:1"))
        await t.store.commit_one(under(old, 1, settle=Settle(), events=[note()]))
        await t.store.commit_one(t.outside(put=[step()]))
        await t.refused(Fenced, under(old, 2, events=[note()]))
        assert await t.store.renew([old.ref], seconds(60)) == [False]

    @scenario
    async def test_CLM_07_stale_fence_refused(self, t: Case) -> None:
        """CLM-07 (I4): who was taken over is refused, whatever it sends.

        The worker that lost its lease must not write over the one that has it. Usual cause: the
        token is not compared in the transaction that writes.
        """
        await t.start()
        old = await t.turn(lease=10)
        await t.shift(11)
        new = await t.turn(owner="b")
        refusal = await t.refused(Fenced, under(old, events=[incoming()]))
        assert (refusal.run_id, refusal.item_id) == ("run", "turn")
        await t.refused(Fenced, under(old, events=[note()]))
        await t.refused(Fenced, under(old, settle=Settle()))
        await t.store.commit_one(under(new, seen=1, events=[command()]))

    @scenario
    async def test_CLM_08_stale_claim_refused(self, t: Case) -> None:
        """CLM-08: a claim that was given back is over.

        A claim that never was is not one. Usual cause: an update that hits no row and is taken for
        success.
        """
        await t.start()
        claim = await t.turn()
        assert await t.store.release(claim.ref)
        await t.refused(Fenced, under(claim, events=[note()]))
        await t.turn()

    @scenario
    async def test_CLM_09_expired_unstolen_commit_ok(self, t: Case) -> None:
        """CLM-09 (I6): a lease that ended while nobody took over still commits and renews.

        Work that is done shall not be thrown away for being late. Usual cause: the lease's end is
        compared instead of the token.
        """
        await t.start()
        claim = await t.turn(lease=10)
        await t.shift(11)
        assert (await t.store.commit_one(under(claim, 1, seen=1, events=[command()]))).last_seq == 2
        assert await t.store.renew([claim.ref], seconds(60)) == [True]
        assert await t.claim(owner="b") == []

    @scenario
    async def test_CLM_10_renew_extends(self, t: Case) -> None:
        """CLM-10: renewal counts from now, and changes nothing but the lease.

        Long steps keep their lease by renewing. Usual cause: the lease is extended from its end, or
        shortened never.
        """
        await t.start()
        claim = await t.turn(lease=30)
        await t.shift(20)
        assert await t.store.renew([claim.ref], seconds(30)) == [True]
        await t.shift(20)
        assert await t.claim(owner="b") == []
        await t.shift(20)
        assert (await t.turn(owner="b")).item.claims == 2

    @scenario
    async def test_CLM_11_renew_lost_false(self, t: Case) -> None:
        """CLM-11: each claim is answered for itself.

        The worker stops what it has lost. Usual cause: the answer is True for every row that is
        there.
        """
        await t.start("a")
        await t.start("b")
        lost, kept = await t.turn("a", lease=10), await t.turn("b", lease=100)
        await t.shift(11)
        await t.turn("a", owner="thief")
        assert await t.store.renew([lost.ref, kept.ref], seconds(60)) == [False, True]

    @scenario
    async def test_CLM_12_release_with_delay(self, t: Case) -> None:
        """CLM-12: what is given back with a delay is due then, even with an unseen input.

        A worker gives back what it has no room for. Usual cause: the due is left, so it comes back
        at once; or it counts as an attempt.
        """
        await t.start()
        claim = await t.turn()
        assert await t.store.release(claim.ref, delay=seconds(30))
        item = (await t.items())["turn"]
        assert (item.claims, item.lease) == (0, None)
        await t.send(note("an observation brings nothing forward"))
        assert await t.claim() == []
        await t.shift(31)
        claim = await t.turn()
        assert claim.item.claims == 1
        # Without a delay the due stays, and so the item can be claimed at once.
        await t.store.release(claim.ref)
        await t.turn()

    @scenario
    async def test_CLM_13_release_stale_ignored(self, t: Case) -> None:
        """CLM-13: a late release disturbs no new holder.

        Messages arrive late. Usual cause: release looks for the item, not for the token.
        """
        await t.start()
        old = await t.turn(lease=10)
        await t.shift(11)
        new = await t.turn(owner="b")
        assert not await t.store.release(old.ref)
        assert (await t.items())["turn"] == new.item

    @scenario
    async def test_CLM_14_claims_counted(self, t: Case) -> None:
        """CLM-14: claims count until progress: a command or input committed under the claim.

        What kills its worker again and again is found by this count. Usual cause: claims are
        counted in the worker, or reset by renewals.
        """
        await t.start(put=[step()])
        for expected in (1, 2, 3):
            (claim,) = await t.claim(("run", "step:1"), lease=10)
            assert claim.item.claims == expected
            await t.store.commit_one(under(claim, 1, events=[note()]))
            await t.shift(11)
        (claim,) = await t.claim(("run", "step:1"))
        now = await t.store.now()
        await t.store.commit_one(under(claim, 1, settle=Settle(reschedule_at=now), events=[note()]))
        assert (await t.items())["step:1"].claims == 4
        (claim,) = await t.claim(("run", "step:1"))
        assert claim.item.claims == 5
        await t.store.release(claim.ref)
        assert (await t.items())["step:1"].claims == 4
        (claim,) = await t.claim(("run", "step:1"))
        await t.store.commit_one(under(claim, 1, events=[incoming()]))
        assert (await t.items())["step:1"].claims == 1
        await t.store.commit_one(
            under(
                claim, 2, events=[incoming()], settle=Settle(reschedule_at=now, payload={"try": 2})
            )
        )
        (claim,) = await t.claim(("run", "step:1"))
        assert (claim.item.claims, claim.item.payload) == (1, {"try": 2})

    @scenario
    async def test_CLM_28_what_counts_as_progress(self, t: Case) -> None:
        """CLM-28: delivering an input, healing a stall and a new payload are progress as well.

        Giving an item back as it was is not.

        Poison is told from slow work by progress. Usual cause: every commit resets the count.
        """
        await t.start()
        claim = await t.turn()
        now = await t.store.now()
        stall = Control(ControlKind.STALL, "x")
        await t.store.commit_one(under(claim, control=stall, settle=Settle(reschedule_at=now)))
        claim = await t.turn()
        assert claim.item.claims == 2
        heal = Control(ControlKind.UNSTALL)
        await t.store.commit_one(under(claim, control=heal, settle=Settle(reschedule_at=now)))
        claim = await t.turn()
        assert claim.item.claims == 1
        await t.store.commit_one(under(claim, 1, settle=Settle(reschedule_at=now)))
        claim = await t.turn()
        assert claim.item.claims == 2
        await t.store.commit_one(under(claim, 1, seen=1))
        assert (await t.items())["turn"].claims == 1
        await t.store.commit_one(t.outside(put=[step()]))
        for expected, payload in ((1, None), (2, {"try": 2}), (1, {"try": 3}), (1, None)):
            (held,) = await t.claim(("run", "step:1"))
            assert held.item.claims == expected
            await t.store.commit_one(under(held, settle=Settle(reschedule_at=now, payload=payload)))

    @scenario
    async def test_CLM_15_poll_excludes_claimed(self, t: Case) -> None:
        """CLM-15: polls share the work out, each item once.

        Workers poll all the time. Usual cause: the lease is not part of the index that is polled.
        """
        for n in range(6):
            await t.start(f"run-{n}")
        first = await t.claim(owner="a", limit=4)
        second = await t.claim(owner="b", limit=4)
        assert (len(first), len(second)) == (4, 2)
        assert len({c.run.run_id for c in first + second}) == 6

    @scenario
    async def test_CLM_16_announce_mutes(self, t: Case) -> None:
        """CLM-16: an item is announced once per mute time, and not when the sender rings.

        Doorbells are rung once, not at every sweep. Usual cause: ``rung_at`` is not set, or not by
        ``put``.
        """
        await t.start("a")
        await t.start("b", put=[turn(notified=True)])
        mute = seconds(30)
        assert [i.run_id for i in await t.store.announce(10, mute)] == ["a"]
        assert await t.store.announce(10, mute) == []
        await t.shift(31)
        assert {i.run_id for i in await t.store.announce(10, mute)} == {"a", "b"}
        await t.turn("a", lease=40)
        await t.store.commit_one(t.outside("b", control=Control(ControlKind.PAUSE)))
        await t.shift(31)
        assert await t.store.announce(10, mute) == []
        await t.shift(10)
        # A dead holder's item is news, however lately it was rung for before the claim.
        assert [i.run_id for i in await t.store.announce(10, mute)] == ["a"]

    @scenario
    async def test_CLM_17_poll_filters(self, t: Case) -> None:
        """CLM-17: queues, kinds and workflows compose; priority first, then the oldest due.

        A worker takes what it can run. Usual cause: filters applied after the limit, or priority
        after due.
        """
        now = await t.store.now()
        for run_id, workflow, queue, priority, age in (
            ("a", "x", "q1", 0, 3),
            ("b", "x", "q2", 0, 2),
            ("c", "y", "q1", 5, 1),
            ("d", "y", "q2", 0, 4),
        ):
            await t.start(
                run_id,
                workflow=workflow,
                queue=queue,
                priority=priority,
                events=[],
                put=[turn(due_at=now - seconds(age)), step(due_at=now - seconds(1))],
            )

        async def poll(**fields: Any) -> list[str]:
            claims = await t.claim(limit=10, **fields)
            for claim in claims:
                await t.store.release(claim.ref)
            return [c.item.run_id for c in claims]

        turns = frozenset({ItemKind.TURN})
        assert await poll(kinds=turns) == ["c", "d", "a", "b"]
        assert await poll(kinds=turns, queues=frozenset({"q1"})) == ["c", "a"]
        assert await poll(kinds=turns, workflows=frozenset({"y"})) == ["c", "d"]
        assert await poll(queues=frozenset({"q2"}), workflows=frozenset({"y"})) == ["d", "d"]
        assert await poll(kinds=frozenset({ItemKind.DELIVER})) == []
        assert len(await poll()) == 8
        assert await t.store.next_due(queues=frozenset({"q9"})) is None
        due = await t.store.next_due(workflows=frozenset({"x"}))
        assert due is not None
        assert due <= await t.store.now()

    @scenario
    async def test_CLM_18_input_during_claim_rearms(self, t: Case) -> None:
        """CLM-18 (I5): an input that comes while the turn is held makes it due when it is settled.

        An input that comes during a turn needs another turn. Usual cause: the settled turn is
        removed although an input is unseen.
        """
        await t.start()
        claim = await t.turn()
        await t.send(incoming())
        far = await t.store.now() + seconds(3600)
        await t.store.commit_one(
            under(claim, seen=1, settle=Settle(reschedule_at=far), events=[command()])
        )
        claim = await t.turn()
        assert [e.seq for e in claim.events] == [1, 2, 3]
        assert claim.run.seen_seq == 1

    @scenario
    async def test_CLM_19_settle_keeps_turn_if_unseen(self, t: Case) -> None:
        """CLM-19 (I5): settling for good with an unseen input leaves a due turn behind.

        Otherwise an input is there and nobody looks. Usual cause: the settle is decided on what the
        worker had read.
        """
        await t.start()
        claim = await t.turn()
        await t.send(incoming())
        await t.store.commit_one(under(claim, seen=1, settle=Settle(), events=[command()]))
        again = await t.turn()
        assert again.item.claims == 1
        await t.store.commit_one(under(again, seen=2, settle=Settle()))
        assert await t.items() == {}
        assert (await t.run()).status == RunStatus.SUSPENDED

    @scenario
    async def test_CLM_20_final_unseen_refused(self, t: Case) -> None:
        """CLM-20: a run does not end over an input; the refusal brings it.

        A workflow must see every input before it ends. Usual cause: the check is made outside of
        the transaction.
        """
        await t.start()
        claim = await t.turn()
        await t.send(note(), incoming(n=1), note(), incoming(n=2))
        refusal = await t.refused(
            UnseenInput, under(claim, seen=1, events=[command()], final=RunStatus.COMPLETED)
        )
        assert list(refusal.inputs) == [
            e for e in await t.store.get_events("run", after=1) if e.klass == "I"
        ]
        await t.store.commit_one(under(claim, 2, seen=5, final=RunStatus.COMPLETED))

    @scenario
    async def test_CLM_21_put_brings_forward_only(self, t: Case) -> None:
        """CLM-21 (I9): put on what exists moves its due earlier, never later, and nothing else.

        A put for later must not delay what is due. Usual cause: the due is replaced.
        """
        now = await t.store.now()
        due = now + seconds(100)
        await t.start(put=[step(due_at=due, queue="q", priority=2, payload={"a": 1})])
        before = (await t.items())["step:1"]
        later = step(due_at=due + seconds(1), queue="z", priority=9, payload={"b": 1})
        await t.store.commit_one(t.outside(put=[later]))
        assert (await t.items())["step:1"] == before
        sooner = step(due_at=due - seconds(1), queue="z", priority=9, payload={"b": 1})
        await t.store.commit_one(t.outside(put=[sooner]))
        item = (await t.items())["step:1"]
        assert item.due_at == due - seconds(1)
        assert (item.queue, item.priority, item.payload) == ("q", 2, {"a": 1})

    @scenario
    async def test_CLM_22_settle_sets_exactly(self, t: Case) -> None:
        """CLM-22 (I9): the holder's settle sets due and payload, later as well as sooner.

        A turn that waits for a timer sets when it is due, exactly. Usual cause: the earlier due
        wins, and the turn runs in vain.
        """
        await t.start(put=[step(payload={"try": 1})])
        (claim,) = await t.claim(("run", "step:1"))
        due = await t.store.now() + seconds(60)
        await t.store.commit_one(under(claim, settle=Settle(reschedule_at=due, payload={"try": 2})))
        item = (await t.items())["step:1"]
        assert (item.due_at, item.payload, item.lease) == (due, {"try": 2}, None)
        await t.refused(Fenced, under(claim, 2, events=[note()]))
        await t.shift(61)
        (claim,) = await t.claim(("run", "step:1"))
        await t.store.commit_one(under(claim, settle=Settle(keep=True, payload={"begun": True})))
        item = (await t.items())["step:1"]
        assert (item.lease, item.payload) == (claim.item.lease, {"begun": True})

    @scenario
    async def test_CLM_23_drop_fences_the_step(self, t: Case) -> None:
        """CLM-23: the turn's holder gives steps up; who runs one is fenced.

        A step that was given up must not report a result. Usual cause: the item goes, and its token
        stays valid.
        """
        await t.start(put=[step("1"), step("2"), deliver()])
        claim = await t.turn()
        (running,) = await t.claim(("run", "step:1"), owner="b")
        await t.refused(Fenced, under(running, events=[note()], drop=["step:2"]))
        await t.store.commit_one(
            under(claim, seen=1, events=[command()], drop=["step:1", "step:2", "step:9"])
        )
        assert set(await t.items()) == {"turn", "deliver:1"}
        await t.refused(Fenced, under(running, events=[incoming()], settle=Settle()))

    @scenario
    async def test_CLM_24_known_and_cut(self, t: Case) -> None:
        """CLM-24: a claim brings events after what is known, and says when they were cut.

        Workers keep histories; only what is new travels. Usual cause: ``known`` is ignored, or the
        cut is not told.
        """
        await t.start()
        await t.send(*(note("x" * 1000) for _ in range(50)))
        claim = await t.turn(known={"run": 45})
        assert (claim.after, [e.seq for e in claim.events]) == (45, list(range(46, 52)))
        assert not claim.cut
        await t.store.release(claim.ref)
        claim = await t.turn(max_bytes=20_000)
        assert claim.cut
        assert [e.seq for e in claim.events] == list(range(1, len(claim.events) + 1))
        assert len(claim.events) < 25
        rest = await t.store.get_events("run", after=len(claim.events))
        assert rest[-1].seq == 51

    @scenario
    async def test_CLM_25_free_ends_leases(self, t: Case) -> None:
        """CLM-25: the leases of a process that is gone end at once; its claims stay counted.

        A process that is known to be gone need not be waited for. Usual cause: one item of several,
        or those of others with a similar name.
        """
        for n in range(3):
            await t.start(f"run-{n}")
        await t.turn("run-0", owner="dead")
        await t.turn("run-1", owner="dead")
        await t.turn("run-2", owner="alive")
        assert await t.store.holders() == ["alive", "dead"]
        assert await t.store.free("dead") == 2
        assert await t.store.holders() == ["alive"]
        claims = await t.claim(limit=5)
        assert {c.item.run_id: c.item.claims for c in claims} == {"run-0": 2, "run-1": 2}

    @scenario
    async def test_CLM_26_take_turn(self, t: Case) -> None:
        """CLM-26: a due turn that nobody holds goes to the sender in the same commit.

        A turn after a turn costs one round trip less. Usual cause: the turn is taken although it is
        paused, not due, or held.
        """
        held = LeaseFor(owner="me", lease=seconds(60))
        await t.start(put=[step()])
        claim = await t.turn()
        far = await t.store.now() + seconds(3600)
        answer = await t.store.commit_one(
            under(
                claim,
                1,
                seen=1,
                events=[command()],
                settle=Settle(reschedule_at=far),
                take_turn=held,
            )
        )
        assert list(answer.claims) == []
        (running,) = await t.claim(("run", "step:1"))
        answer = await t.store.commit_one(
            under(running, 1, events=[incoming("step:1")], settle=Settle(), take_turn=held)
        )
        (mine,) = answer.claims
        assert (mine, mine.claims) == ((await t.items())["turn"], 1)
        assert [e.seq for e in answer.unseen_events] == [2]
        # Held by somebody else it is not taken; nor when the run is paused.
        await t.store.commit_one(t.outside(put=[step("2"), step("3")]))
        (second,) = await t.claim(("run", "step:2"))
        (third,) = await t.claim(("run", "step:3"))
        answer = await t.store.commit_one(
            under(second, 1, events=[incoming("step:2")], settle=Settle(), take_turn=held)
        )
        assert list(answer.claims) == []
        await t.store.commit_one(under(mine, 1, seen=answer.last_seq, settle=Settle()))
        answer = await t.store.commit_one(
            under(
                third,
                1,
                events=[incoming("step:3")],
                control=Control(ControlKind.PAUSE),
                settle=Settle(),
                take_turn=held,
            )
        )
        assert (list(answer.claims), answer.paused) == ([], True)

    @scenario
    async def test_CLM_27_others_are_after_seen(self, t: Case) -> None:
        """CLM-27: an answer brings all that others added after ``seen``, and not one's own.

        Only to the holder of the turn, who delivers it; to all steps of a wide run it would be
        quadratic. Usual cause: what the change itself wrote comes too, or nothing.
        """
        await t.start(put=[turn(), step("1")])
        claim = await t.turn()
        await t.send(incoming("a"), note())
        answer = await t.store.commit_one(under(claim, 1, seen=1, events=[command(), note()]))
        assert [e.seq for e in answer.unseen_events] == [2, 3]
        assert list(answer.seqs) == [4, 5]
        answer = await t.store.commit_one(under(claim, 2, seen=2, events=[note()]))
        assert [e.seq for e in answer.unseen_events] == [3, 4, 5]
        assert list((await t.send(note())).unseen_events) == []
        (running,) = await t.claim(("run", "step:1"))
        change = under(running, 1, events=[incoming("step:1")], settle=Settle())
        for _ in range(2):  # also when it is answered again
            assert list((await t.store.commit_one(change)).unseen_events) == []
