"""Group CRA, the part with killed and stopped processes and servers (I1, I3); and GC-06."""
# ruff: noqa: N802 - the ids are part of the names

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Any, TypeVar

from pyworkflow.errors import KeyTaken, StorageUnavailable
from pyworkflow.spi.storage import Committed
from pyworkflow_conformance import _worker
from pyworkflow_conformance._case import (
    Case,
    Server,
    Suite,
    command,
    note,
    scenario,
    seconds,
    under,
)
from pyworkflow_conformance._children import Child, alone, check_batches, dice, sizes, sound

__all__ = ["CrashChecks"]

R = TypeVar("R")
#: Seconds within which a store answers again after a crash, on a slow machine.
SOON = 60.0


class CrashChecks(Suite):
    """CRA-01, 02, 07 to 12; GC-06."""

    @scenario(needs=("url",))
    async def test_CRA_01_kill_during_commit_loop(self, t: Case) -> None:
        """CRA-01 (I1, I3): after SIGKILL every acknowledged change is there, and none by half.

        A worker that was told "committed" has rung doorbells and forgotten. Usual cause: the
        answer is given before the write is; or a change is several writes.
        """
        chance = dice(t, "CRA-01")
        for round_ in range(sizes(3)):
            run_id = f"run-{round_}"
            await t.start(run_id)
            async with alone(t), Child(t, "batches", run_id=run_id, writer="w") as child:
                await _some(child, chance.randint(1, 25))
                await asyncio.sleep(chance.random() * 0.01)
                await child.kill()
            await check_batches(t.store, run_id, "w", child.acknowledged())
            await sound(t.store)

    @scenario(needs=("url",))
    async def test_CRA_02_kill_between_reserve_and_commit(self, t: Case) -> None:
        """CRA-02 (I1): an idempotency key is taken if and only if its run is there.

        A key that is taken by no run blocks its order for ever. Usual cause: the key is reserved
        in a write of its own.
        """
        chance = dice(t, "CRA-02")
        async with alone(t), Child(t, "starts") as child:
            await _some(child, chance.randint(1, 15))
            await asyncio.sleep(chance.random() * 0.01)
            await child.kill()
        tried, done = len(child.tried()), len(child.acknowledged())
        for n in range(tried):
            run = await t.store.get_run(f"run-{n}")
            owner = await t.store.find_run(f"key-{n}")
            assert (owner is None) == (run is None), f"key and run do not agree: n={n}"
            assert run is not None or n >= done, f"an acknowledged run is lost: n={n}"
            try:
                await t.store.commit_one(_worker.creation(f"again-{n}", f"key-{n}"))
            except KeyTaken as refusal:
                owner_now: str | None = refusal.owner
            else:
                owner_now = None
            assert owner_now == owner == (None if run is None else f"run-{n}")

    @scenario(needs=("url",))
    async def test_CRA_07_unknown_outcome_resolved_by_dedup(self, t: Case) -> None:
        """CRA-07: who does not know what became of a change sends it again, and it is there once.

        Usual cause: the key of a change is noted in another write than the change.
        """
        chance = dice(t, "CRA-07")
        await t.start()
        first = 0
        for _ in range(sizes(4)):
            going_on: dict[str, Any] = {"run_id": "run", "writer": "w", "first": first}
            async with alone(t), Child(t, "batches", **going_on) as child:
                await _some(child, chance.randint(1, 4), "at")
                await asyncio.sleep(chance.random() * 0.005)
                await child.kill()
            last = child.tried()[-1]
            there = [e.data["n"] for e in await t.store.get_events("run") if "n" in e.data]
            answer = await t.store.commit_one(_worker.batch("run", "w", last))
            # A server may finish after its client has died: then it came between the two reads.
            assert answer.duplicate or last not in there
            assert (await t.store.commit_one(_worker.batch("run", "w", last))).seqs == answer.seqs
            first = last + 1
        messages = [e.data["n"] for e in await t.store.get_events("run", after=1)]
        assert messages == [n for n in range(first) for _ in range(_worker.BATCH)]

    @scenario(needs=("multi_process", "url"))
    async def test_CRA_08_sigstop_past_lease(self, t: Case) -> None:
        """CRA-08 (I4): who slept through its lease and was replaced is fenced when it wakes.

        Usual cause: the fence is checked by the client, or against the clock instead of the token.
        """
        await t.start()
        async with Child(t, "holds", run_id="run", lease=60) as child:
            await child.line("ready")
            child.signal(signal.SIGSTOP)
            await t.shift(61)
            claim = await t.turn(owner="b")
            child.let_go()
            child.signal(signal.SIGCONT)
            await child.ended()
            assert [line["error"] for line in child.lines if "error" in line] == ["Fenced"], (
                f"the zombie was not fenced: {child.lines}"
            )
        await t.store.commit_one(under(claim, seen=1, events=[command()]))
        assert (await t.run()).history_length == 2

    @scenario(needs=("durable", "server"))
    async def test_CRA_09_server_kill_acknowledged_kept(self, t: Case) -> None:
        """CRA-09 (I1, I3): SIGKILL to the server loses nothing that it acknowledged.

        Usual cause: the server flushes later than it answers; then the store is not durable, and
        must not say that it is.
        """
        server = _server(t)
        chance = dice(t, "CRA-09")
        for round_ in range(sizes(2)):
            run_id = f"run-{round_}"
            await _patiently(lambda: t.start(run_id))  # noqa: B023 - awaited in this round
            acknowledged: list[_Line] = []
            writing = asyncio.ensure_future(_write(t, run_id, acknowledged, sizes(60)))
            for _ in range(1000):
                if len(acknowledged) < 5 and not writing.done():
                    await asyncio.sleep(0.002)
            await asyncio.sleep(chance.random() * 0.02)
            await asyncio.to_thread(server.kill)
            await asyncio.to_thread(server.start)
            await asyncio.wait_for(writing, SOON)
            found = await check_batches(t.store, run_id, "w", acknowledged, more=0)
            assert found == len(acknowledged)

    @scenario(needs=("server",))
    async def test_CRA_10_server_restart_reconnects(self, t: Case) -> None:
        """CRA-10: without its server a store says so by type; afterwards the same object works.

        Workers live longer than servers. Usual cause: a pool hands out dead connections, or an
        exception of the client library gets through.
        """
        server = _server(t)
        await t.start()
        other = await t.open()
        await other.get_run("run")
        await asyncio.to_thread(server.kill)
        began = monotonic()
        calls: tuple[Callable[[], Awaitable[object]], ...] = (
            lambda: t.store.commit_one(t.outside(key="down", events=[note()])),
            lambda: t.store.get_run("run"),
            lambda: t.claim(("run", "turn")),
            t.store.now,
        )
        for call in calls:
            try:
                await asyncio.wait_for(call(), SOON)
            except StorageUnavailable:
                pass
            else:
                raise AssertionError("a store without its server answered")
        assert monotonic() - began < 2 * SOON
        await asyncio.to_thread(server.start)
        for store in (t.store, other):
            assert await _patiently(store.now) is not None
        answer = await _patiently(
            lambda: t.store.commit_one(t.outside(key="down", events=[note("again")]))
        )
        assert answer.last_seq >= 1
        await asyncio.to_thread(server.pause)
        try:
            call_ = asyncio.ensure_future(
                _patiently(lambda: other.commit_one(t.outside(key="paused", events=[note("p")])))
            )
            await asyncio.sleep(0)
        finally:
            await asyncio.to_thread(server.resume)
        await asyncio.wait_for(call_, SOON)
        if self.capabilities.durable:
            await t.turn()

    @scenario(needs=("url",))
    async def test_CRA_11_half_written_index_rebuilt(self, t: Case) -> None:
        """CRA-11: killed while a store is made, it is opened by the next one as if nothing was.

        Usual cause: several files or tables are made, and that the first is there is taken as
        a sign that all are.
        """
        chance = dice(t, "CRA-11")
        for round_ in range(sizes(3)):
            namespace = f"{t.namespace}-{round_}"
            async with Child(t, "opens", namespace=namespace, run_id="run", gate=True) as child:
                await child.go()
                await asyncio.sleep(chance.random() * 0.05)
                await child.kill()
            store = await asyncio.wait_for(t.open(namespace), SOON)
            if child.acknowledged():
                assert await store.get_run("run") is not None
            await store.commit_one(_worker.creation("other"))
            assert (await store.commit_one(_worker.creation("run"))).last_seq == 1
            await sound(store)
            await store.close()

    @scenario(needs=("multi_process", "url"))
    async def test_CRA_12_lock_of_dead_process_released(self, t: Case) -> None:
        """CRA-12: what a killed process had locked is free at once, for those that are open.

        Usual cause: a lock file that stays, or a lock with a long time to live.
        """
        chance = dice(t, "CRA-12")
        await t.start()
        for n in range(sizes(3)):
            first = Child(t, "batches", run_id="run", writer=f"a{n}", size=2000)
            second = Child(t, "batches", run_id="run", writer=f"b{n}", size=2000)
            async with first, second:
                await _some(first, 2)
                await _some(second, 2)
                await asyncio.sleep(chance.random() * 0.01)
                await first.kill()
                # Both the process that goes on and this one get their turn.
                before = len(second.acknowledged())
                await asyncio.wait_for(t.send(note(str(n))), SOON)
                while len(second.acknowledged()) <= before:
                    await second.line("ack")
                await second.kill()
            await asyncio.wait_for(t.send(note(f"after {n}")), SOON)
            await check_batches(t.store, "run", f"a{n}", first.acknowledged())
            await check_batches(t.store, "run", f"b{n}", second.acknowledged())

    @scenario(needs=("url",))
    async def test_GC_06_purge_interrupted_resumes(self, t: Case) -> None:
        """GC-06: killed in a purge, every run is whole or gone, and the next purge ends the work.

        Usual cause: a run's rows are deleted table by table.
        """
        number = sizes(20, 200)
        for n in range(number):
            await t.start(f"run-{n}", idempotency_key=f"key-{n}", key=f"s{n}")
            await t.send(*(note(key=f"k{m}") for m in range(10)), run_id=f"run-{n}")
            await t.end(f"run-{n}")
        whole = await t.store.get_events("run-0")
        async with alone(t), Child(t, "purges", limit=3, opened=True) as child:
            await child.go()
            await _some(child, 2)
            await child.kill()
        left = 0
        for n in range(number):
            while True:
                run = await t.store.get_run(f"run-{n}")
                events = await t.store.get_events(f"run-{n}")
                # A server may finish after its client has died: then it came between the reads.
                if (await t.store.get_run(f"run-{n}") is None) == (run is None):
                    break
            assert len(events) == (0 if run is None else len(whole)), f"half a run: n={n}"
            # Its key stays taken, as a purged run's does.
            assert await t.store.find_run(f"key-{n}") == f"run-{n}"
            left += run is not None
        before = await t.store.now() + seconds(86_400)
        removed = 0
        while found := await t.store.purge(before=before, limit=7):
            removed += found
        # Three is what the client asked for last; where the store is files, nobody goes on with it.
        late = 0 if t.suite.files(t.namespace) else 3
        assert left - late <= removed <= left
        assert (await t.store.stats())["runs"] == 0


_Line = dict[str, object]


def _server(t: Case) -> Server:
    server = t.suite.server(t.namespace)
    assert server is not None, "the suite gives no server"
    return server


async def _some(child: Child, number: int, what: str = "ack") -> None:
    """Wait until the child has said so much."""
    for _ in range(number):
        await child.line(what)


async def _write(t: Case, run_id: str, acknowledged: list[_Line], number: int) -> None:
    """Commit batches, each until it is answered."""
    for n in range(number):
        answer: Committed = await _patiently(
            lambda: t.store.commit_one(_worker.batch(run_id, "w", n))  # noqa: B023 - awaited here
        )
        acknowledged.append({"ack": n, "seqs": list(answer.seqs)})


async def _patiently(call: Callable[[], Awaitable[R]]) -> R:
    """Call until the store answers. A run that a store without durability lost is an answer."""
    async with asyncio.timeout(SOON):
        while True:
            try:
                return await call()
            except StorageUnavailable:
                await asyncio.sleep(0.01)
