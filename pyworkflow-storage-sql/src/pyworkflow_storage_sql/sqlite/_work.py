"""Work items: which can be claimed, and what claimers do to them. Run in the writer's transaction."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, Final

from pyworkflow.spi import (
    Claim,
    Claimed,
    ClaimRef,
    ClaimRequest,
    Event,
    ItemKind,
    StorageDamaged,
    WorkItem,
)
from pyworkflow_storage_sql.sqlite._buckets import HEADS, HEADS_OF_QUEUES
from pyworkflow_storage_sql.sqlite._rows import (
    CLAIMED_RUN,
    EVENT,
    ITEM,
    RUN,
    UNREADABLE,
    damaged_run,
    event_in,
    from_micros,
    item_in,
    run_in,
    to_micros,
)
from pyworkflow_storage_sql.sqlite._writer import Batch

__all__ = [
    "announce",
    "claim",
    "free",
    "holders",
    "leases",
    "next_due",
    "recover",
    "release",
    "renew",
]

_log = logging.getLogger("pyworkflow.storage.sqlite")
_FIRST_PAUSE_S: Final = 1
_LONGEST_PAUSE_S: Final = 300
_ITEM: Final = ", ".join(f"i.{name}" for name in ITEM.split(", "))
#: Of one bucket, in the order of the index.
_FREE: Final = (
    "select i.priority, i.due_at, i.id, i.rung_at from work_items i indexed by work_free "
    "where i.token is null and i.parked = 0 and i.namespace = ? and i.queue = ? "
    "and i.workflow = ? and i.kind = ? and i.priority = ? and i.due_at <= ? "
    "order by i.due_at, i.id limit ?"
)
#: So many items of a bucket are looked at for some that were not rung for: those behind them have
#: their turn when these are claimed.
_MOST_RUNG: Final = 2000
#: The heads of all buckets, or of those of some queues.
_HEADS: Final = (
    "with recursive heads (id) as ({heads}) "
    "select i.queue, i.workflow, i.kind, i.priority, i.due_at from heads h "
    "cross join work_items i on i.id = h.id where {where}"
)
_HELD: Final = (
    "select i.priority, i.due_at, i.id, i.rung_at from work_items i indexed by work_held "
    "where i.token is not null and i.parked = 0 and i.namespace = ? and i.free_at <= ?{filters}"
)
_HELD_NEXT: Final = (
    "select i.free_at from work_items i indexed by work_held "
    "where i.token is not null and i.parked = 0 and i.namespace = ?{filters}"
)
_EVENT_BYTES: Final = 96

_Due = tuple[int, int, int, int | None]


class _Filters:
    """What a claim asks for, as SQL behind a where."""

    def __init__(
        self,
        *,
        queues: frozenset[str] | None = None,
        kinds: frozenset[ItemKind] | None = None,
        workflows: frozenset[str] | None = None,
    ) -> None:
        self.queues = queues
        """Asked for by ``heads``, and where ``sql`` is not behind it by the caller."""
        self.sql = ""
        self.values: list[object] = []
        if kinds is not None:
            self.sql += f" and i.kind in ({_marks(kinds)})"
            self.values += sorted(str(kind) for kind in kinds)
        if workflows is not None:
            self.sql += f" and (i.kind = 'deliver' or i.workflow in ({_marks(workflows)}))"
            self.values += sorted(workflows)

    def held(self) -> tuple[str, list[object]]:
        """For what is not found by bucket: the queues as well."""
        if self.queues is None:
            return self.sql, self.values
        return (
            f"{self.sql} and i.queue in ({_marks(self.queues)})",
            [*self.values, *sorted(self.queues)],
        )


def _marks(values: frozenset[Any]) -> str:
    return ", ".join("?" * len(values))


def _heads(batch: Batch, filters: _Filters) -> list[tuple[str, str, str, int, int]]:
    """Queue, workflow, kind and priority of each bucket that fits; when its first item is due."""
    if filters.queues is None:
        heads = HEADS.format(namespace="?")
        values: list[object] = [batch.namespace, batch.namespace]
    elif filters.queues:
        heads = HEADS_OF_QUEUES.format(queues=", ".join(["(?)"] * len(filters.queues)))
        values = [batch.namespace, *sorted(filters.queues), batch.namespace]
    else:
        return []
    sql = _HEADS.format(heads=heads, where=f"true{filters.sql}")
    return batch.conn.execute(sql, (*values, *filters.values)).fetchall()


def _due(batch: Batch, limit: int, filters: _Filters, rung: int | None = None) -> list[int]:
    """Ids of items that can be claimed now: highest priority, then oldest due.

    With ``rung``, those alone that were not rung for after that.
    """
    most = limit if rung is None else _MOST_RUNG
    found: list[_Due] = []
    for *bucket, due_at in _heads(batch, filters):
        if due_at <= batch.micros:
            found += batch.conn.execute(_FREE, (batch.namespace, *bucket, batch.micros, most))
    held, values = filters.held()
    found += batch.conn.execute(
        _HELD.format(filters=held), (batch.namespace, batch.micros, *values)
    )
    if rung is not None:
        found = [row for row in found if row[3] is None or row[3] <= rung]
    found.sort(key=lambda row: (-row[0], row[1], row[2]))
    return [row[2] for row in found[:limit]]


def _named(batch: Batch, request: ClaimRequest) -> list[int]:
    """Ids of those of the items asked for by name that can be claimed now."""
    filters = _Filters(kinds=request.kinds, workflows=request.workflows)
    found: dict[int, None] = {}
    for run_id, item_id in request.items or ():
        if len(found) >= request.limit:
            break
        row = batch.conn.execute(
            "select i.id, i.queue from runs r join work_items i on i.run = r.id "  # noqa: S608 - constant text and marks
            "where r.namespace = ? and r.run_id = ? and i.item_id = ? and i.free_at <= ? "
            f"and i.parked = 0{filters.sql}",
            (batch.namespace, run_id, item_id, batch.micros, *filters.values),
        ).fetchone()
        if row is not None and (request.queues is None or row[1] in request.queues):
            found[row[0]] = None
    return list(found)


def claim(request: ClaimRequest, batch: Batch) -> Claimed:
    """Take due, free items."""
    if request.limit <= 0:
        ids = []
    elif request.items is None:
        filters = _Filters(queues=request.queues, kinds=request.kinds, workflows=request.workflows)
        ids = _due(batch, request.limit, filters)
    else:
        ids = _named(batch, request)
    if not ids:
        return Claimed(claims=[], now=batch.now)
    until = to_micros(batch.now + request.lease)
    batch.writes()
    for item in ids:
        batch.conn.execute(
            "update work_items set owner = ?, token = ?, lease_until = ?, "
            "free_at = max(due_at, ?), claims = claims + 1, rung_at = null where id = ?",
            (request.owner, batch.token(), until, until, item),
        )
    budget = request.max_bytes
    claims: list[Claim] = []
    for item in ids:
        try:
            made, size = _claimed(batch, item, request, budget)
        except UNREADABLE as damage:
            _put_off(batch, item, damage)
            continue
        budget -= size
        claims.append(made)
    return Claimed(claims=claims, now=batch.now)


def _put_off(batch: Batch, id: int, damage: Exception) -> None:
    """Leave an item alone whose row, or whose run's, cannot be read: longer with each claim."""
    run_id, item_id, claims = batch.conn.execute(
        "select r.run_id, i.item_id, i.claims from work_items i join runs r on r.id = i.run "
        "where i.id = ?",
        (id,),
    ).fetchone()
    pause = min(_FIRST_PAUSE_S * 2 ** min(max(0, claims - 1), 10), _LONGEST_PAUSE_S)
    due = batch.micros + pause * 1_000_000
    batch.conn.execute(
        "update work_items set owner = null, token = null, lease_until = null, due_at = ?, "
        "free_at = ? where id = ?",
        (due, due, id),
    )
    if claims <= 1:
        _log.error(
            "work cannot be read and is left alone, the other runs continue: item_id=%s run_id=%s: "
            "%s",
            item_id,
            run_id,
            damaged_run(batch.file, run_id, damage),
        )


