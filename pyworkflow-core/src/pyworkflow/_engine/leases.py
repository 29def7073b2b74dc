"""Keeping what was claimed: renewal in a thread of its own, so that no step can starve it.

The thread has its own event loop and its own object on the store (``clone``). It stops renewing
when the worker's loop has not answered for a lease: then another worker is better off.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from time import monotonic

from pyworkflow.errors import StorageUnavailable
from pyworkflow.runs import WorkItem
from pyworkflow.spi.storage import Claimed, ClaimRef, ClaimRequest, StorageBackend
from pyworkflow.storekit import failpoints

__all__ = ["LeaseKeeper", "claim", "give_back", "ref_of", "still_held"]

failpoints.register(
    __name__,
    StorageUnavailable,
    {
        "claim.before": "a worker is about to ask for due items",
        "claim.after": "items are claimed, and nothing of them has begun",
        "lease.before_renew": "leases are about to be extended, in the thread that does that",
        "drain.before_release": "a worker that drains is about to give an item back",
    },
)

_log = logging.getLogger("pyworkflow.engine")


async def claim(storage: StorageBackend, request: ClaimRequest) -> Claimed:
    """Claim what is due; of a late answer, what is still held."""
    if failpoints.active:
        failpoints.hit("claim.before")
    asked = monotonic()
    claimed = await storage.claim(request)
    if failpoints.active:
        failpoints.hit("claim.after")
    if claimed.claims and monotonic() - asked > request.lease.total_seconds() / 2:
        kept = await still_held(storage, [claim.ref for claim in claimed.claims], request.lease)
        return replace(claimed, claims=[claim for claim in claimed.claims if claim.ref in kept])
    return claimed


def ref_of(item: WorkItem) -> ClaimRef:
    """How the holder of an item names its claim in changes."""
    assert item.lease is not None
    return ClaimRef(item.run_id, item.item_id, item.lease.token)


async def still_held(
    storage: StorageBackend, refs: Sequence[ClaimRef], lease: timedelta
) -> set[ClaimRef]:
    """Of claims whose answer was long under way, those that others have not taken, renewed.

    All of them when the storage cannot tell: under a lost claim nothing can be committed.
    """
    try:
        kept = await storage.renew(refs, lease)
    except Exception as exc:  # noqa: BLE001 - the answer counts, whatever this is
        _log.warning("the storage cannot say which claims stand: %r", exc)
        return set(refs)
    return {ref for ref, ok in zip(refs, kept, strict=True) if ok}


async def give_back(storage: StorageBackend, ref: ClaimRef) -> None:
    """Release what a worker that drains holds."""
    if failpoints.active:
        failpoints.hit("drain.before_release")
    await storage.release(ref)


class LeaseKeeper:
    """Renews the claims of one worker."""

    def __init__(
        self,
        storage: StorageBackend,
        lease: timedelta,
        renew_every: timedelta,
        on_lost: Callable[[ClaimRef], None],
    ) -> None:
        self._storage = storage
        self._lease = lease
        self._every = renew_every.total_seconds()
        self._on_lost = on_lost
        self._held: dict[ClaimRef, float] = {}
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._heard = monotonic()
        self.asked_at = monotonic()
        """When the worker last sent a claim that was answered. The answer says nothing: the process
        may have stood still before it read it."""
        self._task: asyncio.Task[None] | None = None
        """Renews in place of the thread, when none can start."""

    def add(self, ref: ClaimRef) -> None:
        """From now on ``ref`` is renewed."""
        with self._lock:
            self._held[ref] = monotonic()
        if self._thread is None and self._timer is None and self._task is None:
            # Most claims are over long before they need renewal: the thread starts for those
            # that are not.
            self._loop = asyncio.get_running_loop()
            self._timer = self._loop.call_later(self._every / 2, self._look)

    def discard(self, ref: ClaimRef) -> None:
        """``ref`` is over, or was given back."""
        with self._lock:
            self._held.pop(ref, None)

    def held(self) -> list[ClaimRef]:
        """What is held now."""
        with self._lock:
            return list(self._held)

    async def after_pause(self, storage: StorageBackend) -> None:
        """Keep what ran out while this process stood still, and was taken by nobody.

        Otherwise it would claim its own running work again, and run it beside itself.
        """
        renewed: set[ClaimRef] = set()
        for _ in range(3):  # it may stand still while it asks
            held = self.held()
            stood_still = monotonic() - self.asked_at >= self._lease.total_seconds() / 2
            # What an answer from before the pause gave may be taken up while it asks.
            taken_up = renewed and not renewed.issuperset(held)
            if not held or not (stood_still or taken_up):
                return
            asked = monotonic()
            renewed.update(held)
            kept = await storage.renew(held, self._lease)
            self.asked_at = asked
            for ref, ok in zip(held, kept, strict=True):
                if not ok:
                    self.discard(ref)
                    self._on_lost(ref)

    def _look(self) -> None:
        self._timer = None
        begun = self._thread is not None or self._task is not None
        if self._stop.is_set() or not self._held or begun:
            return
        self._heard = monotonic()
        thread = threading.Thread(
            target=lambda: asyncio.run(self._renew()), name="pyworkflow-leases", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:
            # At the end of the process no thread can start: renew from the worker's own loop.
            assert self._loop is not None
            self._task = self._loop.create_task(self._renew())
        else:
            self._thread = thread

    async def _renew(self) -> None:
        storage: StorageBackend | None = None
        try:
            last = 0.0
            while not self._stop.is_set():
                if monotonic() - last >= self._every / 2:
                    last = monotonic()
                    try:
                        if storage is None:
                            storage = self._storage.clone()
                        await self._renew_once(storage)
                    except Exception as exc:  # noqa: BLE001 - a backend's bug must not end renewal
                        _log.warning("leases could not be renewed: %r", exc)
                await asyncio.sleep(min(self._every / 2, 0.5))
        finally:
            if storage is not None:
                await storage.close()

    async def _renew_once(self, storage: StorageBackend) -> None:
        loop = self._loop
        if loop is None or loop.is_closed():
            self._stop.set()
            return
        loop.call_soon_threadsafe(self._beat)
        now = monotonic()
        if now - self._heard > self._lease.total_seconds():
            _log.error(
                "the worker's event loop has not answered for a lease: its claims are given up; "
                "look for blocking calls in async steps lease=%s",
                self._lease,
            )
            return
        with self._lock:
            refs = [r for r, since in self._held.items() if now - since > self._every / 3]
        if not refs:
            return
        if failpoints.active:
            failpoints.hit("lease.before_renew")
        kept = await storage.renew(refs, self._lease)
        for ref, ok in zip(refs, kept, strict=True):
            if not ok:
                with self._lock:
                    known = self._held.pop(ref, None) is not None
                if known and not loop.is_closed():
                    loop.call_soon_threadsafe(self._on_lost, ref)

    def _beat(self) -> None:
        self._heard = monotonic()

    def close(self) -> None:
        """Stop renewing; what is still held runs out."""
        self._stop.set()
        if self._timer is not None:
            self._timer.cancel()
