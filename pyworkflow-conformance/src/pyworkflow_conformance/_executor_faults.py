"""Group EXE, workers that die, stop, drain, and code that takes them down."""
# ruff: noqa: N802 - the ids are part of the names

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from time import monotonic

import pytest

from pyworkflow.runs import Run, RunStatus
from pyworkflow_conformance._executor_case import ExecutorCase, ExecutorSuite, check

__all__ = ["FaultChecks"]

#: A lease that nothing in a check outlasts.
LONG = "300s"


class FaultChecks(ExecutorSuite):
    """EXE, faults."""

    @check
    async def test_EXE_06_worker_sigkill_recovers_within_lease(self, t: ExecutorCase) -> None:
        """EXE-06: what a killed worker held is done by another one when its lease is over.

        Lease 2 s; within 20 s. Usual cause: the message is lost with the worker, and nobody
        sweeps.
        """
        first = t.worker()
        await t.start("held", "a")
        await t.begun("a")
        await first.kill()
        began = monotonic()
        t.worker()
        t.go("a")
        await t.done("a")
        assert monotonic() - began < 20
        assert len(t.effects("end", "a-after")) == 1
        assert len(t.effects("begin", "a")) - len(t.effects("begin", "a-after")) == 2

    @check(needs=("graceful_drain",))
    async def test_EXE_07_sigterm_drains_no_lost_step(self, t: ExecutorCase) -> None:
        """EXE-07: SIGTERM lets what is begun end within the grace, and gives the rest back at once.

        Lease 300 s, grace 5 s: a deploy neither repeats a step nor waits for a lease. Usual cause:
        the worker dies at the signal, or its pool does; or it ends without releasing.
        """
        first = t.worker(lease=LONG, mute="1s", drain="5s")
        await t.start("held", "a")
        await t.begun("a")
        first.signal(signal.SIGTERM)
        t.go("a")
        await first.ended()
        ends = [one.name for one in t.effects("end", "a")]
        assert "a" in ends, "the step did not end within the grace"
        second = t.worker(lease=LONG, mute="1s", drain="1s")
        await t.done("a", patience=30)
        t.once("a", "a-after")
        await t.start("held", "b")
        await t.begun("b")
        second.signal(signal.SIGTERM)
        await second.ended()
        t.worker(lease=LONG, mute="1s")
        t.go("b")
        await t.done("b", patience=30)
        t.once("b-after")

    @check
    async def test_EXE_08_sigstop_zombie_fenced(self, t: ExecutorCase) -> None:
        """EXE-08: a worker that is stopped past its lease changes nothing when it goes on.

        As a virtual machine that was paused. Usual cause: the worker commits results otherwise
        than under its claim.
        """
        first = t.worker()
        await t.start("held", "a")
        stopped = await t.begun("a")
        first.signal_all(signal.SIGSTOP)
        t.worker()
        again = await t.seen(
            "another worker takes the step",
            lambda: [one for one in t.effects("begin", "a") if one.pid != stopped.pid],
        )
        t.go("a")
        winner = await t.result("a")
        assert winner == again[0].pid
        length = (await t.run("a")).history_length
        first.signal_all(signal.SIGCONT)
        await t.start("one", "b")
        await t.done("b")
        first.signal(signal.SIGTERM)
        await first.ended()
        events = await t.store.get_events("run-a")
        assert (await t.run("a")).history_length == length
        done = [one.op for one in events if one.type == "step.completed"]
        assert len(done) == len(set(done)) == 2
        assert len(t.effects("end", "a-after")) == 1

    @check
    async def test_EXE_11_poison_step_contained(self, t: ExecutorCase) -> None:
        """EXE-11: a step that kills its worker each time fails, and other runs go on.

        Usual cause: the doorbell is delivered again for ever, or the deaths are not counted since
        the worker does not claim through the store.
        """
        await t.start("kills_step", "a")
        keep = _keeper(t)
        assert await _ended(t, "a", keep) is RunStatus.COMPLETED
        assert await t.result("a") == "WorkerLost"
        assert 2 <= len(t.effects("begin", "a")) <= 5
        keep()
        await t.start("one", "b")
        await t.done("b")
        t.once("b")

    @check
    async def test_EXE_12_poison_turn_stalls(self, t: ExecutorCase) -> None:
        """EXE-12: workflow code that kills its worker each time stalls the run, and no more.

        Usual cause: as EXE-11.
        """
        await t.start("kills_turn", "a")
        keep = _keeper(t, lease="1s", mute="500ms")
        await _ended(t, "a", keep, stalled=True)
        assert 2 <= len(t.effects("headers", "run-a")) <= 15  # one for each turn that began
        keep()
        await t.start("one", "b")
        await t.done("b")
        t.once("b")

    @check
    async def test_EXE_14_sleep_fires_after_full_restart(self, t: ExecutorCase) -> None:
        """EXE-14: a run that sleeps when every worker is killed is woken by those that come.

        Usual cause: timers are kept in workers, or in messages that wait (eta, countdown).
        """
        workers = [t.worker(), t.worker()]
        await t.start("nap", "a", 3)
        await t.until("the run sleeps", partial(_sleeps, t, "a"))
        for worker in workers:
            await worker.kill()
        assert not t.effects("begin", "a-after")
        t.worker()
        await t.done("a")
        t.once("a-before", "a-after")

    @check(needs=("kill_detection",))
    async def test_EXE_24_pool_child_killed_freed_at_once(self, t: ExecutorCase) -> None:
        """EXE-24: what a killed pool process held is free at once, not when its lease ends.

        Lease 300 s. Usual cause: ``Runtime.free(pid)`` is not called, or no sweep follows it.
        """
        worker = t.worker(lease=LONG, mute="1s", concurrency=2)
        await t.start("held", "a")
        child = await t.begun("a")
        if child.pid == worker.pid:
            pytest.skip("does not apply: EXE-24 needs a worker command with a pool of processes")
        os.kill(child.pid, signal.SIGKILL)
        await t.seen("the step begins again", lambda: len(t.effects("begin", "a")) > 1, 30)
        t.go("a")
        await t.done("a", patience=30)
        t.once("a-after")


def _keeper(t: ExecutorCase, lease: str = "2s", mute: str = "1s") -> Callable[[], None]:
    """Keeps a worker running, as a service manager does."""

    def keep() -> None:
        if not t.workers or t.workers[-1].status is not None:
            t.worker(lease=lease, mute=mute)

    return keep


async def _ended(
    t: ExecutorCase, name: str, keep: Callable[[], None], *, stalled: bool = False
) -> RunStatus:
    async def probe() -> Run | None:
        keep()
        run = await t.run(name)
        there = run.status is RunStatus.STALLED if stalled else run.status.is_terminal
        return run if there else None

    return (await t.until(f"{name} ends or stalls", probe, 120)).status


async def _sleeps(t: ExecutorCase, name: str) -> bool:
    events = await t.store.get_events(f"run-{name}")
    work = await t.store.list_work(f"run-{name}")
    soon = await t.store.now() + timedelta(milliseconds=1)
    asleep = any(one.type == "sleep.created" for one in events)
    return asleep and all(item.lease is None and item.due_at > soon for item in work)
