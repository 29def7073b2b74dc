"""Items that may take the worker's process down: each begins alone.

A crash counts for all items that the process had claimed. From the third claim without progress an
item is suspect: it begins while nothing else is in progress here, and nothing else is claimed until
it has made progress. The others of its batch are released, which counts nothing, so only the item
that kills its worker reaches the limit.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from datetime import timedelta
from time import monotonic
from typing import TYPE_CHECKING, Any

from pyworkflow.errors import StorageError
from pyworkflow.events import Event, EventClass, EventType
from pyworkflow.runs import ItemKind, WorkItem
from pyworkflow.spi.storage import Claim

if TYPE_CHECKING:
    from pyworkflow._engine.worker import Worker

__all__ = ["KILLS", "POISON", "POISONED", "Suspects", "is_poison"]

_log = logging.getLogger("pyworkflow.engine")

TRUSTED_CLAIMS = 2
"""Claims without progress up to which an item is worked on beside others."""
POISON = 10
"""Claims of a turn without progress after which the run stalls, for an hour."""
POISONED = (
    f"poison: the turn was claimed {POISON} times without progress; its code seems to take the "
    "worker down"
)
KILLS = 3
"""Claims of a step without progress after which it is taken to kill its worker."""
LONGEST_ALONE_S = 10.0
"""An item that has run for so long without progress runs beside others."""
LONGEST_WAIT_S = 10.0
"""A suspect that was released for so long, since others were in progress, begins beside them."""
_RELEASED_FOR = timedelta(milliseconds=250)
_REMEMBERED = 10_000

_Key = tuple[str, str]


class Suspects:
    """Decides which claimed items of one worker begin now."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.alone: _Key | None = None
        """The (run, item) that is in progress alone."""
        self._since = 0.0
        self._over = asyncio.Event()
        self._released: dict[_Key, float] = {}
        """Suspects that waited, and since when (``monotonic``)."""

    async def none_alone(self) -> None:
        """Wait while a suspect is in progress alone."""
        while self.alone is not None and not self._worker.is_stopping:
            left = self._since + LONGEST_ALONE_S - monotonic()
            if left <= 0:
                self._end()
                return
            self._over.clear()
            try:
                async with asyncio.timeout(left):
                    await self._over.wait()
            except TimeoutError:
                continue

    async def sift(self, claims: Sequence[Claim]) -> Sequence[Claim]:
        """Of these claims, those that begin now; the others are released uncounted."""
        suspects = [claim for claim in claims if _is_suspect(claim.item)]
        if not suspects:
            return claims
        begin = [claim for claim in claims if not _is_suspect(claim.item)]
        # The fewest claims first: whatever kills its worker each time comes after the others.
        suspects.sort(key=lambda claim: claim.item.claims)
        if begin or self._worker.is_busy:
            chosen = next((claim for claim in suspects if self._waited(claim)), None)
        else:
            chosen = suspects[0]
        if chosen is not None:
            self._begin_alone(chosen)
            begin.append(chosen)
        delay = None if chosen is not None else _RELEASED_FOR
        await asyncio.gather(*(self._release(c, delay) for c in suspects if c is not chosen))
        return begin

    def follow(self, task: asyncio.Task[Any] | None) -> None:
        """``task`` is the work on the suspect that is alone."""
        if task is None or task.done():
            self._end()
        else:
            alone = self.alone
            task.add_done_callback(lambda _: self._end() if self.alone == alone else None)

    def committed(self, run_id: str, events: Sequence[Event]) -> None:
        """Events of a run are durable: a suspect of it may have made progress."""
        progress = any(event.klass != EventClass.OBSERVATION for event in events)
        if progress and self.alone is not None and self.alone[0] == run_id:
            self._end()

    def _waited(self, claim: Claim) -> bool:
        since = self._released.get((claim.ref.run_id, claim.ref.item_id))
        return since is not None and monotonic() - since > LONGEST_WAIT_S

    def _begin_alone(self, claim: Claim) -> None:
        ref = claim.ref
        self.alone, self._since = (ref.run_id, ref.item_id), monotonic()
        self._released.pop(self.alone, None)
        _log.info(
            "an item that made no progress under its last claims begins alone: claims=%d "
            "item_id=%s run_id=%s",
            claim.item.claims,
            ref.item_id,
            ref.run_id,
        )

    def _end(self) -> None:
        self.alone = None
        self._over.set()
        self._worker.wake()

    async def _release(self, claim: Claim, delay: timedelta | None) -> None:
        ref = claim.ref
        if len(self._released) >= _REMEMBERED:
            self._released.clear()
        self._released.setdefault((ref.run_id, ref.item_id), monotonic())
        try:
            await self._worker.storage.release(ref, delay=delay)
        except StorageError as exc:
            _log.debug("a suspect is released later: %s run_id=%s", exc, ref.run_id)
            self._worker.recovery.wanted()


async def is_poison(worker: Worker, claim: Claim) -> bool:
    """Whether the turn was claimed so often without an end that its code must be the cause.

    A turn that ends in order with nothing to do is none: under a clock that stands still or was set
    back, a turn is due, and its timer is not.
    """
    run = claim.run
    if claim.item.claims <= POISON or run.stalled is not None:
        return False
    lease, ask = worker.settings.lease, worker.storage.get_events
    idle = 0
    for event in reversed(await worker.outages.answered(lease, ask, run.run_id)):
        if event.klass != EventClass.OBSERVATION:
            break
        idle += event.type == EventType.WORKFLOW_SUSPENDED
    # The first of these ended the turn that made progress.
    return claim.item.claims - max(0, idle - 1) > POISON


def _is_suspect(item: WorkItem) -> bool:
    """Whether the item may take the worker down. What is given up without running cannot."""
    limit = KILLS if item.kind is ItemKind.STEP else POISON
    return TRUSTED_CLAIMS < item.claims <= limit
