"""Scenarios that break a durable engine, each a test by its number.

Elsewhere: 13, 14, 15, 28, 29, 36 and the storage halves of 1, 3, 4, 6, 9, 18 and 27 are rules of the
contract (conformance suite, ``test_reference.py``); 16 belongs to the file backend; 11 and 34 are
pinned by ``test_ops_table.py`` and ``test_golden.py``; 35 by ``test_logging.py`` and below.
Not yet: 19 (hooks), 27 a, b, e (children, continue-as-new), 30 (doorbells across processes: Celery),
31 as far as signals go. The `hard_timeout` of 32 is with Celery. 37 is a list of what was left out;
38 to 40 say what newcomers try: `test_bad_input.py` and the refusals below.
"""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import textwrap
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from pyworkflow import (
    StepError,
    WorkflowContextError,
    is_evicting,
    is_replaying,
    logger,
    now,
    patched,
    random,
    sleep,
    step,
    uuid4,
    workflow,
)
from pyworkflow._engine.deliver import event_payload
from pyworkflow._engine.guard import shared_guard
from pyworkflow._replay.commands import RunStep
from pyworkflow._replay.loop import WorkflowTask
from pyworkflow._replay.replay import Replay
from pyworkflow.runs import ItemKind
from pyworkflow.spi import Change, ClaimRequest, Control, ControlKind, Event, NewRun, Put, RunStatus
from pyworkflow.spi.storage import Update
from pyworkflow.storage.memory import MemoryStorageBackend
from tests.core._driving import bench, eventually

LEASE = timedelta(seconds=30)


