"""Commits that wait together go together.

While a batch is at the storage, the changes that come meanwhile form the next: that is all the
batching there is. ``call_soon`` lets everything that is ready in one turn of the loop join.

A storage that says so (``StorageInfo.batches``) is given several batches at once. What is sure for
callers stays sure then: changes of one run go in the order in which they were submitted, for a run
is in one batch at a time and what else it has waits; a batch that is sent again, since the storage
did not answer, holds up its own runs alone; ``StorageClock`` keeps the later of two answers that
cross each other. Between runs there never was an order.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import datetime, timedelta
from math import inf
from time import get_clock_info, monotonic

from pyworkflow import _plugins
from pyworkflow._clock import AHEAD, ticks, to_micros, utcnow
from pyworkflow._codecs import Writer
from pyworkflow._engine.leases import ref_of, still_held
from pyworkflow._engine.outages import Backoff, Outages
from pyworkflow.errors import (
    PayloadTooLarge,
    SerializationError,
    StorageDamaged,
    StorageError,
    StorageFull,
    StorageUnavailable,
)
from pyworkflow.runs import WorkItem
from pyworkflow.spi.storage import Answer, Change, Committed, StorageBackend
from pyworkflow.storekit import failpoints

__all__ = ["Pipeline", "StorageClock"]

_Waiting = tuple[Change, Callable[[Answer | Exception], None]]

_log = logging.getLogger("pyworkflow.engine")

failpoints.register(
    __name__,
    StorageUnavailable,
    {
        "pipeline.before_send": "a batch of changes is complete and was not sent to the storage",
        "pipeline.after_send": "the storage has answered a batch, and nobody has an answer yet",
    },
)

_FAR_S = 60.0
"""Seconds between two clocks that are worth a word."""
_COMPARE_EVERY_S = 60.0
_WARN_EVERY_S = 3600.0
_STANDS_US = max(2_000, 2_000_000 * get_clock_info("time").resolution)
"""A clock that shows the same for so long stands still."""
_LOOKS = 10_000
BATCH = 500
_BEHIND = (
    "leases and timers follow the store, the times in this log do not; set the clock of this "
    "machine, or that of the store's server"
)
_FROZEN = (
    "a library for tests has frozen it, or it is broken; runs continue by the store's clock, and "
    "what reads this machine's clock is wrong: let it run"
)
_STORE_FROZEN = (
    "sleeps, retries and ends of leases wait until it runs again; repair the clock of the store's "
    "server"
)
DIVISIBLE = 32
"""With fewer changes one batch costs less than several."""


class StorageClock:
    """A live turn's idea of the storage's time: the last answer, plus the time since.

    Never ahead of the storage, whatever this machine's clock says.
    """

    def __init__(self) -> None:
        self._micros = 0
        self._at = 0.0
        self._compare_at = inf
        self._warn_at = -inf
        self._compared: tuple[int, float] | None = None
        """What was shown at the last comparison, and when that was."""

    def begin(self, now: datetime) -> None:
        """The first answer; warns, and again each hour, when this machine's clock is far from it."""
        self.update(now)
        self._compare(now)

    def _compare(self, now: datetime) -> None:
        self._compare_at = self._at + _COMPARE_EVERY_S
        before, self._compared = self._compared, (self._micros, self._at)
        ahead = (utcnow() - now).total_seconds()
        if abs(ahead) <= _FAR_S or self._at < self._warn_at:
            return
        self._warn_at = self._at + _WARN_EVERY_S
        if ahead < 0 and _machine_stands_still():
            _log.warning(
                "the clock of this machine stands still: now=%s; %s", utcnow().isoformat(), _FROZEN
            )
        elif before is not None and before[0] == self._micros and before[1] < self._at:
            _log.warning(
                "the clock of the store stands still: now=%s for=%.0fs; %s",
                now.isoformat(),
                self._at - before[1],
                _STORE_FROZEN,
            )
        else:
            _log.warning(
                "the clock of this machine is not the store's: ahead=%+.0fs; %s",
                ahead,
                AHEAD if ahead < 0 else _BEHIND,
            )

    def update(self, now: datetime, asked: float | None = None) -> None:
        """An answer carried this ``now``; ``asked``: the question was sent then (``monotonic``).

        Answers that overtake each other do not set the clock back; the storage itself may.
        """
        micros = to_micros(now)
        if asked is not None and asked < self._at and micros < self._micros:
            return
        self._micros = micros
        self._at = monotonic()
        if self._at > self._compare_at:
            self._compare(now)

    def micros(self) -> int:
        """µs since the epoch."""
        return self._micros + int((monotonic() - self._at) * 1_000_000)


