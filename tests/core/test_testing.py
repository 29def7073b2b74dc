"""The testing kit: driving runs in the test's loop, a clock that skips, and replaying histories."""

from __future__ import annotations

import asyncio
import dataclasses
import subprocess
import sys
import textwrap
import threading
import time
from datetime import UTC, datetime, timedelta

import pytest

from pyworkflow import (
    ArgumentError,
    ConfigurationError,
    FatalError,
    IdempotencyConflict,
    NonDeterminism,
    RunCancelled,
    RunNotFound,
    SchemaTooNew,
    SerializationError,
    WorkflowContextError,
    WorkflowError,
    WorkflowTimeout,
    now,
    sleep,
    step,
    step_context,
    workflow,
)
from pyworkflow._definitions import RunOptions
from pyworkflow._operations import Operations
from pyworkflow.events import Event
from pyworkflow.runs import RunStatus
from pyworkflow.storage.memory import MemoryStorageBackend
from pyworkflow.testing import History, TestEnvironment, replay, resume_local, start_local

START = datetime(2030, 1, 1, tzinfo=UTC)
calls: list[str] = []


@pytest.fixture(autouse=True)
def _forget_calls():
    calls.clear()


@step(name="testing.double")
async def double(x: int) -> int:
    calls.append(f"double {x}")
    return x * 2


@step(name="testing.sync_double")
def sync_double(x: int) -> int:
    return x * 2


@step(name="testing.slow")
async def slow(seconds: float) -> str:
    calls.append("slow")
    await asyncio.sleep(seconds)
    return "slept"


@step(name="testing.flaky", retry_delay=0.05)
async def flaky() -> int:
    if step_context().attempt == 1:
        raise ConnectionError("not yet")
    return step_context().attempt


@step(name="testing.hourly", max_retries=3, retry_delay="1h")
async def hourly() -> int:
    if step_context().attempt < 4:
        raise ConnectionError("not yet")
    return step_context().attempt


@step(name="testing.broken", max_retries=0)
async def broken() -> None:
    raise FatalError("told to")


@workflow(name="testing.plus_one")
async def plus_one(x: int) -> int:
    return await double(x) + 1


@workflow(name="testing.threads")
async def in_threads(x: int) -> int:
    return await sync_double(x)


@workflow(name="testing.naps")
async def naps(pause: float, times: int = 1) -> int:
    for _ in range(times):
        await sleep(pause)
    return await double(times)


@workflow(name="testing.retrying")
async def retrying() -> int:
    return await flaky()


@workflow(name="testing.patient")
async def patient() -> int:
    return await hourly()


@workflow(name="testing.failing")
async def failing() -> None:
    await broken()


@workflow(name="testing.race")
async def race(limit: float, work: float) -> str:
    try:
        return await asyncio.wait_for(slow(work), limit)
    except TimeoutError:
        return "too slow"


@workflow(name="testing.waits")
async def waits_forever() -> None:
    await asyncio.get_running_loop().create_future()


@workflow(name="testing.nests")
async def nests() -> None:
    await start_local(plus_one, 1)


@workflow(name="testing.reminders")
async def reminders() -> list[datetime]:
    sent = []
    for _ in range(3):
        await sleep("7d")
        sent.append(now())
    return sent


@workflow(name="testing.overdue", max_duration="1d")
async def overdue() -> None:
    await sleep("2d")


# --- start_local and resume_local -------------------------------------------------------------


def test_the_example_of_the_readme(tmp_path, monkeypatch) -> None:
    from pyworkflow.storage.file import FileStorageBackend

    monkeypatch.chdir(tmp_path)

    async def main() -> None:
        storage = FileStorageBackend()
        run_id = await start_local(plus_one, 5, storage=storage)
        run = await storage.get_run(run_id)
        assert run.status == "completed"
        assert run.result == 11
        await storage.close()

    asyncio.run(main())
    assert (tmp_path / ".pyworkflow").is_dir()


SCRIPT = """
    import asyncio, sys, threading
    from pyworkflow import workflow, step, sleep
    from pyworkflow.testing import History, resume_local, start_local

    @step
    def double(x: int) -> int:
        return x * 2

    @workflow
    async def nap(x: int) -> int:
        await sleep(0.2)
        return await double(x)

    async def begin():
        return await start_local(nap, 4)

    async def end(run_id):
        assert await resume_local(run_id, wait=5) == run_id
        return await History.fetch(run_id)

    run_id = asyncio.run(begin())
    history = asyncio.run(end(run_id))
    assert history.run.status == "completed", history
    threads = {t.name for t in threading.enumerate()} - {"MainThread", "pyworkflow-watchdog"}
    assert not {t for t in threads if not t.startswith("pyworkflow-step")}, threads
    assert "pytest" not in sys.modules
"""


