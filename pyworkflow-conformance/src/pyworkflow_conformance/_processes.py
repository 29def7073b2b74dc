"""Group CCY, the part with processes; and WATCH across processes and restarts."""
# ruff: noqa: N802 - the ids are part of the names

from __future__ import annotations

import asyncio

from pyworkflow.errors import StorageUnavailable
from pyworkflow.spi.storage import Change
from pyworkflow_conformance import _worker
from pyworkflow_conformance._case import Case, Suite, note, scenario, seconds
from pyworkflow_conformance._children import Child, check_batches, sizes

__all__ = ["ProcessChecks"]

WRITERS = 8


class ProcessChecks(Suite):
    """CCY-09, CCY-13, WATCH-03, WATCH-04."""

    @scenario(needs=("multi_process", "url"))
    async def test_CCY_09_multi_process_append(self, t: Case) -> None:
        """CCY-09: what eight processes append to one run is there once, whole and in order.

        Workers are processes, and all of them write to the runs that they share. Usual cause: the
        next seq is read and written in two steps, or a lock holds only within a process.
        """
        await t.start()
        number = sizes(6)
        children = [
            Child(t, "batches", run_id="run", writer=f"w{n}", number=number, opened=True)
            for n in range(WRITERS)
        ]
        try:
            for child in children:
                await child.line("ready")
            for child in children:
                child.let_go()
            for child in children:
                await child.finished()
                assert len(child.acknowledged()) == number
        finally:
            for child in children:
                await child.__aexit__(None, None, None)
        for n, child in enumerate(children):
            found = await check_batches(t.store, "run", f"w{n}", child.acknowledged(), more=0)
            assert found == number
        assert (await t.run()).history_length == 1 + WRITERS * number * _worker.BATCH

    @scenario(needs=("multi_process", "url"))
    async def test_CCY_13_fork_safety(self, t: Case) -> None:
        """CCY-13: after a fork the child works or is refused by type, and the parent is unharmed.

        Servers with prefork open the store and fork then. Usual cause: both processes write to
        one socket, or the child waits for a lock or a thread that only the parent has.
        """
        await t.start()
        async with Child(t, "forks", run_id="run") as child:
            await child.finished()
            said = [line for line in child.lines if "fork" in line]
            parents = [line for line in child.lines if "parent" in line]
        kinds = ["object", "clone", "new"]
        assert [line["fork"] for line in said] == kinds, f"a forked child says nothing: {said}"
        for line in said:
            assert (
                "ack" in line
                or "StorageError" in line["kinds"]
                or ("WorkflowContextError" in line["kinds"])
            ), f"a forked child fails without a clear refusal: {line}"
        assert "ack" in said[2], f"a new object in a forked child must work: {said[2]}"
        assert [(line["parent"], line["status"]) for line in parents] == [(k, 0) for k in kinds]
        run, events = await t.run(), await t.store.get_events("run")
        assert run.history_length == len(events)
        for line in said:
            assert (f"fork-{line['fork']}" in run.attributes) == ("ack" in line)

    @scenario(needs=("watch", "server"))
    async def test_WATCH_03_reconnect(self, t: Case) -> None:
        """WATCH-03: who watches while the server restarts is told of what comes afterwards.

        A worker that waits for ever for news after a restart looks like a lost run. Usual cause:
        the subscription dies with its connection and nobody renews it.
        """
        server = t.suite.server(t.namespace)
        assert server is not None
        await t.start()
        watching = asyncio.ensure_future(_watch_until(t, after=1))
        assert not await t.store.watch("run", after=1, timeout=seconds(0.05))
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)
        await _until_committed(t, t.outside(key="news", events=[note()]))
        assert await asyncio.wait_for(watching, 60)

    @scenario(needs=("watch", "multi_process", "url"))
    async def test_WATCH_04_wakes_across_processes(self, t: Case) -> None:
        """WATCH-04: what another process commits ends the wait.

        Usual cause: only the writer's own process is told.
        """
        await t.start()
        async with Child(t, "batches", run_id="run", writer="w", number=1, opened=True) as child:
            await child.line("ready")
            waiting = asyncio.ensure_future(t.store.watch("run", after=1, timeout=seconds(60)))
            await asyncio.sleep(0)
            child.let_go()
            assert await asyncio.wait_for(waiting, 50)
            await child.finished()


async def _watch_until(t: Case, after: int) -> bool:
    while True:
        try:
            if await t.store.watch("run", after=after, timeout=seconds(20)):
                return True
        except StorageUnavailable:
            await asyncio.sleep(0.02)


async def _until_committed(t: Case, change: Change) -> None:
    """Send a change until it is answered, as whoever does not know its outcome must."""
    async with asyncio.timeout(60):
        while True:
            try:
                await t.store.commit_one(change)
            except StorageUnavailable:
                await asyncio.sleep(0.02)
            else:
                return