def _claimed(batch: Batch, id: int, request: ClaimRequest, budget: int) -> tuple[Claim, int]:
    run_columns = CLAIMED_RUN if request.lease > timedelta(0) else RUN
    row = batch.conn.execute(
        f"select r.id, {_ITEM}, {run_columns} from work_items i "  # noqa: S608 - constant columns
        "join runs r on r.id = i.run join run_data d on d.run = r.id where i.id = ?",
        (id,),
    ).fetchone()
    width = 1 + len(ITEM.split(", "))
    run = run_in(row[width:], batch.micros)
    item = item_in(row[1:width], run.run_id)
    if item.kind is not ItemKind.TURN:
        return Claim(item=item, run=run), 0
    after = request.known.get(run.run_id, 0)
    if not 0 <= after <= run.history_length:
        after = 0
    events: list[Event] = []
    size = 0
    if after < run.history_length:
        cursor = batch.conn.execute(
            f"select {EVENT} from events where run = ? and seq > ? order by seq",  # noqa: S608 - constant columns
            (row[0], after),
        )
        with contextlib.closing(cursor):
            for event in cursor:
                more = _EVENT_BYTES + len(event[7])
                if size + more > budget:
                    break
                seq = after + 1 + len(events)
                try:
                    events.append(event_in(event, run.run_id, batch.file, seq))
                except StorageDamaged:
                    break  # told to whoever reads on: the other claims are as good as ever
                size += more
    cut = after + len(events) < run.history_length
    return Claim(item=item, run=run, events=events, after=after, cut=cut), size


