"""The engine on a memory store: ends, items, limits, stalls, and what workers leave behind."""

from __future__ import annotations

import asyncio
import itertools
import logging
import sys
import threading
from collections import Counter
from datetime import timedelta
from typing import Any

import pytest

from pyworkflow import (
    HistoryTooLong,
    RunCancelled,
    RunClosed,
    RunNotFound,
    StepError,
    WorkflowTimeout,
    deprecate_patch,
    logger,
    now,
    patched,
    sleep,
    step,
    step_context,
    workflow,
)
from pyworkflow._definitions import Step, Workflow
from pyworkflow._engine.deliver import event_payload, run_payload
from pyworkflow._engine.guard import shared_guard
from pyworkflow._engine.session import Session
from pyworkflow.errors import StorageUnavailable
from pyworkflow.runs import ItemKind, ParentRef, Run
from pyworkflow.spi import (
    Change,
    ClaimRequest,
    Event,
    NewRun,
    Put,
    RunStatus,
    Settle,
)
from pyworkflow.spi.storage import ClaimRef, Update
from pyworkflow.storage.memory import MemoryStorageBackend
from tests.core._driving import Bench, bench, eventually

LEASE = timedelta(seconds=30)


# --- cancellation -------------------------------------------------------------------------------


def test_cancel_is_raised_where_the_run_waits_and_finally_may_run_steps() -> None:
    calls: list[str] = []

    @step
    async def te_note(what: str) -> None:
        calls.append(what)

    @workflow
    async def te_cleanup() -> None:
        try:
            await te_note("begin")
            await sleep("1d")
        except asyncio.CancelledError:
            await te_note("cancelled")
            raise
        finally:
            await asyncio.gather(te_note("clean"), te_note("up"))
            await sleep("1m")
            await te_note("end")

    async def main() -> None:
        async with bench() as b:
            run_id = await b.start(te_cleanup)
            await b.asleep(run_id)
            await b.ops.cancel(run_id, "no more")
            await b.has(run_id, "sleep.created", 2)
            await b.asleep(run_id)
            await b.restart()
            await b.pass_time("1m")
            with pytest.raises(RunCancelled) as caught:
                await b.result(run_id)
            assert (caught.value.run_id, caught.value.reason) == (run_id, "no more")
            assert calls == ["begin", "cancelled", "clean", "up", "end"]
            assert (await b.types(run_id))[-1] == "workflow.cancelled"
            await b.ops.cancel(run_id, "again")  # a no-op
            assert await b.items(run_id) == {}

    asyncio.run(main())


def test_cancel_of_a_run_that_nobody_began_closes_it_without_code() -> None:
    began: list[int] = []

    @workflow
    async def te_pending() -> None:
        began.append(1)

    async def main() -> None:
        async with bench(work=False) as b:
            run_id = await b.start(te_pending)
            assert (await b.get(run_id)).status == "pending"
            await b.ops.cancel(run_id, "too late")
            assert (await b.get(run_id)).status == "cancelled"
            await b.work()
            with pytest.raises(RunCancelled, match="too late"):
                await b.result(run_id)
            assert await b.types(run_id) == ["workflow.started", "workflow.cancelled"]
        assert began == []

    asyncio.run(main())


def make_stalling(changed: bool) -> Any:
    @step
    async def te_old(n: int) -> int:
        return n

    @step
    async def te_new(n: int) -> int:
        return n

    @workflow
    async def te_stalling() -> int:
        await (te_new if changed else te_old)(1)
        await sleep("1h")
        return await te_old(2)

    return te_stalling, te_old, te_new


async def stalled(b: Bench) -> tuple[str, Any]:
    """A run that stalled, and what must be kept for it to stay so."""
    old = make_stalling(changed=False)
    run_id = await b.start(old[0])
    await b.asleep(run_id)
    new = make_stalling(changed=True)
    await b.pass_time("1h")
    await b.until(run_id, "stalled")
    return run_id, new


def test_cancel_of_a_stalled_run_closes_it_at_once() -> None:
    async def main() -> None:
        async with bench() as b:
            run_id, keep = await stalled(b)
            await b.rest()
            await b.ops.cancel(run_id, "give up")
            assert (await b.get(run_id)).status == "cancelled"
            del keep

    asyncio.run(main())


def test_cancel_of_a_stalled_run_that_is_just_tried_closes_it_too() -> None:
    async def main() -> None:
        async with bench() as b:
            run_id, keep = await stalled(b)
            await b.rest()
            await b.pass_time("1m")
            claimed = await b.storage.claim(ClaimRequest(owner="other", lease=LEASE))
            (claim,) = claimed.claims
            await b.ops.cancel(run_id, "give up")
            await b.storage.release(claim.ref)
            await b.work()
            assert (await b.until(run_id, "cancelled")).status == "cancelled"
            del keep

    asyncio.run(main())


def test_a_second_cancel_is_delivered_again() -> None:
    @workflow
    async def te_stubborn() -> str:
        ignored = 0
        while True:
            try:
                await sleep("1d")
            except asyncio.CancelledError:
                ignored += 1
                if ignored == 2:
                    return f"ignored {ignored}"

    async def main() -> None:
        async with bench() as b:
            run_id = await b.start(te_stubborn)
            await b.asleep(run_id)
            await b.ops.cancel(run_id, "first")
            await b.has(run_id, "sleep.created", 2)
            await b.asleep(run_id)
            await b.ops.cancel(run_id, "second")
            # A value that is returned is a result, cancelled or not.
            assert await b.result(run_id) == "ignored 2"
            with pytest.raises(RunClosed, match="completed"):
                await b.ops.cancel(run_id, "third")

    asyncio.run(main())


def test_cancelled_error_that_nobody_asked_for_fails_the_run() -> None:
    @workflow
    async def te_self_cancelling() -> None:
        raise asyncio.CancelledError

    async def main() -> None:
        async with bench() as b:
            run_id = await b.start(te_self_cancelling)
            with pytest.raises(StepError, match="CancelledError"):
                await b.result(run_id)
            assert (await b.get(run_id)).status == "failed"

    asyncio.run(main())