class Spied(MemoryStorageBackend):
    """Remembers the changes that were sent, in order, and lets a test act between them."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[Change] = []
        self.before: Any = None

    async def commit(self, changes: Any) -> Any:
        if self.before is not None:
            await self.before(changes)
        self.sent.extend(changes)
        return await super().commit(changes)


def cancel(run_id: str, key: str = "cancel:test") -> Change:
    return Change(
        run_id=run_id,
        key=key,
        events=[Event("cancel.requested", "I", {"reason": key}, None, key)],
    )


# --- 1 to 10 ------------------------------------------------------------------------------------


def test_h01_a_message_of_an_ended_run_is_still_delivered() -> None:
    @workflow
    async def h01_listener() -> str:
        try:
            await sleep("1d")
        except asyncio.CancelledError:
            return "heard"
        return "?"

    async def main() -> None:
        async with bench() as b:
            to = await b.start(h01_listener)
            await b.asleep(to)
            await b.rest()
            payload = event_payload(to, "cancel.requested", {"reason": ""})
            started = {"workflow": "h01_x", "version": "1", "args": '{"args":[]}', "seed": "0" * 32}
            await b.storage.commit_one(
                Change(
                    run_id="sender",
                    key="start:sender",
                    create=NewRun(workflow="h01_x", version="1", args='{"args":[]}'),
                    events=[Event("workflow.started", "I", started, None, "started")],
                    put=[Put(item_id="turn", kind=ItemKind.TURN)],
                )
            )
            (claim,) = (await b.storage.claim(ClaimRequest(owner="o", lease=LEASE, limit=9))).claims
            await b.storage.commit_one(
                Change(
                    run_id="sender",
                    key=f"{claim.ref.token}:1",
                    claim=claim.ref,
                    seen=1,
                    final=RunStatus.COMPLETED,
                    update=Update(result="null"),
                    events=[Event("workflow.completed", "C", {"result": "null"})],
                    put=[Put(item_id="deliver:1", kind=ItemKind.DELIVER, payload=payload)],
                )
            )
            await b.work()
            assert await b.result(to) == "heard"

            async def settled() -> bool:
                return await b.items("sender") == {}

            await eventually(settled)

    asyncio.run(main())


@pytest.mark.parametrize("news", ["cancel", "timer", "branch"])
def test_h02_nothing_waits_for_a_long_step_for_more_than_the_flush(news: str) -> None:
    async def main() -> None:
        gate = asyncio.Event()

        @step
        async def h02_long() -> None:
            await gate.wait()

        @step
        async def h02_short(n: int) -> int:
            return n

        @workflow
        async def h02_races() -> str:
            async def chain() -> str:
                return f"chain {await h02_short(1) + await h02_short(2)}"

            async def timer() -> str:
                await sleep("1h")
                return "timer"

            tasks = [asyncio.create_task(c) for c in (h02_long(), chain(), timer())]
            try:
                if news == "branch":
                    return str(await tasks[1])
                await tasks[1]
                done, _ = await asyncio.wait(
                    [tasks[0], tasks[2]], return_when=asyncio.FIRST_COMPLETED
                )
                return str(done.pop().result())
            except asyncio.CancelledError:
                return "cancel"

        async with bench() as b:
            run_id = await b.start(h02_races)
            await b.has(run_id, "step.completed", 2)
            if news == "cancel":
                await b.has(run_id, "step.scheduled")
                await b.ops.cancel(run_id, "")
            elif news == "timer":
                await b.has(run_id, "step.scheduled")
                await b.pass_time("1h")
            expected = {"cancel": "cancel", "timer": "timer", "branch": "chain 3"}[news]
            assert await b.result(run_id) == expected
            gate.set()

    asyncio.run(main())


def test_h03_stalled_and_paused_runs_do_not_spin() -> None:
    def make(changed: bool) -> Any:
        @workflow
        async def h03_flow() -> str:
            if not changed:
                await sleep("1h")
            return "end"

        return h03_flow

    async def main() -> None:
        store = Spied()
        async with bench(store) as b:
            old = make(changed=False)
            run_id, paused = await b.start(old), await b.start(old)
            for each in (run_id, paused):
                await b.asleep(each)
            await b.storage.commit_one(
                Change(run_id=paused, key="control:1", control=Control(ControlKind.PAUSE))
            )
            new = make(changed=True)
            await b.pass_time("1h")
            await b.until(run_id, "stalled")
            await eventually(lambda: b.worker is not None and not b.worker.is_busy)
            claims = (await b.items(run_id))["turn"].claims
            length = (await b.get(run_id)).history_length
            sent = len(store.sent)

            @workflow
            async def h03_other() -> str:
                return "other"

            for _ in range(20):
                assert await b.run(h03_other) == "other"
            # The clock stands almost still: nobody tried again.
            assert (await b.items(run_id))["turn"].claims <= claims + 1
            assert (await b.get(run_id)).history_length == length
            mine = [c for c in store.sent[sent:] if c.run_id in (run_id, paused)]
            assert len(mine) <= 1
            assert (await b.items(paused))["turn"].claims == 0
            await b.storage.commit_one(cancel(run_id))  # a new input, at most once a second
            await eventually(lambda: b.worker is not None and not b.worker.is_busy)
            assert (await b.items(run_id)).get("turn") is None or (await b.items(run_id))[
                "turn"
            ].claims <= claims + 2
            del old, new

    asyncio.run(main())


def test_h04_an_input_between_settle_and_answer_is_delivered_once_by_one_owner() -> None:
    calls: Counter[int] = Counter()

    @step
    async def h04_react(n: int) -> int:
        calls[n] += 1
        return n

    @workflow
    async def h04_flow() -> int:
        got = 0
        while got < 5:
            try:
                await sleep("1d")
            except asyncio.CancelledError:
                got += 1
                await h04_react(got)
        return got

    async def main() -> None:
        store = Spied()
        sent = 0

        async def interfere(changes: Any) -> None:
            # Whenever the session settles, an input slips in right before.
            nonlocal sent
            for change in changes:
                if change.settle is not None and change.claim.item_id == "turn" and sent < 5:
                    sent += 1
                    late = cancel(change.run_id, f"cancel:{sent}")
                    await MemoryStorageBackend.commit(store, [late])

        store.before = interfere
        async with bench(store) as b, bench(store.clone()) as other:
            run_id = await b.start(h04_flow)
            assert await b.result(run_id) == 5
            assert other.worker is not None
        assert calls == dict.fromkeys(range(1, 6), 1)

    asyncio.run(main())


def test_h05_a_session_has_one_commit_in_flight_and_seen_is_what_was_delivered() -> None:
    @step
    async def h05_part(n: int) -> int:
        await asyncio.sleep(0.001 * (n % 3))
        return n

    @workflow
    async def h05_flow() -> int:
        total = sum(await asyncio.gather(*(h05_part(n) for n in range(12))))
        return total + await h05_part(100)

    class Counting(Spied):
        in_flight: Counter[str] = Counter()  # noqa: RUF012 - one per test

        async def commit(self, changes: Any) -> Any:
            for change in changes:
                self.in_flight[change.run_id] += 1
                assert self.in_flight[change.run_id] == 1
            await asyncio.sleep(0.002)
            answers = await super().commit(changes)
            for change in changes:
                self.in_flight[change.run_id] -= 1
            return answers

    async def main() -> None:
        store = Counting()
        async with bench(store) as b:
            run_id = await b.start(h05_flow)
            assert await b.result(run_id) == 166
            seen = [c.seen for c in store.sent if c.run_id == run_id and c.seen is not None]
            assert seen == sorted(seen)
            keys = [c.key for c in store.sent if c.run_id == run_id]
            assert len(set(keys)) == len(keys)
            run = await b.get(run_id)
            events = await b.events(run_id)
            assert run.seen_seq == max(e.seq for e in events if e.klass == "I")

    asyncio.run(main())


def test_h06_retries_wait_their_delay_and_are_counted_apart_from_claims() -> None:
    tries: list[int] = []

    @step(max_retries=6, retry_delay="1m")
    async def h06_flaky() -> str:
        tries.append(1)
        if len(tries) < 6:
            raise OSError
        return "done"

    @workflow
    async def h06_flow() -> str:
        return await h06_flaky()

    async def main() -> None:
        async with bench() as b:
            run_id = await b.start(h06_flow)
            for count in range(1, 6):
                await b.has(run_id, "step.retrying", count)
                item = (await b.items(run_id))["step:1#1:step"]
                assert item.payload["attempt"] == count + 1
                assert item.claims == 0
                left = item.due_at - await b.storage.now()
                assert timedelta(seconds=50) < left <= timedelta(minutes=1)
                if count == 2:  # a release does not count as a try, nor as a kill
                    await b.restart()
                await b.pass_time("1m")
            assert await b.result(run_id) == "done"
        assert len(tries) == 6

    asyncio.run(main())


def test_h07_whether_an_exception_is_typed_does_not_depend_on_what_is_imported(
    tmp_path: Path,
) -> None:
    (tmp_path / "h07_elsewhere.py").write_text("class Odd(Exception): pass\n")
    sys.path.insert(0, str(tmp_path))
    seen: list[list[str]] = []

    @step(max_retries=0)
    async def h07_imports(kind: str) -> None:
        if kind == "stdlib":
            import sqlite3

            raise sqlite3.IntegrityError("unique")
        import h07_elsewhere  # type: ignore[import-not-found]

        raise h07_elsewhere.Odd("odd")

    @workflow
    async def h07_flow() -> list[str]:
        found: list[str] = []
        for kind in ("stdlib", "elsewhere"):
            try:
                await h07_imports(kind)
            except Exception as exc:  # noqa: BLE001 - its type is the point
                found.append(f"{type(exc).__module__}.{type(exc).__name__}")
        seen.append(found)
        await sleep("1h")
        return found

    async def main() -> None:
        async with bench() as b:
            run_id = await b.start(h07_flow)
            await b.asleep(run_id)
            await b.rest()
            sys.modules.pop("h07_elsewhere")  # another process, which imported nothing
            await b.work()
            await b.pass_time("1h")
            expected = ["sqlite3.IntegrityError", "pyworkflow.errors.StepError"]
            assert await b.result(run_id) == expected
            assert seen == [expected, expected]

    try:
        asyncio.run(main())
    finally:
        sys.path.remove(str(tmp_path))
    assert issubclass(StepError, Exception)


def test_h07_a_stored_value_that_no_longer_validates_stalls_and_never_fails_the_run() -> None:
    import pydantic

    def make(field: str) -> Any:
        H07Model.model_fields_set  # noqa: B018 - it is there
        model = pydantic.create_model(
            "H07Model",
            **{field: (int, ...)},
            __module__=__name__,  # type: ignore[call-overload]
        )
        globals()["H07Model"] = model

        @step
        async def h07_model() -> Any:
            return globals()["H07Model"](**{field: 1})

        @workflow
        async def h07_models() -> str:
            value = await h07_model()
            await sleep("1h")
            return type(value).__name__

        return h07_models, h07_model

    async def main() -> None:
        async with bench() as b:
            old = make("before")
            run_id = await b.start(old[0])
            await b.asleep(run_id)
            await b.rest()
            new = make("after")
            await b.work()
            await b.pass_time("1h")
            run = await b.until(run_id, "stalled", "failed", "completed")
            assert run.status == "stalled"
            assert "h07_model" in str(run.stalled)
            back = make("before")
            await b.pass_time("30s")
            assert await b.result(run_id) == "H07Model"
            del old, new, back

    asyncio.run(main())


class H07Model:
    """Stands for a class that changes between versions."""

    model_fields_set: frozenset[str] = frozenset()


@pytest.mark.parametrize("crash", [False, True])
def test_h08_what_is_recorded_may_depend_on_turns_and_replay_does_not_mind(crash: bool) -> None:
    """A cancel lands while the first step runs; with or without a commit in between."""

    async def main() -> None:
        gate = asyncio.Event()

        @step
        async def h08_first() -> str:
            await gate.wait()
            return "first"

        @step
        async def h08_second(n: int) -> int:
            return n

        @workflow
        async def h08_flow() -> list[Any]:
            found: list[Any] = []
            try:
                found.append(await h08_first())
            except asyncio.CancelledError:
                found.append("cancelled")
            found.append(await h08_second(2))
            await sleep("1h")
            return found

        async with bench(work=not crash) as b:
            run_id = await b.start(h08_flow)
            if crash:
                await b.storage.commit_one(cancel(run_id))  # both inputs in one turn
                await b.work()
            else:
                await b.has(run_id, "step.scheduled")
                await b.ops.cancel(run_id, "")
            await b.asleep(run_id)
            scheduled = [
                e for e in await b.events(run_id, "step.scheduled") if e.data["name"] == "h08_first"
            ]
            assert len(scheduled) == (0 if crash else 1)
            await b.restart()
            await b.pass_time("1h")
            assert await b.result(run_id) == ["cancelled", 2]
            gate.set()

    asyncio.run(main())


def test_h08_a_renamed_step_does_not_get_the_old_result() -> None:
    def make(name: str) -> Any:
        @step(name=name)
        async def h08_named() -> str:
            return name

        @workflow
        async def h08_renames() -> str:
            found = await h08_named()
            await sleep("1h")
            return found

        return h08_renames, h08_named

    async def main() -> None:
        async with bench() as b:
            old = make("h08-old")
            run_id = await b.start(old[0])
            await b.asleep(run_id)
            new = make("h08-new")
            await b.pass_time("1h")
            run = await b.until(run_id, "stalled")
            assert "h08-old" in str(run.stalled)
            assert "h08-new" in str(run.stalled)
            del old, new

    asyncio.run(main())


def make_h09(version: int, answers: list[Any]) -> Any:
    @step
    async def h09_step(n: int) -> int:
        return n

    @workflow
    async def h09_flow() -> list[int]:
        found = [await h09_step(1)]
        if version == 2:
            answers.append((is_replaying(), patched("x")))
            if patched("x"):
                found.append(await h09_step(10))
        await sleep("1h")
        if version == 2:
            answers.append(("later", patched("x")))
        found.append(await h09_step(2))
        return found

    return h09_flow, h09_step


def test_h09_old_code_does_not_go_over_a_marker_that_it_never_asked_for() -> None:
    # It would record its own steps under the ops of those that the marker stands for, and the
    # new code could never go on.
    @step
    async def h09_part(n: int) -> int:
        return n

    def make(version: int) -> Any:
        @workflow(name="h09_beside")
        async def h09_beside() -> int:
            beside = asyncio.ensure_future(h09_part(2))
            await asyncio.sleep(0)
            if version == 2 and patched("x"):
                await h09_part(1000)
            return await h09_part(1) + await beside

        return h09_beside

    data = {
        "workflow": "h09_beside",
        "version": "1",
        "args": '{"args":[]}',
        "seed": "ab" * 16,
        "profile": 1,
    }
    history = [Event("workflow.started", "I", data, None, None, "r", 1)]
    new = make(2)
    first = Replay(new, "r")
    first.feed(history)
    steps = [each for each in first.take() if isinstance(each, RunStep)]
    ahead = next(each for each in steps if each.op.startswith("1."))
    done = {"name": "h09_part", "attempt": 1, "digest": ahead.digest, "result": "2"}
    history += [
        Event("version.marked", "C", {"id": "x"}, None, "marker:x", "r", 2),
        Event("step.completed", "I", done, ahead.op, f"step:{ahead.op}", "r", 3),
    ]
    first.close()
    del new, first
    old = Replay(make(1), "r")
    old.acknowledge(1)
    old.feed(history)
    assert "version.marked id=x" in str(old.problem)
    old.close()
    again = Replay(make(2), "r")
    again.acknowledge(1)
    again.feed(history)
    assert again.problem is None
    again.close()


def test_h09_the_first_patched_decides_for_the_coroutine_and_is_the_same_on_replay() -> None:
    async def main() -> None:
        for crash_before_marker in (False, True):
            answers: list[Any] = []
            async with bench() as b:
                old = make_h09(1, answers)
                run_id = await b.start(old[0])
                await b.asleep(run_id)
                new = make_h09(2, answers)
                for _ in range(2):  # decided while replaying, however often that is
                    await b.restart()
                fresh = await b.start(new[0])
                await b.asleep(fresh)
                if crash_before_marker:
                    await b.restart()
                await b.pass_time("1h")
                assert await b.result(run_id) == [1, 2]
                assert await b.result(fresh) == [1, 10, 2]
                assert (True, False) in answers
                assert ("later", False) in answers
                assert ("later", True) in answers
                marked = [e.data["id"] for e in await b.events(fresh, "version.marked")]
                assert marked == ["x"]
                assert await b.events(run_id, "version.marked") == []
                del old, new

    asyncio.run(main())


def test_h09_a_marker_goes_with_the_commit_that_covers_its_input() -> None:
    async def main() -> None:
        answers: list[Any] = []
        store = Spied()
        async with bench(store) as b:
            flow = make_h09(2, answers)
            run_id = await b.start(flow[0])
            await b.asleep(run_id)
            emitted = next(e.seq for e in await b.events(run_id, "step.completed"))
            for change in store.sent:
                marker = any(e.type == "version.marked" for e in change.events)
                if change.run_id == run_id and change.seen is not None and change.seen >= emitted:
                    assert marker
                    break
            del flow

    asyncio.run(main())


def test_h10_time_in_the_workflow_is_that_of_its_inputs_and_no_timer_ends_early() -> None:
    seen: list[list[Any]] = []

    @workflow
    async def h10_flow() -> int:
        loop = asyncio.get_running_loop()
        began = now()
        marks: list[Any] = [began, loop.time()]
        timers = 0
        target = began + timedelta(hours=1, microseconds=1)
        while now() < target:
            await sleep(target - now())
            timers += 1
        marks += [now(), loop.time()]
        deadline = loop.time() + 0.1 + 0.2
        while loop.time() < deadline:
            await asyncio.sleep(deadline - loop.time())
            timers += 1
        marks += [now(), loop.time()]
        order: list[str] = []

        async def nap(name: str, seconds: float) -> None:
            await asyncio.sleep(seconds)
            order.append(name)

        await asyncio.gather(nap("c", 30), nap("a", 10), nap("b", 10), nap("d", 40))
        marks.append(order)
        seen.append(marks)
        await sleep("1h")
        assert abs((now() - began).total_seconds() - loop.time()) < 1e-6
        return timers

    async def main() -> None:
        async with bench() as b:
            run_id = await b.start(h10_flow)
            for _ in range(4):
                await b.asleep(run_id)
                length = (await b.get(run_id)).history_length
                if (await b.events(run_id, "sleep.created"))[1:]:
                    break
                await b.pass_time("1h1s")

                async def moved(length: int = length) -> bool:
                    return (await b.get(run_id)).history_length > length

                await eventually(moved)
            await b.asleep(run_id)
            await b.restart()
            await b.pass_time("1h")
            assert await b.result(run_id) == 2  # one timer each: none had to be made again
            first, replayed = seen
            assert first == replayed
            assert first[-1] == ["a", "b", "c", "d"]
            assert first[2] - first[0] >= timedelta(hours=1, microseconds=1)
            assert first[3] >= 3600

    asyncio.run(main())


def test_h10_a_timer_is_not_early_by_the_loops_own_account() -> None:
    from pyworkflow._clock import from_micros

    # Times a million, this is rounded to 200003; read back, that is a little less.
    deadline = 0.200_003 * (1 + 2**-52)
    assert deadline > 200_003 / 1_000_000

    @workflow
    async def h10_polls() -> int:
        loop = asyncio.get_running_loop()
        timers = 0
        while loop.time() < deadline:
            await asyncio.sleep(deadline - loop.time())
            timers += 1
        return timers

    began = 1_900_000_000_000_000
    replay = Replay(h10_polls, "run")
    data = {"workflow": "h10_polls", "version": "1", "args": '{"args":[]}', "seed": "0" * 32}
    replay.feed(
        [Event("workflow.started", "I", data, None, "started", "run", 1, from_micros(began))]
    )
    for seq in (2, 3):
        until = replay.next_timer()
        if until is None:
            break
        (due,) = replay.due_timers(until)
        fired = Event(due[1], "I", {}, due[0], f"timer:{due[0]}", "run", seq, from_micros(until))
        replay.feed([fired])
    assert replay.problem is None
    assert replay.outcome is not None
    assert getattr(replay.outcome, "result", None) == "1"


@pytest.mark.parametrize("first", [12_239, 1, 999_999, 86_400_000_003, 10**14 + 7])
def test_h10_timers_a_microsecond_apart_stay_apart(first: int) -> None:
    from pyworkflow._clock import from_micros

    # As floats, 0.012239 + 0.004012 is later than 0.016251: rounded up, the two would be due
    # together, and the longer one, which was set first, would win.
    @workflow
    async def h10_apart() -> str:
        await asyncio.sleep(first / 1_000_000)
        try:
            async with asyncio.timeout(0.004_013):
                await asyncio.sleep(0.004_012)
        except TimeoutError:
            return "late"
        return "in time"

    began = 1_900_000_000_000_000
    replay = Replay(h10_apart, "run")
    data = {"workflow": "h10_apart", "version": "1", "args": '{"args":[]}', "seed": "0" * 32}
    replay.feed(
        [Event("workflow.started", "I", data, None, "started", "run", 1, from_micros(began))]
    )
    instants: list[int] = []
    while (until := replay.next_timer()) is not None:
        due = replay.due_timers(until)[0]
        instants.append(until - began)
        seq = len(instants) + 1
        fired = Event(due[1], "I", {}, due[0], f"timer:{due[0]}", "run", seq, from_micros(until))
        replay.feed([fired])
    assert instants == [first, first + 4_012]
    assert getattr(replay.outcome, "result", None) == '"in time"'


# --- 12 -----------------------------------------------------------------------------------------


def test_h12_eviction_closes_and_never_cancels() -> None:
    seen: list[str] = []

    @step
    async def h12_refund() -> None:
        seen.append("refund")

    @workflow
    async def h12_flow() -> str:
        async def stubborn() -> None:
            while True:
                try:
                    await asyncio.sleep(10**6)
                except asyncio.CancelledError:
                    seen.append("stubborn cancelled")

        task = asyncio.create_task(stubborn())
        try:
            await sleep("1h")
        except asyncio.CancelledError:
            seen.append("cancelled")
            await h12_refund()
            raise
        finally:
            seen.append(f"finally evicting={is_evicting()}")
            if is_evicting():
                for refused in (h12_refund, lambda: sleep(1)):
                    try:
                        await refused()
                    except (WorkflowContextError, GeneratorExit) as exc:
                        seen.append(type(exc).__name__)
        del task
        return "woken"

    async def main() -> None:
        async with bench(sessions=0) as b:
            run_id = await b.start(h12_flow)
            await b.asleep(run_id)
            await eventually(lambda: seen)
            assert b.worker is not None
            b.worker.evictor.flush()
            assert seen[0] == "finally evicting=True"
            assert set(seen[1:]) <= {"WorkflowContextError", "GeneratorExit"}
            length = (await b.get(run_id)).history_length
            seen.clear()
            await b.pass_time("1h")
            assert await b.result(run_id) == "woken"
            assert seen == ["finally evicting=False"]
            assert length < (await b.get(run_id)).history_length
            b.worker.evictor.flush()
            assert b.worker.evictor.stubborn == []

    asyncio.run(main())


def test_h12_what_refuses_to_close_is_kept_and_counted() -> None:
    let_go: list[bool] = []

    @workflow
    async def h12_refuses() -> None:
        try:
            await sleep("1h")
        finally:
            while not let_go:
                try:
                    await asyncio.sleep(0)
                except GeneratorExit:
                    pass

    async def main() -> None:
        async with bench() as b:
            worker = b.worker
            assert worker is not None
            run_id = await b.start(h12_refuses)
            await b.asleep(run_id)
            await eventually(lambda: not worker.is_busy)
            worker.evict()
            worker.evictor.flush()
            assert [r.run_id for r in worker.evictor.stubborn] == [run_id]
            gc.collect()
            let_go.append(True)

    asyncio.run(main())
    gc.collect()


# --- 13 to 18: what of them is the engine's -----------------------------------------------------


def test_h13_a_pause_is_not_overwritten_by_a_session() -> None:
    @step
    async def h13_step(n: int) -> int:
        await asyncio.sleep(0.001)
        return n

    @workflow
    async def h13_flow() -> int:
        return sum([await h13_step(n) for n in range(30)])

    async def main() -> None:
        async with bench() as b:
            run_id = await b.start(h13_flow)
            await b.has(run_id, "step.completed", 3)
            await b.storage.commit_one(
                Change(run_id=run_id, key="control:1", control=Control(ControlKind.PAUSE))
            )
            await eventually(lambda: b.worker is not None and not b.worker.is_busy)
            assert (await b.get(run_id)).status == "paused"
            done = len(await b.events(run_id, "step.completed"))
            assert done < 30
            await b.restart()
            assert (await b.get(run_id)).status == "paused"
            await b.storage.commit_one(
                Change(run_id=run_id, key="control:2", control=Control(ControlKind.UNPAUSE))
            )
            assert await b.result(run_id) == 435

    asyncio.run(main())


def test_h15_claims_of_steps_do_not_fence_the_live_turn() -> None:
    calls: Counter[int] = Counter()

    @step(dispatch="queue")
    async def h15_queued(n: int) -> int:
        calls[n] += 1
        return n

    @step
    async def h15_here(n: int) -> int:
        return n

    @workflow
    async def h15_fans_out() -> int:
        async def chain() -> int:
            return sum([await h15_here(n) for n in range(20)])

        return sum(await asyncio.gather(chain(), *(h15_queued(n) for n in range(200))))

    async def main() -> None:
        store = MemoryStorageBackend()
        async with bench(store) as b, bench(store.clone()):
            assert await b.run(h15_fans_out) == 190 + 19_900
        assert set(calls.values()) == {1}

    asyncio.run(main())


def test_h17_the_deadline_is_an_input_like_any_other_and_is_replayed() -> None:
    seen: list[str] = []

    @workflow(max_duration="2h")
    async def h17_waits_for_nothing() -> None:
        try:
            await asyncio.Event().wait()  # nothing but the deadline can wake it
        except asyncio.CancelledError:
            seen.append("cancelled")
            await sleep("50s")
            raise

    async def main() -> None:
        from pyworkflow import WorkflowTimeout

        async with bench() as b:
            run_id = await b.start(h17_waits_for_nothing)
            await b.asleep(run_id)
            turn = (await b.items(run_id))["turn"]
            assert turn.due_at == (await b.get(run_id)).deadline
            await b.pass_time("2h")
            await b.has(run_id, "sleep.created")
            await b.asleep(run_id)
            await b.restart()
            await b.pass_time("50s")
            with pytest.raises(WorkflowTimeout):
                await b.result(run_id)
            assert seen == ["cancelled", "cancelled"]  # live, and on replay

    asyncio.run(main())


def test_h18_the_start_of_an_at_most_once_step_is_fenced_and_precedes_its_body() -> None:
    order: list[str] = []

    @step(semantics="at_most_once")
    async def h18_pay() -> str:
        order.append("body")
        return "paid"

    @workflow
    async def h18_flow() -> str:
        return await h18_pay()

    class Ordered(Spied):
        async def commit(self, changes: Any) -> Any:
            answers = await super().commit(changes)
            for change in changes:
                if change.settle is not None and change.settle.keep:
                    payload = change.settle.payload
                    assert payload is not None
                    assert payload["begun"] == change.claim.token
                    order.append("begun")
            return answers

    async def main() -> None:
        async with bench(Ordered()) as b:
            assert await b.run(h18_flow) == "paid"
        assert order == ["begun", "body"]
        assert h18_pay.policy.max_retries == 0

    asyncio.run(main())


# --- 20 to 26 -----------------------------------------------------------------------------------


def test_h20_when_the_root_returns_the_rest_is_closed_and_no_step_of_it_runs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls: list[str] = []

    @step
    async def h20_email(n: int) -> None:
        calls.append(f"email {n}")

    @workflow
    async def h20_forgets() -> str:
        async def background() -> None:
            try:
                await sleep("1h")
            finally:
                calls.append("closed")

        tasks = [asyncio.create_task(h20_email(n)) for n in range(2)]
        tasks.append(asyncio.create_task(background(), name="behind"))
        await asyncio.sleep(0)
        tasks.append(asyncio.create_task(h20_email(9)))
        return f"left {len(tasks)}"

    async def main() -> None:
        async with bench() as b:
            run_id = await b.start(h20_forgets)
            assert await b.result(run_id) == "left 4"
            assert await b.types(run_id) == ["workflow.started", "workflow.completed"]
            assert await b.items(run_id) == {}
        assert calls == ["closed"]
        assert any("behind" in r.getMessage() for r in caplog.records)

    asyncio.run(main())


def test_h21_async_generators_end_when_the_code_says_and_not_when_a_collector_does() -> None:
    order: list[str] = []

    @step
    async def h21_step(name: str) -> str:
        return name

    @workflow
    async def h21_flow() -> list[str]:
        found: list[str] = []

        async def numbers(n: int) -> Any:
            try:
                while True:
                    yield await h21_step(f"{n}")
                    n += 1
            finally:
                order.append("finalized")
                if not is_evicting():
                    await h21_step("never")

        async for value in numbers(0):
            found.append(value)
            if len(found) == 2:
                break
        gc.collect()
        found.append(await h21_step("after"))
        await sleep("1h")
        gc.collect()
        return [*found, await h21_step("end")]

    async def main() -> None:
        async with bench() as b:
            run_id = await b.start(h21_flow)
            await b.asleep(run_id)
            assert order == []
            await b.restart()
            await b.pass_time("1h")
            assert await b.result(run_id) == ["0", "1", "after", "end"]
            names = [e.data["result"] for e in await b.events(run_id, "step.completed")]
            assert '"never"' not in names

    asyncio.run(main())


def test_h21_tasks_that_only_the_loop_knows_do_not_vanish() -> None:
    @step
    async def h21_echo(n: int) -> int:
        return n

    @workflow
    async def h21_unreferenced() -> list[int]:
        done: list[int] = []
        over = asyncio.Event()

        async def work(n: int) -> None:
            await asyncio.sleep(3600)
            done.append(await h21_echo(n))
            if len(done) == 5:
                over.set()

        for n in range(5):
            asyncio.create_task(work(n))  # noqa: RUF006 - the very thing under test
        gc.collect()
        await over.wait()
        return sorted(done)

    async def main() -> None:
        async with bench() as b:
            run_id = await b.start(h21_unreferenced)
            await b.asleep(run_id)
            gc.collect()
            await b.pass_time("1h")
            assert await b.result(run_id) == [0, 1, 2, 3, 4]

    asyncio.run(main())


def test_h22_asyncio_objects_shared_between_runs_are_refused() -> None:
    shared = asyncio.Lock()
    first_holds = asyncio.Event

    @workflow
    async def h22_flow(hold: bool) -> str:
        async with shared:
            if hold:
                await sleep("1h")
        return "done"

    async def main() -> None:
        async with bench() as b:
            holder = await b.start(h22_flow, True)
            await b.asleep(holder)
            waiter = await b.start(h22_flow, False)
            run = await b.until(waiter, "stalled", "suspended", "failed", "completed")
            if run.status == "suspended":  # it found out only when the lock was given to it
                await b.pass_time("1h")
                await b.until(holder, "stalled", "completed", "failed")
                run = await b.until(holder, "stalled", "failed")
            assert run.status in ("stalled", "failed"), run
            reason = str(run.stalled or run.error)
            assert "event loop" in reason or "shared between runs" in reason

    asyncio.run(main())
    del first_holds


def test_h22_a_future_of_one_run_cannot_be_resolved_in_another() -> None:
    parked: list[Any] = []

    @workflow
    async def h22_waits() -> str:
        future = asyncio.get_running_loop().create_future()
        parked.append(future)
        return str(await future)

    @workflow
    async def h22_meddles() -> str:
        try:
            parked[0].set_result("from elsewhere")
        except WorkflowContextError:
            return "refused"
        return "let through"

    async def main() -> None:
        async with bench() as b:
            waits = await b.start(h22_waits)
            await b.asleep(waits)
            assert await b.run(h22_meddles) == "refused"
            assert (await b.get(waits)).status == "suspended"
            with pytest.raises(WorkflowContextError, match="shared between runs"):
                parked[0].get_loop().call_soon(print)
            with pytest.raises(WorkflowContextError):
                parked[0].get_loop().call_at(1.0, print)
            with pytest.raises(WorkflowContextError):
                parked[0].get_loop().create_future()

    asyncio.run(main())


def test_h23_many_live_runs_cost_as_much_each_as_few() -> None:
    @workflow
    async def h23_sleeper() -> None:
        await sleep("1d")

    async def main() -> None:
        async with bench() as b:
            ids = [await b.start(h23_sleeper) for _ in range(2000)]
            await b.asleep(ids[-1])
            # asyncio keeps every task of the process in one set: equal hashes make it a list.
            tasks = [t for t in gc.get_objects() if isinstance(t, WorkflowTask) and not t.done()]
            assert len(tasks) >= 2000
            assert len({hash(t) for t in tasks}) == len(tasks)
            # A set of them has 2 ** 13 places; by chance a fifth shares its place with another.
            assert len({hash(t) % 2**13 for t in tasks}) > len(tasks) / 2

    asyncio.run(main())


def test_h24_neither_ping_pong_nor_a_closed_loop_stops_the_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shared_guard(), "_limit", 0.3)

    @workflow
    async def h24_ping_pong() -> None:
        queues: list[asyncio.Queue[int]] = [asyncio.Queue(), asyncio.Queue()]

        async def player(n: int) -> None:
            while True:
                await queues[1 - n].put(await queues[n].get())

        await queues[0].put(1)
        await asyncio.gather(player(0), player(1))

    @workflow
    async def h24_computes() -> None:
        n = 0
        while True:
            n += 1

    @workflow
    async def h24_fine() -> str:
        return "fine"

    async def main() -> None:
        async with bench() as b:
            ids = [await b.start(w) for w in (h24_ping_pong, h24_computes)]
            for run_id in ids:
                await b.until(run_id, "stalled")
            assert await b.run(h24_fine) == "fine"

    asyncio.run(main())


def test_h24_replay_of_a_long_history_lets_the_loop_go_on() -> None:
    @step
    async def h24_step(n: int) -> int:
        return n

    @workflow
    async def h24_long() -> None:
        for n in range(3000):
            await h24_step(n)
        await sleep("1h")

    async def main() -> None:
        async with bench() as b:
            run_id = await b.start(h24_long)
            await b.until(run_id, "suspended", timeout=60)
            await b.restart()
            await b.pass_time("1h")
            gaps: list[float] = []
            last = time.perf_counter()
            while (await b.get(run_id)).status != "completed":
                await asyncio.sleep(0)
                gaps.append(time.perf_counter() - last)
                last = time.perf_counter()
            replay = sum(gaps)
            # Not in one piece: the loop came round many times meanwhile.
            assert len([g for g in gaps if g > replay / 50]) > 2 or replay < 0.05

    asyncio.run(main())


def test_h25_a_refused_commit_drops_the_coroutine_and_nothing_it_emitted_is_lost() -> None:
    calls: Counter[str] = Counter()

    @step
    async def h25_step(name: str) -> str:
        calls[name] += 1
        return name

    @workflow
    async def h25_flow() -> list[str]:
        found = [await h25_step("a")]
        await sleep("1h")
        found.append(await h25_step("b"))
        found += await asyncio.gather(h25_step("c"), h25_step("d"))
        return found

    class FencesOnce(Spied):
        """While the session is about to commit, its claim is taken away."""

        armed = False

        async def commit(self, changes: Any) -> Any:
            if self.armed and changes[0].claim is not None:
                self.armed = False
                ref = changes[0].claim
                await self.renew([ref], timedelta(0))
                (claim,) = (
                    await self.claim(
                        ClaimRequest(
                            owner="thief", lease=timedelta(0), items=[(ref.run_id, ref.item_id)]
                        )
                    )
                ).claims
                assert claim.ref.token != ref.token
            return await super().commit(changes)

    async def main() -> None:
        store = FencesOnce()
        async with bench(store) as b:
            run_id = await b.start(h25_flow)
            await b.asleep(run_id)
            await b.pass_time("1h")
            store.armed = True
            assert await b.result(run_id) == ["a", "b", "c", "d"]
            assert calls["a"] == 1
            assert len(await b.events(run_id, "step.completed")) == 4

    asyncio.run(main())


def test_h25_events_of_another_worker_are_fed_under_the_rules_of_replay() -> None:
    lines: list[tuple[str, bool]] = []

    @workflow
    async def h25_logs() -> list[bool]:
        decided: list[bool] = []
        for n in range(4):
            lines.append((f"line {n}", is_replaying()))
            logger.info("line %d", n)
            decided.append(patched(f"p{n}"))
            await sleep("1h")
        return decided

    async def main() -> None:
        store = MemoryStorageBackend()
        async with bench(store) as one, bench(store.clone(), work=False) as two:
            run_id = await one.start(h25_logs)
            await one.asleep(run_id)
            kept = one.worker
            assert kept is not None
            kept._stopping = True  # it keeps its coroutine, and claims nothing for a while
            kept.wake()
            await eventually(lambda: kept._server is None or kept._server.done())
            await two.work()
            for count in (2, 3):
                await two.pass_time("1h")
                await two.has(run_id, "sleep.created", count)
                await two.asleep(run_id)
            await two.rest()
            kept._stopping = False
            kept._server = None
            kept.serve()
            await one.pass_time("1h")
            await one.has(run_id, "sleep.created", 4)
            await one.asleep(run_id)
            await one.pass_time("1h")
            assert await one.result(run_id) == [True] * 4
            logged = [e.data["message"] for e in await one.events(run_id, "log.info")]
            assert logged == [f"line {n}" for n in range(4)]
            marked = [e.data["id"] for e in await one.events(run_id, "version.marked")]
            assert marked == [f"p{n}" for n in range(4)]

    asyncio.run(main())


_SETS = """
import asyncio, sys
from pyworkflow import configure, get_run, sleep, start, step, workflow, result
from pyworkflow.storage.file import FileStorageBackend