def _held(batch: Batch, ref: ClaimRef) -> int | None:
    row = batch.conn.execute(
        "select i.id from runs r join work_items i on i.run = r.id "
        "where r.namespace = ? and r.run_id = ? and i.item_id = ? and i.token = ?",
        (batch.namespace, ref.run_id, ref.item_id, ref.token),
    ).fetchone()
    return None if row is None else row[0]


def renew(refs: Sequence[ClaimRef], lease: timedelta, batch: Batch) -> list[bool]:
    """Extend leases, those too that ended and were not taken over."""
    until = to_micros(batch.now + lease)
    kept: list[bool] = []
    for ref in refs:
        item = _held(batch, ref)
        kept.append(item is not None)
        if item is not None:
            batch.writes(work=lease <= timedelta(0))
            batch.conn.execute(
                "update work_items set lease_until = ?, free_at = max(due_at, ?) where id = ?",
                (until, until, item),
            )
    return kept


def release(ref: ClaimRef, delay: timedelta | None, batch: Batch) -> bool:
    """Give an item back as if it had not been claimed, or later."""
    item = _held(batch, ref)
    if item is None:
        return False
    batch.writes(work=True)
    due = None if delay is None else to_micros(batch.now + delay)
    batch.conn.execute(
        "update work_items set owner = null, token = null, lease_until = null, rung_at = null, "
        "due_at = coalesce(?, due_at), free_at = coalesce(?, due_at), "
        "claims = max(0, claims - 1) where id = ?",
        (due, due, item),
    )
    return True


def announce(limit: int, mute: timedelta, batch: Batch) -> list[WorkItem]:
    """Due, free items that nobody rang for within ``mute``, in the order of claims."""
    if limit <= 0:
        return []
    found: list[WorkItem] = []
    for item in _due(batch, limit, _Filters(), to_micros(batch.now - mute)):
        batch.writes()
        batch.conn.execute("update work_items set rung_at = ? where id = ?", (batch.micros, item))
        row = batch.conn.execute(
            f"select r.run_id, {_ITEM} from work_items i join runs r on r.id = i.run where i.id = ?",  # noqa: S608 - constant columns
            (item,),
        ).fetchone()
        with contextlib.suppress(*UNREADABLE):  # named by the claim that meets it
            found.append(item_in(row[1:], row[0]))
    return found


def free(owner: str, batch: Batch) -> int:
    """End the leases of ``owner``; the claims stay counted, and valid until taken over."""
    now = batch.micros
    freed = batch.conn.execute(
        "update work_items set lease_until = ?, due_at = min(due_at, ?), free_at = ?, "
        "rung_at = null where namespace = ? and token is not null and owner = ? "
        "and lease_until > ?",
        (now, now, now, batch.namespace, owner, now),
    ).rowcount
    if freed:
        batch.writes(work=True)
    return freed


def recover(batch: Batch) -> None:
    """Release all items that have a lease, ended or not: their holders are fenced."""
    batch.writes(work=True)
    batch.conn.execute(
        "update work_items set owner = null, token = null, lease_until = null, rung_at = null, "
        "free_at = due_at, claims = max(0, claims - 1) where namespace = ? and token is not null",
        (batch.namespace,),
    )


def holders(batch: Batch) -> list[str]:
    """Owners of leases that have not ended."""
    rows = batch.conn.execute(
        "select distinct owner from work_items indexed by work_held "
        "where namespace = ? and token is not null and lease_until > ? order by owner",
        (batch.namespace, batch.micros),
    )
    return [row[0] for row in rows]


def leases(owner: str, batch: Batch) -> list[ClaimRef]:
    """The claims of ``owner`` whose leases have not ended."""
    rows = batch.conn.execute(
        "select r.run_id, i.item_id, i.token from work_items i indexed by work_held "
        "join runs r on r.id = i.run where i.namespace = ? and i.token is not null "
        "and i.lease_until > ? and i.owner = ?",
        (batch.namespace, batch.micros, owner),
    )
    return [ClaimRef(*row) for row in rows]


def next_due(
    queues: frozenset[str] | None, workflows: frozenset[str] | None, batch: Batch
) -> datetime | None:
    """When an item can be claimed next; in the past when one can be claimed now."""
    filters = _Filters(queues=queues, workflows=workflows)
    times = [head[4] for head in _heads(batch, filters)]
    sql, values = filters.held()
    held = batch.conn.execute(
        _HELD_NEXT.format(filters=sql) + " order by i.free_at limit 1", (batch.namespace, *values)
    ).fetchone()
    if held is not None:
        times.append(held[0])
    return from_micros(min(times)) if times else None