def test_cancel_ends_running_steps_of_every_kind_and_drops_their_items() -> None:
    seen: Counter[str] = Counter()
    free = threading.Event()

    @step
    async def te_in_place() -> None:
        seen["async begun"] += 1
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            seen["async cancelled"] += 1
            raise

    @step(queue="elsewhere")
    async def te_never_claimed() -> None:
        seen["elsewhere"] += 1

    @step(max_retries=5)
    async def te_retrying() -> None:
        seen["retrying"] += 1
        raise OSError

    @step
    def te_threaded() -> None:
        seen["thread begun"] += 1
        free.wait(30)

    @workflow
    async def te_all_kinds() -> None:
        await asyncio.gather(te_in_place(), te_never_claimed(), te_retrying(), te_threaded())

    async def main() -> None:
        async with bench(work=False) as b:
            from pyworkflow._engine.worker import Worker

            b.worker = Worker(b.storage, b.settings, queues=["default"])
            await b.worker.open()
            b.worker.serve()
            run_id = await b.start(te_all_kinds)
            await b.has(run_id, "step.retrying")
            await b.has(run_id, "step.scheduled", 4)
            assert set(await b.items(run_id)) >= {f"step:1.{n}#1:step" for n in (1, 2, 3, 4)}
            await b.ops.cancel(run_id, "stop")
            with pytest.raises(RunCancelled):
                await b.result(run_id)
            free.set()
            await eventually(lambda: seen["async cancelled"])
            assert seen == {
                "async begun": 1, "async cancelled": 1, "retrying": 1, "thread begun": 1,
            }  # fmt: skip
            cancelled = await b.events(run_id, "step.cancelled")
            assert len(cancelled) in (0, 4)
            assert await b.items(run_id) == {}

    asyncio.run(main())


def test_a_step_that_the_code_gave_up_is_recorded_as_cancelled() -> None:
    @step
    async def te_forever() -> None:
        await asyncio.sleep(60)

    @workflow
    async def te_gives_up() -> str:
        try:
            async with asyncio.timeout(3600):
                await te_forever()
        except TimeoutError:
            await sleep("1h")
            return "gave up"
        return "not here"

    async def main() -> None:
        async with bench() as b:
            run_id = await b.start(te_gives_up)
            await b.has(run_id, "step.scheduled")
            await b.pass_time("1h")
            await b.has(run_id, "step.cancelled")
            await b.asleep(run_id)
            assert set(await b.items(run_id)) == {"turn"}
            await b.restart()
            await b.pass_time("1h")
            assert await b.result(run_id) == "gave up"

    asyncio.run(main())


def test_questions_about_a_run_that_is_not_there() -> None:
    async def main() -> None:
        async with bench() as b:
            for ask in (b.ops.get_run("run_x"), b.ops.cancel("run_x", ""), b.result("run_x")):
                with pytest.raises(RunNotFound, match="run_x"):
                    await ask
            with pytest.raises(RunNotFound):
                await b.ops.get_events("run_x", 0, None)

    asyncio.run(main())


# --- at most once -------------------------------------------------------------------------------


def make_once(body: Any) -> Any:
    @step(semantics="at_most_once")
    async def te_pay() -> str:
        return str(await body())

    @workflow
    async def te_pays() -> str:
        try:
            return await te_pay()
        except Exception as exc:  # noqa: BLE001 - whatever comes is told
            return f"{type(exc).__name__}: {exc}"

    return te_pays, te_pay


def test_at_most_once_runs_once_and_is_never_tried_again() -> None:
    calls: list[int] = []

    async def body() -> str:
        calls.append(step_context().attempt)
        raise ConnectionError("reset")

    async def main() -> None:
        async with bench() as b:
            flow, _keep = make_once(body)
            run_id = await b.start(flow)
            assert await b.result(run_id) == "ConnectionError: reset"
            assert calls == [1]
            types = await b.types(run_id, observations=True)
            assert types.index("step.scheduled") < types.index("step.started")
            assert types.count("step.started") == 1

    asyncio.run(main())


def test_at_most_once_that_was_begun_by_a_lost_worker_is_interrupted() -> None:
    calls: list[int] = []

    async def body() -> str:
        calls.append(1)
        await asyncio.sleep(60)
        return "never"

    async def main() -> None:
        async with bench() as b:
            flow, _keep = make_once(body)
            run_id = await b.start(flow)
            await eventually(lambda: calls)
            await b.crash()
            await b.pass_time("31s")
            await b.work()
            assert (await b.result(run_id)).startswith("StepInterrupted: ")
            (failed,) = await b.events(run_id, "step.failed")
            assert failed.data["kind"] == "interrupted"
        assert calls == [1]

    asyncio.run(main())


def test_at_most_once_claimed_and_not_begun_by_a_lost_worker_runs() -> None:
    async def body() -> str:
        return "ran"

    async def main() -> None:
        async with bench() as b:
            flow, pay = make_once(body)
            await b.rest()
            run_id = await b.start(flow)
            del pay
            # Somebody takes the turn to the point where the step is owed, and the step itself.
            await b.work()
            assert await b.result(run_id) == "ran"

    asyncio.run(main())


def test_at_most_once_does_not_begin_with_less_than_half_its_lease() -> None:
    calls: list[int] = []

    async def body() -> str:
        calls.append(1)
        return "ran"

    class SlowAnswers(MemoryStorageBackend):
        """The answer to the start's commit takes longer than half a lease."""

        async def commit(self, changes: Any) -> Any:
            answers = await super().commit(changes)
            if any(c.settle and c.settle.keep for c in changes):
                await asyncio.sleep(0.35)
            return answers

    async def main() -> None:
        async with bench(SlowAnswers(), lease=0.6) as b:
            flow, _keep = make_once(body)
            run_id = await b.start(flow)
            await b.has(run_id, "step.started")
            await b.pass_time("1s")
            assert (await b.result(run_id)).startswith("StepInterrupted: ")
        assert calls == []

    asyncio.run(main())


# --- patched ------------------------------------------------------------------------------------


def make_patched(version: int) -> Any:
    @step
    async def te_say(what: str) -> str:
        return what

    @workflow
    async def te_versions() -> list[str]:
        said = [await te_say("one")]
        if version > 1:
            said.append(await te_say("early") if patched("early") else "late-comer")
        await sleep("1h")
        if version > 1 and patched("later"):
            said.append(await te_say("later"))
        else:
            said.append("old")
        if version > 1:
            said.append(str(patched("later")))
        await sleep("1h")
        return said

    return te_versions, te_say


def test_patched_decides_by_whether_the_run_passed_the_line_before_the_change() -> None:
    async def main() -> None:
        async with bench() as b:
            old = make_patched(1)
            run_id = await b.start(old[0])
            await b.asleep(run_id)
            new = make_patched(2)
            fresh = await b.start(new[0])
            await b.asleep(fresh)
            for count in (1, 2):
                await b.restart()
                await b.pass_time("1h")
                if count == 1:
                    for each in (run_id, fresh):
                        await b.has(each, "sleep.created", 2)
                        await b.asleep(each)
            assert await b.result(run_id) == ["one", "late-comer", "later", "True"]
            assert await b.result(fresh) == ["one", "early", "later", "True"]
            for each, ids in ((run_id, ["later"]), (fresh, ["early", "later"])):
                marked = await b.events(each, "version.marked")
                assert [e.data["id"] for e in marked] == ids
            del old

    asyncio.run(main())


