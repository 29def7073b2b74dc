"""The loop of a worker that looks for work by itself: claim, begin, wait for news."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from time import monotonic
from typing import TYPE_CHECKING

from pyworkflow import _plugins
from pyworkflow._clock import to_micros
from pyworkflow._definitions import workflow_names
from pyworkflow._engine.outages import Backoff
from pyworkflow._engine.waits import Awaited

if TYPE_CHECKING:
    from pyworkflow._engine.worker import Worker

__all__ = ["Serving"]

GONE_EVERY = 1.0
"""Seconds between looks for leases of processes that are gone."""
_ROOM_PAUSE_S = 0.25
"""Until the next look when due items wait for room here, or are for other workers."""


class Serving:
    """Claims due items for one worker until it stops."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._awaited = Awaited()
        self._looked_for_gone = monotonic()

    async def run(self) -> None:
        """Claim until the worker stops."""
        worker = self._worker
        _plugins.observe(
            "pyworkflow_worker_started", worker=worker.owner, queues=sorted(worker.queues or ())
        )
        outages = worker.outages
        backoff = Backoff(outages.jitter)
        while not worker.is_stopping:
            worker.woken.clear()
            try:
                if took := await worker.claim_due():
                    self._awaited.came()
                timeout = 0.0 if took else await self._until_due()
            except Exception as exc:  # noqa: BLE001 - a backend's own bug must not end the worker
                outages.failed("claim", "no work can be claimed", exc)
                await outages.pause(backoff.seconds(exc))
                continue
            backoff.reset()
            outages.worked("claim")
            if timeout > 0:
                await self._idle(timeout)
            else:
                await asyncio.sleep(0)
        _plugins.observe("pyworkflow_worker_stopping", worker=worker.owner)

    async def _until_due(self) -> float:
        worker = self._worker
        due = await worker.storage.next_due(queues=worker.queues, workflows=workflow_names())
        if monotonic() - self._looked_for_gone > GONE_EVERY:
            self._looked_for_gone = monotonic()
            if await worker.free_gone():
                return 0.0
        if due is None:
            return 1.0
        left = (to_micros(due) - worker.clock.micros()) / 1_000_000
        if left <= 0 and not worker.has_room:
            left = _ROOM_PAUSE_S
        return self._awaited.seconds(due, left)

    async def _idle(self, timeout: float) -> None:
        """Until woken, until the store may hold news, or for ``timeout`` seconds."""
        worker = self._worker
        end = monotonic() + timeout
        woken = asyncio.ensure_future(worker.woken.wait())
        news = asyncio.ensure_future(
            worker.storage.watch(None, after=0, timeout=timedelta(seconds=timeout))
        )
        # It may fail while this is cancelled, and no more asked for.
        news.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        try:
            await asyncio.wait({woken, news}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if not news.done():
                return
            if (problem := news.exception()) is None:
                worker.outages.worked("watch")
                return
            # A store that cannot be watched is asked when the time is over, not before.
            worker.outages.failed("watch", "the storage cannot be watched for news", problem)
            await asyncio.wait({woken}, timeout=max(0.0, end - monotonic()))
        finally:
            for waiter in (woken, news):
                waiter.cancel()
            await asyncio.gather(woken, news, return_exceptions=True)
