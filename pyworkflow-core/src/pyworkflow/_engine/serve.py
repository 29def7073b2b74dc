"""A worker as a process of its own: work until a signal comes, then drain."""

from __future__ import annotations

import asyncio
import gc
import logging
from typing import cast

from pyworkflow._clock import utcnow
from pyworkflow._engine.interrupts import obeyed
from pyworkflow._engine.worker import Worker
from pyworkflow.spi.executor import Runtime

__all__ = ["serve_here"]

_log = logging.getLogger("pyworkflow.worker")


def serve_here(runtime: Runtime) -> None:
    """Work in this thread until SIGTERM or SIGINT, then drain. A second signal ends at once."""
    worker = cast("Worker", runtime)
    # Live runs and a store in memory are many objects that stay: at the default threshold, looking
    # at them again and again takes a tenth or more of a busy worker's time. What was imported
    # stays as well, and is not looked at again. This process is the worker's own.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)
    asyncio.run(_serve(worker))


async def _serve(worker: Worker) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    with obeyed(lambda: loop.call_soon_threadsafe(stop.set)):
        await worker.open()
        ahead = (await worker.storage.now() - utcnow()).total_seconds()
        _log.info(
            "the worker claims work: storage=%s clock_ahead=%+.1fs",
            worker.storage.info().location,
            ahead,
        )
        worker.serve()
        try:
            await stop.wait()
            grace = worker.settings.drain
            _log.info(
                "the worker drains: grace=%gs; another signal ends it at once",
                grace.total_seconds(),
            )
            await worker.drain(grace)
        finally:
            await worker.close()
            await worker.storage.close()