def test_a_recorded_patch_needs_code_that_asks_for_it_until_it_is_deprecated() -> None:
    def make(version: int) -> Any:
        @step
        async def te_note(n: int) -> int:
            return n

        @workflow
        async def te_lives() -> list[int]:
            found = [await te_note(1)]
            if version == 3:
                deprecate_patch("extra")
            if version == 3 or (version == 2 and patched("extra")):
                found.append(await te_note(10))
            await sleep("1h")
            return found

        return te_lives, te_note

    async def main() -> None:
        async with bench() as b:
            second = make(2)
            marked, fresh = await b.start(second[0]), await b.start(second[0])
            await b.asleep(marked)
            await b.asleep(fresh)
            del second
            old = make(1)  # it does not know the patch: neither the old code, nor one without it
            await b.restart()
            await b.pass_time("1h")
            run = await b.until(marked, "stalled")
            assert "deprecate_patch('extra')" in str(run.stalled)
            del old
            third = make(3)
            await b.restart()
            await b.pass_time("1h")
            assert await b.result(marked) == [1, 10]
            assert await b.result(fresh) == [1, 10]
            new = await b.start(third[0])
            await b.asleep(new)
            assert await b.events(new, "version.marked") == []
            del third
            fourth = make(3)  # without a marker, nothing needs the line any more
            await b.restart()
            await b.pass_time("1h")
            assert await b.result(new) == [1, 10]
            del fourth

    asyncio.run(main())


def test_patched_is_false_for_the_whole_run_once_it_was_false() -> None:
    def make(version: int) -> Any:
        @workflow
        async def te_loops() -> list[str]:
            found: list[str] = []
            for _ in range(3):
                found.append("new" if version > 1 and patched("loop") else "old")
                await sleep("1h")
            return found

        return te_loops

    async def main() -> None:
        async with bench() as b:
            old = make(1)
            run_id = await b.start(old)
            await b.asleep(run_id)
            new = make(2)
            for count in (1, 2, 3):
                await b.restart()
                await b.pass_time("1h")
                if count < 3:
                    await b.has(run_id, "sleep.created", count + 1)
                    await b.asleep(run_id)
            assert await b.result(run_id) == ["old", "old", "old"]
            del old, new

    asyncio.run(main())


# --- deliver items ------------------------------------------------------------------------------


@workflow
async def te_sender() -> str:
    """Whose store items the tests write by hand."""
    return "sent"


@workflow
async def te_receiver() -> str:
    """Counts the cancels that it gets."""
    got = 0
    while True:
        try:
            await sleep("1d")
        except asyncio.CancelledError:
            got += 1
            if got == 2:
                return f"got {got}"


def started(workflow: str, seed: str = "ab" * 16) -> Event:
    data = {"workflow": workflow, "version": "1", "args": '{"args":[]}', "seed": seed}
    return Event("workflow.started", "I", data, None, "started")


def new_run(workflow: str, **others: Any) -> NewRun:
    return NewRun(workflow=workflow, version="1", args='{"args":[]}', **others)


async def owe(b: Bench, run_id: str, item_id: str, payload: Any, *, final: bool = False) -> None:
    """Create a run that owes something to another."""
    turn = Put(item_id="turn", kind=ItemKind.TURN)
    message = Put(item_id=item_id, kind=ItemKind.DELIVER, payload=payload)
    await b.storage.commit_one(
        Change(
            run_id=run_id,
            key=f"start:{run_id}",
            create=new_run("te_sender"),
            events=[started("te_sender")],
            put=[message] if final else [turn, message],
        )
    )


def test_a_deliver_item_gives_another_run_an_input_exactly_once() -> None:
    async def main() -> None:
        async with bench() as b:
            to = await b.start(te_receiver)
            await b.asleep(to)
            payload = event_payload(to, "cancel.requested", {"reason": "by message"})
            await owe(b, "a", "deliver:1", payload)
            await b.has(to, "cancel.requested")
            await b.until("a", "completed")

            async def settled() -> bool:
                return await b.items("a") == {}

            await eventually(settled)
            # A delivery that a crash repeats finds its key.
            await owe(b, "b", "deliver:1", payload)
            await b.has(to, "cancel.requested", 2)
            (first, second) = await b.events(to, "cancel.requested")
            assert first.key != second.key
            assert await b.result(to) == "got 2"

    asyncio.run(main())


def test_a_repeated_delivery_is_recognised_by_its_key() -> None:
    class LosesSettles(MemoryStorageBackend):
        """The settle of a delivery never arrives, once."""

        lost = 0

        async def commit(self, changes: Any) -> Any:
            if not self.lost and any(
                c.claim and c.claim.item_id.startswith("deliver") for c in changes
            ):
                self.lost += 1
                from pyworkflow.errors import StorageError

                raise StorageError("the process died here")
            return await super().commit(changes)

    async def main() -> None:
        store = LosesSettles()
        async with bench(store) as b:
            to = await b.start(te_receiver)
            await b.asleep(to)
            await owe(b, "a", "deliver:1", event_payload(to, "cancel.requested", {"reason": ""}))
            await b.has(to, "cancel.requested")
            await eventually(lambda: store.lost)
            assert "deliver:1" in await b.items("a")
            await b.pass_time("31s")

            async def settled() -> bool:
                return "deliver:1" not in await b.items("a")

            await eventually(settled)
            assert len(await b.events(to, "cancel.requested")) == 1

    asyncio.run(main())


def test_a_deliver_item_starts_another_run_once_and_outlives_its_own() -> None:
    async def main() -> None:
        async with bench(work=False) as b:
            parent = ParentRef(run_id="p", op="1#1:child")
            payload = run_payload(
                "child-1", new_run("te_sender", parent=parent, root="p"), started("te_sender").data
            )
            await owe(b, "p", "deliver:child", payload)
            # The parent ends before its message is carried out.
            claimed = await b.storage.claim(
                ClaimRequest(owner="o", lease=LEASE, kinds=frozenset({ItemKind.TURN}))
            )
            (claim,) = claimed.claims
            await b.storage.commit_one(
                Change(
                    run_id="p",
                    key=f"{claim.ref.token}:1",
                    claim=claim.ref,
                    seen=1,
                    final=RunStatus.COMPLETED,
                    update=Update(result='"early"'),
                    events=[Event("workflow.completed", "C", {"result": '"early"'})],
                )
            )
            assert set(await b.items("p")) == {"deliver:child"}
            await b.work()
            await eventually(lambda: b.storage.get_run("child-1"))
            assert await b.result("child-1") == "sent"
            child = await b.get("child-1")
            assert child.parent == parent

            async def settled() -> bool:
                return await b.items("p") == {}

            await eventually(settled)

    asyncio.run(main())


