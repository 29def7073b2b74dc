"""Renewal of leases in a thread of its own, so that no step can starve it.

The thread has its own event loop and its own object on the store, whose connection is open before
the worker takes its first item: a renewal is one round trip, sent as soon as the thread has the
interpreter's lock once. When the thread is late all the same, a process beside the worker renews
as well (``renewals``). Both stop when the worker's loop has not answered for a lease: then another
worker is better off.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import weakref
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from time import monotonic
from typing import Self

from pyworkflow._config import Settings
from pyworkflow._engine.outages import Backoff, Outages
from pyworkflow._engine.renewals import RenewalProcess
from pyworkflow.errors import StorageUnavailable
from pyworkflow.spi.storage import ClaimRef, StorageBackend
from pyworkflow.storekit import failpoints

__all__ = ["LeaseKeeper"]

failpoints.register(
    __name__,
    StorageUnavailable,
    {"lease.before_renew": "leases are about to be extended, in the thread that does that"},
)

_log = logging.getLogger("pyworkflow.engine")

LONGEST_TICK_S = 0.5
_OPENS_S = 10.0
"""Seconds that a worker waits for its keeper's connection before it takes its first item."""
_LATE = 60
"""A thread that is late by this part of a lease is starved."""
_QUIET = 10
"""Leases without such a delay after which the process beside the worker ends."""
_STARTS = 3
"""How often a process beside the worker is started, should it end by itself."""
_NO_CLAIM = ClaimRef("-", "-", "-")


