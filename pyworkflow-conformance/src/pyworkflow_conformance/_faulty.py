"""Layer L4 (group FLT): the protocol of claims and commits, through a line that fails.

Whoever does not know what became of a change sends the same change again, and whoever lost the
answer to a claim waits for its end. So nothing is lost and nothing is done twice.
"""
# ruff: noqa: N802 - the ids are part of the names

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TypeVar

from pyworkflow.errors import Fenced, RunClosed, StorageUnavailable
from pyworkflow.events import Event
from pyworkflow.runs import ItemKind, RunStatus
from pyworkflow.spi.storage import (
    TURN,
    Change,
    ClaimRequest,
    NewRun,
    Put,
    Settle,
    StorageBackend,
)
from pyworkflow_conformance._case import Case, Suite, note, scenario, seconds, started, under
from pyworkflow_conformance._children import sizes
from pyworkflow_conformance.faults import Fault, FaultPlan, FaultyStorage, cancelled_after

__all__ = ["FaultChecks"]

R = TypeVar("R")
CLIENTS = 3
STEPS = 3


class FaultChecks(Suite):
    """FLT."""

    @scenario
    async def test_FLT_01_error_before(self, t: Case) -> None:
        """FLT-01: calls that never reach the store are made again, and the work is done once.

        Usual cause of a failure here: an object that is unusable after an error of its caller.
        """
        await _protocol(t, Fault.BEFORE)

    @scenario
    async def test_FLT_02_error_after(self, t: Case) -> None:
        """FLT-02: answers are lost, changes are sent again, and each is there once.

        Usual cause: the second answer differs from the first, or the change is applied again.
        """
        await _protocol(t, Fault.AFTER)

    @scenario
    async def test_FLT_03_delay(self, t: Case) -> None:
        """FLT-03: calls overtake each other, and no claim or change is lost by it."""
        await _protocol(t, Fault.DELAY)

    @scenario
    async def test_FLT_04_cancellation_at_each_await(self, t: Case) -> None:
        """FLT-04: a commit or claim cancelled at any of its awaits is done or not done, at once.

        Workers cancel when they are stopped. Usual cause: a connection goes back to its pool in
        the middle of a transaction; a writer waits for an answer that nobody takes.
        """
        await t.start()
        for turns in range(sizes(30, 120)):
            change = t.outside(key=f"c{turns}", events=[note(str(turns)), note(str(turns))])
            answer = await cancelled_after(lambda: t.store.commit_one(change), turns)  # noqa: B023 - awaited here
            again = await asyncio.wait_for(t.store.commit_one(change), 60)
            assert answer is None or list(answer.seqs) == list(again.seqs)
            assert again.last_seq == 3 + 2 * turns
        for turns in range(sizes(15, 60)):
            request = ClaimRequest(owner="me", lease=seconds(60), items=[("run", TURN)])
            await cancelled_after(lambda: t.store.claim(request), turns)  # noqa: B023 - awaited here
            await t.store.free("me")
            claim = await asyncio.wait_for(t.turn(owner="me"), 60)
            await cancelled_after(lambda: t.store.renew([claim.ref], seconds(60)), turns)  # noqa: B023 - awaited here
            await cancelled_after(lambda: t.store.release(claim.ref), turns)  # noqa: B023 - awaited here
            await t.store.release(claim.ref)
        await _protocol(t, Fault.CANCEL)

    @scenario
    async def test_FLT_05_duplicated_call(self, t: Case) -> None:
        """FLT-05: a call that arrives twice is answered twice and done once."""
        await _protocol(t, Fault.DOUBLED)

    @scenario
    async def test_FLT_06_all_faults(self, t: Case) -> None:
        """FLT-06: all of it at once, under several clients."""
        await _protocol(t, *Fault)


