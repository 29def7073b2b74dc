"""Which items can be claimed, and when the next one can: heaps, so that nothing is ever scanned.

Items lie in buckets of one queue, workflow and kind: a claim with filters looks at the heads of the
buckets that match. A bucket has two heaps, of items whose time has come and of those that wait.
What was replaced stays in its heap, marked, until it comes up or most of the heap is such.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from heapq import heapify, heappop, heappush

from pyworkflow.runs import ItemKind, WorkItem

__all__ = ["DueIndex"]

_Name = tuple[str, str, ItemKind]
ItemRef = tuple[str, str]


class _Entry:
    __slots__ = ("alive", "bucket", "due", "priority", "queued", "ref", "wake")

    def __init__(
        self, ref: ItemRef, bucket: _Name, wake: datetime, due: datetime, priority: int
    ) -> None:
        self.ref = ref
        self.bucket = bucket
        self.wake = wake
        self.due = due
        self.priority = priority
        self.alive = True
        self.queued = True


class _Bucket:
    __slots__ = ("dead", "live", "ready", "waiting")

    def __init__(self) -> None:
        self.ready: list[tuple[int, datetime, int, _Entry]] = []
        self.waiting: list[tuple[datetime, int, _Entry]] = []
        self.live = 0
        self.dead = 0

    def head(self, now: datetime) -> tuple[int, datetime, int, _Entry] | None:
        """The first item that can be claimed now."""
        ready, waiting = self.ready, self.waiting
        while waiting and waiting[0][0] <= now:
            _, number, entry = heappop(waiting)
            if entry.alive:
                heappush(ready, (-entry.priority, entry.due, number, entry))
            else:
                self.dead -= 1
        while ready:
            first = ready[0]
            entry = first[3]
            if entry.alive and entry.wake <= now:
                return first
            heappop(ready)
            if entry.alive:  # the clock was set back
                heappush(waiting, (entry.wake, first[2], entry))
            else:
                self.dead -= 1
        return None

    def next(self) -> datetime | None:
        """When the first of the waiting items can be claimed."""
        waiting = self.waiting
        while waiting:
            if waiting[0][2].alive:
                return waiting[0][0]
            heappop(waiting)
            self.dead -= 1
        return None

    def sweep(self) -> None:
        """Let go of what was replaced, once that is most of what is here."""
        if self.dead > 64 and self.dead > self.live:
            self.ready = [e for e in self.ready if e[3].alive]
            self.waiting = [e for e in self.waiting if e[2].alive]
            heapify(self.ready)
            heapify(self.waiting)
            self.dead = 0


class DueIndex:
    """Items by when they can be claimed."""

    def __init__(self) -> None:
        self._buckets: dict[_Name, _Bucket] = {}
        self._entries: dict[ItemRef, _Entry] = {}
        self._number = 0

    def put(self, item: WorkItem, workflow: str) -> None:
        """Add an item, or tell the index that it changed."""
        ref = (item.run_id, item.item_id)
        name = (item.queue, workflow, item.kind)
        due = wake = item.due_at
        if item.lease is not None and item.lease.until > due:
            wake = item.lease.until
        old = self._entries.get(ref)
        if old is not None:
            if (
                old.queued
                and old.wake == wake
                and old.due == due
                and old.priority == item.priority
                and old.bucket == name
            ):
                return
            self._discard(old)
        bucket = self._buckets.get(name)
        if bucket is None:
            bucket = self._buckets[name] = _Bucket()
        entry = self._entries[ref] = _Entry(ref, name, wake, due, item.priority)
        self._number += 1
        heappush(bucket.waiting, (wake, self._number, entry))
        bucket.live += 1

    def drop(self, ref: ItemRef) -> None:
        """Forget an item; nothing happens for one that is not here."""
        old = self._entries.pop(ref, None)
        if old is not None:
            self._discard(old)

    def _discard(self, entry: _Entry) -> None:
        entry.alive = False
        bucket = self._buckets[entry.bucket]
        bucket.live -= 1
        if entry.queued:
            bucket.dead += 1
        if bucket.live == 0:
            del self._buckets[entry.bucket]
        else:
            bucket.sweep()

    def _matching(
        self,
        queues: frozenset[str] | None,
        workflows: frozenset[str] | None,
        kinds: frozenset[ItemKind] | None,
    ) -> Iterator[_Bucket]:
        for (queue, workflow, kind), bucket in self._buckets.items():
            if (
                (queues is None or queue in queues)
                # A delivery runs no code of the workflow: any worker may carry it out.
                and (workflows is None or kind is ItemKind.DELIVER or workflow in workflows)
                and (kinds is None or kind in kinds)
            ):
                yield bucket

    def pop(
        self,
        limit: int,
        now: datetime,
        queues: frozenset[str] | None,
        workflows: frozenset[str] | None,
        kinds: frozenset[ItemKind] | None,
    ) -> list[ItemRef]:
        """Up to ``limit`` items: highest priority, then oldest due. Each must be ``put`` again."""
        heads = [
            (*head[:3], bucket)
            for bucket in self._matching(queues, workflows, kinds)
            if (head := bucket.head(now)) is not None
        ]
        heapify(heads)
        found: list[ItemRef] = []
        while heads and len(found) < limit:
            bucket = heappop(heads)[3]
            entry = heappop(bucket.ready)[3]
            entry.queued = False
            found.append(entry.ref)
            head = bucket.head(now)
            if head is not None:
                heappush(heads, (*head[:3], bucket))
        return found

    def due(self, now: datetime) -> Iterator[ItemRef]:
        """Every item that can be claimed now, in the order of ``pop``; costs as many as are read.

        The index must not change meanwhile.
        """
        # A heap of places in the buckets' heaps: below each place are only later items.
        heads = [
            (*head, bucket.ready, 0)
            for bucket in self._buckets.values()
            if (head := bucket.head(now)) is not None
        ]
        heapify(heads)
        while heads:
            *_, entry, ready, place = heappop(heads)
            if entry.alive and entry.wake <= now:
                yield entry.ref
            for below in range(2 * place + 1, min(2 * place + 3, len(ready))):
                heappush(heads, (*ready[below], ready, below))

    def next_due(
        self, now: datetime, queues: frozenset[str] | None, workflows: frozenset[str] | None
    ) -> datetime | None:
        """When an item can be claimed next; in the past when one can be claimed now."""
        first: datetime | None = None
        for bucket in self._matching(queues, workflows, None):
            head = bucket.head(now)
            wake = bucket.next() if head is None else head[3].wake
            if wake is not None and (first is None or wake < first):
                first = wake
        return first

    def __len__(self) -> int:
        return len(self._entries)