def test_deliveries_to_nobody_and_to_a_taken_id_are_dropped_with_words(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> None:
        async with bench() as b:
            taken = await b.start(te_receiver)
            await owe(b, "a", "deliver:1", event_payload("nobody", "cancel.requested", {}))
            other = new_run("te_sender", parent=ParentRef(run_id="b", op="1#1:child"))
            await owe(b, "b", "deliver:1", run_payload(taken, other, started("te_sender").data))

            async def settled() -> bool:
                return await b.items("a") == {} == await b.items("b")

            await eventually(settled)
            await b.rest()

    with caplog.at_level(logging.WARNING, "pyworkflow.engine"):
        asyncio.run(main())
    assert any("to=nobody" in r.getMessage() for r in caplog.records)
    assert any("somebody else's" in r.getMessage() for r in caplog.records)


def test_a_delivery_follows_the_chain_of_a_continued_run() -> None:
    async def main() -> None:
        async with bench() as b:
            to = await b.start(te_receiver)
            await b.asleep(to)
            await b.rest()
            await b.storage.commit_one(
                Change(
                    run_id="old",
                    key="start:old",
                    create=new_run("te_sender"),
                    events=[started("te_sender")],
                    put=[Put(item_id="turn", kind=ItemKind.TURN)],
                )
            )
            claimed = await b.storage.claim(
                ClaimRequest(owner="o", lease=LEASE, items=[("old", "turn")])
            )
            (claim,) = claimed.claims
            await b.storage.commit_one(
                Change(
                    run_id="old",
                    key=f"{claim.ref.token}:1",
                    claim=claim.ref,
                    seen=1,
                    final=RunStatus.CONTINUED,
                    update=Update(next=to),
                    events=[Event("workflow.continued", "C", {"next": to})],
                )
            )
            await b.work()
            await owe(b, "a", "deliver:1", event_payload("old", "cancel.requested", {"reason": ""}))
            await b.has(to, "cancel.requested")

    asyncio.run(main())


# --- steps: timeouts, hand-off, limits ----------------------------------------------------------


def test_the_next_try_of_a_sync_step_waits_for_the_thread_of_the_last() -> None:
    running = itertools.count()
    beside: list[int] = []
    lock = threading.Lock()
    free = threading.Event()
    tries: list[int] = []

    @step(timeout="50ms", retry_delay=0, max_retries=2)
    def te_stuck() -> str:
        tries.append(next(running))
        assert lock.acquire(blocking=False), beside.append(1)
        try:
            if len(tries) == 1:
                free.wait(15)
        finally:
            lock.release()
        return "unstuck"

    @workflow
    async def te_sticks() -> str:
        return await te_stuck()

    async def main() -> None:
        async with bench() as b:
            run_id = await b.start(te_sticks)
            await b.has(run_id, "step.scheduled")
            assert tries == [0]
            free.set()
            assert await b.result(run_id) == "unstuck"
            assert (len(tries), beside) == (2, [])

    asyncio.run(main())


def test_a_step_that_takes_long_is_handed_off_so_that_nothing_waits_for_it() -> None:
    free = asyncio.Event

    async def main() -> None:
        gate = free()
        order: list[str] = []

        @step
        async def te_long() -> str:
            await gate.wait()
            return "long"

        @step
        async def te_short(n: int) -> int:
            order.append(f"short {n}")
            return n

        @workflow
        async def te_race() -> list[Any]:
            async def chain() -> list[int]:
                return [await te_short(n) for n in range(3)]

            async def impatient() -> str:
                try:
                    async with asyncio.timeout(3600):
                        await asyncio.Event().wait()
                except TimeoutError:
                    return "timer"
                return "?"

            return list(await asyncio.gather(te_long(), chain(), impatient()))

        async with bench() as b:
            run_id = await b.start(te_race)
            await b.has(run_id, "step.scheduled")
            items = await b.items(run_id)
            assert items["step:1.1#1:step"].lease is not None
            await eventually(lambda: len(order) == 3)
            await b.pass_time("1h")
            await b.has(run_id, "timer.fired")  # while the step still runs
            gate.set()
            assert await b.result(run_id) == ["long", [0, 1, 2], "timer"]
            assert len(await b.events(run_id, "step.scheduled")) == 1

    asyncio.run(main())


def test_a_short_step_is_two_events_and_no_item() -> None:
    @step
    async def te_tiny() -> int:
        return 1

    @workflow
    async def te_two() -> int:
        return await te_tiny() + await te_tiny()

    async def main() -> None:
        async with bench() as b:
            run_id = await b.start(te_two)
            assert await b.result(run_id) == 2
            assert await b.types(run_id, observations=True) == [
                "workflow.started",
                "step.started", "step.completed",
                "step.started", "step.completed",
                "workflow.completed",
            ]  # fmt: skip

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["async", "sync"])
def test_no_more_steps_run_at_once_than_the_settings_say(kind: str) -> None:
    now_running = 0
    peak = 0
    lock = threading.Lock()
    full = threading.Event()

    def enter() -> None:
        nonlocal now_running, peak
        with lock:
            now_running += 1
            peak = max(peak, now_running)
            if now_running == 3:
                full.set()

    def leave() -> None:
        nonlocal now_running
        with lock:
            now_running -= 1

    @step
    async def te_limited_async(n: int) -> int:
        enter()
        await asyncio.sleep(0.005)
        leave()
        return n

    @step
    def te_limited_sync(n: int) -> int:
        enter()
        full.wait(5)
        leave()
        return n

    work = te_limited_async if kind == "async" else te_limited_sync

    @workflow
    async def te_wide() -> int:
        return sum(await asyncio.gather(*(work(n) for n in range(20))))

    async def main() -> None:
        async with bench(concurrency=3, threads=3) as b:
            ids = [await b.start(te_wide) for _ in range(3)]
            for run_id in ids:
                assert await b.result(run_id) == 190
        assert peak == 3

    asyncio.run(main())


def test_a_claim_is_renewed_while_a_step_outlives_its_lease() -> None:
    calls: list[int] = []

    @step
    async def te_outlives() -> str:
        calls.append(1)
        await asyncio.sleep(1.0)
        return "kept"

    @workflow
    async def te_kept() -> str:
        return await te_outlives()

    async def main() -> None:
        store = MemoryStorageBackend()
        async with bench(store, lease=0.4) as b, bench(store.clone(), lease=0.4):
            assert await b.run(te_kept) == "kept"
        assert calls == [1]

    asyncio.run(main())


