"""Groups DUE and CTL: when a turn is owed (I5), controls, ends, and the outbox that outlives them."""
# ruff: noqa: N802 - the ids are part of the names

from __future__ import annotations

from typing import Any

from pyworkflow.errors import Fenced, RunClosed
from pyworkflow.events import Event
from pyworkflow.runs import RunStatus
from pyworkflow.spi.storage import Control, ControlKind, LeaseFor, RunQuery, Settle, Update
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

__all__ = ["TurnChecks"]

PAUSE = Control(ControlKind.PAUSE)
UNPAUSE = Control(ControlKind.UNPAUSE)
STALL = Control(ControlKind.STALL, "the code has changed")
UNSTALL = Control(ControlKind.UNSTALL)
CANCEL = Control(ControlKind.CANCEL)
TERMINATE = Control(ControlKind.TERMINATE)


class TurnChecks(Suite):
    """DUE, CTL."""

    @scenario
    async def test_DUE_01_input_makes_a_due_turn(self, t: Case) -> None:
        """DUE-01 (I5): an input wakes a run that waits for the outside, or for a timer.

        Otherwise a signal waits until a timer ends. Usual cause: the due of the turn is not looked
        at when an input comes.
        """
        await t.start()
        claim = await t.turn()
        await t.store.commit_one(under(claim, seen=1, events=[command()], settle=Settle()))
        assert await t.items() == {}
        await t.send(note())
        assert await t.items() == {}
        await t.send(incoming())
        claim = await t.turn()
        far = await t.store.now() + seconds(3600)
        await t.store.commit_one(
            under(claim, seen=4, settle=Settle(reschedule_at=far), events=[command()])
        )
        assert await t.store.next_due() == far
        assert (await t.run()).status == RunStatus.SUSPENDED
        await t.send(incoming("k"))
        assert (await t.turn()).item.claims == 1

    @scenario
    async def test_DUE_02_skipped_input_wakes_nobody(self, t: Case) -> None:
        """DUE-02: an input that was recorded before is no news.

        A repeated delivery would cost a turn each time. Usual cause: the due is changed before the
        key is checked.
        """
        await t.start()
        await t.send(incoming("k"))
        claim = await t.turn()
        await t.store.commit_one(under(claim, seen=2, events=[command()], settle=Settle()))
        await t.send(incoming("k"))
        assert await t.items() == {}

    @scenario
    async def test_DUE_03_put_later_than_input_is_due_now(self, t: Case) -> None:
        """DUE-03: whatever due the sender gives, an unseen input makes the turn due at once.

        An input that came while the turn set its timer would sleep with it. Usual cause: put is
        applied after the input has made the turn due.
        """
        far = await t.store.now() + seconds(3600)
        await t.start(put=[turn(due_at=far)])
        await t.turn()

    @scenario
    async def test_DUE_04_seen_only_by_the_turns_holder(self, t: Case) -> None:
        """DUE-04: ``seen`` moves under the turn's claim, never back, and starts the run.

        An input that was not delivered would count as delivered, and be lost. Usual cause: ``seen``
        is set without a look at the claim.
        """
        await t.start(put=[step()])
        (other,) = await t.claim(("run", "step:1"))
        await t.refused(Fenced, under(other, seen=1))
        claim = await t.turn()
        answer = await t.store.commit_one(under(claim, 1, seen=1))
        run = await t.run()
        assert (answer.seen_seq, run.seen_seq, run.started_at) == (1, 1, answer.timestamp)
        await t.send(incoming())
        await t.store.commit_one(under(claim, 2, seen=2))
        await t.shift(5)
        answer = await t.store.commit_one(under(claim, 3, seen=1, events=[note()]))
        assert answer.seen_seq == (await t.run()).seen_seq == 2
        assert (await t.run()).started_at == run.started_at

    @scenario
    async def test_DUE_05_status_follows(self, t: Case) -> None:
        """DUE-05: status is derived: pending, running, suspended, paused, stalled, ended.

        People read the status. Usual cause: it is stored, and not changed with the items.
        """
        await t.start()
        assert (await t.run()).status == RunStatus.PENDING
        claim = await t.turn()
        assert (await t.run()).status == RunStatus.RUNNING
        far = await t.store.now() + seconds(100)
        await t.store.commit_one(
            under(claim, seen=1, settle=Settle(reschedule_at=far), events=[command()])
        )
        assert (await t.run()).status == RunStatus.SUSPENDED
        await t.shift(101)
        assert (await t.run()).status == RunStatus.RUNNING
        await t.store.commit_one(t.outside(control=PAUSE))
        assert (await t.run()).status == RunStatus.PAUSED
        await t.store.commit_one(t.outside(control=UNPAUSE))
        await t.store.commit_one(under(await t.turn(), control=STALL))
        assert (await t.run()).status == RunStatus.STALLED
        statuses = frozenset({RunStatus.STALLED})
        page = await t.store.list_runs(RunQuery(status=statuses))
        assert [r.run_id for r in page.items] == ["run"]

    @scenario
    async def test_DUE_06_status_looks_at_each_item(self, t: Case) -> None:
        """DUE-06: one item that is due or leased makes a run running, whichever it is.

        A delivery that is due does not: the run itself waits. Usual cause: the status is derived
        from one item of each kind, such as the first one or the one with the latest lease.
        """
        far = await t.store.now() + seconds(3600)
        for name in ("a", "b", "c"):
            await t.start(name)
            puts = [step(n) if n == name else step(n, due_at=far) for n in ("a", "b", "c")]
            claim = await t.turn(name)
            await t.store.commit_one(under(claim, seen=1, put=puts, settle=Settle()))
            await self._has_status(t, name, RunStatus.RUNNING)
            (due,) = await t.claim((name, f"step:{name}"), lease=1800)
            await self._has_status(t, name, RunStatus.RUNNING)
            await t.store.commit_one(under(due, settle=Settle(reschedule_at=far), put=[deliver()]))
            await self._has_status(t, name, RunStatus.SUSPENDED)
            (delivery,) = await t.claim((name, "deliver:1"))
            await self._has_status(t, name, RunStatus.RUNNING)
            await t.store.release(delivery.ref)
            await self._has_status(t, name, RunStatus.SUSPENDED)

    async def _has_status(self, t: Case, run_id: str, status: RunStatus) -> None:
        """By the run and by the list of runs."""
        listed = await t.store.list_runs(RunQuery(status=frozenset({status})))
        assert (await t.run(run_id)).status == status
        assert run_id in [run.run_id for run in listed.items]

    @scenario
    async def test_CLM_29_leases_of_one_owner(self, t: Case) -> None:
        """CLM-29: the leases of an owner are listed with their tokens: those that have not ended.

        A worker whose claim was not answered releases at once what it does not know of. Usual
        cause: leases of others with a similar name, of released items, or only the first page.
        """
        for n in range(4):
            await t.start(f"run-{n}")
        mine = [await t.turn(f"run-{n}", owner="Host/1") for n in range(2)]
        await t.turn("run-2", owner="host/1")
        short = await t.claim(("run-3", "turn"), owner="Host/1", lease=0.5)
        await t.shift(1)
        found = await t.store.leases("Host/1")
        assert {*found} == {claim.ref for claim in mine}
        assert len(found) == 2
        assert short[0].ref not in found
        await t.store.release(mine[0].ref)
        assert await t.store.leases("Host/1") == [mine[1].ref]
        assert await t.store.leases("Host") == []

    @scenario
    async def test_CLM_31_recover_ends_all_claims(self, t: Case) -> None:
        """CLM-31: after a recovery no claim of before is valid, and no token comes a second time.

        The store's clock was set, or it is an old copy: who held work knows of a future that did
        not happen. Usual cause: leases are ended and their tokens stay valid until the next claim,
        or those that had ended already are left out.
        """
        for n in range(3):
            await t.start(f"run-{n}")
        live = await t.turn("run-0")
        paused = await t.turn("run-1")
        await t.store.commit_one(t.outside("run-1", control=PAUSE))
        (ended,) = await t.claim(("run-2", "turn"), lease=0.5)
        await t.shift(1)
        before = {claim.item.run_id: claim for claim in (live, paused, ended)}
        await t.store.recover()
        assert await t.store.holders() == []
        kept = await t.store.renew([claim.ref for claim in before.values()], seconds(60))
        assert kept == [False, False, False]
        for run_id, claim in before.items():
            items = {item.item_id: item for item in await t.store.list_work(run_id)}
            assert items["turn"].lease is None
            assert items["turn"].claims == claim.item.claims - 1
            await t.refused(Fenced, under(claim, events=[note()]))
        await t.store.commit_one(t.outside("run-1", control=UNPAUSE))
        again = [await t.turn(run_id) for run_id in before]
        tokens = {claim.ref.token for claim in (*before.values(), *again)}
        assert len(tokens) == 6

    @scenario
    async def test_CTL_01_pause_hides_work(self, t: Case) -> None:
        """CTL-01: a paused run's turn and steps are not claimed; deliveries are.

        Operators stop a run to look at it. Usual cause: the pause is a field that claiming does not
        look at.
        """
        await t.start(put=[step(), deliver()])
        await t.store.commit_one(t.outside(control=PAUSE, events=[note()]))
        assert (await t.run()).paused
        await t.send(incoming())
        assert [c.item.item_id for c in await t.claim(limit=9)] == ["deliver:1"]
        assert await t.claim(("run", "turn"), ("run", "step:1")) == []
        (delivery,) = [i for i in (await t.items()).values() if i.lease is not None]
        await t.store.commit_one(under(delivery, settle=Settle()))
        assert await t.store.next_due() is None
        await t.store.commit_one(t.outside(control=UNPAUSE))
        assert {c.item.item_id for c in await t.claim(limit=9)} == {"turn", "step:1"}

    @scenario
    async def test_CTL_02_pause_survives_the_holder(self, t: Case) -> None:
        """CTL-02 (hazard 13): a session that commits after a pause learns of it, and keeps it.

        A turn that was under way when the pause came ends it otherwise. Usual cause: settling puts
        the item back without a look at the pause.
        """
        await t.start()
        claim = await t.turn()
        await t.store.commit_one(t.outside(control=PAUSE))
        await t.send(incoming())
        answer = await t.store.commit_one(under(claim, 1, seen=1, events=[command()]))
        assert answer.paused
        far = await t.store.now() + seconds(3600)
        await t.store.commit_one(under(claim, 2, settle=Settle(reschedule_at=far)))
        assert (await t.run()).status == RunStatus.PAUSED
        assert await t.claim(limit=9) == []
        await t.store.commit_one(t.outside(control=UNPAUSE))
        await t.turn()

    @scenario
    async def test_CTL_03_stall_backs_off(self, t: Case) -> None:
        """CTL-03 (hazard 3): a stalled run's turn keeps its back-off, unseen inputs or not.

        A run that always fails must not take all of a worker's time. Usual cause: an unseen input
        makes the stalled turn due at once.
        """
        await t.start()
        claim = await t.turn()
        await t.refused(Fenced, t.outside(control=STALL))
        due = await t.store.now() + seconds(30)
        stalled = under(claim, control=STALL, events=[note()], settle=Settle(reschedule_at=due))
        await t.store.commit_one(stalled)
        run = await t.run()
        assert (run.status, run.stalled) == (RunStatus.STALLED, "the code has changed")
        assert (await t.items())["turn"].due_at == due
        await t.send(note())
        assert (await t.items())["turn"].due_at == due
        # A new input brings it forward, at most once a second.
        now = (await t.send(incoming())).now
        assert (await t.items())["turn"].due_at == now + seconds(1)
        await t.send(incoming())
        assert (await t.items())["turn"].due_at == now + seconds(1)
        await t.shift(2)
        claim = await t.turn()
        await t.store.commit_one(
            under(claim, control=UNSTALL, seen=1, events=[note()], settle=Settle())
        )
        assert (await t.run()).stalled is None
        await t.turn()

    @scenario
    async def test_CTL_04_unstall_from_outside(self, t: Case) -> None:
        """CTL-04: unstalling makes the turn due at once.

        Operators fix the code and go on. Usual cause: the due stays where the backoff has put it.
        """
        await t.start()
        claim = await t.turn()
        due = await t.store.now() + seconds(3600)
        await t.store.commit_one(under(claim, control=STALL, settle=Settle(reschedule_at=due)))
        assert await t.claim() == []
        await t.store.commit_one(t.outside(control=UNSTALL))
        await t.turn()

    @scenario
    async def test_CTL_05_cancel_without_code(self, t: Case) -> None:
        """CTL-05: a run that no turn has run, or that is stalled, is cancelled by a commit.

        What no code has run can be cancelled without code, and nothing else. Usual cause: the check
        does not see that a turn has run.
        """
        cancelled: dict[str, Any] = {
            "control": CANCEL,
            "final": RunStatus.CANCELLED,
            "events": [incoming("cancel"), Event("workflow.cancelled", "C", {"reason": "x"})],
        }
        await t.start("new")
        await t.store.commit_one(t.outside("new", **cancelled))
        assert (await t.run("new")).status == RunStatus.CANCELLED
        await t.start("held")
        claim = await t.turn("held", lease=10)
        await t.refused(Fenced, t.outside("held", **cancelled), run_id="held")
        await t.store.commit_one(under(claim, 1, seen=1, events=[command()]))
        await t.shift(11)
        await t.refused(Fenced, t.outside("held", **cancelled), run_id="held")
        due = await t.store.now() + seconds(60)
        await t.store.commit_one(under(claim, 2, control=STALL, settle=Settle(reschedule_at=due)))
        await t.store.commit_one(t.outside("held", **cancelled))
        run = await t.run("held")
        assert (run.status, run.finished_at) == (RunStatus.CANCELLED, run.updated_at)
        assert await t.items("held") == {}

    @scenario
    async def test_CTL_06_terminate_whatever_it_does(self, t: Case) -> None:
        """CTL-06: terminate needs no claim and waits for no input; holders are cut off.

        The last resort of an operator has to work always. Usual cause: terminate respects a lease.
        """
        await t.start(put=[step(), deliver()])
        claim = await t.turn()
        (running,) = await t.claim(("run", "step:1"))
        await t.send(incoming())
        await t.store.commit_one(
            t.outside(control=TERMINATE, final=RunStatus.TERMINATED, events=[note()])
        )
        assert (await t.run()).status == RunStatus.TERMINATED
        assert set(await t.items()) == {"deliver:1"}
        await t.refused(RunClosed, under(claim, 1, seen=2, events=[command()]))
        await t.refused(RunClosed, under(running, 1, events=[incoming()], settle=Settle()))
        await t.refused(Fenced, under(running, 1, events=[note()]))
        assert await t.store.renew([claim.ref, running.ref], seconds(9)) == [False, False]
        assert not await t.store.release(claim.ref)

    @scenario
    async def test_CTL_07_deliveries_outlive_the_run(self, t: Case) -> None:
        """CTL-07 (I8, hazard 1): what an ended run still owes to others is delivered.

        A parent must hear that its child has ended. Usual cause: all items of a run are removed
        when it ends.
        """
        await t.start()
        claim = await t.turn()
        await t.store.commit_one(
            under(
                claim,
                seen=1,
                events=[command()],
                final=RunStatus.COMPLETED,
                update=Update(result="1"),
                put=[deliver(payload={"to": "parent"}), step("late"), turn()],
                take_turn=LeaseFor(owner="me", lease=seconds(60)),
            )
        )
        assert set(await t.items()) == {"deliver:1"}
        (delivery,) = await t.claim()
        assert (delivery.item.payload, delivery.run.status) == ({"to": "parent"}, "completed")
        assert await t.store.renew([delivery.ref], seconds(60)) == [True]
        now = await t.store.now()
        again = under(delivery, 1, settle=Settle(reschedule_at=now, payload={"try": 2}))
        await t.store.commit_one(again)
        (delivery,) = await t.claim()
        assert (delivery.item.claims, delivery.item.payload) == (1, {"try": 2})
        assert await t.store.release(delivery.ref, delay=seconds(5))
        await t.shift(6)
        (delivery,) = await t.claim()
        await t.refused(RunClosed, under(delivery, 1, events=[incoming()], settle=Settle()))
        await t.store.commit_one(under(delivery, 1, events=[note("told")], settle=Settle()))
        assert await t.items() == {}
        run = await t.run()
        assert (run.status, run.result_text, run.history_length) == (RunStatus.COMPLETED, "1", 3)

    @scenario
    async def test_CTL_08_pause_twice_is_once(self, t: Case) -> None:
        """CTL-08: controls that change nothing are accepted.

        Two operators press the button. Usual cause: a toggle, or a second event.
        """
        await t.start()
        for _ in range(2):
            await t.store.commit_one(t.outside(control=PAUSE))
        await t.store.commit_one(t.outside(control=UNPAUSE))
        await t.store.commit_one(t.outside(control=UNPAUSE))
        await t.store.commit_one(t.outside(control=UNSTALL))
        assert (await t.run()).status == RunStatus.PENDING