@step
async def charge(user: str) -> str:
    return "receipt of " + user

@step
async def take(users: set) -> int:
    return len(users)

@workflow
async def charges() -> list:
    found = [await take({"alice", "bob", "carol", "dave", "eve", "frank"})]
    for user in {"alice", "bob", "carol", "dave", "eve", "frank"}:
        found.append((user, await charge(user)))
    await sleep(0.05)
    return found

storage = FileStorageBackend(sys.argv[1])
configure(storage=storage)
run_id = start(charges, idempotency_key="one")
if len(sys.argv) > 2:
    import os
    from pyworkflow import get_events
    while not any(e.type == "sleep.created" for e in get_events(run_id)):
        pass
    os._exit(0)
import time
end = time.monotonic() + 30
while get_run(run_id).status not in ("stalled", "completed", "failed") and time.monotonic() < end:
    time.sleep(0.01)
run = get_run(run_id)
print(run.status, run.result if run.status == "completed" else run.stalled)
os = __import__("os"); sys.stdout.flush(); os._exit(0)
"""


def test_h26_an_order_of_a_set_that_differs_between_processes_stalls(tmp_path: Path) -> None:
    (tmp_path / "sets.py").write_text(textwrap.dedent(_SETS))

    def process(seed: int, *more: str) -> str:
        done = subprocess.run(
            [sys.executable, "sets.py", "store", *more],
            cwd=tmp_path,
            env=os.environ
            | {
                "PYTHONHASHSEED": str(seed),
                "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            },
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return done.stdout

    process(1, "first")
    answer = process(2)
    # Another order: the digests differ, and nobody gets somebody else's receipt.
    assert answer.startswith("stalled "), answer
    assert "other arguments for step=charge" in answer
    assert "op=1#2:step" in answer or "digest" in answer
    # The set that was an argument is the same set in any order.
    assert "step=take" not in answer


# --- 27 to 40: what of them is here -------------------------------------------------------------


def test_h27_the_key_of_a_purged_run_is_still_taken() -> None:
    calls: list[int] = []

    @step
    async def h27_charge() -> int:
        calls.append(1)
        return len(calls)

    @workflow
    async def h27_flow() -> int:
        return await h27_charge()

    async def main() -> None:
        async with bench() as b:
            run_id = await b.start(h27_flow, key="invoice-1")
            await b.result(run_id)
            await b.pass_time("2d")
            removed = await b.storage.purge(before=await b.storage.now())
            assert removed == 1
            assert await b.start(h27_flow, key="invoice-1") == run_id
            assert await b.storage.get_run(run_id) is None
        assert calls == [1]

    asyncio.run(main())


def test_h31_a_run_that_is_flooded_with_inputs_ends() -> None:
    @step
    async def h31_step(n: int) -> int:
        return n

    @workflow
    async def h31_flow() -> int:
        got = 0
        while got < 20:
            try:
                await sleep("1d")
            except asyncio.CancelledError:
                got += 1
        return got

    async def main() -> None:
        store = Spied()
        count = 0

        async def flood(changes: Any) -> None:
            # One more input arrives before every commit of the session, also before the last.
            nonlocal count
            for change in changes:
                if change.claim is not None and count < 200:
                    count += 1
                    late = cancel(change.run_id, f"cancel:{count}")
                    await MemoryStorageBackend.commit(store, [late])

        store.before = flood
        async with bench(store) as b:
            run_id = await b.start(h31_flow)
            assert await b.result(run_id) == 20
            events = await b.events(run_id)
            assert [e.seq for e in events] == list(range(1, len(events) + 1))
            assert len([e for e in events if e.type == "workflow.completed"]) == 1

    asyncio.run(main())


def test_h32_a_step_called_inside_a_step_just_runs() -> None:
    @step(max_retries=0)
    async def h32_inner(n: int) -> int:
        return n + 1

    @step
    def h32_inner_sync(n: int) -> int:
        return n * 2

    @step
    async def h32_outer(n: int) -> int:
        return await h32_inner(n) + await h32_inner_sync(n)

    @workflow
    async def h32_flow() -> int:
        return await h32_outer(5)

    async def main() -> None:
        async with bench() as b:
            run_id = await b.start(h32_flow)
            assert await b.result(run_id) == 16
            assert len(await b.events(run_id, "step.completed")) == 1

    asyncio.run(main())


def test_h33_a_history_at_its_limit_fails_for_good_and_does_not_stall() -> None:
    from pyworkflow import HistoryTooLong

    @workflow
    async def h33_flow() -> None:
        while True:
            await sleep("1h")

    async def main() -> None:
        async with bench(max_history=30) as b:
            run_id = await b.start(h33_flow)
            while not (await b.get(run_id)).status.is_terminal:
                run = await b.until(run_id, "suspended", "failed")
                assert run.history_length < 60
                await b.pass_time("1h")

                async def moved(length: int = run.history_length) -> bool:
                    found = await b.get(run_id)
                    return found.history_length > length or found.status.is_terminal

                await eventually(moved)
            with pytest.raises(HistoryTooLong):
                await b.result(run_id)

    asyncio.run(main())


def test_h34_runs_have_contexts_names_and_randomness_of_their_own() -> None:
    from contextvars import ContextVar

    callers: ContextVar[str] = ContextVar("callers", default="unset")
    seen: list[Any] = []

    @workflow
    async def h34_flow() -> list[Any]:
        async def named() -> str:
            task = asyncio.current_task()
            assert task is not None
            return task.get_name()

        first = asyncio.create_task(named())
        second = asyncio.create_task(named(), name="given")
        branches: list[str] = []

        def later() -> None:
            task = asyncio.get_running_loop().create_task(named())
            task.add_done_callback(lambda t: branches.append(t.result()))

        asyncio.get_running_loop().call_soon(later)
        asyncio.get_running_loop().call_soon(later)
        found = [callers.get(), await first, await second]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        callers.set("changed")
        await sleep("1h")
        seen.append([*found, sorted(branches), str(uuid4()), random().random()])
        await sleep("1h")
        return [callers.get(), len(set(branches))]

    async def main() -> None:
        async with bench() as b:
            callers.set("of the caller")
            ids = [await b.start(h34_flow) for _ in range(2)]
            for _ in range(2):
                for run_id in ids:
                    await b.asleep(run_id)
                await b.restart()
                await b.pass_time("1h")
                await asyncio.sleep(0)
                for run_id in ids:
                    await b.has(run_id, "sleep.completed", _ + 1)
            for run_id in ids:
                assert await b.result(run_id) == ["changed", 2]
            assert callers.get() == "of the caller"
        drawn = {(s[4], s[5]) for s in seen}
        assert len(drawn) == 2  # two runs, however often replayed
        assert {s[0] for s in seen} == {"unset"}
        assert all(s[1:3] == ["1.1", "given"] for s in seen)

    asyncio.run(main())


def test_h34_eager_tasks_and_as_completed_of_coroutines_are_refused() -> None:
    @step
    async def h34_step(n: int) -> int:
        return n

    @workflow
    async def h34_as_completed() -> int:
        coros = [h34_step(1), h34_step(2)]
        try:
            return sum([await f for f in asyncio.as_completed(coros)])
        finally:
            for coro in coros:
                coro.close()

    async def main() -> None:
        async with bench() as b:
            run_id = await b.start(h34_as_completed)
            run = await b.until(run_id, "stalled", "completed", "failed")
            assert run.status == "stalled"
            assert "as_completed" in str(run.stalled)

    asyncio.run(main())


def test_h35_log_events_are_recorded_once_and_lines_are_not_repeated_on_replay(
    caplog: pytest.LogCaptureFixture,
) -> None:
    import logging

    @step
    async def h35_step() -> None:
        logger.info("in the step")

    @workflow
    async def h35_flow() -> None:
        logger.info("before %s", "one", extra={"key": 1})
        await h35_step()
        logger.warning("between")
        await sleep("1h")
        logger.error("after")

    async def main() -> None:
        async with bench() as b:
            run_id = await b.start(h35_flow)
            await b.asleep(run_id)
            for _ in range(3):
                await b.restart()
            await b.pass_time("1h")
            await b.result(run_id)
            logged = [
                (e.type, e.data["message"])
                for e in await b.events(run_id)
                if str(e.type).startswith("log.")
            ]
            assert logged == [
                ("log.info", "before one"), ("log.info", "in the step"),
                ("log.warning", "between"), ("log.error", "after"),
            ]  # fmt: skip

    with caplog.at_level(logging.INFO):
        asyncio.run(main())
    lines = [r.getMessage() for r in caplog.records]
    for line in ("before one", "in the step", "between", "after"):
        assert lines.count(line) == 1


def test_h36_history_and_result_agree_for_a_run_started_again_with_its_id() -> None:
    from pyworkflow import RunIdConflict

    @workflow
    async def h36_flow(n: int) -> int:
        return n

    async def main() -> None:
        async with bench() as b:
            run_id = await b.start(h36_flow, 1, run_id="mine")
            assert await b.result(run_id) == 1
            with pytest.raises(RunIdConflict, match="mine"):
                await b.start(h36_flow, 2, run_id="mine")
            assert await b.result(run_id) == 1

    asyncio.run(main())


def test_h38_a_mistake_in_a_steps_own_code_warns_loudly_on_the_first_try(
    caplog: pytest.LogCaptureFixture,
) -> None:
    @step
    async def h38_mistaken() -> None:
        undefined_name  # type: ignore[name-defined]  # noqa: B018, F821 - the very thing

    @workflow
    async def h38_flow() -> None:
        await h38_mistaken()

    async def main() -> None:
        async with bench() as b:
            run_id = await b.start(h38_flow)
            await b.has(run_id, "step.retrying")

    asyncio.run(main())
    warnings = [r for r in caplog.records if "mistake in its own code" in r.getMessage()]
    assert len(warnings) == 1
    assert "h38_mistaken" in warnings[0].getMessage()


def test_h39_stalled_runs_are_listed_like_failed_ones() -> None:
    @workflow
    async def h39_flow() -> None:
        open("nowhere")  # noqa: ASYNC230, PTH123, SIM115 - the very thing

    async def main() -> None:
        async with bench() as b:
            run_id = await b.start(h39_flow)
            await b.until(run_id, "stalled")
            page = await b.ops.list_runs("stalled", None, 10, None)
            assert [r.run_id for r in page.items] == [run_id]
            assert "nowhere" in str(page.items[0].stalled)

    asyncio.run(main())


def test_h40_what_a_process_that_is_gone_held_is_due_at_once() -> None:
    from pyworkflow._engine.owner import is_gone, owner_of

    gone = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = f"{owner_of(gone.pid)}/1"
    assert not is_gone(owner)

    @workflow
    async def h40_flow() -> str:
        return "continued"

    async def main() -> None:
        async with bench(work=False, lease=3600) as b:
            run_id = await b.start(h40_flow)
            await b.storage.claim(ClaimRequest(owner=owner, lease=timedelta(hours=1)))
            gone.communicate(b"")
            assert is_gone(owner)
            await b.work()
            assert await b.result(run_id) == "continued"

    asyncio.run(main())
