"""The rules of work items, runs that are purged and keys, one pure function each.

``decide`` has the rules of ``commit``; these are the rules of everything else that writes. None of
them reads a clock or changes what it is given: the caller passes the storage's ``now`` and writes
what comes back. ``None`` means that the call does nothing to this item.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime, timedelta

from pyworkflow.events import Json
from pyworkflow.runs import ItemKind, Lease, WorkItem
from pyworkflow.spi._delta import KeyMark, RunDelta
from pyworkflow.spi.storage import ClaimRef, ClaimRequest

__all__ = [
    "claimable",
    "claimed",
    "freed",
    "imported",
    "is_free",
    "key_owner",
    "notified",
    "postponed",
    "purgeable",
    "released",
    "renewed",
    "tombstone",
    "wakes_at",
    "with_lease",
]


def with_lease(
    item: WorkItem,
    *,
    lease: Lease | None,
    due_at: datetime | None = None,
    payload: Mapping[str, Json] | None = None,
    claims: int | None = None,
    rung_at: datetime | None = None,
) -> WorkItem:
    """The item with this lease and ``rung_at``, and other fields where given."""
    return WorkItem(
        run_id=item.run_id,
        item_id=item.item_id,
        kind=item.kind,
        queue=item.queue,
        priority=item.priority,
        due_at=item.due_at if due_at is None else due_at,
        payload=item.payload if payload is None else payload,
        claims=item.claims if claims is None else claims,
        lease=lease,
        rung_at=rung_at,
    )


def wakes_at(item: WorkItem, *, paused: bool) -> datetime | None:
    """When a claim may take the item: when it is due, and its lease is over.

    None while its run is paused, unless it is a delivery. It changes with the item and with
    ``paused`` alone, so that an index may keep it: ``next_due`` is the least of all.
    """
    if paused and item.kind is not ItemKind.DELIVER:
        return None
    if item.lease is None or item.lease.until < item.due_at:
        return item.due_at
    return item.lease.until


def is_free(item: WorkItem, *, paused: bool, now: datetime) -> bool:
    """Whether the item is due, under no lease that still runs, and not of a paused run.

    A lease that ends now is over. Deliveries of a paused run are free.
    """
    return (
        item.due_at <= now
        and (item.lease is None or item.lease.until <= now)
        and (not paused or item.kind is ItemKind.DELIVER)
    )


def claimable(
    item: WorkItem, request: ClaimRequest, *, paused: bool, workflow: str, now: datetime
) -> bool:
    """Whether a request may take the item: it is free, and every filter of the request lets it by.

    ``items`` and ``limit`` of the request are the caller's. Deliveries pass the filter of workflows.

    Args:
        item: As it is stored.
        request: Its ``queues``, ``kinds`` and ``workflows`` are read.
        paused: Whether the item's run is paused.
        workflow: The name of the run's workflow.
        now: The storage's clock.
    """
    return (
        is_free(item, paused=paused, now=now)
        and (request.queues is None or item.queue in request.queues)
        and (request.kinds is None or item.kind in request.kinds)
        and (
            request.workflows is None
            or item.kind is ItemKind.DELIVER
            or workflow in request.workflows
        )
    )


def claimed(item: WorkItem, *, owner: str, token: str, until: datetime) -> WorkItem:
    """The item under a new lease: the claim is counted, and ``rung_at`` ends.

    Args:
        item: A claimable one.
        owner: The request's.
        token: One that this store never gave before.
        until: The storage's ``now`` plus the request's lease.
    """
    lease = Lease(owner=owner, token=token, until=until)
    return with_lease(item, lease=lease, claims=item.claims + 1)


def renewed(
    item: WorkItem | None, ref: ClaimRef, lease: timedelta, *, now: datetime
) -> WorkItem | None:
    """The item with its lease until now + ``lease``; None when the claim is over.

    Only the token counts: a lease whose time is over, and that no other claim replaced, is renewed
    as well. ``rung_at`` stays.
    """
    if item is None or item.lease is None or item.lease.token != ref.token:
        return None
    until = Lease(owner=item.lease.owner, token=item.lease.token, until=now + lease)
    return with_lease(item, lease=until, rung_at=item.rung_at)


def released(
    item: WorkItem | None, ref: ClaimRef, delay: timedelta | None, *, now: datetime
) -> WorkItem | None:
    """The item without its lease and uncounted, as if it had not been claimed; None as in ``renewed``.

    ``rung_at`` ends. ``delay`` None keeps ``due_at``; else it is now + ``delay``.
    """
    if item is None or item.lease is None or item.lease.token != ref.token:
        return None
    return with_lease(
        item,
        lease=None,
        due_at=None if delay is None else now + delay,
        claims=max(0, item.claims - 1),
    )


def notified(item: WorkItem, mute: timedelta, *, now: datetime) -> WorkItem | None:
    """The item of an ``announce``: ``rung_at`` is now, its lease (which is over) stays.

    None when it was notified less than ``mute`` ago. The caller passes free items only
    (``is_free``), in the order of claims.
    """
    if item.rung_at is not None and item.rung_at + mute > now:
        return None
    return with_lease(item, lease=item.lease, rung_at=now)


def freed(item: WorkItem, owner: str, *, now: datetime) -> WorkItem | None:
    """The item with its lease at an end; None unless ``owner`` has it under a lease that runs.

    It is due now, or earlier if it was: a holder may have moved ``due_at`` ahead. The claim stays
    counted, and its token valid until another claim replaces it. ``rung_at`` ends.
    """
    lease = item.lease
    if lease is None or lease.owner != owner or lease.until <= now:
        return None
    ended = Lease(owner=owner, token=lease.token, until=now)
    return with_lease(item, lease=ended, due_at=min(item.due_at, now))


def postponed(item: WorkItem, by: timedelta) -> WorkItem | None:
    """The item with a lease that ends ``by`` later; None without a lease. ``rung_at`` stays.

    For a store whose clock was set forward: the time of its leases has not passed.
    """
    if item.lease is None:
        return None
    lease = Lease(owner=item.lease.owner, token=item.lease.token, until=item.lease.until + by)
    return with_lease(item, lease=lease, rung_at=item.rung_at)


def purgeable(
    finished_at: datetime | None, *, before: datetime, items: Collection[object], parent_open: bool
) -> bool:
    """Whether ``purge`` removes a run: it ended earlier than ``before`` and owns no items.

    Args:
        finished_at: The run's; None while it is open. A run that ended exactly at ``before`` stays.
        before: The argument of ``purge``.
        items: The run's items, or their ids. A delivery that is not done keeps the run.
        parent_open: Whether the run that started it exists and has not ended.
    """
    return finished_at is not None and finished_at < before and not items and not parent_open


def tombstone(
    run_id: str, finished_at: datetime, key_retention: timedelta, *, now: datetime
) -> KeyMark | None:
    """What a purged run's idempotency key becomes: taken until ``finished_at`` + ``key_retention``.

    None: that time is over, and the key is removed with its run. It counts from the end of the run,
    whenever the run is purged.
    """
    until = finished_at + key_retention
    return KeyMark(run_id, until) if until > now else None


def key_owner(mark: KeyMark | None, *, now: datetime) -> str | None:
    """The run that has an idempotency key, or None.

    A mark whose ``until`` has come owns nothing, even while it still is in the store: a new run may
    overwrite it, and ``purge`` removes it only if its ``until`` is still the one that it read.
    """
    if mark is None or (mark.until is not None and mark.until <= now):
        return None
    return mark.owner


def imported(part: RunDelta, length: int | None, items: Collection[str]) -> RunDelta:
    """A part of ``import_delta`` as it is to be written.

    Events that are there already are left out, so that a part may be sent again, and so are items
    in ``gone`` that are not there. ``number`` is never taken over: a new run gets the store's next.

    Args:
        part: As it was given.
        length: The number of events that the run has here; None when there is no such run.
        items: The ids of the items that the run has here.

    Raises:
        ValueError: Events are missing between the run's last and the first given.
    """
    last = length or 0
    events = [event for event in part.events if event.seq > last]
    if events and events[0].seq != last + 1:
        raise ValueError(
            f"events are missing: run_id={part.run_id} last_seq={last} next={events[0].seq}"
        )
    return RunDelta(
        part.run_id,
        {name: value for name, value in part.fields.items() if name != "number"},
        events,
        part.items,
        [item_id for item_id in part.gone if item_id in items],
        part.records,
        part.removed,
    )
