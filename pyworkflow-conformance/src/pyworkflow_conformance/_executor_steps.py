"""Group EXE, steps and sleeps: kinds, limits of time, what a sleeping run costs."""
# ruff: noqa: N802 - the ids are part of the names

from __future__ import annotations

from functools import partial

from pyworkflow.runs import RunStatus
from pyworkflow_conformance._children import sizes
from pyworkflow_conformance._executor_case import ExecutorCase, ExecutorSuite, check

__all__ = ["StepChecks"]


class StepChecks(ExecutorSuite):
    """EXE, steps."""

    @check
    async def test_EXE_09_step_timeout_enforced(self, t: ExecutorCase) -> None:
        """EXE-09: a step that takes longer than its ``timeout`` ends with ``StepTimeout``.

        Usual cause: steps run outside the runtime, where nobody looks at the time.
        """
        t.worker()
        await t.start("late", "a")
        assert await t.result("a", 30) == "timeout"
        assert len(t.effects("begin", "a")) == 1

    @check
    async def test_EXE_10_cpu_bound_step_keeps_lease(self, t: ExecutorCase) -> None:
        """EXE-10: a step that computes for three leases is not taken over by another worker.

        Usual cause: the loop that renews shares its thread with the step.
        """
        t.worker(lease="1s", mute="500ms")
        await t.start("burn", "a", 3.0)
        await t.begun("a")
        t.worker(lease="1s", mute="500ms")
        await t.done("a")
        t.once("a")

    @check
    async def test_EXE_13_sleep_zero_resource(self, t: ExecutorCase) -> None:
        """EXE-13: runs that sleep hold neither a place in a worker nor a lease.

        40 sleepers here (800 with ``PYWORKFLOW_FULL=1``), and a worker with one place. Usual
        cause: a sleep is a waiting task, or a message with an eta that the worker holds.
        """
        number = sizes(40)
        t.worker(concurrency=1)
        names = [f"a{n}" for n in range(number)]
        for name in names:
            await t.start("nap", name, 3600)
        await t.seen("all sleep", lambda: len(t.effects("end", "a")) == number, 30 + number * 0.2)
        await t.start("one", "b")
        await t.done("b", patience=60 + number * 0.2)  # behind what was rung for twice
        for name in names:
            await t.until(f"{name} holds nothing", partial(_free, t, name))
            assert (await t.run(name)).status is RunStatus.SUSPENDED

    @check
    async def test_EXE_18_sync_and_async_steps(self, t: ExecutorCase) -> None:
        """EXE-18: async steps, blocking steps and retries work alike.

        Usual cause: a worker without a running loop, or with one per message.
        """
        t.worker()
        await t.start("kinds", "a")
        assert await t.result("a") == ["a-async", "a-sync", "a-again"]
        t.once("a-async", "a-sync")
        assert len(t.effects("begin", "a-again")) == 2

    @check(needs=("hard_time_limit",))
    async def test_EXE_23_hard_time_limit_ends_blocking_step(self, t: ExecutorCase) -> None:
        """EXE-23: a blocking step with ``hard_timeout`` ends with ``StepTimeout``, too.

        Usual cause: ``hard_time_limit`` is declared, and steps run in threads.
        """
        t.worker()
        await t.start("stuck", "a")
        assert await t.result("a", 30) == "timeout"


async def _free(t: ExecutorCase, name: str) -> bool:
    work = await t.store.list_work(f"run-{name}")
    return bool(work) and all(item.lease is None for item in work)
