"""The operations of the contract, each as one function of a transaction's tables.

``decide`` and the functions of items have the rules; what is here finds, lists and removes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from uuid import uuid4

from pyworkflow.spi import (
    Answer,
    Change,
    Claim,
    Claimed,
    ClaimRef,
    ClaimRequest,
    Committed,
    Delta,
    Event,
    ItemKind,
    KeyMark,
    Page,
    Run,
    RunDelta,
    RunQuery,
    WorkItem,
)
from pyworkflow.storekit import (
    answer_each,
    claimable,
    claimed,
    decide,
    imported,
    key_owner,
    notified,
    purgeable,
    released,
    renewed,
    tombstone,
)
from pyworkflow_storage_lmdb._tables import (
    StoredRun,
    Tables,
    digest,
    instant,
    mark_from_json,
    micros,
    pack,
    unpack,
)

PAGE = 1000


def new_token() -> str:
    """A token that no claim ever had."""
    return uuid4().hex


def find_run(tables: Tables, key: str) -> str | None:
    """Who owns an idempotency key."""
    return key_owner(tables.mark(key), now=tables.now)


def commit(tables: Tables, change: Change) -> Committed:
    """Decide a change and write its effects."""
    committed, part = decide(
        tables.run(change.run_id),
        change,
        now=tables.now,
        token=new_token,
        owner_of=lambda key: find_run(tables, key),
    )
    if part is not None:
        tables.apply(part)
        if change.create is not None and change.create.idempotency_key is not None:
            tables.set_mark(change.create.idempotency_key, KeyMark(change.run_id))
    return committed


def commit_all(tables: Tables, changes: Sequence[Change]) -> list[Answer]:
    """Several changes in one transaction; a refusal is raised before anything is written."""
    return answer_each(changes, lambda change: commit(tables, change))


# --- claims -------------------------------------------------------------------------------------


def _put_item(tables: Tables, item: WorkItem) -> WorkItem:
    tables.apply(RunDelta(item.run_id, items=[item]))
    return item


def _item(tables: Tables, run_id: str, item_id: str) -> WorkItem | None:
    run = tables.run(run_id)
    return None if run is None else run.items.get(item_id)


def _claimable(tables: Tables) -> Iterator[tuple[int, str, str, str, str, str]]:
    """(wake, queue, workflow, kind, run id, item id) of due, free items in the order of claims.

    Within a priority, what stands before the first item that is due later was due; of that, what
    is held is skipped: there is no more of it than is being worked on.
    """
    now = micros(tables.now)
    place = b"d"
    while True:
        first = next(tables.scan(b"d", place), None)
        if first is None:
            return
        priority = first[0][:9]
        for key, raw in tables.scan(priority):
            if key[9:17] > pack(now):
                break
            entry = json.loads(raw)
            if entry[0] <= now:
                yield entry
        place = priority + b"\xff" * 8


def _wanted(
    kind: str,
    queue: str,
    workflow: str,
    queues: frozenset[str] | None,
    kinds: frozenset[ItemKind] | None,
    workflows: frozenset[str] | None,
) -> bool:
    return (
        (queues is None or queue in queues)
        and (kinds is None or kind in kinds)
        # A delivery runs no code of the workflow: any worker may carry it out.
        and (workflows is None or kind == ItemKind.DELIVER or workflow in workflows)
    )


def _found(tables: Tables, request: ClaimRequest) -> list[tuple[str, str]]:
    """(run id, item id) of what a request takes."""
    found: dict[tuple[str, str], None] = {}
    filters = (request.queues, request.kinds, request.workflows)
    if request.items is None:
        for _, queue, workflow, kind, run_id, item_id in _claimable(tables):
            if len(found) >= request.limit:
                break
            if _wanted(kind, queue, workflow, *filters):
                found[run_id, item_id] = None
        return list(found)
    for run_id, item_id in request.items:
        if len(found) >= request.limit:
            break
        run = tables.run(run_id)
        item = None if run is None else run.items.get(item_id)
        if (
            run is not None
            and item is not None
            and claimable(item, request, paused=run.paused, workflow=run.workflow, now=tables.now)
        ):
            found[run_id, item_id] = None
    return list(found)


def claim(tables: Tables, request: ClaimRequest) -> Claimed:
    """Take due, free items. Nothing is written when there are none."""
    until = tables.now + request.lease
    taken: list[WorkItem] = []
    for run_id, item_id in _found(tables, request):
        item = _item(tables, run_id, item_id)
        assert item is not None  # the index names only what is there
        item = claimed(item, owner=request.owner, token=new_token(), until=until)
        taken.append(_put_item(tables, item))
    budget = request.max_bytes
    claims: list[Claim] = []
    for item in taken:
        run = tables.run(item.run_id)
        assert run is not None
        if item.kind is not ItemKind.TURN:
            claims.append(Claim(item=item, run=run.view()))
            continue
        after = request.known.get(item.run_id, 0)
        if not 0 <= after <= len(run.events):
            after = 0
        events: list[Event] = []
        for event, size in run.events.read(after, len(run.events)):
            if size > budget:
                break
            budget -= size
            events.append(event)
        cut = after + len(events) < len(run.events)
        claims.append(Claim(item=item, run=run.view(), events=events, after=after, cut=cut))
    return Claimed(claims=claims, now=tables.now)


def renew(tables: Tables, refs: Sequence[ClaimRef], lease: timedelta) -> list[bool]:
    """Extend leases."""
    kept: list[bool] = []
    for ref in refs:
        item = renewed(_item(tables, ref.run_id, ref.item_id), ref, lease, now=tables.now)
        kept.append(item is not None)
        if item is not None:
            _put_item(tables, item)
    return kept


def release(tables: Tables, ref: ClaimRef, delay: timedelta | None) -> bool:
    """Give an item back uncounted."""
    item = released(_item(tables, ref.run_id, ref.item_id), ref, delay, now=tables.now)
    if item is None:
        return False
    _put_item(tables, item)
    return True


def announce(tables: Tables, limit: int, mute: timedelta) -> list[WorkItem]:
    """Due, free items that nobody rang for within ``mute``."""
    rung: list[WorkItem] = []
    for *_, run_id, item_id in _claimable(tables):
        if len(rung) >= limit:
            break
        item = _item(tables, run_id, item_id)
        if item is not None and (new := notified(item, mute, now=tables.now)) is not None:
            rung.append(new)
    for item in rung:
        _put_item(tables, item)
    return rung


def next_due(
    tables: Tables, queues: frozenset[str] | None, workflows: frozenset[str] | None
) -> datetime | None:
    """When an item can be claimed next."""
    first: int | None = None
    place = b"d"
    while (head := next(tables.scan(b"d", place), None)) is not None:
        priority = head[0][:9]
        for key, raw in tables.scan(priority):
            if first is not None and key[9:17] >= pack(first):
                break  # what is due later than the first wake does not wake before it
            wake, queue, workflow, kind, *_ = json.loads(raw)
            if _wanted(kind, queue, workflow, queues, None, workflows):
                first = wake if first is None else min(first, wake)
        place = priority + b"\xff" * 8
    return None if first is None else instant(first)


# --- listings and removal -----------------------------------------------------------------------


def list_runs(tables: Tables, query: RunQuery, cursor: str | None) -> Page[Run]:
    """Runs, newest first; the cursor is the number of the last one shown."""
    if not 1 <= query.limit <= 1000:
        raise ValueError(f"the limit is 1 to 1000: limit={query.limit}")
    last = tables.get(b"mnext") or 1
    if cursor is not None:
        if not (cursor.isascii() and cursor.isdigit() and len(cursor) <= 18):
            raise ValueError(f"not a cursor of this store: cursor={cursor!r}")
        last = int(cursor)
    found: list[Run] = []
    with tables.txn.cursor() as at:
        # To the first key that is not below, then backwards.
        more = at.prev() if at.set_range(b"r" + pack(last)) else at.last()
        while more and (key := bytes(at.key())).startswith(b"r"):
            number = unpack(key)
            stored = StoredRun(tables, number)
            if query.workflow is None or stored.workflow == query.workflow:
                run = stored.view()
                if query.status is None or run.status in query.status:
                    if len(found) == query.limit:
                        return Page(items=found, cursor=str(last))
                    found.append(run)
                    last = number
            more = at.prev()
    return Page(items=found)


def stats(tables: Tables) -> Mapping[str, int]:
    """Numbers of runs, per status, of events and of items."""
    counts = {"runs": 0, "events": 0, "items": sum(1 for _ in tables.scan(b"w"))}
    for key, _ in tables.scan(b"r"):
        run = StoredRun(tables, unpack(key)).view()
        counts["runs"] += 1
        counts["events"] += run.history_length
        counts[run.status] = counts.get(run.status, 0) + 1
    return counts


def purge(tables: Tables, before: datetime, limit: int, key_retention: timedelta) -> int:
    """Remove runs that ended first, and let go of keys whose time is over."""
    lapsed = [
        json.loads(raw) for key, raw in tables.scan(b"l") if key[1:9] <= pack(micros(tables.now))
    ]
    for name in lapsed:
        tables.set_mark(name, None)
    gone: list[StoredRun] = []
    for key, _ in tables.scan(b"f"):
        if len(gone) >= limit or key[1:9] >= pack(micros(before)):
            break
        run = StoredRun(tables, unpack(key))
        parent = None if run.state.parent is None else tables.run(run.state.parent.run_id)
        parent_open = parent is not None and parent.final is None
        if purgeable(run.finished_at, before=before, items=run.items, parent_open=parent_open):
            gone.append(run)
    for run in gone:
        tables.remove(run.run_id)
        name = run.state.idempotency_key
        if name is not None and run.finished_at is not None:
            mark = tombstone(run.run_id, run.finished_at, key_retention, now=tables.now)
            tables.set_mark(name, mark)
    return len(gone)


# --- moving between stores ----------------------------------------------------------------------


def export_keys(tables: Tables, cursor: str | None) -> Page[tuple[str, KeyMark]]:
    """Idempotency keys in the order of their digests; the cursor is the last key shown."""
    start = b"n" if cursor is None else b"n" + digest(cursor) + b"\0"
    found: list[tuple[str, KeyMark]] = []
    for _, raw in tables.scan(b"n", start):
        if len(found) == PAGE:
            return Page(items=found, cursor=found[-1][0])
        value = json.loads(raw)
        found.append((value[0], mark_from_json(value)))
    return Page(items=found)


def import_delta(tables: Tables, delta: Delta) -> None:
    """Write effects as they are; what was written before is skipped."""
    for part in delta.parts:
        if part.removed:
            tables.remove(part.run_id)
            continue
        run = tables.run(part.run_id)
        if run is None:
            tables.apply(imported(part, None, ()))
        else:
            tables.apply(imported(part, len(run.events), run.items))
    for key, mark in delta.taken.items():
        tables.set_mark(key, mark)
    for key in delta.freed:
        tables.set_mark(key, None)