def test_without_a_storage_the_configured_one_is_opened_and_closed(tmp_path) -> None:
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    subprocess.run([sys.executable, "script.py"], cwd=tmp_path, check=True, timeout=60)
    assert (tmp_path / ".pyworkflow").is_dir()


def test_a_storage_that_was_passed_in_is_used_and_stays_open() -> None:
    async def main() -> None:
        storage = MemoryStorageBackend()
        run_id = await start_local(plus_one, 1, storage=storage)
        assert (await storage.stats())["runs"] == 1
        assert (await storage.get_run(run_id)).result == 3

    asyncio.run(main())


def test_a_failed_run_is_returned_like_any_other() -> None:
    async def main() -> None:
        storage = MemoryStorageBackend()
        run = await storage.get_run(await start_local(failing, storage=storage))
        assert run.status == "failed"
        assert run.error.type == "pyworkflow.errors:FatalError"

    asyncio.run(main())


def test_a_sleep_is_not_waited_for_unless_asked() -> None:
    async def main() -> None:
        storage = MemoryStorageBackend()
        began = time.monotonic()
        run_id = await start_local(naps, 3600, storage=storage)
        assert time.monotonic() - began < 10
        assert (await storage.get_run(run_id)).status == "suspended"

    asyncio.run(main())


def test_waiting_covers_sleeps_and_retries_that_fit() -> None:
    async def main() -> None:
        storage = MemoryStorageBackend()
        for started in (
            await start_local(naps, 0.05, 3, storage=storage, wait=10),
            await start_local(retrying, storage=storage, wait="10s"),
        ):
            assert (await storage.get_run(started)).status == "completed"

    asyncio.run(main())


def test_the_wait_is_a_total() -> None:
    async def main() -> None:
        storage = MemoryStorageBackend()
        run_id = await start_local(naps, 0.2, 100, storage=storage, wait=0.5)
        assert (await storage.get_run(run_id)).status == "suspended"
        fired = [e for e in await storage.get_events(run_id) if e.type == "sleep.completed"]
        assert len(fired) in (1, 2)

    asyncio.run(main())


def test_a_timer_fires_while_a_step_still_runs() -> None:
    async def main() -> None:
        storage = MemoryStorageBackend()
        began = time.monotonic()
        run_id = await start_local(race, 0.3, 600, storage=storage)
        assert time.monotonic() - began < 30
        run = await storage.get_run(run_id)
        assert (run.status, run.result) == ("completed", "too slow")

    asyncio.run(main())


def test_other_runs_of_the_store_are_left_alone() -> None:
    async def main() -> None:
        storage = MemoryStorageBackend()
        other = await Operations(storage, None, None).start(plus_one, (1,), {}, RunOptions())
        mine = await start_local(plus_one, 2, storage=storage)
        assert (await storage.get_run(mine)).status == "completed"
        assert (await storage.get_run(other)).status == "pending"
        await resume_local(other, storage=storage)
        assert (await storage.get_run(other)).status == "completed"

    asyncio.run(main())


def test_a_key_gives_one_run() -> None:
    async def main() -> None:
        storage = MemoryStorageBackend()
        first = await start_local(plus_one, 1, storage=storage, idempotency_key="k")
        assert await start_local(plus_one, 1, storage=storage, idempotency_key="k") == first
        assert calls == ["double 1"]
        with pytest.raises(IdempotencyConflict):
            await start_local(plus_one, 2, storage=storage, idempotency_key="k")

    asyncio.run(main())


def test_resuming_fires_only_what_is_due() -> None:
    async def main() -> None:
        storage = MemoryStorageBackend()
        run_id = await start_local(naps, 3600, 2, storage=storage)
        for hours, ends in ((0.5, 0), (0.6, 1), (0.5, 1), (1, 2)):
            await storage.shift_clock(timedelta(hours=hours))
            assert await resume_local(run_id, storage=storage) == run_id
            fired = [e for e in await storage.get_events(run_id) if e.type == "sleep.completed"]
            assert len(fired) == ends
        assert (await storage.get_run(run_id)).status == "completed"

    asyncio.run(main())


