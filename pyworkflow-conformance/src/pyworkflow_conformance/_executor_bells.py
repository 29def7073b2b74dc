"""Group EXE, doorbells: lost, doubled, out of order, many, and where they lead."""
# ruff: noqa: N802 - the ids are part of the names

from __future__ import annotations

import signal
from functools import partial
from time import monotonic

from pyworkflow.runs import RunStatus
from pyworkflow.spi.storage import TURN
from pyworkflow_conformance._children import sizes
from pyworkflow_conformance._executor_case import (
    OTHER,
    PROGRAMS,
    ExecutorCase,
    ExecutorSuite,
    check,
)
from pyworkflow_conformance._executor_other import HEADER

__all__ = ["BellChecks"]

#: Long enough that nothing which a check sees was brought by a sweep.
NEVER = "300s"


class BellChecks(ExecutorSuite):
    """EXE, doorbells."""

    @check
    async def test_EXE_01_notify_runs_once(self, t: ExecutorCase) -> None:
        """EXE-01: a run that is started is worked on, once, and its result is stored.

        Usual cause: workers listen at another place than clients ring, or a message is handed to
        several workers that do not claim.
        """
        t.worker()
        t.worker()
        names = [f"a{n}" for n in range(5)]
        for name in names:
            await t.start("one", name)
        for name in names:
            assert await t.result(name) == name
        t.once(*names)

    @check(needs=("distributed",))
    async def test_EXE_02_notify_duplicate_one_effect(self, t: ExecutorCase) -> None:
        """EXE-02: a doorbell that comes twenty times has one effect.

        Brokers deliver again after a lost connection. Usual cause: a worker that works on what a
        message says without a claim in the store.
        """
        t.worker()
        t.worker()
        await t.start("held", "a")
        await t.begun("a")
        await t.ring(*[("run-a", TURN)] * 20)
        await t.start("one", "b")
        await t.ring(*[("run-b", TURN)] * 20)
        await t.done("b")
        t.go("a")
        await t.done("a")
        await t.ring(*[("run-a", TURN)] * 20)
        await t.start("one", "c")  # behind them
        await t.done("c")
        t.once("a", "a-after", "b", "c")

    @check
    async def test_EXE_03_notify_lost_swept(self, t: ExecutorCase) -> None:
        """EXE-03: a run whose doorbell was lost is found by a sweep, without another one ringing.

        Doorbells are hints; a broker may lose all of them. Usual cause: workers do not sweep, or
        only one that is not running does (a scheduler of its own).
        """
        await t.start("one", "before", ring=False)
        t.worker()
        await t.done("before")
        await t.start("one", "after", ring=False)
        await t.done("after")
        t.once("before", "after")

    @check(needs=("distributed",))
    async def test_EXE_04_order_not_assumed(self, t: ExecutorCase) -> None:
        """EXE-04: doorbells in any order, too early, or for what is not there, do no harm.

        Usual cause: an item is dropped because its doorbell came before the item was due.
        """
        names = [f"a{n}" for n in range(10)]
        bells = [(f"run-{name}", TURN) for name in names]
        bells += [("run-none", TURN), ("run-a0", "step:9"), ("run-a1", "deliver:0")]
        t.worker()
        t.chance.shuffle(bells)
        await t.ring(*bells)
        for name in names:
            await t.start("fan", name, 2, ring=False)
        t.chance.shuffle(bells)
        await t.ring(*bells)
        await t.done(*names)
        t.once(*(f"{name}-{n}" for name in names for n in range(2)))

    @check(needs=("distributed",))
    async def test_EXE_05_notify_storm_10k_bounded(self, t: ExecutorCase) -> None:
        """EXE-05: thousands of superfluous doorbells delay the work behind them by a bounded time.

        1,000 here, 10,000 with ``PYWORKFLOW_FULL=1``; one doorbell costs less than 30 ms. Usual
        cause: a doorbell for nothing is sent again, or handled one at a time at great cost.
        """
        number = sizes(1_000, 10_000)
        t.worker()
        await t.start("one", "first")
        await t.done("first")
        began = monotonic()
        for _ in range(number // 500):
            await t.ring(*[("run-first", TURN)] * 500)
        await t.start("one", "behind")
        await t.done("behind", patience=30 + number * 0.03)
        assert monotonic() - began < 30 + number * 0.03
        t.once("first", "behind")

    @check
    async def test_EXE_15_two_sweepers_no_double(self, t: ExecutorCase) -> None:
        """EXE-15: workers that sweep at once double no effect.

        Every worker sweeps. Usual cause: a sweep that works on what it finds without a claim.
        """
        names = [f"a{n}" for n in range(10)]
        for name in names:
            await t.start("nap", name, 0.5, ring=False)
        for _ in range(2):
            t.worker()
        await t.done(*names)
        t.once(*(f"{name}-{part}" for name in names for part in ("before", "after")))

    @check
    async def test_EXE_16_unknown_workflow_released(self, t: ExecutorCase) -> None:
        """EXE-16: a worker without the workflow leaves the run to others, as it was.

        During a deploy, old workers meet new runs. Usual cause: the message is acknowledged and
        nobody rings again, or the run fails.
        """
        await t.start("one", "a")
        t.worker(modules=[OTHER])
        for name in ("b", "c"):
            await t.start("other", name)
        await t.done("b", "c")
        assert (await t.run("a")).status is RunStatus.PENDING
        t.worker()
        await t.done("a")
        t.once("a", "b", "c")

    @check
    async def test_EXE_17_mixed_versions_route(self, t: ExecutorCase) -> None:
        """EXE-17: in a fleet of two versions every run reaches a worker that has its workflow.

        Usual cause: as EXE-16; or a worker takes what it cannot do again and again, so that the
        others never see it.
        """
        t.worker(modules=[OTHER])
        t.worker(modules=[PROGRAMS])
        names = [f"{kind}-{n}" for n in range(8) for kind in ("one", "other")]
        for name in names:
            await t.start(name.partition("-")[0], name)
        await t.done(*names)
        t.once(*names)

    @check(needs=("distributed",))
    async def test_EXE_19_trace_headers_propagate(self, t: ExecutorCase) -> None:
        """EXE-19: what ``pyworkflow_inject_headers`` adds to a doorbell arrives with the turn.

        A trace goes on in the worker. Usual cause: ``Doorbell.headers`` is not sent, or the worker
        makes a doorbell without them. They are no part of the body.
        """
        t.worker(mute=NEVER)
        await t.start("one", "a")
        await t.done("a")
        found = {one.value for one in t.effects("headers", "run-a")}
        assert "trace-of-run-a" in found, f"header {HEADER} did not arrive: {found}"

    @check
    async def test_EXE_20_queue_routing(self, t: ExecutorCase) -> None:
        """EXE-20: what belongs to a queue is done by workers of this queue alone.

        Queues are how work reaches machines that can do it. Usual cause: ``Doorbell.queue`` is
        not used, or sweeps of a worker take from every queue.
        """
        t.worker(queues=["default"])
        await t.start("routed", "a")
        await t.until("the other queue has an item", partial(_queued, t, "run-a"))
        for name in ("b", "c"):
            await t.start("one", name)
        await t.done("b", "c")
        assert not t.effects("begin", "a"), "a worker of another queue did it"
        t.worker(queues=["conformance-other"])
        await t.done("a")
        t.once("a", "a-after")
        assert t.effects("begin", "a")[0].pid != t.effects("begin", "b")[0].pid

    @check(needs=("distributed",))
    async def test_EXE_21_prefetch_starvation_bounded(self, t: ExecutorCase) -> None:
        """EXE-21: work does not wait behind a busy worker while another one is idle.

        Usual cause: a worker takes more messages than it works on, and keeps them.
        """
        t.worker(concurrency=1)
        await t.start("held", "a")
        await t.begun("a")
        t.worker(concurrency=1)
        names = [f"b{n}" for n in range(10)]
        for name in names:
            await t.start("one", name)
        await t.done(*names, patience=30)
        t.go("a")
        await t.done("a")
        t.once("a", *names)

    @check(needs=("broker",))
    async def test_EXE_22_broker_down_start_still_durable(self, t: ExecutorCase) -> None:
        """EXE-22: with the broker away, a run is started durably within seconds, and done later.

        The store is the queue of record. Usual cause: the client retries, or fails, when it
        cannot ring; or workers end when the broker goes.
        """
        broker = self.broker(t.namespace)
        assert broker is not None
        t.worker()
        await t.start("one", "before")
        await t.done("before")
        broker.stop()
        try:
            for name in ("a", "b"):
                answer = await t.asked("one", name)
                assert answer["seconds"] < 5, f"start took {answer['seconds']:.1f} s"
                assert (await t.run(name)).workflow == "conformance_exe.one"
        finally:
            broker.start()
        await t.done("a", "b")
        await t.start("one", "later")
        await t.done("later")
        t.once("before", "a", "b", "later")

    @check(needs=("priority",))
    async def test_EXE_25_priority_sooner(self, t: ExecutorCase) -> None:
        """EXE-25: of what waits, higher priorities come sooner (a larger number is higher).

        Usual cause: the broker's order is the other way round.
        """
        low, high = [f"low-{n}" for n in range(8)], [f"high-{n}" for n in range(8)]
        for name in low:
            await t.start("one", name, priority=0)
        for name in high:
            await t.start("one", name, priority=9)
        worker = t.worker(concurrency=1)
        await t.done(*low, *high)
        order = [one.name for one in t.effects("begin")]
        ahead = sum(order.index(h) < order.index(one) for h in high for one in low)
        assert ahead > len(high) * len(low) * 0.7, f"not by priority: {order}"
        worker.signal(signal.SIGTERM)


async def _queued(t: ExecutorCase, run_id: str) -> bool:
    work = await t.store.list_work(run_id)
    return any(item.queue == "conformance-other" for item in work)
