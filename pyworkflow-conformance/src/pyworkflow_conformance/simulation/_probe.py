"""Whether a backend can be simulated, asked before the first seed: else it would look broken."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

from pyworkflow.errors import ConfigurationError
from pyworkflow.spi.storage import RunQuery, StorageBackend
from pyworkflow_conformance.simulation._cluster import Cluster
from pyworkflow_conformance.simulation._faults import make_plan
from pyworkflow_conformance.simulation._loop import make_loop
from pyworkflow_conformance.simulation._reality import in_world

__all__ = ["probe"]

_WHILE = 100.0
"""Seconds of virtual time between two looks at the clock."""


def probe(store: StorageBackend, name: str) -> None:
    """Open the store, and look at its clock and its runs, as a simulation does.

    Raises:
        ConfigurationError: It cannot be simulated, and why.
    """
    problem = _found(store)
    if problem is not None:
        raise ConfigurationError(
            f"the backend cannot be simulated: backend={name}: {problem}; what one needs is in "
            "docs/how-to/simulate.md, 'Your own backend'"
        )


def _found(store: StorageBackend) -> str | None:
    cluster = Cluster(make_plan(0, "calm"), [])
    loop = make_loop(cluster.clockwork, "probe")

    async def look() -> tuple[timedelta, bool]:
        await store.open()
        before = await store.now()
        await asyncio.sleep(_WHILE)
        after = await store.now()
        return after - before, bool((await store.list_runs(RunQuery())).items)

    with in_world(cluster):
        cluster.begin_server(store)
        task: asyncio.Task[Any] = loop.create_task(look())
        try:
            cluster.clockwork.run(until=cluster.clockwork.now + 2 * _WHILE, most=10_000)
            if not task.done():
                return "its calls wait for something else than the running event loop"
            if (error := task.exception()) is not None:
                return f"it failed: {error!r}"
        finally:
            loop.kill()
            cluster.server.loop.kill()
    passed, is_used = task.result()
    if abs(passed.total_seconds() - _WHILE) > 1:
        return (
            f"its clock is not the simulation's: {passed} passed in {_WHILE:g} s; take the time "
            "from pyworkflow.spi.utcnow()"
        )
    return "the store that it makes is not empty" if is_used else None