class LeaseKeeper:
    """Renews the claims of one worker.

    Args:
        storage: The worker's; the thread uses a clone of it.
        on_lost: Called in the worker's loop with each claim that another worker has.
        start_process: Starts a process that renews beside the worker; None when there can be none.
    """

    def __init__(
        self,
        storage: StorageBackend,
        lease: timedelta,
        renew_every: timedelta,
        on_lost: Callable[[ClaimRef], None],
        *,
        outages: Outages,
        start_process: Callable[[], RenewalProcess | None] | None = None,
    ) -> None:
        self._storage = storage
        self._lease = lease
        self._every = renew_every.total_seconds()
        self._tick = min(self._every / 2, LONGEST_TICK_S)
        self._on_lost = on_lost
        self._outages = outages
        self._held: dict[ClaimRef, float] = {}
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._thread: threading.Thread | None = None
        self._wake: Callable[[], None] | None = None
        """Ends the thread's sleep, from any thread."""
        self._stop = threading.Event()
        self._heard = monotonic()
        self._hangs = False
        self.asked_at = monotonic()
        """When the worker last sent a claim that was answered. The answer says nothing: the process
        may have stood still before it read it."""
        self._task: asyncio.Task[None] | None = None
        """Renews in place of the thread, when none can start."""
        self._ready: asyncio.Future[None] | None = None
        self._is_open = False
        self._backoff = Backoff(outages.jitter)
        self._retry_s: float | None = None
        """Seconds until the next try, after one that failed."""
        self._start_process = start_process
        self._starts = 0
        self._late_at = 0.0
        self._process: RenewalProcess | None = None
        _keepers.add(self)

    @classmethod
    def of(
        cls,
        storage: StorageBackend,
        settings: Settings,
        on_lost: Callable[[ClaimRef], None],
        outages: Outages,
    ) -> Self:
        """The keeper of a worker with these settings."""
        start = partial(RenewalProcess.start, settings, storage)
        lease, every = settings.lease, settings.renew_every
        return cls(storage, lease, every, on_lost, outages=outages, start_process=start)

    async def ready(self) -> None:
        """Wait until the thread has a connection; for a store within this process it needs none."""
        if self._is_open:
            return
        if self._ready is None:
            if not self._storage.info().capabilities.multi_process:
                self._is_open = True
                return
            self._loop = asyncio.get_running_loop()
            self._ready = self._loop.create_future()
            self._begin()
        await asyncio.wait({self._ready}, timeout=_OPENS_S)
        self._is_open = True

    def add(self, ref: ClaimRef) -> None:
        """From now on ``ref`` is renewed."""
        now = monotonic()
        with self._lock:
            self._held[ref] = now
            if self._process is not None:
                self._process.table.add(ref, now)
        if self._timer is None and not self._stop.is_set():
            self._loop = asyncio.get_running_loop()
            self._heard = now
            self._timer = self._loop.call_later(self._tick, self._look)

    def discard(self, ref: ClaimRef) -> None:
        """``ref`` is over, or was released."""
        with self._lock:
            self._held.pop(ref, None)
            if self._process is not None:
                self._process.table.discard(ref)

    def held(self) -> list[ClaimRef]:
        """What is claimed now."""
        with self._lock:
            return list(self._held)

    @property
    def process(self) -> RenewalProcess | None:
        """The process that renews beside the worker, while there is one."""
        return self._process

    async def after_pause(self, storage: StorageBackend) -> None:
        """Keep what ran out while this process stood still, and was taken by no other worker.

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

    def close(self) -> None:
        """Stop renewing; what is still claimed runs out."""
        self._stop.set()
        if self._timer is not None:
            self._timer.cancel()
        if (wake := self._wake) is not None:
            wake()

    async def closed(self, timeout: float) -> None:
        """Wait until the thread has ended, and the process beside it; at most so many seconds."""
        end = monotonic() + timeout
        while self._thread is not None and self._thread.is_alive() and monotonic() < end:  # noqa: ASYNC110 - a thread's end sets no event
            await asyncio.sleep(0.002)

    # --- in the worker's loop -------------------------------------------------------------------

    def _look(self) -> None:
        """Show that the loop answers, and begin to renew what is claimed for long."""
        self._timer = None
        self._heard = now = monotonic()
        if self._stop.is_set():
            return
        with self._lock:
            oldest = next(iter(self._held.values()), None)
            if self._process is not None:
                self._process.table.beat(now)
        if oldest is None and self._process is None:
            return
        assert self._loop is not None
        self._timer = self._loop.call_later(self._tick, self._look)
        # Most claims are over long before they need renewal: without a connection to open, the
        # thread starts for those that are not.
        if oldest is not None and now - oldest >= self._every / 2:
            self._begin()

    def _begin(self) -> None:
        if self._thread is not None or self._task is not None:
            return
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

    # --- in the thread --------------------------------------------------------------------------

    async def _renew(self) -> None:
        loop = asyncio.get_running_loop()
        woken = asyncio.Event()

        def wake() -> None:
            try:
                loop.call_soon_threadsafe(woken.set)
            except RuntimeError:
                pass  # the thread has ended

        self._wake = wake
        storage: StorageBackend | None = None
        try:
            storage = await self._opened()
            tried = 0.0
            while not self._stop.is_set():
                if monotonic() - tried >= self._pause():
                    tried = monotonic()
                    storage = await self._renew_once(storage, age=self._every / 3)
                slept = monotonic()
                try:
                    async with asyncio.timeout(self._tick):
                        await woken.wait()
                except TimeoutError:
                    late = monotonic() - slept - self._tick
                    if self._begins_process(late):
                        # Before the start, whose many calls of the system wait for the
                        # interpreter's lock again: the lease might be over by then.
                        tried = monotonic()
                        storage = await self._renew_once(storage, age=0.0)
                    loop.call_soon(self._see_to_process, late)
        finally:
            self._end_process()
            if storage is not None:
                await storage.close()

    def _pause(self) -> float:
        """Seconds between renewals: half of ``renew_every``, less while they fail."""
        return self._every / 2 if self._retry_s is None else min(self._every / 2, self._retry_s)

    async def _opened(self) -> StorageBackend | None:
        """Open the connection, and send one statement over it: later ones are prepared then."""
        if self._ready is None:
            return None
        storage: StorageBackend | None = None
        try:
            storage = self._storage.clone()
            async with asyncio.timeout(_OPENS_S):
                await storage.open()
                await storage.renew([_NO_CLAIM], self._lease)
        except Exception as exc:  # noqa: BLE001 - the first renewal opens it then
            _log.debug("leases cannot be renewed yet: %r", exc)
        finally:
            self._call(_resolve, self._ready)
        return storage

    async def _renew_once(
        self, storage: StorageBackend | None, age: float
    ) -> StorageBackend | None:
        """Renew what is claimed for so long; the store's object, made when there is none yet."""
        loop = self._loop
        if loop is None or loop.is_closed():
            self._stop.set()
            return storage
        now = monotonic()
        with self._lock:
            refs = [ref for ref, since in self._held.items() if now - since > age]
        if not refs or self._loop_hangs(now):
            return storage
        try:
            storage = storage or self._storage.clone()
            if failpoints.active:
                failpoints.hit("lease.before_renew")
            kept = await storage.renew(refs, self._lease)
            lost = [ref for ref, ok in zip(refs, kept, strict=True) if not ok]
        except Exception as exc:  # noqa: BLE001 - a backend's bug must not end renewal
            self._outages.failed("renew", "leases cannot be renewed", exc)
            self._retry_s = self._backoff.seconds(exc)
            return storage
        if self._retry_s is not None:
            self._retry_s = None
            self._backoff.reset()
        self._outages.worked("renew")
        with self._lock:
            if self._process is not None:
                self._process.table.renewed(now)
        for ref in lost:
            if ref in self._held:
                self.discard(ref)
                self._call(self._on_lost, ref)
        return storage

    def _loop_hangs(self, now: float) -> bool:
        hangs = now - self._heard > self._lease.total_seconds()
        if hangs and not self._hangs:
            _log.error(
                "the worker's event loop has not answered for a lease: its claims are given up; "
                "look for blocking calls in async steps lease=%s",
                self._lease,
            )
        self._hangs = hangs
        return hangs

    def _call(self, what: Callable[..., object], *args: object) -> None:
        """Call ``what`` in the worker's loop."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(what, *args)
        except RuntimeError:
            pass  # it is closed: the worker has ended

    # --- the process beside the worker ------------------------------------------------------------

    def _is_starved(self, late: float) -> bool:
        return late > self._lease.total_seconds() / _LATE and bool(self._held)

    def _begins_process(self, late: float) -> bool:
        can_begin = self._process is None and self._start_process is not None
        return can_begin and self._is_starved(late)

    def _see_to_process(self, late: float) -> None:
        """Start a process when this thread is starved, and end it when that is long over."""
        now, lease = monotonic(), self._lease.total_seconds()
        if self._is_starved(late):
            self._late_at = now
        process = self._process
        if process is None:
            if self._begins_process(late) and self._start_process is not None:
                self._begin_process(self._start_process)
        elif process.has_ended or now - self._late_at > _QUIET * lease:
            self._end_process()

    def _begin_process(self, start: Callable[[], RenewalProcess | None]) -> None:
        self._starts += 1
        try:
            process = start() if self._starts <= _STARTS else None
        except Exception as exc:  # noqa: BLE001 - there may be none here: leases are renewed inside
            _log.warning("no process can be started that renews leases: %r", exc)
            process = None
        if process is None:
            self._start_process = None
            return
        with self._lock:
            process.table.beat(self._heard)
            for ref, since in self._held.items():
                process.table.add(ref, since)
            self._process = process
        _log.info(
            "steps keep the interpreter's lock for long, so a process of its own renews leases as "
            "well: pid=%d",
            process.pid,
        )

    def _end_process(self) -> None:
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            process.close()

    def leave_to_parent(self) -> None:
        """In a forked child: the claims, and the process that renews them, are the parent's."""
        self._lock = threading.Lock()
        self._stop.set()
        self._held = {}
        process, self._process = self._process, None
        if process is not None:
            process.leave_to_parent()


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


_keepers: weakref.WeakSet[LeaseKeeper] = weakref.WeakSet()


def _in_child() -> None:
    for keeper in list(_keepers):
        keeper.leave_to_parent()
    _keepers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