def test_resuming_an_ended_run_does_nothing() -> None:
    async def main() -> None:
        storage = MemoryStorageBackend()
        run_id = await start_local(plus_one, 1, storage=storage)
        before = await storage.get_run(run_id)
        assert await resume_local(run_id, storage=storage) == run_id
        assert await storage.get_run(run_id) == before

    asyncio.run(main())


def test_resuming_needs_the_run_and_its_code() -> None:
    async def main() -> None:
        storage = MemoryStorageBackend()
        with pytest.raises(RunNotFound):
            await resume_local("run_of_nobody", storage=storage)

        @workflow(name="testing.forgotten")
        async def forgotten() -> None:
            await sleep("1h")

        run_id = await start_local(forgotten, storage=storage)
        del forgotten
        with pytest.raises(ConfigurationError, match=r"testing\.forgotten"):
            await resume_local(run_id, storage=storage)

    asyncio.run(main())


def test_wrong_arguments_start_nothing() -> None:
    async def main() -> None:
        storage = MemoryStorageBackend()
        with pytest.raises(ArgumentError):
            await start_local(plus_one, "no number", storage=storage)
        with pytest.raises(ArgumentError, match="decorate"):
            await start_local(plus_one.fn, 1, storage=storage)  # type: ignore[arg-type]
        assert (await storage.stats())["runs"] == 0

    asyncio.run(main())


def test_workflow_code_may_not_drive_runs() -> None:
    async def main() -> None:
        async with TestEnvironment() as env:
            with pytest.raises(WorkflowContextError, match=r"start_local\(\)"):
                await env.run(nests)

    asyncio.run(main())


def test_nothing_is_left_behind() -> None:
    async def main() -> None:
        storage = MemoryStorageBackend()
        before = set(threading.enumerate())
        await start_local(naps, 3600, storage=storage)
        await start_local(race, 0.2, 600, storage=storage)
        left = {t.name for t in set(threading.enumerate()) - before}
        assert left <= {"pyworkflow-watchdog"}
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_a_call_that_is_cut_off_gives_the_run_back() -> None:
    async def main() -> None:
        storage = MemoryStorageBackend()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await start_local(race, 3600, 600, storage=storage, idempotency_key="k")
        run_id = await storage.find_run("k")
        for item in await storage.list_work(run_id):
            assert item.lease is None or item.lease.until <= await storage.now()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await resume_local(run_id, storage=storage)
        assert calls == ["slow", "slow"]

    asyncio.run(main())


# --- the environment --------------------------------------------------------------------------


def test_a_year_of_sleep_takes_no_time() -> None:
    async def main() -> None:
        began = time.monotonic()
        async with TestEnvironment() as env:
            before = await env.now()
            assert await env.run(naps, 86_400, 365) == 730
            assert await env.now() - before >= timedelta(days=365)
        assert time.monotonic() - began < 20

    asyncio.run(main())


def test_the_clock_starts_where_it_is_told() -> None:
    async def main() -> None:
        async with TestEnvironment(start=START) as env:
            assert START <= await env.now() < START + timedelta(minutes=1)
            sent = await env.run(reminders)
        for week, at in enumerate(sent, 1):
            assert timedelta(0) <= at - (START + timedelta(weeks=week)) < timedelta(minutes=1)

    asyncio.run(main())


def test_a_naive_start_is_taken_as_utc_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="taken as UTC"):
        TestEnvironment(start=datetime(2030, 1, 1))  # noqa: DTZ001 - what is warned of


def test_retry_delays_and_deadlines_are_skipped() -> None:
    async def main() -> None:
        async with TestEnvironment(start=START) as env:
            assert await env.run(patient) == 4
            assert await env.now() - START >= timedelta(hours=3)
            with pytest.raises(WorkflowTimeout):
                await env.run(overdue)

    asyncio.run(main())


def test_steps_that_run_are_waited_for() -> None:
    async def main() -> None:
        async with TestEnvironment() as env:
            assert await env.run(race, 3600, 0.3) == "slept"
            assert await env.run(race, 0.2, 600) == "too slow"
            assert await env.run(in_threads, 4) == 8

    asyncio.run(main())


