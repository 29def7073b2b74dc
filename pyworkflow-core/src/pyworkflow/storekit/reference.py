"""The reference store: the storage contract without clock, randomness or I/O.

One object holds one namespace. The memory backend wraps it, the file backend journals its deltas,
and every other backend is compared with it. Instants and tokens come from the caller, so that the
same calls always give the same store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from itertools import chain

from pyworkflow.events import Event
from pyworkflow.runs import ItemKind, Lease, Run, RunStatus, WorkItem
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
from pyworkflow.storekit._due import DueIndex
from pyworkflow.storekit._plan import altered
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


class ReferenceStore:
    """Runs, events, items and keys of one namespace.

    Methods that change something return the delta that did it, already applied; None when nothing
    was to do. ``apply`` alone changes state.
    """

    def __init__(self) -> None:
        self._runs: dict[str, RunState] = {}
        self._keys: dict[str, KeyMark] = {}
        self._index = DueIndex()
        self._parked: dict[tuple[str, str], None] = {}  # items that a pause hides
        self._next_number = 1

    # --- changes ------------------------------------------------------------------------------

    def commit(
        self, change: Change, *, now: datetime, token: Token
    ) -> tuple[Committed, Delta | None]:
        """Accept or refuse a change that ``check_change`` has passed.

        Raises:
            RunExists, RunNotFound, RunClosed, Fenced, UnseenInput, KeyTaken: Nothing has changed.
        """
        committed, part = decide(
            self._runs.get(change.run_id),
            change,
            now=now,
            token=token,
            owner_of=lambda key: self.find_run(key, now=now),
        )
        if part is None:
            return committed, None
        delta = Delta([part])
        new = change.create
        if new is not None:
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
            lease = Lease(owner=request.owner, token=token(), until=until)
            item = altered(item, lease=lease, claims=item.claims + 1)
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
                and item.due_at <= now
                and (item.lease is None or item.lease.until <= now)
                and (not run.paused or item.kind is ItemKind.DELIVER)
                and (request.queues is None or item.queue in request.queues)
                and (request.kinds is None or item.kind in request.kinds)
                and (
                    request.workflows is None
                    or item.kind is ItemKind.DELIVER
                    or run.workflow in request.workflows
                )
            ):
                found[run_id, item_id] = None
        return list(found)

    def _with_events(
        self, items: list[WorkItem], request: ClaimRequest, now: datetime
    ) -> list[Claim]:
        budget = request.max_bytes
        claims: list[Claim] = []
        for item in items:
            run = self._runs[item.run_id]
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

    def _held(self, ref: ClaimRef) -> WorkItem | None:
        run = self._runs.get(ref.run_id)
        item = None if run is None else run.items.get(ref.item_id)
        if item is None or item.lease is None or item.lease.token != ref.token:
            return None
        return item

    def renew(
        self, refs: Sequence[ClaimRef], lease: timedelta, *, now: datetime
    ) -> tuple[list[bool], Delta | None]:
        """Extend leases. One that ended and was not taken over by anybody is extended as well."""
        kept: list[bool] = []
        parts: dict[str, RunDelta] = {}
        for ref in refs:
            item = self._held(ref)
            kept.append(item is not None)
            if item is not None and item.lease is not None:
                until = Lease(owner=item.lease.owner, token=item.lease.token, until=now + lease)
                _part(parts, ref.run_id).items.append(
                    altered(item, lease=until, rung_at=item.rung_at)
                )
        return kept, self._applied(parts)

    def release(
        self, ref: ClaimRef, delay: timedelta | None, *, now: datetime
    ) -> tuple[bool, Delta | None]:
        """Give an item back as if it had not been claimed, or later."""
        item = self._held(ref)
        if item is None:
            return False, None
        given = altered(
            item,
            lease=None,
            due_at=None if delay is None else now + delay,
            claims=max(0, item.claims - 1),
        )
        return True, self._applied({ref.run_id: RunDelta(ref.run_id, items=[given])})

    def announce(
        self, limit: int, mute: timedelta, *, now: datetime
    ) -> tuple[list[WorkItem], Delta | None]:
        """Due, free items that nobody rang for within ``mute``, in the order of claims."""
        parts: dict[str, RunDelta] = {}
        rung: list[WorkItem] = []
        for run_id, item_id in self._index.due(now):
            if len(rung) >= limit:
                break
            item = self._runs[run_id].items[item_id]
            if item.rung_at is None or item.rung_at + mute <= now:
                item = altered(item, lease=item.lease, rung_at=now)
                rung.append(item)
                _part(parts, run_id).items.append(item)
        return rung, self._applied(parts)

    def free(self, owner: str, *, now: datetime) -> tuple[int, Delta | None]:
        """End the leases of ``owner``; the claims stay counted, and valid until taken over."""
        parts: dict[str, RunDelta] = {}
        freed = 0
        for item in self._leased(now):
            if item.lease is not None and item.lease.owner == owner:
                freed += 1
                lease = Lease(owner=owner, token=item.lease.token, until=now)
                _part(parts, item.run_id).items.append(
                    altered(item, lease=lease, due_at=min(item.due_at, now))
                )
        return freed, self._applied(parts)

    def purge(
        self, *, before: datetime, limit: int, key_retention: timedelta, now: datetime
    ) -> tuple[int, Delta | None]:
        """Remove ended runs; lets go of keys whose time is over."""
        delta = Delta()
        delta.freed = [
            key for key, mark in self._keys.items() if mark.until is not None and mark.until <= now
        ]
        for run in self._runs.values():
            if len(delta.parts) >= limit:
                break
            if run.finished_at is None or run.finished_at >= before or run.items:
                continue
            parent = None if run.parent is None else self._runs.get(run.parent.run_id)
            if parent is not None and parent.final is None:
                continue
            delta.parts.append(RunDelta(run.run_id, removed=True))
            key = run.idempotency_key
            if key is not None:
                until = run.finished_at + key_retention
                if until > now:
                    delta.taken[key] = KeyMark(run.run_id, until)
                else:
                    delta.freed.append(key)
        if not delta.parts and not delta.freed:
            return 0, None
        self.apply(delta)
        return len(delta.parts), delta

    # --- effects ------------------------------------------------------------------------------

    def apply(self, delta: Delta) -> None:
        """Take over effects; nothing else changes the store."""
        for part in delta.parts:
            if part.removed:
                del self._runs[part.run_id]
            else:
                self._apply(part)
        for key in delta.freed:
            del self._keys[key]
        if delta.taken:
            self._keys.update(delta.taken)

    def _apply(self, part: RunDelta) -> None:
        run = self._runs.get(part.run_id)
        if run is None:
            run = self._runs[part.run_id] = RunState(part.run_id)
        run.apply(part)
        if run.number >= self._next_number:
            self._next_number = run.number + 1
        items = run.items
        for item_id in part.gone:
            del items[item_id]
            ref = (part.run_id, item_id)
            self._index.drop(ref)
            self._parked.pop(ref, None)
        for item in part.items:
            items[item.item_id] = item
            self._place(run, item)
        if "paused" in part.fields:
            for item in items.values():
                self._place(run, item)

    def _place(self, run: RunState, item: WorkItem) -> None:
        ref = (item.run_id, item.item_id)
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
        run = self._runs.get(run_id)
        if run is None:
            return None
        return RunDelta(
            run_id,
            run.row(),
            items=[item for _, item in sorted(run.items.items())],
            records=[*run.outside.values(), *run.recent.values()],
        )

    def export_keys(self, cursor: str | None, *, limit: int = 1000) -> Page[tuple[str, KeyMark]]:
        """Idempotency keys in their order; the cursor is the last one shown."""
        keys = sorted(key for key in self._keys if cursor is None or key > cursor)
        return Page(
            items=[(key, self._keys[key]) for key in keys[:limit]],
            cursor=keys[limit - 1] if len(keys) > limit else None,
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
            fields = {name: value for name, value in part.fields.items() if name != "number"}
            length = 0 if run is None else len(run.events)
            if run is None:
                fields["number"] = number
                number += 1
            events = [event for event in part.events if event.seq > length]
            if events and events[0].seq != length + 1:
                raise ValueError(
                    f"events are missing: run_id={part.run_id} last_seq={length} "
                    f"next={events[0].seq}"
                )
            gone = [] if run is None else [item_id for item_id in part.gone if item_id in run.items]
            applied.parts.append(
                RunDelta(part.run_id, fields, events, part.items, gone, part.records, part.removed)
            )
        self.apply(applied)
        return applied

    def snapshot(self) -> Iterator[Delta]:
        """Deltas that make an equal store of an empty one, each of bounded size.

        The store must not change while they are taken.
        """
        for run in self._runs.values():
            events, _ = run.within(0, _SNAPSHOT_BYTES)
            yield Delta([RunDelta(run.run_id, run.row(), events)])
            done = len(events)
            while done < len(run.events):
                # One event may be larger than the bound.
                events = run.within(done, _SNAPSHOT_BYTES)[0] or run.events[done : done + 1]
                yield Delta([RunDelta(run.run_id, events=events)])
                done += len(events)
            items = list(run.items.values())
            records = [*run.outside.values(), *run.recent.values()]
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
        return None if run is None else run.view(now)

    def progress(self, run_id: str) -> tuple[int, bool]:
        """The length of the run's history, and whether it has ended; of none, nothing."""
        run = self._runs.get(run_id)
        return (0, False) if run is None else (len(run.events), run.final is not None)

    def find_run(self, idempotency_key: str, *, now: datetime) -> str | None:
        """Who owns the key."""
        mark = self._keys.get(idempotency_key)
        if mark is None or (mark.until is not None and mark.until <= now):
            return None
        return mark.owner

    def list_runs(self, query: RunQuery, cursor: str | None, *, now: datetime) -> Page[Run]:
        """Newest first; the cursor names the last run shown."""
        if not 1 <= query.limit <= 1000:
            raise ValueError(f"the limit is 1 to 1000: limit={query.limit}")
        below = self._next_number if cursor is None else _parse_cursor(cursor)
        found: list[Run] = []
        last = 0
        for run in reversed(self._runs.values()):
            if run.number >= below or (
                query.workflow is not None and run.workflow != query.workflow
            ):
                continue
            view = run.view(now)
            if query.status is not None and view.status not in query.status:
                continue
            if len(found) == query.limit:
                return Page(items=found, cursor=f"run-{last}")
            found.append(view)
            last = run.number
        return Page(items=found)

    def get_events(self, run_id: str, *, after: int = 0, limit: int | None = None) -> list[Event]:
        """Events after ``after``."""
        run = self._runs.get(run_id)
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

    def _leased(self, now: datetime) -> list[WorkItem]:
        items = (self._runs[run].items[item] for run, item in chain(self._index, self._parked))
        return [i for i in items if i.lease is not None and i.lease.until > now]

    def stats(self, *, now: datetime) -> Mapping[str, int]:
        """Numbers of runs, per status, of events and of items."""
        counts = {"runs": len(self._runs), "events": 0, "items": 0}
        counts |= {status.value: 0 for status in RunStatus}
        for run in self._runs.values():
            counts["events"] += len(run.events)
            counts["items"] += len(run.items)
            counts[run.view(now).status.value] += 1
        return counts


def _part(parts: dict[str, RunDelta], run_id: str) -> RunDelta:
    part = parts.get(run_id)
    if part is None:
        part = parts[run_id] = RunDelta(run_id)
    return part


def _parse_cursor(cursor: str) -> int:
    number = cursor.removeprefix("run-")
    if number == cursor or not number.isascii() or not number.isdigit() or len(number) > 18:
        raise ValueError(f"not a cursor of this store: cursor={cursor!r}; start without one")
    return int(number)
