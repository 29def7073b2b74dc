"""Group CCY: several clients at once, in tasks and in threads with loops of their own."""
# ruff: noqa: N802 - the ids are part of the names

from __future__ import annotations

import asyncio
from datetime import timedelta

from pyworkflow.errors import Fenced, KeyTaken, RunClosed, RunNotFound, UnseenInput
from pyworkflow.runs import RunStatus
from pyworkflow.spi.storage import Change, ClaimRequest, NewRun, Settle, StorageBackend
from pyworkflow_conformance._case import (
    Case,
    Suite,
    command,
    in_threads,
    incoming,
    note,
    scenario,
    seconds,
    started,
    step,
    under,
)

__all__ = ["RaceChecks"]


class RaceChecks(Suite):
    """CCY, WATCH."""

    @scenario
    async def test_CCY_01_50_claimers_one_winner(self, t: Case) -> None:
        """CCY-01 (I6): an item goes to one of those who want it.

        Workers are many. Usual cause: read and update in two steps, without a condition in the
        update.
        """
        await t.start()
        stores = [t.store, *[await t.open() for _ in range(4)]]
        claims = await asyncio.gather(
            *(t.claim(("run", "turn"), owner=f"w{n}", store=stores[n % 5]) for n in range(50))
        )
        assert sum(map(len, claims)) == 1

    @scenario
    async def test_CCY_02_50_appenders_same_run(self, t: Case) -> None:
        """CCY-02: every event of every writer is there once, without a gap.

        Fan-in: many steps report to one run. Usual cause: the next seq is read before the lock is
        held.
        """
        await t.start()

        async def append(store: StorageBackend, thread: int) -> list[int]:
            seqs: list[int] = []
            for n in range(10):
                change = Change(run_id="run", key=f"{thread}:{n}", events=[note(f"{thread}:{n}")])
                seqs += (await store.commit_one(change)).seqs
            return seqs

        seqs = [seq for found in await in_threads(t, 5, append) for seq in found]
        assert sorted(seqs) == list(range(2, 52))
        messages = {str(e.data["message"]) for e in await t.store.get_events("run", after=1)}
        assert messages == {f"{thread}:{n}" for thread in range(5) for n in range(10)}

    @scenario
    async def test_CCY_03_append_vs_turn_commit(self, t: Case) -> None:
        """CCY-03 (I5): an input that races with a settle is delivered by somebody.

        An input that is accepted is delivered. Usual cause: the turn writes ``seen`` and the end in
        two transactions.
        """
        await t.start()
        for n in range(20):
            claim = await t.turn()
            seen = (await t.run()).history_length
            settle = under(claim, seen=seen, events=[command()], settle=Settle())
            sent, settled = await asyncio.gather(
                t.send(incoming(f"k{n}")), t.store.commit_one(settle)
            )
            run = await t.run()
            assert run.seen_seq == seen < sent.seqs[0]
            told = [e.seq for e in settled.unseen_events]
            assert told in ([], [sent.seqs[0]])

    @scenario
    async def test_CCY_04_two_turn_owners_one_commits(self, t: Case) -> None:
        """CCY-04 (I4): of two who believe to hold the turn, the later claim counts.

        A worker that was stopped goes on after its lease. Usual cause: the fence is checked in the
        client.
        """
        await t.start()
        old = await t.turn(lease=1)
        await t.shift(2)
        new = await t.turn(owner="b")
        answers = await asyncio.gather(
            *(t.store.commit_one(under(c, seen=1, events=[command()])) for c in (old, new)),
            return_exceptions=True,
        )
        assert [type(a).__name__ for a in answers] == ["Fenced", "Committed"]

    @scenario
    async def test_CCY_05_append_vs_terminal(self, t: Case) -> None:
        """CCY-05: an input and the end of the run: one of them wins, nothing is lost unnoticed.

        An input is delivered or refused, never both. Usual cause: the status is read before the
        transaction.
        """
        for n in range(10):
            run_id = f"run-{n}"
            await t.start(run_id)
            claim = await t.turn(run_id)
            end = under(claim, seen=1, events=[command()], final=RunStatus.COMPLETED)
            sent, ended = await asyncio.gather(
                t.send(incoming(), run_id=run_id), t.store.commit_one(end), return_exceptions=True
            )
            if isinstance(sent, BaseException):
                assert isinstance(sent, RunClosed)
                assert not isinstance(ended, BaseException)
            else:
                assert isinstance(ended, UnseenInput)

    @scenario
    async def test_CCY_06_key_race(self, t: Case) -> None:
        """CCY-06 (I7): one idempotency key, many threads, one run.

        Two starts, one key. Usual cause: the key is looked up and set in two steps.
        """

        async def start(store: StorageBackend, thread: int) -> str:
            new = NewRun(workflow="flow", version="1", args="[]", idempotency_key="order")
            run_id = f"run-{thread}"
            try:
                await store.commit_one(
                    Change(run_id=run_id, key="start", create=new, events=[started()])
                )
            except KeyTaken as refusal:
                return refusal.owner
            return run_id

        assert len(set(await in_threads(t, 6, start))) == 1
        assert (await t.store.stats())["runs"] == 1

    @scenario
    async def test_CCY_07_poll_race_no_double(self, t: Case) -> None:
        """CCY-07: polls at the same time share the work, and leave none of it.

        Polls of many workers meet. Usual cause: a read without "skip locked" or a condition in the
        update.
        """
        for n in range(60):
            await t.start(f"run-{n}")

        async def poll(store: StorageBackend, thread: int) -> list[str]:
            found: list[str] = []
            while True:
                request = ClaimRequest(owner=f"w{thread}", lease=seconds(60), limit=4)
                claims = (await store.claim(request)).claims
                if not claims:
                    return found
                found += [c.run.run_id for c in claims]

        found = [run_id for ids in await in_threads(t, 4, poll) for run_id in ids]
        assert sorted(found) == sorted(f"run-{n}" for n in range(60))

    @scenario
    async def test_CCY_08_purge_vs_commit(self, t: Case) -> None:
        """CCY-08: a late observation meets its run or no run, never half of one.

        Purges run beside work. Usual cause: a list of runs is made first and removed later.
        """
        for n in range(10):
            run_id = f"run-{n}"
            await t.start(run_id)
            await t.end(run_id)
            before = await t.store.now() + timedelta(days=1)
            answer, purged = await asyncio.gather(
                t.send(note(), run_id=run_id),
                t.store.purge(before=before),
                return_exceptions=True,
            )
            assert purged == 1
            assert not isinstance(answer, BaseException) or isinstance(answer, RunNotFound)
            assert await t.picture(run_id) == (None, [], [])

    @scenario
    async def test_CCY_10_reader_sees_whole_batches_only(self, t: Case) -> None:
        """CCY-10 (I1): a change is visible as a whole or not at all.

        A reader between two events of a change decides wrongly. Usual cause: one insert per event
        without a transaction.
        """
        await t.start()

        async def work(store: StorageBackend, thread: int) -> None:
            if thread == 0:
                for n in range(30):
                    events = [note(str(m)) for m in range(7)]
                    await store.commit_one(Change(run_id="run", key=f"b{n}", events=events))
                return
            while True:
                length = len(await store.get_events("run"))
                run = await store.get_run("run")
                assert run is not None
                assert (length - 1) % 7 == 0, "half a change was seen"
                assert (run.history_length - 1) % 7 == 0
                assert run.history_length >= length, "a read went back in time"
                if length == 211:
                    return

        await in_threads(t, 3, work)

    @scenario
    async def test_CCY_11_no_deadlock_1000_mixed_ops(self, t: Case) -> None:
        """CCY-11: claims, commits, renewals and reads over a few runs all come to an end.

        All operations together must end. Usual cause: locks that are taken in different orders.
        """
        for n in range(5):
            await t.start(f"run-{n}", put=[step("1"), step("2")])

        async def work(store: StorageBackend, thread: int) -> None:
            for n in range(60):
                request = ClaimRequest(owner=f"w{thread}", lease=seconds(60), limit=2)
                for claim in (await store.claim(request)).claims:
                    await store.renew([claim.ref], seconds(60))
                    try:
                        await store.commit_one(under(claim, events=[note()]))
                    except Fenced as error:
                        raise AssertionError("a held claim was fenced") from error
                    await store.release(claim.ref)
                change = Change(
                    run_id=f"run-{n % 5}", key=f"{thread}:{n}", events=[note(), incoming()]
                )
                await store.commit_one(change)
                await store.get_events(f"run-{n % 5}", after=n)
                await store.next_due()

        await asyncio.wait_for(in_threads(t, 4, work), 120)
        assert sum([(await t.run(f"run-{n}")).history_length for n in range(5)]) >= 5 + 480

    @scenario
    async def test_CCY_12_cancelled_call_leaves_no_lock(self, t: Case) -> None:
        """CCY-12: a call given up in the middle hinders nobody, and is done or not done.

        Clients time out. Usual cause: a lock or a connection that is given back on success only.
        """
        await t.start()
        for n in range(30):
            call = asyncio.ensure_future(
                t.store.commit_one(t.outside(key=f"c{n}", events=[note(str(n)), note(str(n))]))
            )
            for _ in range(n % 4):
                await asyncio.sleep(0)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
        assert ((await t.run()).history_length - 1) % 2 == 0
        # What became of each is found out by sending it again.
        for n in range(30):
            await t.store.commit_one(t.outside(key=f"c{n}", events=[note(str(n)), note(str(n))]))
        assert (await t.run()).history_length == 61

    @scenario
    async def test_WATCH_01_wakes(self, t: Case) -> None:
        """WATCH-01: who waits for a run is told of the next event, and not of older ones.

        Waiting for a result costs nothing then. Usual cause: the event is told before it can be
        read.
        """
        await t.start()
        brief, long = timedelta(milliseconds=20), seconds(60)
        assert await t.store.watch("run", after=0, timeout=long), "an older event is not seen"
        woken = await t.store.watch("run", after=1, timeout=brief)
        assert not woken, "woken by an event that the caller knows"
        waiting = asyncio.ensure_future(t.store.watch("run", after=1, timeout=long))
        await asyncio.sleep(0)
        await (await t.open()).commit_one(t.outside(events=[note()]))
        assert await asyncio.wait_for(waiting, 30), "not woken by the next event"

    @scenario
    async def test_WATCH_02_no_missed_change(self, t: Case) -> None:
        """WATCH-02: work that appears between a poll and the wait ends the wait.

        A worker that sleeps through work is slow for as long as it polls. Usual cause: the
        subscription begins after the look.
        """
        await t.start()
        await t.turn()
        assert await t.claim() == []
        await t.start("run-2")
        waiting = t.store.watch(None, after=0, timeout=seconds(60))
        assert await asyncio.wait_for(waiting, 30)