def test_runs_side_by_side_keep_their_order_in_time() -> None:
    async def main() -> None:
        async with TestEnvironment(start=START) as env:
            found = await asyncio.gather(
                *(env.run(naps, 3600 * n, 24 // n) for n in (1, 2, 3)), env.run(reminders)
            )
            assert found[:3] == [48, 24, 16]
            for run in (await env.storage.list_runs(_all())).items:
                for event in await env.storage.get_events(run.run_id):
                    assert event.type != "sleep.completed" or event.data["lag"] < 60

    asyncio.run(main())


def test_without_skipping_only_advance_moves_the_clock() -> None:
    async def main() -> None:
        async with TestEnvironment(start=START, auto_skip=False) as env:
            run_id = await env.start(reminders)
            with pytest.raises(TimeoutError, match=r"advance\(\)"):
                await env.result(run_id)
            await env.advance("8d")
            assert await _fired(env, run_id) == 1
            await env.advance("30d")
            sent = await env.result(run_id)
        for week, at in enumerate(sent, 1):
            assert timedelta(0) <= at - (START + timedelta(weeks=week)) < timedelta(minutes=1)

    asyncio.run(main())


def test_advancing_ends_where_it_should() -> None:
    async def main() -> None:
        async with TestEnvironment(start=START) as env:
            await env.start(reminders)
            await env.advance("10d")
            assert timedelta(days=10) <= await env.now() - START < timedelta(days=10, minutes=1)

    asyncio.run(main())


def test_a_run_can_be_cancelled_on_the_way() -> None:
    async def main() -> None:
        async with TestEnvironment() as env:
            run_id = await env.start(reminders)
            await env.advance("8d")
            await env.cancel(run_id, reason="enough")
            with pytest.raises(RunCancelled):
                await env.result(run_id)

    asyncio.run(main())


def test_a_run_that_waits_for_nothing_that_comes_is_reported() -> None:
    async def main() -> None:
        async with TestEnvironment() as env:
            with pytest.raises(TimeoutError, match="nothing is due"):
                await env.run(waits_forever)
            with pytest.raises(RunNotFound):
                await env.result("run_of_nobody")

    asyncio.run(main())


def test_a_stalled_run_raises_its_reason_and_heals() -> None:
    async def main() -> None:
        async with TestEnvironment() as env:
            behaves = False

            @workflow(name="testing.moody")
            async def moody() -> int:
                if not behaves:
                    time.sleep(0)  # noqa: ASYNC251 - what stalls the run
                return await double(4)

            run_id = await env.start(moody)
            with pytest.raises(WorkflowContextError, match=r"time\.sleep"):
                await env.result(run_id)
            behaves = True
            assert await env.result(run_id) == 8

    asyncio.run(main())


def test_a_store_that_was_passed_in_stays_open() -> None:
    async def main() -> None:
        storage = MemoryStorageBackend()
        async with TestEnvironment(storage) as env:
            run_id = await env.start(plus_one, 1)
            assert env.storage is storage
        assert (await storage.get_run(run_id)).status == "completed"

    asyncio.run(main())


def test_an_environment_must_be_entered() -> None:
    with pytest.raises(WorkflowError, match="async with"):
        asyncio.run(TestEnvironment().start(plus_one, 1))


# --- histories ----------------------------------------------------------------------------------


async def _history_of(wf, *args, advance: str = "0s") -> History:
    async with TestEnvironment(start=START) as env:
        run_id = await env.start(wf, *args)
        await env.advance(advance)
        return await History.fetch(run_id, env.storage)


def test_a_history_survives_its_file(tmp_path) -> None:
    history = asyncio.run(_history_of(naps, 60, 2, advance="1h"))
    history.dump(tmp_path / "naps.json")
    loaded = History.load(tmp_path / "naps.json")
    assert loaded.events == history.events
    assert (loaded.v, loaded.seen_seq) == (1, history.seen_seq)
    assert loaded.run.run_id == history.run.run_id
    assert loaded.run.status is RunStatus.COMPLETED
    assert replay(tmp_path / "naps.json").ok
    assert replay(str(tmp_path / "naps.json"), naps).status == "completed"


def test_fetching_needs_a_run() -> None:
    with pytest.raises(RunNotFound):
        asyncio.run(History.fetch("run_of_nobody", MemoryStorageBackend()))


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "no JSON"),
        ("[1, 2]", "valid dictionary"),
        ("{}", "run: Field required"),
        ('{"v": 1, "run": {"run_id": "r"}, "seen_seq": -1, "events": []}', r"run\.workflow: Field"),
    ],
)
def test_nonsense_is_named(tmp_path, text: str, wrong: str) -> None:
    (tmp_path / "odd.json").write_text(text)
    with pytest.raises(SerializationError, match=wrong) as caught:
        History.load(tmp_path / "odd.json")
    assert "odd.json" in str(caught.value)