# --- max_duration -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cleanup", "ends", "outcome"),
    [
        ("10s", "raise", WorkflowTimeout),
        ("10s", "return", "cleaned"),
        ("5m", "raise", WorkflowTimeout),
    ],
)
def test_max_duration_cancels_and_gives_a_grace_period(
    cleanup: str, ends: str, outcome: Any
) -> None:
    @workflow(max_duration="1h")
    async def te_overtime(cleanup: str, ends: str) -> str:
        try:
            await sleep("1d")
        except asyncio.CancelledError:
            await sleep(cleanup)
            if ends == "raise":
                raise
        return "cleaned"

    async def main() -> None:
        async with bench() as b:
            run_id = await b.start(te_overtime, cleanup, ends)
            await b.asleep(run_id)
            await b.restart()
            await b.pass_time("1h")
            await b.has(run_id, "sleep.created", 2)
            await b.asleep(run_id)
            await b.pass_time("61s")
            if outcome == "cleaned":
                assert await b.result(run_id) == "cleaned"
            else:
                with pytest.raises(outcome, match=run_id):
                    await b.result(run_id)
                assert (await b.get(run_id)).status == "failed"

    asyncio.run(main())


# --- stalls -------------------------------------------------------------------------------------


def test_a_turn_claimed_ten_times_without_progress_stalls_as_poison_and_heals() -> None:
    began: list[int] = []

    @workflow
    async def te_poison() -> str:
        began.append(1)
        return "fine after all"

    async def main() -> None:
        async with bench(work=False) as b:
            run_id = await b.start(te_poison)
            innocent = await b.start(te_sender)
            for n in range(10):  # ten workers died of it
                claimed = await b.storage.claim(
                    ClaimRequest(owner=f"w{n}", lease=LEASE, items=[(run_id, "turn")])
                )
                assert len(claimed.claims) == 1
                await b.pass_time("31s")
            await b.work()
            run = await b.until(run_id, "stalled")
            assert run.stalled is not None
            assert "poison" in run.stalled
            assert "10 times" in run.stalled or "11 times" in run.stalled
            assert began == []
            assert await b.result(innocent) == "sent"
            await b.pass_time("1h")
            assert await b.result(run_id) == "fine after all"
            assert len(await b.events(run_id, "workflow.stalled")) == 1

    asyncio.run(main())


def test_turns_that_deliver_inputs_and_record_nothing_are_no_poison() -> None:
    @workflow
    async def te_patient() -> int:
        got = 0
        while got < 13:
            try:
                await asyncio.sleep(86_400)
            except asyncio.CancelledError:
                got += 1
        return got

    async def main() -> None:
        async with bench() as b:
            run_id = await b.start(te_patient)
            for n in range(13):
                await b.asleep(run_id)
                seen = (await b.get(run_id)).seen_seq
                await b.ops.cancel(run_id, str(n))

                async def delivered(seen: int = seen) -> bool:
                    return (await b.get(run_id)).seen_seq > seen

                await eventually(delivered)
            assert await b.result(run_id) == 13

    asyncio.run(main())


def test_a_step_may_be_tried_more_often_than_a_worker_may_die_of_it() -> None:
    @step(max_retries=8, retry_delay=0, queue="default")
    async def te_often() -> int:
        if step_context().attempt < 9:
            raise OSError
        return step_context().attempt

    @workflow
    async def te_tries() -> int:
        return await te_often()

    async def main() -> None:
        async with bench() as b:
            assert await b.run(te_tries) == 9

    asyncio.run(main())


def test_a_step_whose_worker_disappears_three_times_fails_with_worker_lost() -> None:
    calls: list[int] = []

    @step(queue="default")
    async def te_deadly() -> None:
        calls.append(1)
        await asyncio.sleep(60)

    @workflow
    async def te_survives() -> str:
        try:
            await te_deadly()
        except Exception as exc:  # noqa: BLE001 - whatever comes is told
            return type(exc).__name__
        return "?"

    async def main() -> None:
        async with bench() as b:
            run_id = await b.start(te_survives)
            for n in range(1, 4):
                await eventually(lambda n=n: len(calls) == n)
                await b.crash()
                await b.pass_time("31s")
                await b.work()
            assert await b.result(run_id) == "WorkerLost"
            (failed,) = await b.events(run_id, "step.failed")
            assert failed.data["kind"] == "worker_lost"
        assert len(calls) == 3

    asyncio.run(main())


def test_steps_beside_one_that_takes_the_worker_down_are_not_blamed() -> None:
    async def main() -> None:
        deaths: list[int] = []
        died = asyncio.Event()

        @step(queue="default")
        async def te_culprit() -> str:
            deaths.append(1)
            died.set()
            await asyncio.sleep(60)
            return "?"

        @step(queue="default")
        async def te_bystander(n: int) -> str:
            await asyncio.sleep(0.05)
            return f"fine {n}"

        @workflow
        async def te_crowd() -> list[str]:
            async def told(work: Any) -> str:
                try:
                    return str(await work)
                except Exception as exc:  # noqa: BLE001 - whatever comes is told
                    return type(exc).__name__

            works = [te_bystander(0), te_culprit(), te_bystander(1), te_bystander(2)]
            return list(await asyncio.gather(*map(told, works)))

        async with bench() as b:
            run_id = await b.start(te_crowd)
            for _ in range(3):
                await asyncio.wait_for(died.wait(), 60)
                died.clear()
                await b.crash()
                await b.pass_time("31s")
                await b.work()
            assert await b.result(run_id) == ["fine 0", "WorkerLost", "fine 1", "fine 2"]
        assert len(deaths) == 3

    asyncio.run(main())


def test_a_busy_loop_stalls_its_run_and_not_the_worker() -> None:
    def make(busy: bool) -> Any:
        @workflow
        async def te_busy() -> str:
            while busy:  # noqa: ASYNC110 - the very thing under test
                await asyncio.sleep(0)
            return "calm"

        return te_busy

    async def main() -> None:
        async with bench() as b:
            busy = make(busy=True)
            run_id = await b.start(busy)
            run = await b.until(run_id, "stalled")
            assert "busy loop" in str(run.stalled)
            assert await b.run(te_sender) == "sent"
            calm = make(busy=False)
            await b.pass_time("30s")
            assert await b.result(run_id) == "calm"
            del busy, calm

    asyncio.run(main())


