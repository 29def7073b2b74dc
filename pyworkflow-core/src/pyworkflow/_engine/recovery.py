"""Leases that the store gave to a worker and the worker does not know of.

The answer of a claim may be lost, and an item may be given up while the store fails. Its lease
would keep it from all workers until it ends. So the worker compares the store's list of its leases
with its own work, after a failure and once when it has been idle for a while, and releases the rest.
"""

from __future__ import annotations

import asyncio
import logging
from time import monotonic
from typing import TYPE_CHECKING

from pyworkflow._engine.outages import Backoff

if TYPE_CHECKING:
    from pyworkflow._engine.worker import Worker

__all__ = ["Recovery"]

_log = logging.getLogger("pyworkflow.engine")

_SETTLES_S = 0.05
"""Seconds for the task that gave an item up to end: until then the item counts as known."""
_AGAIN_S = 1.0
"""Seconds between looks while it is unsure whether a lease is known."""


class _Claiming:
    """One claim under way. A class: a generator takes three times as long."""

    __slots__ = ("_claim", "_recovery")

    def __init__(self, recovery: Recovery) -> None:
        self._recovery = recovery

    def __enter__(self) -> None:
        self._claim = self._recovery.begin_claim()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, GeneratorExit):
            return  # its loop is gone
        self._recovery.end_claim(self._claim)
        if kind is not None:
            self._recovery.wanted()  # the store may have done it


class Recovery:
    """Releases the unknown leases of one worker."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._claims: set[asyncio.Future[None]] = set()
        """Claims under way: what they bring is not known yet."""
        self._task: asyncio.Task[None] | None = None
        self._again = False
        self._timer: asyncio.TimerHandle | None = None
        self._active_at = 0.0

    def claiming(self) -> _Claiming:
        """While a claim is under way, until its items have begun."""
        return _Claiming(self)

    def begin_claim(self) -> asyncio.Future[None]:
        """A claim is under way, until ``end_claim`` is called with this."""
        claim: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._claims.add(claim)
        return claim

    def end_claim(self, claim: asyncio.Future[None]) -> None:
        """What the claim brought has begun, or its answer is lost."""
        self._claims.discard(claim)
        claim.set_result(None)
        self._active_at = monotonic()
        if self._timer is None and not self._worker.is_stopping:
            self._arm(self._worker.settings.renew_every.total_seconds())

    def wanted(self) -> None:
        """There may be leases that are not known here."""
        self._again = True
        if not self._worker.is_stopping and (self._task is None or self._task.done()):
            self._task = self._worker.spawn_aside(self._recover())

    def close(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()

    def _arm(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self._look_if_idle)

    def _look_if_idle(self) -> None:
        self._timer = None
        every = self._worker.settings.renew_every.total_seconds()
        left = self._active_at + every - monotonic()
        if self._worker.is_stopping:
            return
        if left > 0 or self._worker.is_busy:
            self._arm(left if left > 0 else every)
        else:
            self.wanted()

    async def _recover(self) -> None:
        worker = self._worker
        backoff = Backoff(worker.outages.jitter)
        end = monotonic() + worker.settings.lease.total_seconds()
        while not worker.is_stopping:
            self._again = False
            await asyncio.sleep(_SETTLES_S)
            try:
                sure = await self._release_unknown()
            except Exception as exc:  # noqa: BLE001 - a backend's own bug must not end this
                worker.outages.failed("recover", "lost leases cannot be looked for", exc)
                await worker.outages.pause(backoff.seconds(exc))
                end = monotonic() + worker.settings.lease.total_seconds()
                continue
            backoff.reset()
            worker.outages.worked("recover")
            if not self._again and (sure or monotonic() > end):
                return
            await asyncio.sleep(_AGAIN_S)

    async def _release_unknown(self) -> bool:
        """Release what is not known here; False when that is unsure for some of it."""
        worker = self._worker
        leases = await worker.storage.leases(worker.owner)
        unknown = [ref for ref in leases if not worker.works_on(ref)]
        if not unknown:
            return True
        # A lease that is listed was asked for before: once the claims of that time have been
        # answered, what is still unknown stays so.
        if self._claims:
            _, late = await asyncio.wait(
                set(self._claims), timeout=worker.settings.lease.total_seconds()
            )
            if late:
                return False
        sure = True
        for ref in unknown:
            if worker.works_on(ref):
                continue
            if worker.may_come_to_know(ref):
                sure = False
                continue
            if await worker.storage.release(ref):
                _log.info(
                    "released a lease whose answer was lost or whose work was given up: "
                    "item_id=%s run_id=%s",
                    ref.item_id,
                    ref.run_id,
                )
                worker.wake()
        return sure