def _machine_stands_still() -> bool:
    shown, began = utcnow(), ticks()
    for _ in range(_LOOKS):
        if utcnow() != shown:
            return False
        if ticks() - began > _STANDS_US:
            return True
    return False  # in a simulation neither clock moves


class Pipeline:
    """The way of a worker's changes to its storage."""

    def __init__(
        self,
        storage: StorageBackend,
        clock: StorageClock,
        patience: float,
        codecs: Writer | None = None,
        max_payload: int = 0,
        *,
        outages: Outages | None = None,
    ) -> None:
        failpoints.check()
        self.write_with(codecs, max_payload)
        self._storage = storage
        self.outages = outages if outages is not None else Outages(storage.now, "client")
        self._clock = clock
        self._patience = patience
        """Seconds to go on trying while the storage does not answer: about a lease."""
        self._waiting: deque[_Waiting] = deque()
        # Not the context of the step or session that happens to send first.
        self._context = contextvars.copy_context()
        self._width = max(1, storage.info().batches)
        self._senders: set[asyncio.Task[None]] = set()
        self._entered = 0
        self._looking = 0
        """Senders that are not at the storage: they will see what comes now."""
        self._under_way: set[str] = set()
        """Runs with changes at the storage; kept when there are several senders."""
        self.on_trouble: Callable[[StorageError], None] | None = None
        self.batch: AbstractContextManager[None] = nullcontext()
        """Entered while changes are under way."""

    def write_with(self, codecs: Writer | None, max_payload: int) -> None:
        """Write payloads with these codecs, each of at most so many bytes as it is stored."""
        self.codecs = codecs
        self._max_payload = max_payload

    async def commit(self, change: Change) -> Committed:
        """Commit a change; raises the refusal, or ``StorageError`` when the storage gave up."""
        if self.codecs is not None:
            change = await self._wrapped(self.codecs, change)
        future: asyncio.Future[Committed] = asyncio.get_running_loop().create_future()

        def done(answer: Answer | Exception) -> None:
            if future.done():
                return
            if isinstance(answer, Committed):
                future.set_result(answer)
            else:
                future.set_exception(answer)
                future.exception()  # its caller may be cancelled in this turn of the loop

        self.submit(change, done)
        return await future

    def submit(self, change: Change, done: Callable[[Answer | Exception], None]) -> None:
        """Send a change along as it is; ``done`` is called with what came of it, and raises not.

        Only while there are no codecs.
        """
        self._waiting.append((change, done))
        if not self._looking and change.run_id not in self._under_way:
            self._begin_sender()

    def _begin_sender(self) -> None:
        if len(self._senders) < self._width:
            self._looking += 1
            sender = asyncio.get_running_loop().create_task(
                self._send(), name="pyworkflow-pipeline", context=self._context.copy()
            )
            self._senders.add(sender)

    async def _wrapped(self, codecs: Writer, change: Change) -> Change:
        """The change as it is stored; made once, so that sending it again sends the same.

        What is done under a claim waits for as long as it takes: the lease is renewed meanwhile,
        and the store, which is in order, would count a claim that ends as a worker that died.
        """
        end = monotonic() + self._patience
        backoff = Backoff(self.outages.jitter)
        while True:
            try:
                wrapped = await codecs.wrap_change(change, self._max_payload)
            except (StorageUnavailable, StorageFull) as exc:
                if self.on_trouble is not None:
                    self.on_trouble(exc)
                pause = backoff.seconds(exc)
                if change.claim is None and monotonic() + pause > end:
                    raise
                self.outages.failed("wrap", "payloads cannot be wrapped now", exc)
            else:
                self.outages.worked("wrap")
                return wrapped
            # Not the store's outage: its probe would tell nothing.
            await asyncio.sleep(pause)

    async def idle(self, timeout: float) -> None:
        """Until no change is under way, or for ``timeout`` seconds."""
        end = monotonic() + timeout
        while self._senders and (left := end - monotonic()) > 0:
            await asyncio.wait(set(self._senders), timeout=left)

    async def _send(self) -> None:
        sender = asyncio.current_task()
        assert sender is not None
        if not self._entered:
            self.batch.__enter__()
        self._entered += 1
        try:
            while batch := self._take():
                await self._send_batch(batch)
                # Let the sessions that were just answered send their next change along: at
                # once, or when the short step that they begin has ended.
                await asyncio.sleep(0)
                if not self._waiting:
                    await asyncio.sleep(0)
        finally:
            self._looking -= 1
            self._senders.discard(sender)
            self._entered -= 1
            if not self._entered:
                self.batch.__exit__(None, None, None)

    def _take(self) -> list[_Waiting]:
        """The next batch; nothing when nothing waits, or only for another batch to come back."""
        waiting = self._waiting
        number = len(waiting)
        if self._width == 1:
            return [waiting.popleft() for _ in range(min(BATCH, number))]
        # Many are divided among the senders: the storage works on one part while this loop works
        # on the other.
        free = self._width - len(self._senders) + self._looking
        if free > 1 and number > DIVISIBLE:
            number = -(-number // free)
        batch: list[_Waiting] = []
        held: list[_Waiting] = []
        while waiting and len(batch) < min(BATCH, number):
            entry = waiting.popleft()
            (held if entry[0].run_id in self._under_way else batch).append(entry)
        more = bool(waiting)
        waiting.extendleft(reversed(held))
        if more and self._looking == 1:
            self._begin_sender()
        return batch

    async def _send_batch(self, batch: list[_Waiting]) -> None:
        runs: set[str] = set()
        if self._width > 1:
            runs = {change.run_id for change, _ in batch}
            self._under_way |= runs
        self._looking -= 1
        try:
            asked = monotonic()
            answers = await self._deliver([change for change, _ in batch], asked)
        finally:
            self._looking += 1
            self._under_way -= runs
        for answer in reversed(answers):
            if isinstance(answer, Committed) and not answer.duplicate:  # that one's ``now`` is old
                self._clock.update(answer.now, asked)
                break
        for (change, done), answer in zip(batch, answers, strict=True):
            try:
                done(answer)
            except Exception:  # noqa: BLE001 - the others must have their answers
                _log.exception("an answer could not be given: run_id=%s", change.run_id)

    async def _deliver(self, changes: list[Change], sent: float) -> list[Answer | Exception]:
        """Send a batch, again while the storage is unavailable: changes carry their keys.

        ``sent`` is now, by ``monotonic``.
        """
        end = sent + self._patience
        backoff: Backoff | None = None
        while True:
            try:
                if failpoints.active:
                    failpoints.hit("pipeline.before_send")
                answers = await self._storage.commit(changes)
                if failpoints.active:
                    failpoints.hit("pipeline.after_send")
                self.outages.worked("commit")
                if monotonic() - sent > self._patience / 2 and any(map(_claims, answers)):
                    # The answer was long under way: others may have all of it by now.
                    return await self._standing(answers)
                return list(answers)
            except StorageDamaged as exc:
                if len(changes) > 1:
                    # The damage of one run must not take the others along.
                    return await self._one_by_one(changes)
                _plugins.observe("pyworkflow_storage_error", operation="commit", error=exc)
                (change,) = changes
                if change.take_turn is None:
                    return [exc]
                # The answer would bring events that cannot be read. What the change records must
                # not be lost: whoever claims the turn next meets the damage.
                changes = [replace(change, take_turn=None)]
                continue
            except StorageError as exc:
                _plugins.observe("pyworkflow_storage_error", operation="commit", error=exc)
                if self.on_trouble is not None:
                    self.on_trouble(exc)
                self.outages.failed("commit", "changes cannot be committed", exc)
                backoff = backoff or Backoff(self.outages.jitter)
                pause = backoff.seconds(exc)
                if not isinstance(exc, StorageUnavailable) or monotonic() + pause > end:
                    _log.debug("given up: changes=%d error=%s", len(changes), exc)
                    return [exc] * len(changes)
            except Exception as exc:  # noqa: BLE001 - a backend's own bug must not hang its callers
                if len(changes) > 1:
                    # One of them cannot be stored: it must not take the others along.
                    return await self._one_by_one(changes)
                if isinstance(exc, PayloadTooLarge | SerializationError | ValueError):
                    return [exc]
                _log.exception("the storage failed in an unexpected way")
                return [StorageError(f"unexpected: {exc!r}")]
            await self.outages.pause(pause)
            sent = monotonic()

    async def _one_by_one(self, changes: list[Change]) -> list[Answer | Exception]:
        return [answer for c in changes for answer in await self._deliver([c], monotonic())]

    async def _standing(self, answers: Sequence[Answer]) -> list[Answer | Exception]:
        """The answers, with those claims alone that others have not taken meanwhile."""
        given = [ref_of(item) for answer in answers for item in _claims(answer)]
        kept = await still_held(self._storage, given, timedelta(seconds=self._patience))
        return [
            replace(answer, claims=[item for item in claims if ref_of(item) in kept])
            if isinstance(answer, Committed) and (claims := answer.claims)
            else answer
            for answer in answers
        ]


def _claims(answer: Answer) -> Sequence[WorkItem]:
    return answer.claims if isinstance(answer, Committed) else ()