def test_code_that_blocks_is_interrupted_and_its_run_stalls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shared_guard(), "_limit", 0.2)

    def make(blocks: bool) -> Any:
        @workflow
        async def te_blocking() -> str:
            try:
                while blocks:
                    pass
            except BaseException:  # noqa: BLE001 - even so
                await asyncio.sleep(0)
                return "swallowed"
            return "calm"

        return te_blocking

    async def main() -> None:
        async with bench() as b:
            blocking = make(blocks=True)
            run_id = await b.start(blocking)
            run = await b.until(run_id, "stalled")
            assert "blocked" in str(run.stalled)
            assert await b.run(te_sender) == "sent"
            calm = make(blocks=False)
            await b.pass_time("30s")
            assert await b.result(run_id) == "calm"
            del blocking, calm

    asyncio.run(main())


@pytest.mark.parametrize("place", ["decode_result", "encode_result"])
def test_a_value_that_takes_too_long_to_read_or_write_stalls_the_run_and_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setattr(shared_guard(), "_limit", 0.2)

    @step
    async def te_made() -> str:
        return "made"

    @workflow
    async def te_hands_on() -> str:
        return await te_made()

    async def main() -> None:
        async with bench() as b:
            of = Step if place == "decode_result" else Workflow
            real: Any = getattr(of, place)
            with monkeypatch.context() as patch:
                patch.setattr(of, place, _forever)
                run_id = await b.start(te_hands_on)
                run = await b.until(run_id, "stalled")
                assert "blocked" in str(run.stalled)
                patch.setattr(of, place, real)
            await b.pass_time("30s")
            assert await b.result(run_id) == "made"

    asyncio.run(main())


def _forever(*args: object) -> None:
    while True:
        pass


def test_an_interruption_that_a_destructor_swallows_is_followed_by_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shared_guard(), "_limit", 0.2)
    swallowed: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", swallowed.append)

    class Slow:
        __del__ = _forever

    @workflow
    async def te_destroys() -> None:
        Slow()
        _forever()

    async def main() -> None:
        async with bench() as b:
            await b.until(await b.start(te_destroys), "stalled")
            assert len(swallowed) == 1

    asyncio.run(main())


def test_a_history_that_reaches_its_limit_fails_the_run() -> None:
    @step
    async def te_count(n: int) -> int:
        return n

    @workflow
    async def te_endless() -> None:
        for n in itertools.count():
            try:
                await te_count(n)
            except Exception:  # noqa: BLE001 - nothing helps
                pass

    async def main() -> None:
        async with bench(max_history=60) as b:
            run_id = await b.start(te_endless)
            with pytest.raises(HistoryTooLong) as caught:
                await b.result(run_id)
            assert caught.value.limit == 60
            assert 60 <= caught.value.length < 70
            assert (await b.get(run_id)).history_length < 75

    asyncio.run(main())


def test_a_history_that_grows_by_sleeps_alone_reaches_its_limit_too() -> None:
    @workflow
    async def te_sleeper() -> None:
        while True:  # noqa: ASYNC110 - the history shall grow
            await asyncio.sleep(3600)

    async def main() -> None:
        async with bench(max_history=20, sessions=0) as b:
            run_id = await b.start(te_sleeper)
            while not (await b.get(run_id)).status.is_terminal:
                length = (await b.get(run_id)).history_length
                assert length < 40
                await b.until(run_id, "suspended", "failed")
                await b.pass_time("1h")

                async def moved(length: int = length) -> bool:
                    run = await b.get(run_id)
                    return run.history_length > length or run.status.is_terminal

                await eventually(moved)
            with pytest.raises(HistoryTooLong):
                await b.result(run_id)

    asyncio.run(main())


def test_an_unknown_workflow_waits_for_a_worker_that_has_it() -> None:
    async def main() -> None:
        async with bench() as b:
            await b.storage.commit_one(
                Change(
                    run_id="later",
                    key="start:later",
                    create=new_run("te_defined_later"),
                    events=[started("te_defined_later")],
                    put=[Put(item_id="turn", kind=ItemKind.TURN)],
                )
            )
            assert await b.run(te_sender) == "sent"
            turn = (await b.items("later"))["turn"]
            assert (turn.claims, turn.lease) == (0, None)

            @workflow
            async def te_defined_later() -> str:
                return "found"

            assert await b.result("later") == "found"

    asyncio.run(main())


# --- workers and stores -------------------------------------------------------------------------


def test_drain_lets_steps_end_and_gives_back_what_does_not() -> None:
    async def main() -> None:
        gate = asyncio.Event()
        seen: Counter[str] = Counter()

        @step
        async def te_ends() -> str:
            await gate.wait()
            seen["ended"] += 1
            return "ended"

        @step
        async def te_stays() -> str:
            seen["stays"] += 1
            if seen["stays"] == 1:
                await asyncio.sleep(60)
            return "stayed"

        @workflow
        async def te_both() -> list[str]:
            return list(await asyncio.gather(te_ends(), te_stays()))

        async with bench() as b:
            run_id = await b.start(te_both)
            await b.has(run_id, "step.scheduled", 2)
            worker = b.worker
            assert worker is not None
            draining = asyncio.create_task(worker.drain(0.5))
            gate.set()
            await draining
            assert seen == {"ended": 1, "stays": 1}
            items = await b.items(run_id)
            stays = items["step:1.2#1:step"]
            assert (stays.lease, stays.claims) == (None, 0)
            assert all(i.lease is None for i in items.values())
            await worker.close()
            b.worker = None
            await b.work()
            assert await b.result(run_id) == ["ended", "stayed"]
            assert seen == {"ended": 1, "stays": 2}

    asyncio.run(main())


def test_what_the_code_asked_for_during_a_drain_is_asked_again_by_the_next_worker() -> None:
    # A log line and a patch are recorded with the inputs that led to them. A draining worker
    # begins nothing more and forgets what was asked: it must not call these inputs seen.
    async def main() -> None:
        first, other = asyncio.Event(), asyncio.Event()

        @step
        async def te_first() -> None:
            await first.wait()

        @step
        async def te_other() -> None:
            await other.wait()

        @step
        async def te_then() -> str:
            return "new"

        @workflow
        async def te_drained() -> list[Any]:
            async def branch() -> str:
                await te_first()
                logger.info("first is over")
                return await te_then() if patched("then") else "old"

            return list(await asyncio.gather(branch(), te_other()))

        async with bench() as b:
            run_id = await b.start(te_drained)
            worker = b.worker
            assert worker is not None
            await eventually(lambda: worker.leases.held())
            draining = asyncio.create_task(worker.drain(15))
            await asyncio.sleep(0)
            first.set()
            await b.has(run_id, "step.completed")
            other.set()
            await draining
            await b.restart()
            assert await b.result(run_id) == ["new", None]
            assert len(await b.events(run_id, "log.info")) == 1
            assert len(await b.events(run_id, "version.marked")) == 1

    asyncio.run(main())