async def _protocol(t: Case, *kinds: Fault) -> None:
    """Clients work runs off, each step recorded once, through the faults; then count."""
    number = sizes(6, 40)
    salt = sum(ord(c) for kind in kinds for c in kind)
    plan = FaultPlan(int(getattr(t.suite, "seed", 0)) + salt, rate=0.35, kinds=kinds)
    stores = [FaultyStorage(t.store, plan), *[FaultyStorage(await t.open(), plan) for _ in "ab"]]
    ended: set[str] = set()
    clients = [
        asyncio.ensure_future(_client(stores[n], f"w{n}", number, ended)) for n in range(CLIENTS)
    ]
    for n in range(number):
        await _again(lambda: stores[n % CLIENTS].commit_one(_start(n)))  # noqa: B023 - awaited here
        signal = Event("signal", "I", {"n": n}, key="signal")
        await _again(
            lambda: stores[n % CLIENTS].commit_one(  # noqa: B023 - awaited here
                Change(run_id=f"flt-{n}", key="signal", events=[signal])  # noqa: B023 - awaited here
            )
        )
    async with asyncio.timeout(120):
        while not all(client.done() for client in clients):
            # What was claimed without an answer comes back when its lease ends.
            await asyncio.wait(clients, timeout=0.05)
            await t.shift(61)
    for client in clients:
        client.result()
    assert plan.done.keys() >= set(kinds) - {Fault.DOUBLED} or not kinds, f"too calm: {plan.done}"
    for n in range(number):
        run_id = f"flt-{n}"
        run = await t.run(run_id)
        assert run.status == RunStatus.COMPLETED
        events = await t.store.get_events(run_id)
        kinds_found = Counter(f"{event.type} {event.data.get('step', '')}" for event in events)
        expected = {"workflow.started ": 1, "signal ": 1, "workflow.completed ": 1}
        expected |= {f"step.completed {step}": 1 for step in range(STEPS)}
        assert kinds_found == Counter(expected), f"lost or doubled in {run_id}: {kinds_found}"
        assert await t.store.list_work(run_id) == []


def _start(n: int) -> Change:
    steps = [Put(item_id=f"step:{step}", kind=ItemKind.STEP) for step in range(STEPS)]
    new = NewRun(workflow="flow", version="1", args="[]", idempotency_key=f"flt-{n}")
    return Change(run_id=f"flt-{n}", key="start", create=new, events=[started()], put=steps)


async def _client(store: StorageBackend, name: str, number: int, ended: set[str]) -> None:
    """Work until every run has ended."""
    request = ClaimRequest(owner=name, lease=seconds(60), limit=2)
    while len(ended) < number:
        try:
            claims = (await store.claim(request)).claims
        except StorageUnavailable:
            continue
        for claim in claims:
            run_id, item, length = claim.item.run_id, claim.item, 0
            if item.kind is ItemKind.STEP:
                step = int(item.item_id.removeprefix("step:"))
                done = Event("step.completed", "I", {"step": step}, key=item.item_id)
                change = under(claim, events=[done], settle=Settle())
            else:
                run = await _again(lambda: store.get_run(run_id))  # noqa: B023 - awaited here
                assert run is not None
                events = await _again(lambda: store.get_events(run_id))  # noqa: B023 - awaited here
                length = len(events)
                inputs = sum(event.klass == "I" for event in events)
                if inputs >= STEPS + 2:
                    done = Event("workflow.completed", "C", {"result": "null"})
                    change = under(
                        claim, seen=len(events), events=[done], final=RunStatus.COMPLETED
                    )
                else:
                    change = under(claim, seen=len(events), settle=Settle())
            try:
                answer = await _again(lambda: store.commit_one(change))  # noqa: B023 - awaited here
            except (Fenced, RunClosed):
                continue  # its lease ended meanwhile, and another has done it, or even ended the run
            if change.final is not None:
                ended.add(run_id)
                assert answer.last_seq == length + 1
        await asyncio.sleep(0)
        if not claims:
            # Others end runs, too, and a fenced end may have been one's own.
            for n in range(number):
                found = await _again(lambda: store.get_run(f"flt-{n}"))  # noqa: B023 - awaited here
                if found is not None and found.status.is_terminal:
                    ended.add(f"flt-{n}")


async def _again(call: Callable[[], Awaitable[R]]) -> R:
    """Make the same call until it is answered."""
    async with asyncio.timeout(60):
        while True:
            try:
                return await call()
            except StorageUnavailable:
                await asyncio.sleep(0)
