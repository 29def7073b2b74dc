"""Which runs exist, by workflow and status and by the time of their end. No list is scanned.

The status of an open run depends on the time: each run that may change by itself has an instant at
which it is looked at again. Runs that a change touched are placed when a list is next asked for,
so that a commit pays for a note only.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping
from datetime import datetime
from heapq import heapify, heappop, heappush, merge
from itertools import takewhile
from typing import Final, Protocol

from pyworkflow._clock import to_micros
from pyworkflow.runs import ItemKind, RunStatus, WorkItem, derive_status

__all__ = ["TOUCHED", "Listed", "OrderedRuns", "RunIndex", "parse_cursor"]

#: A chunk of a list is split at this length: an insertion moves no more than one chunk.
_CHUNK: Final = 2048
#: So many touched runs should be placed, even in a store of which no list is ever asked.
TOUCHED: Final = 4096
_OPEN: Final = (RunStatus.PENDING, RunStatus.RUNNING, RunStatus.SUSPENDED)
_SECOND: Final = 1_000_000
_LAST_SECOND: Final = (1 << 31) - 1


class OrderedRuns:
    """Run ids in the order of their keys, which are distinct integers of 64 bits."""

    __slots__ = ("_firsts", "_ids", "_keys", "size")

    def __init__(self) -> None:
        self._firsts: list[int] = []
        """Of each chunk, a key that is not above its first one."""
        self._keys: list[array[int]] = []
        self._ids: list[list[str]] = []
        self.size = 0

    def add(self, key: int, run_id: str) -> None:
        """Add a run whose key is not here."""
        self.size += 1
        if self._keys:
            at = len(self._keys) - 1
            keys = self._keys[at]
            if key > keys[-1]:
                if len(keys) < _CHUNK:
                    keys.append(key)
                    self._ids[at].append(run_id)
                    return
            else:
                self._insert(key, run_id)
                return
        self._firsts.append(key)
        self._keys.append(array("q", (key,)))
        self._ids.append([run_id])

    def _insert(self, key: int, run_id: str) -> None:
        at = max(0, bisect_right(self._firsts, key) - 1)
        keys, ids = self._keys[at], self._ids[at]
        place = bisect_left(keys, key)
        keys.insert(place, key)
        ids.insert(place, run_id)
        self._firsts[at] = min(self._firsts[at], key)
        if len(keys) > _CHUNK:
            half = len(keys) // 2
            self._firsts.insert(at + 1, keys[half])
            self._keys.insert(at + 1, keys[half:])
            self._ids.insert(at + 1, ids[half:])
            del keys[half:]
            del ids[half:]

    def remove(self, key: int) -> None:
        """Remove the run with the key, which is here."""
        at = bisect_right(self._firsts, key) - 1
        keys = self._keys[at]
        place = bisect_left(keys, key)
        if keys[place] != key:
            raise KeyError(key)
        del keys[place]
        del self._ids[at][place]
        self.size -= 1
        if not keys:
            del self._firsts[at]
            del self._keys[at]
            del self._ids[at]

    def below(self, key: int) -> Iterator[tuple[int, str]]:
        """Keys below ``key`` with their runs, the greatest first. Nothing may change meanwhile."""
        at = bisect_left(self._firsts, key) - 1
        if at < 0:
            return
        keys, ids = self._keys[at], self._ids[at]
        place = bisect_left(keys, key)
        yield from zip(keys[:place][::-1], ids[:place][::-1], strict=True)
        while at > 0:
            at -= 1
            yield from zip(self._keys[at][::-1], self._ids[at][::-1], strict=True)

    def __iter__(self) -> Iterator[tuple[int, str]]:
        for keys, ids in zip(self._keys, self._ids, strict=True):
            yield from zip(keys, ids, strict=True)


class Listed(Protocol):
    """What the index reads of a run, and where it notes its place."""

    run_id: str
    number: int
    workflow: str
    final: RunStatus | None
    stalled: str | None
    paused: bool
    seen_seq: int
    items: dict[str, WorkItem]
    finished_at: datetime | None
    place: OrderedRuns | None
    """The list that has the run. Set by the index alone."""
    look_at: datetime | None
    """When the status may change by itself. Set by the index alone."""


class RunIndex:
    """Runs by workflow and status, newest first; ended runs by the time of their end."""

    def __init__(self) -> None:
        self._lists: dict[tuple[str, RunStatus], OrderedRuns] = {}
        self._ended = OrderedRuns()
        self.touched: set[str] = set()
        """Runs that came or changed since the last ``place``."""
        self._looks: list[tuple[datetime, str]] = []
        self._latest: datetime | None = None
        self.touch = self.touched.add
        """Note that a run came or changed."""

    def end(self, run: Listed, before: datetime | None) -> None:
        """Note that the end of a run was set; ``before`` is what it was."""
        if before is not None:
            self._ended.remove(_end_key(before, run.number))
        if run.finished_at is not None:
            self._ended.add(_end_key(run.finished_at, run.number), run.run_id)

    def add_ended(self, run: Listed, status: RunStatus) -> None:
        """Add a run that has ended and is in no list yet."""
        run.place = self._list(run.workflow, status)
        run.place.add(run.number, run.run_id)

    def remove(self, run: Listed) -> None:
        """Forget a run."""
        if run.place is not None:
            run.place.remove(run.number)
            run.place = None
        run.look_at = None
        self.touched.discard(run.run_id)
        if run.finished_at is not None:
            self._ended.remove(_end_key(run.finished_at, run.number))

    def ended(self, before: datetime) -> Iterator[str]:
        """Runs that ended before the end of that second, by the second of their end."""
        last = _end_key(before, -1)
        return (run_id for _, run_id in takewhile(lambda each: each[0] <= last, self._ended))

    def place(self, runs: Mapping[str, Listed], now: datetime) -> None:
        """Bring the lists level with the runs and the time."""
        if self._latest is not None and now < self._latest:  # the clock was set back
            for (_, status), listed in self._lists.items():
                if status in _OPEN:
                    self.touched.update(run_id for _, run_id in listed)
        self._latest = now
        looks = self._looks
        while looks and looks[0][0] <= now:
            when, run_id = heappop(looks)
            run = runs.get(run_id)
            if run is not None and run.look_at == when:
                run.look_at = None
                self.touched.add(run_id)
        for run_id in self.touched:
            run = runs.get(run_id)
            if run is not None:
                self._place(run, now)
        self.touched.clear()
        if len(looks) > 64 and len(looks) > 4 * sum(
            listed.size for (_, status), listed in self._lists.items() if status in _OPEN
        ):
            looks[:] = [
                (when, run_id)
                for when, run_id in looks
                if (run := runs.get(run_id)) is not None and run.look_at == when
            ]
            heapify(looks)

    def _place(self, run: Listed, now: datetime) -> None:
        status = derive_status(
            final=run.final,
            stalled=run.stalled,
            paused=run.paused,
            seen_seq=run.seen_seq,
            items=list(run.items.values()),
            now=now,
        )
        listed = self._list(run.workflow, status)
        if run.place is not listed:
            if run.place is not None:
                run.place.remove(run.number)
            run.place = listed
            listed.add(run.number, run.run_id)
        look_at = _next_look(run.items, now) if status in _OPEN else None
        if look_at != run.look_at:
            run.look_at = look_at
            if look_at is not None:
                heappush(self._looks, (look_at, run.run_id))

    def _list(self, workflow: str, status: RunStatus) -> OrderedRuns:
        key = workflow, status
        listed = self._lists.get(key)
        if listed is None:
            listed = self._lists[key] = OrderedRuns()
        return listed

    def below(
        self, number: int, workflow: str | None, statuses: frozenset[RunStatus] | None
    ) -> Iterator[tuple[int, str]]:
        """Runs with a smaller number, newest first. ``place`` comes before."""
        wanted = list(RunStatus) if statuses is None else statuses
        if workflow is not None:
            lists = [self._lists.get((workflow, status)) for status in wanted]
        else:
            lists = [listed for (_, status), listed in self._lists.items() if status in wanted]
        found = [listed.below(number) for listed in lists if listed is not None and listed.size]
        return found[0] if len(found) == 1 else merge(*found, reverse=True)

    def counts(self) -> dict[RunStatus, int]:
        """Numbers of runs by status. ``place`` comes before."""
        counts = dict.fromkeys(RunStatus, 0)
        for (_, status), listed in self._lists.items():
            counts[status] += listed.size
        return counts


def _next_look(items: Mapping[str, WorkItem], now: datetime) -> datetime | None:
    """When an open run stops or starts to run by itself, at the earliest."""
    due = [item.due_at for item in items.values() if item.kind is not ItemKind.DELIVER]
    if any(each <= now for each in due):
        return None  # due it stays
    leases = [
        item.lease.until
        for item in items.values()
        if item.lease is not None and item.lease.until > now
    ]
    return max(leases) if leases else min(due, default=None)


def _end_key(instant: datetime, number: int) -> int:
    """Seconds, then the number: distinct, and of 64 bits."""
    seconds = to_micros(instant) // _SECOND
    return (max(-_LAST_SECOND, min(seconds, _LAST_SECOND)) << 32) | (number & 0xFFFF_FFFF)


def parse_cursor(cursor: str) -> int:
    """The number in a cursor of ``list_runs``.

    Raises:
        ValueError: It is none.
    """
    number = cursor.removeprefix("run-")
    if number == cursor or not number.isascii() or not number.isdigit() or len(number) > 18:
        raise ValueError(f"not a cursor of this store: cursor={cursor!r}; start without one")
    return int(number)