def test_drain_takes_no_further_step() -> None:
    calls: Counter[int] = Counter()

    @step
    async def te_link(n: int) -> int:
        calls[n] += 1
        await asyncio.sleep(0.002)
        return n

    @workflow
    async def te_chain() -> int:
        return sum([await te_link(n) for n in range(300)])

    async def main() -> None:
        async with bench() as b:
            run_id = await b.start(te_chain)
            await eventually(lambda: calls[5])
            worker = b.worker
            assert worker is not None
            await worker.drain(30)
            assert len(calls) < 50
            assert all(i.lease is None for i in (await b.items(run_id)).values())
            await worker.close()
            b.worker = None
            await b.work()
            assert await b.result(run_id) == 44_850
        assert set(calls.values()) == {1}

    asyncio.run(main())


class Shaky(MemoryStorageBackend):
    """Every third batch is not answered: half of these were written all the same."""

    calls = 0

    async def commit(self, changes: Any) -> Any:
        self.calls += 1
        if self.calls % 6 == 0:
            await super().commit(changes)
        if self.calls % 3 == 0:
            raise StorageUnavailable("no answer")
        return await super().commit(changes)


def test_commits_without_answer_are_sent_again_and_count_once() -> None:
    calls: Counter[int] = Counter()

    @step
    async def te_numbered(n: int) -> int:
        calls[n] += 1
        return n

    @workflow
    async def te_through_it(base: int) -> int:
        total = 0
        for n in range(6):
            total += await te_numbered(base + n)
        return total + sum(await asyncio.gather(*(te_numbered(base + n) for n in (10, 11))))

    async def main() -> None:
        async with bench(Shaky()) as b:
            ids = [await b.start(te_through_it, base) for base in (100, 200, 300)]
            assert [await b.result(i) for i in ids] == [836, 1636, 2436]
            for run_id in ids:
                events = await b.events(run_id)
                assert [e.seq for e in events] == list(range(1, len(events) + 1))
        assert set(calls.values()) == {1}

    asyncio.run(main())


def test_a_worker_that_lost_its_claim_stops_and_writes_nothing() -> None:
    async def main() -> None:
        gate = asyncio.Event()
        calls: list[str] = []

        @step
        async def te_zombie() -> str:
            calls.append("run")
            if len(calls) == 1:
                await gate.wait()
                return "zombie"
            return "fresh"

        @workflow
        async def te_fenced() -> str:
            return await te_zombie()

        store = MemoryStorageBackend()
        async with bench(store) as first, bench(store.clone(), work=False) as second:
            run_id = await first.start(te_fenced)
            await first.has(run_id, "step.scheduled")
            assert first.worker is not None
            first.worker._stopping = True  # it is paused, and comes back too late
            first.worker.leases.close()
            await first.pass_time("31s")
            await second.work()
            assert await second.result(run_id) == "fresh"
            before = await second.events(run_id)
            gate.set()
            paused = first.worker
            await eventually(lambda: not paused.is_busy)
            assert await second.events(run_id) == before

    asyncio.run(main())


def test_f14_a_late_result_is_refused_while_the_run_goes_on_elsewhere() -> None:
    async def main() -> None:
        gates = [asyncio.Event(), asyncio.Event()]
        calls = itertools.count()

        @step
        async def te_twice() -> str:
            number = next(calls)
            await gates[number].wait()
            return ("late", "fresh")[number]

        @workflow
        async def te_goes_on() -> str:
            return await te_twice()

        store = MemoryStorageBackend()
        async with bench(store) as first, bench(store.clone(), work=False) as second:
            run_id = await first.start(te_goes_on)
            await first.has(run_id, "step.scheduled")
            paused = first.worker
            assert paused is not None
            paused._stopping = True  # it is paused, and comes back too late
            paused.leases.close()
            await first.pass_time("31s")
            await second.work()
            await second.has(run_id, "step.started", 2)
            gates[0].set()
            await eventually(lambda: not paused.is_busy)
            assert await second.events(run_id, "step.completed") == []
            gates[1].set()
            assert await second.result(run_id) == "fresh"
            assert len(await second.events(run_id, "step.completed")) == 1

    asyncio.run(main())


@pytest.mark.parametrize("sessions", [0, 1, 1000])
def test_coroutines_kept_or_not_make_no_difference(sessions: int) -> None:
    async def main() -> None:
        @step
        async def te_echo(n: int) -> int:
            return n

        @workflow
        async def te_often_asleep(n: int) -> list[Any]:
            found: list[Any] = []
            for k in range(3):
                found.append(await te_echo(n * 10 + k))
                await sleep("1h")
                found.append(int(now().timestamp()) > 0)
            return found

        async with bench(sessions=sessions) as b:
            ids = [await b.start(te_often_asleep, n) for n in range(5)]
            for count in (1, 2, 3):
                for run_id in ids:
                    await b.has(run_id, "sleep.created", count)
                    await b.asleep(run_id)
                await b.pass_time("1h")
            for n, run_id in enumerate(ids):
                assert await b.result(run_id) == [n * 10, True, n * 10 + 1, True, n * 10 + 2, True]
                resumed = await b.events(run_id, "workflow.resumed")
                assert len(resumed) == 3

    asyncio.run(main())


def test_a_paused_run_goes_on_only_when_it_is_let() -> None:
    from pyworkflow.spi import Control, ControlKind

    async def main() -> None:
        @workflow
        async def te_paused() -> str:
            await sleep("1h")
            return "woken"

        def control(kind: ControlKind) -> Change:
            return Change(run_id=run_id, key=f"control:{kind}", control=Control(kind))

        async with bench() as b:
            run_id = await b.start(te_paused)
            await b.asleep(run_id)
            await b.storage.commit_one(control(ControlKind.PAUSE))
            await b.pass_time("2h")
            assert await b.run(te_sender) == "sent"
            assert (await b.get(run_id)).status == "paused"
            await b.storage.commit_one(control(ControlKind.UNPAUSE))
            assert await b.result(run_id) == "woken"

    asyncio.run(main())


