"""The reference store: the storage contract without clock, randomness or I/O.

One object holds one namespace. The memory backend wraps it, the file backend journals its deltas,
and every other backend is compared with it. Instants and tokens come from the caller, so that the
same calls always give the same store.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from heapq import heappop, heappush
from typing import cast

from pyworkflow.events import Event
from pyworkflow.runs import ItemKind, Run, WorkItem
from pyworkflow.spi._delta import DELTA_VERSION, Delta, KeyMark, Record, RunDelta
from pyworkflow.spi.storage import (
    Change,
    Claim,
    ClaimRef,
    ClaimRequest,
    Committed,
    Page,
    RunQuery,
)
from pyworkflow.storekit._check import check_change
from pyworkflow.storekit._decide import decide
from pyworkflow.storekit._dormant import DormantRun
from pyworkflow.storekit._due import DueIndex
from pyworkflow.storekit._items import (
    claimable,
    claimed,
    freed,
    imported,
    key_owner,
    notified,
    postponed,
    purgeable,
    released,
    renewed,
    tombstone,
)
from pyworkflow.storekit._listing import TOUCHED, RunIndex, parse_cursor
from pyworkflow.storekit._state import RunState

__all__ = [
    "DELTA_VERSION",
    "Delta",
    "KeyMark",
    "Record",
    "ReferenceStore",
    "RunDelta",
    "check_change",
    "decide",
]

Token = Callable[[], str]
_SNAPSHOT_BYTES = 256 * 1024
_SNAPSHOT_ROWS = 1000
#: So many dormant runs' rows are kept for the next read.
_ROWS = 1000


class ReferenceStore:
    """Runs, events, items and keys of one namespace.

    Methods that change something return the delta that did it, already applied; None when nothing
    was to do. ``apply`` alone changes state.
    """

    def __init__(self) -> None:
        self._runs: dict[str, RunState | DormantRun] = {}
        self._keys: dict[str, KeyMark] = {}
        self._sorted_keys: list[str] | None = None
        self._ending_keys: list[tuple[datetime, str]] = []
        """A heap of keys of purged runs, by when anybody may take them."""
        self._index = DueIndex()
        self._parked: dict[tuple[str, str], None] = {}  # items that a pause hides
        self._leases: dict[tuple[str, str], WorkItem] = {}
        """Items that were claimed and not settled; the lease may be over."""
        self._listing = RunIndex()
        self._next_number = 1
        self._events = 0
        self._loaded: RunState | None = None
        """The dormant run that was loaded last."""
        self._rows: dict[str, RunState] = {}

    # --- changes ------------------------------------------------------------------------------

    def commit(
        self, change: Change, *, now: datetime, token: Token
    ) -> tuple[Committed, Delta | None]:
        """Accept or refuse a change that ``check_change`` has passed.

        Raises:
            RunExists, RunNotFound, RunClosed, Fenced, UnseenInput, KeyTaken: Nothing has changed.
        """
        if len(self._listing.touched) >= TOUCHED:
            self._listing.place(self._runs, now)
        run = self._runs.get(change.run_id)
        committed, part = decide(
            run if isinstance(run, RunState) or run is None else self._whole(change.run_id),
            change,
            now=now,
            token=token,
            owner_of=lambda key: self.find_run(key, now=now),
        )
        if part is None:
            return committed, None
        delta = Delta([part])
        new = change.create
        if new is None:
            self._apply(part)
            return committed, delta
        part.fields["number"] = self._next_number
        if new.idempotency_key is not None:
            delta.taken[new.idempotency_key] = KeyMark(change.run_id)
        self.apply(delta)
        return committed, delta

    def claim(
        self, request: ClaimRequest, *, now: datetime, token: Token
    ) -> tuple[list[Claim], Delta | None]:
        """Take due, free items; ``limit`` bounds claims by reference, too."""
        if request.items is None:
            refs = self._index.pop(
                request.limit, now, request.queues, request.workflows, request.kinds
            )
        else:
            refs = self._claimable(request, now)
        if not refs:
            return [], None
        until = now + request.lease
        parts: dict[str, RunDelta] = {}
        taken: list[WorkItem] = []
        for run_id, item_id in refs:
            item = self._runs[run_id].items[item_id]
            item = claimed(item, owner=request.owner, token=token(), until=until)
            taken.append(item)
            _part(parts, run_id).items.append(item)
        delta = Delta(list(parts.values()))
        self.apply(delta)
        return self._with_events(taken, request, now), delta

    def _claimable(self, request: ClaimRequest, now: datetime) -> list[tuple[str, str]]:
        found: dict[tuple[str, str], None] = {}
        for run_id, item_id in request.items or ():
            if len(found) >= request.limit:
                break
            run = self._runs.get(run_id)
            item = None if run is None else run.items.get(item_id)
            if (
                run is not None
                and item is not None
                and claimable(item, request, paused=run.paused, workflow=run.workflow, now=now)
            ):
                found[run_id, item_id] = None
        return list(found)

    def _with_events(
        self, items: list[WorkItem], request: ClaimRequest, now: datetime
    ) -> list[Claim]:
        budget = request.max_bytes
        claims: list[Claim] = []
        for item in items:
            # The claim has just changed it, so it is in memory.
            run = cast("RunState", self._runs[item.run_id])
            if item.kind is not ItemKind.TURN:
                claims.append(Claim(item=item, run=run.view(now)))
                continue
            after = request.known.get(item.run_id, 0)
            if not 0 <= after <= len(run.events):
                after = 0
            events, size = run.within(after, budget)
            budget -= size
            cut = after + len(events) < len(run.events)
            claims.append(Claim(item=item, run=run.view(now), events=events, after=after, cut=cut))
        return claims

    def _item(self, ref: ClaimRef) -> WorkItem | None:
        run = self._runs.get(ref.run_id)
        return None if run is None else run.items.get(ref.item_id)

    def renew(
        self, refs: Sequence[ClaimRef], lease: timedelta, *, now: datetime
    ) -> tuple[list[bool], Delta | None]:
        """Extend leases. One that ended and was not taken over by anybody is extended as well."""
        kept: list[bool] = []
        parts: dict[str, RunDelta] = {}
        for ref in refs:
            item = renewed(self._item(ref), ref, lease, now=now)
            kept.append(item is not None)
            if item is not None:
                _part(parts, ref.run_id).items.append(item)
        return kept, self._applied(parts)

    def release(
        self, ref: ClaimRef, delay: timedelta | None, *, now: datetime
    ) -> tuple[bool, Delta | None]:
        """Give an item back as if it had not been claimed, or later."""
        item = released(self._item(ref), ref, delay, now=now)
        if item is None:
            return False, None
        return True, self._applied({ref.run_id: RunDelta(ref.run_id, items=[item])})

    def announce(
        self, limit: int, mute: timedelta, *, now: datetime
    ) -> tuple[list[WorkItem], Delta | None]:
        """Due, free items that nobody rang for within ``mute``, in the order of claims."""
        parts: dict[str, RunDelta] = {}
        rung: list[WorkItem] = []
        for run_id, item_id in self._index.due(now):
            if len(rung) >= limit:
                break
            item = notified(self._runs[run_id].items[item_id], mute, now=now)
            if item is not None:
                rung.append(item)
                _part(parts, run_id).items.append(item)
        return rung, self._applied(parts)

    def free(self, owner: str, *, now: datetime) -> tuple[int, Delta | None]:
        """End the leases of ``owner``; the claims stay counted, and valid until taken over."""
        parts: dict[str, RunDelta] = {}
        count = 0
        for old in list(self._leases.values()):
            item = freed(old, owner, now=now)
            if item is not None:
                count += 1
                _part(parts, item.run_id).items.append(item)
        return count, self._applied(parts)

    def recover(self) -> Delta | None:
        """Release all items that have a lease, ended or not: their holders are fenced."""
        parts: dict[str, RunDelta] = {}
        for item in self._leases.values():
            if item.lease is not None:
                ref = ClaimRef(item.run_id, item.item_id, item.lease.token)
                if (given := released(item, ref, None, now=item.due_at)) is not None:
                    _part(parts, item.run_id).items.append(given)
        return self._applied(parts)

    def postpone(self, by: timedelta) -> Delta | None:
        """Let leases end later: the clock was set forward, and their time has not passed."""
        parts: dict[str, RunDelta] = {}
        for old in self._leases.values():
            item = postponed(old, by)
            if item is not None:
                _part(parts, item.run_id).items.append(item)
        return self._applied(parts)

    def purge(
        self, *, before: datetime, limit: int, key_retention: timedelta, now: datetime
    ) -> tuple[int, Delta | None]:
        """Remove ended runs; lets go of keys whose time is over."""
        delta = Delta()
        ending = self._ending_keys
        while ending and ending[0][0] <= now:
            until, key = heappop(ending)
            mark = self._keys.get(key)
            if mark is not None and mark.until == until:
                delta.freed.append(key)
        for run_id in self._listing.ended(before):
            if len(delta.parts) >= limit:
                break
            run = self._runs[run_id]
            ended = run.finished_at
            parent = None if run.parent_id is None else self._runs.get(run.parent_id)
            parent_open = parent is not None and parent.final is None
            if ended is None or not purgeable(
                ended, before=before, items=run.items, parent_open=parent_open
            ):
                continue
            delta.parts.append(RunDelta(run_id, removed=True))
            taken = run.idempotency_key
            if taken is not None:
                mark = tombstone(run_id, ended, key_retention, now=now)
                if mark is not None:
                    delta.taken[taken] = mark
                else:
                    delta.freed.append(taken)
        if not delta.parts and not delta.freed:
            return 0, None
        self.apply(delta)
        return len(delta.parts), delta

    # --- effects ------------------------------------------------------------------------------

    def apply(self, delta: Delta) -> None:
        """Take over effects; nothing else changes the store."""
        for part in delta.parts:
            if part.removed:
                self._remove(part.run_id)
            else:
                self._apply(part)
        if delta.freed or delta.taken:
            self._sorted_keys = None
            for key in delta.freed:
                self._keys.pop(key, None)
            for key, mark in delta.taken.items():
                self._keys[key] = mark
                if mark.until is not None:
                    heappush(self._ending_keys, (mark.until, key))

    def _apply(self, part: RunDelta) -> None:
        run_id = part.run_id
        run = self._runs.get(run_id)
        if run is None:
            run = self._runs[run_id] = RunState(run_id)
        elif not isinstance(run, RunState):  # an abstract class is slow to ask for
            run = self._awaken(run)
        fields = part.fields
        if "finished_at" in fields:
            before = run.finished_at
            run.apply(part)
            self._listing.end(run, before)
        else:
            run.apply(part)
        self._listing.touch(run_id)
        self._events += len(part.events)
        if "number" in fields and run.number >= self._next_number:
            self._next_number = run.number + 1
        if part.gone or part.items or "paused" in fields:
            self._apply_items(run, part)

    def _apply_items(self, run: RunState, part: RunDelta) -> None:
        items = run.items
        for item_id in part.gone:
            del items[item_id]
            self._drop_item((run.run_id, item_id))
        for item in part.items:
            items[item.item_id] = item
            self._place(run, item)
        if "paused" in part.fields:
            for item in items.values():
                self._place(run, item)

    def _remove(self, run_id: str) -> None:
        run = self._runs.pop(run_id)
        self._listing.remove(run)
        home = run if isinstance(run, DormantRun) else run.home
        if home is not None:
            home.released()
        self._events -= run.length
        self._forget(run_id)
        for item_id in run.items:
            self._drop_item((run_id, item_id))

    def _drop_item(self, ref: tuple[str, str]) -> None:
        self._index.drop(ref)
        self._parked.pop(ref, None)
        self._leases.pop(ref, None)

    def _place(self, run: RunState | DormantRun, item: WorkItem) -> None:
        ref = (item.run_id, item.item_id)
        if item.lease is not None:
            self._leases[ref] = item
        else:
            self._leases.pop(ref, None)
        if run.paused and item.kind is not ItemKind.DELIVER:
            self._index.drop(ref)
            self._parked[ref] = None
        else:
            if self._parked:
                self._parked.pop(ref, None)
            self._index.put(item, run.workflow)

    def _applied(self, parts: Mapping[str, RunDelta]) -> Delta | None:
        if not parts:
            return None
        delta = Delta(list(parts.values()))
        self.apply(delta)
        return delta

    def export_run(self, run_id: str) -> RunDelta | None:
        """The run without its events."""
        run = self._whole(run_id)
        if run is None:
            return None
        return RunDelta(
            run_id,
            run.row(),
            items=[item for _, item in sorted(run.items.items())],
            records=[*run.external_answers.values(), *run.answers_by_token.values()],
        )

    def export_keys(self, cursor: str | None, *, limit: int = 1000) -> Page[tuple[str, KeyMark]]:
        """Idempotency keys in their order; the cursor is the last one shown."""
        keys = self._sorted_keys
        if keys is None:
            keys = self._sorted_keys = sorted(self._keys)
        start = 0 if cursor is None else bisect_right(keys, cursor)
        shown = keys[start : start + limit]
        return Page(
            items=[(key, self._keys[key]) for key in shown],
            cursor=shown[-1] if start + limit < len(keys) else None,
        )

    def import_delta(self, delta: Delta) -> Delta:
        """Take over what another store had; the delta as it was applied.

        Raises:
            ValueError: Events are missing between the run's last and the first given.
        """
        applied = Delta(taken=dict(delta.taken), freed=[k for k in delta.freed if k in self._keys])
        number = self._next_number
        for part in delta.parts:
            run = self._runs.get(part.run_id)
            if run is None:
                part = imported(part, None, ())
                part.fields["number"] = number
                number += 1
            else:
                part = imported(part, run.length, run.items)
            applied.parts.append(part)
        self.apply(applied)
        return applied

    def snapshot(self) -> Iterator[Delta]:
        """Deltas that make an equal store of an empty one, each of bounded size.

        The store must not change while they are taken.
        """
        for each in self._runs.values():
            run = each.load() if isinstance(each, DormantRun) else each
            events, _ = run.within(0, _SNAPSHOT_BYTES)
            yield Delta([RunDelta(run.run_id, run.row(), events)])
            done = len(events)
            while done < len(run.events):
                # One event may be larger than the bound.
                events = run.within(done, _SNAPSHOT_BYTES)[0] or run.events[done : done + 1]
                yield Delta([RunDelta(run.run_id, events=events)])
                done += len(events)
            items = list(run.items.values())
            records = [*run.external_answers.values(), *run.answers_by_token.values()]
            for start in range(0, max(len(items), len(records)), _SNAPSHOT_ROWS):
                rows = slice(start, start + _SNAPSHOT_ROWS)
                yield Delta([RunDelta(run.run_id, items=items[rows], records=records[rows])])
        keys = list(self._keys.items())
        for start in range(0, len(keys), _SNAPSHOT_ROWS):
            yield Delta(taken=dict(keys[start : start + _SNAPSHOT_ROWS]))

    # --- reads --------------------------------------------------------------------------------

    def get_run(self, run_id: str, *, now: datetime) -> Run | None:
        """The run, or None."""
        run = self._runs.get(run_id)
        return None if run is None else self._view(run, now)

    def _view(self, run: RunState | DormantRun, now: datetime) -> Run:
        if isinstance(run, RunState):
            return run.view(now)
        row = self._rows.get(run.run_id)
        if row is None:
            if len(self._rows) >= _ROWS:
                del self._rows[next(iter(self._rows))]
            row = self._rows[run.run_id] = run.load_row()
            row.items = run.items
        return row.view(now, run.length)

    def progress(self, run_id: str) -> tuple[int, bool]:
        """The length of the run's history, and whether it has ended; of none, nothing."""
        run = self._runs.get(run_id)
        return (0, False) if run is None else (run.length, run.final is not None)

    def find_run(self, idempotency_key: str, *, now: datetime) -> str | None:
        """Who owns the key."""
        return key_owner(self._keys.get(idempotency_key), now=now)

    def list_runs(self, query: RunQuery, cursor: str | None, *, now: datetime) -> Page[Run]:
        """Newest first; the cursor names the last run shown."""
        if not 1 <= query.limit <= 1000:
            raise ValueError(f"the limit is 1 to 1000: limit={query.limit}")
        below = self._next_number if cursor is None else parse_cursor(cursor)
        self._listing.place(self._runs, now)
        found: list[Run] = []
        last = 0
        for number, run_id in self._listing.below(below, query.workflow, query.status):
            if len(found) == query.limit:
                return Page(items=found, cursor=f"run-{last}")
            found.append(self._view(self._runs[run_id], now))
            last = number
        return Page(items=found)

    def get_events(self, run_id: str, *, after: int = 0, limit: int | None = None) -> list[Event]:
        """Events after ``after``."""
        run = self._whole(run_id)
        if run is None:
            return []
        start = max(0, after)
        return run.events[start : None if limit is None else start + max(0, limit)]

    def list_work(self, run_id: str) -> list[WorkItem]:
        """The run's items, ordered by id."""
        run = self._runs.get(run_id)
        return [] if run is None else [item for _, item in sorted(run.items.items())]

    def next_due(
        self, *, queues: frozenset[str] | None, workflows: frozenset[str] | None, now: datetime
    ) -> datetime | None:
        """When an item can be claimed next; in the past when one can be claimed now."""
        return self._index.next_due(now, queues, workflows)

    def holders(self, *, now: datetime) -> list[str]:
        """Owners of leases that have not ended."""
        return sorted({i.lease.owner for i in self._leased(now) if i.lease is not None})

    def leases(self, owner: str, *, now: datetime) -> list[ClaimRef]:
        """The claims of ``owner`` whose leases have not ended."""
        return [
            ClaimRef(item.run_id, item.item_id, item.lease.token)
            for item in self._leased(now)
            if item.lease is not None and item.lease.owner == owner
        ]

    def _leased(self, now: datetime) -> list[WorkItem]:
        return [i for i in self._leases.values() if i.lease is not None and i.lease.until > now]

    def stats(self, *, now: datetime) -> Mapping[str, int]:
        """Numbers of runs, per status, of events and of items."""
        self._listing.place(self._runs, now)
        items = len(self._index) + len(self._parked)
        counts = {"runs": len(self._runs), "events": self._events, "items": items}
        return counts | {status.value: n for status, n in self._listing.counts().items()}

    # --- dormant runs -------------------------------------------------------------------------

    def adopt(self, run: DormantRun) -> None:
        """Add a run that is not here, or have one that is here lie dormant from now on."""
        known = self._runs.get(run.run_id)
        self._runs[run.run_id] = run
        if isinstance(known, RunState):
            return
        self._forget(run.run_id)
        self._events += run.length
        if run.number >= self._next_number:
            self._next_number = run.number + 1
        if run.finished_at is not None:
            self._listing.end(run, None)
        if run.final is not None:
            self._listing.add_ended(run, run.final)
        else:
            self._listing.touch(run.run_id)
        for item in run.items.values():
            self._place(run, item)

    def drop(self, run: DormantRun) -> None:
        """Take a dormant run out, to be adopted again when its head was changed."""
        del self._runs[run.run_id]
        self._listing.remove(run)
        self._events -= run.length
        self._forget(run.run_id)
        for item_id in run.items:
            self._drop_item((run.run_id, item_id))

    def find(self, run_id: str) -> RunState | DormantRun | None:
        """The run as it is in memory."""
        return self._runs.get(run_id)

    def _whole(self, run_id: str) -> RunState | None:
        """The run to be read; a dormant one stays dormant."""
        run = self._runs.get(run_id)
        if isinstance(run, DormantRun):
            loaded = self._loaded
            if loaded is None or loaded.run_id != run_id:
                loaded = self._loaded = run.load()
                run.give_head(loaded)
            return loaded
        return run

    def _awaken(self, run: DormantRun) -> RunState:
        """The run to be changed."""
        loaded = self._whole(run.run_id)
        assert loaded is not None
        # Lists may have moved it since it was loaded.
        run.give_head(loaded)
        self._forget(run.run_id)
        self._runs[run.run_id] = loaded
        return loaded

    def _forget(self, run_id: str) -> None:
        self._rows.pop(run_id, None)
        if self._loaded is not None and self._loaded.run_id == run_id:
            self._loaded = None


def _part(parts: dict[str, RunDelta], run_id: str) -> RunDelta:
    part = parts.get(run_id)
    if part is None:
        part = parts[run_id] = RunDelta(run_id)
    return part