def test_a_history_with_a_hole_is_refused(tmp_path) -> None:
    history = asyncio.run(_history_of(plus_one, 1))
    dataclasses.replace(history, events=history.events[1:]).dump(tmp_path / "hole.json")
    with pytest.raises(SerializationError, match="event 1 has seq=2"):
        History.load(tmp_path / "hole.json")


def test_newer_versions_are_refused_by_name(tmp_path) -> None:
    history = asyncio.run(_history_of(plus_one, 1))
    dataclasses.replace(history, v=2).dump(tmp_path / "newer.json")
    with pytest.raises(SchemaTooNew, match="version=2"):
        History.load(tmp_path / "newer.json")
    newer = tuple(e._replace(v=9) for e in history.events)
    dataclasses.replace(history, events=newer).dump(tmp_path / "events.json")
    with pytest.raises(SchemaTooNew, match="event seq=1"):
        History.load(tmp_path / "events.json")


def test_replaying_runs_no_step_in_and_out_of_a_loop() -> None:
    history = asyncio.run(_history_of(plus_one, 1))
    calls.clear()

    async def inside() -> None:
        replay(history).check()

    asyncio.run(inside())
    replay(history).check()
    assert calls == []


def test_changed_code_is_found_with_expected_and_found() -> None:
    history = asyncio.run(_history_of(naps, 60, 2, advance="1h"))

    @workflow(name="testing.naps_changed")
    async def changed(pause: float, times: int = 1) -> int:
        await double(times)
        for _ in range(times):
            await sleep(pause)
        return await double(times)

    result = replay(history, changed)
    assert not result.ok
    assert result.status == "stalled"
    with pytest.raises(NonDeterminism) as caught:
        result.check()
    assert caught.value is result.mismatch
    assert "op=1#1:step" in result.mismatch.expected or "sleep" in result.mismatch.expected
    assert result.mismatch.seq > 0


def test_changed_parameters_are_a_mismatch() -> None:
    history = asyncio.run(_history_of(plus_one, 1))

    @workflow(name="testing.plus_one_changed")
    async def changed(x: int, y: int) -> int:
        return await double(x) + y

    assert replay(history, changed).status == "stalled"


def test_replaying_needs_the_code() -> None:
    history = asyncio.run(_history_of(plus_one, 1))
    run = dataclasses.replace(history.run, workflow="testing.unheard_of")
    with pytest.raises(ConfigurationError, match="unheard_of"):
        replay(dataclasses.replace(history, run=run))


def test_an_open_run_replays_to_where_it_waits() -> None:
    history = asyncio.run(_history_of(reminders, advance="8d"))
    result = replay(history)
    assert (result.status, result.waiting) == ("suspended", ("1#2:sleep",))


def test_inputs_that_no_turn_delivered_are_left_out() -> None:
    history = asyncio.run(_history_of(reminders, advance="8d"))
    seq = len(history.events) + 1
    cancel = Event(
        "cancel.requested", "I", {"reason": ""}, None, "c", history.run.run_id, seq, START
    )
    unseen = dataclasses.replace(history, events=(*history.events, cancel))
    assert replay(unseen).status == "suspended"
    seen = dataclasses.replace(unseen, seen_seq=seq)
    assert replay(seen).status == "cancelled"
    pending = dataclasses.replace(history, events=history.events[:1], seen_seq=0)
    assert replay(pending).status == "pending"


def test_an_end_that_a_limit_decided_is_no_mismatch() -> None:
    history = asyncio.run(_history_of(reminders, advance="8d"))
    seq = len(history.events) + 1
    error = {"type": "pyworkflow.errors:HistoryTooLong", "message": "", "portable": True}
    failed = Event(
        "workflow.failed", "C", {"error": error}, None, None, history.run.run_id, seq, START
    )
    result = replay(dataclasses.replace(history, events=(*history.events, failed)))
    assert result.ok
    assert result.status == "failed"


# --- asking the store -----------------------------------------------------------------------------


def _all():
    from pyworkflow.spi import RunQuery

    return RunQuery()


async def _fired(env: TestEnvironment, run_id: str) -> int:
    return sum(e.type == "sleep.completed" for e in await env.storage.get_events(run_id))