def test_a_run_paused_while_its_steps_run_keeps_their_results() -> None:
    from pyworkflow.spi import Control, ControlKind

    async def main() -> None:
        gate = asyncio.Event()
        calls: Counter[str] = Counter()

        @step
        async def te_gated(name: str) -> str:
            calls[name] += 1
            await gate.wait()
            return name

        @step
        async def te_next(n: int) -> int:
            calls["next"] += 1
            await asyncio.sleep(0.002)
            return n

        @workflow
        async def te_paused_in_the_middle() -> list[Any]:
            async def chain() -> int:
                total = 0
                for n in range(50):
                    total += await te_next(n)
                return total

            return list(await asyncio.gather(te_gated("a"), te_gated("b"), chain()))

        async with bench() as b:
            run_id = await b.start(te_paused_in_the_middle)
            await eventually(lambda: calls["next"] > 3)
            await b.storage.commit_one(
                Change(run_id=run_id, key="control:1", control=Control(ControlKind.PAUSE))
            )
            await b.until(run_id, "paused")
            await eventually(lambda: b.worker is not None and not b.worker._turns)
            at_pause = calls["next"]
            assert at_pause < 50
            gate.set()

            async def both() -> bool:
                done = await b.events(run_id, "step.completed")
                return sum(e.data["name"] == "te_gated" for e in done) == 2

            await eventually(both)
            assert calls["next"] == at_pause
            await b.storage.commit_one(
                Change(run_id=run_id, key="control:2", control=Control(ControlKind.UNPAUSE))
            )
            assert await b.result(run_id) == ["a", "b", 1225]
            assert (calls["a"], calls["b"]) == (1, 1)
            # What was cut off by the pause may have been begun once more.
            assert calls["next"] <= 51

    asyncio.run(main())


def test_terminate_ends_a_run_whatever_it_does() -> None:
    from pyworkflow import RunTerminated
    from pyworkflow.spi import Control, ControlKind

    async def main() -> None:
        ended = asyncio.Event()

        @step
        async def te_endless_step() -> None:
            try:
                await asyncio.sleep(60)
            finally:
                ended.set()

        @workflow
        async def te_terminated() -> None:
            await te_endless_step()

        async with bench(lease=0.6) as b:
            run_id = await b.start(te_terminated)
            await b.has(run_id, "step.started")
            await b.storage.commit_one(
                Change(
                    run_id=run_id,
                    key="terminate:1",
                    control=Control(ControlKind.TERMINATE, "operator"),
                    final=RunStatus.TERMINATED,
                    events=[Event("workflow.terminated", "O", {"reason": "operator"})],
                )
            )
            with pytest.raises(RunTerminated):
                await b.result(run_id)
            # The step's claim is over: renewal finds out, and ends it.
            await asyncio.wait_for(ended.wait(), 10)

    asyncio.run(main())


def test_the_result_of_a_run_that_is_worked_on_here_is_read_once() -> None:
    class Counting(MemoryStorageBackend):
        reads = 0

        async def get_run(self, run_id: str) -> Run | None:
            self.reads += 1
            return await super().get_run(run_id)

        async def watch(self, run_id: str | None, *, after: int, timeout: timedelta) -> bool:
            self.reads += run_id is not None
            return await super().watch(run_id, after=after, timeout=timeout)

    async def main() -> None:
        storage = Counting()
        async with bench(storage) as b:
            assert await b.run(te_sender) == "sent"
            assert storage.reads == 1

    asyncio.run(main())


def test_settle_and_claim_of_somebody_else_do_not_confuse_a_session() -> None:
    async def main() -> None:
        async with bench(work=False) as b:
            run_id = await b.start(te_sender)
            claimed = await b.storage.claim(ClaimRequest(owner="o", lease=LEASE))
            (claim,) = claimed.claims
            await b.pass_time("31s")
            await b.work()
            assert await b.result(run_id) == "sent"
            ref = ClaimRef(run_id, "turn", claim.ref.token)
            with pytest.raises(RunClosed):
                await b.storage.commit_one(
                    Change(run_id=run_id, key="x", claim=ref, seen=1, settle=Settle())
                )

    asyncio.run(main())


def test_workflow_errors_of_every_kind_fail_the_run_and_not_the_worker() -> None:
    async def main() -> None:
        @workflow
        async def te_raises(kind: str) -> None:
            match kind:
                case "value":
                    raise ValueError("v")
                case "exit":
                    raise SystemExit(3)
                case "group":
                    async with asyncio.TaskGroup() as group:
                        group.create_task(_fails())
                case "lookup":
                    raise RunNotFound("some run")

        async def _fails() -> None:
            raise KeyError("k")

        async with bench() as b:
            for kind, expected in (
                ("value", ValueError),
                ("exit", StepError),
                ("group", ExceptionGroup),
                ("lookup", RunNotFound),
            ):
                run_id = await b.start(te_raises, kind)
                with pytest.raises(expected):
                    await b.result(run_id)
                assert (await b.get(run_id)).status == "failed"

    asyncio.run(main())


@pytest.mark.parametrize("heals", [True, False])
def test_a_fault_of_the_engine_is_tried_again_after_pauses_and_then_stalls_the_run(
    heals: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults: list[str] = []

    def broken(self: Any) -> Any:
        if not faulty:
            return finish(self)
        faults.append(self._run.run_id)
        raise LookupError("a fault of the engine")

    faulty = [True]
    finish = Session._finish
    monkeypatch.setattr(Session, "_finish", broken)

    @workflow
    async def te_faulty() -> str:
        return "done"

    async def main() -> None:
        async with bench() as b:
            worker = b.worker
            assert worker is not None

            async def faults_are(number: int) -> None:
                await eventually(lambda: len(faults) == number and not worker.is_busy)

            run_id = await b.start(te_faulty)
            for number, pause in ((1, 1.1), (2, 2.1)):
                await faults_are(number)
                assert (await b.get(run_id)).status != "stalled"
                await b.pass_time(pause)
            await faults_are(3)
            assert (await b.get(run_id)).stalled == "LookupError: a fault of the engine"
            if not heals:
                await b.pass_time(4.1)
                await faults_are(4)
                assert len(await b.events(run_id, "workflow.stalled")) == 1
            faulty.clear()
            await b.pass_time(8.1)
            assert await b.result(run_id) == "done"
            assert len(faults) == 3 + (not heals)

    asyncio.run(main())


def test_an_exception_that_cannot_be_shown_is_warned_of_by_its_type(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Unshown(Exception):
        def __repr__(self) -> str:
            raise LookupError("no text")

    def raises() -> None:
        raise Unshown

    @workflow
    async def te_raises_in_a_callback() -> str:
        asyncio.get_running_loop().call_soon(raises)
        await asyncio.sleep(0)
        return "done"

    async def main() -> None:
        async with bench() as b:
            assert await b.run(te_raises_in_a_callback) == "done"

    asyncio.run(main())
    assert any(": Unshown run_id=" in r.getMessage() for r in caplog.records)
