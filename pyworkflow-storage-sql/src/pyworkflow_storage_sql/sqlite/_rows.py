"""Values of the contract as rows, and back. Instants are microseconds, JSON is text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final, cast
from zlib import crc32

from pyworkflow.spi import (
    ErrorInfo,
    Event,
    ItemKind,
    Lease,
    ParentRef,
    Run,
    RunStatus,
    SerializationError,
    StorageDamaged,
    WorkItem,
)

__all__ = [
    "CLAIMED_RUN",
    "EVENT",
    "ITEM",
    "RUN",
    "UNREADABLE",
    "damaged_run",
    "decode",
    "encode",
    "event_in",
    "event_out",
    "events_in",
    "fitting",
    "from_micros",
    "item_in",
    "item_out",
    "listed_run_in",
    "run_in",
    "to_micros",
    "whole",
]

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_ENCODER: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)
#: What ``JSONEncoder.encode`` makes anew for every value; None where Python lacks it.
_make: Any = getattr(json.encoder, "c_make_encoder", None)
_PIECES: Final[Any] = _make and _make(
    None, _ENCODER.default, json.encoder.encode_basestring, None, ":", ",", False, False, False
)
_LARGEST: Final = 2**63 - 1
#: What reading a damaged row of a run or an item raises.
UNREADABLE: Final = (
    StorageDamaged, ArithmeticError, AttributeError, LookupError, TypeError, ValueError,
)  # fmt: skip

#: Columns of ``event_in``.
EVENT: Final = "seq, type, class, op, key, timestamp, v, data, crc"
#: Columns of ``item_in``.
ITEM: Final = (
    "item_id, kind, queue, priority, due_at, payload, claims, owner, token, lease_until, rung_at"
)
#: Columns of ``run_in``, of ``runs r`` and ``run_data d``.
_RUN: Final = (
    "r.run_id, r.workflow, r.version, d.args, d.result, d.error, r.idempotency_key, "
    "r.parent_run_id, r.parent_op, r.root, r.next, r.queue, r.priority, d.tags, d.attributes, "
    "r.created_at, r.started_at, r.updated_at, r.finished_at, r.deadline, r.last_seq, r.seen_seq, "
    "r.paused, r.stalled, r.final"
)
_ERROR, _TAGS, _ATTRIBUTES, _STALLED = (
    [name.strip() for name in _RUN.split(",")].index(name)
    for name in ("d.error", "d.tags", "d.attributes", "r.stalled")
)
RUN: Final = (
    f"{_RUN}, "  # noqa: S608 - constant columns
    "(select max(i.lease_until) from work_items i where i.run = r.id), "
    "(select max(i.claims) from work_items i where i.run = r.id), "
    "(select min(i.due_at) from work_items i where i.run = r.id and i.kind <> 'deliver')"
)
#: The same beside a row of ``work_items`` that has just been claimed: its lease alone decides the
#: status. All items of the run, read for each claim, would make wide runs quadratic.
CLAIMED_RUN: Final = f"{_RUN}, i.lease_until, i.claims, i.due_at"


def to_micros(instant: datetime) -> int:
    """Microseconds since 1970, exact."""
    gap = instant - _EPOCH
    return (gap.days * 86_400 + gap.seconds) * 1_000_000 + gap.microseconds


def from_micros(micros: int) -> datetime:
    """Inverse of ``to_micros``."""
    return _EPOCH + timedelta(microseconds=micros)


def _micros(instant: datetime | None) -> int | None:
    return None if instant is None else to_micros(instant)


def _instant(micros: int | None) -> datetime | None:
    return None if micros is None else from_micros(micros)


def encode(value: object) -> str:
    """JSON text; ``decode`` gives back an equal value.

    Raises:
        SerializationError: No JSON can hold it as it is.
    """
    if type(value) is not dict and isinstance(value, Mapping):
        value = dict(cast("Mapping[str, Any]", value))
    try:
        return _ENCODER.encode(value) if _PIECES is None else "".join(_PIECES(value, 0))
    except (TypeError, ValueError, RecursionError) as error:
        raise SerializationError(
            f"the change cannot be stored as JSON: {error}; encode its values first"
        ) from error


def decode(text: str) -> Any:
    """The value of JSON text.

    Raises:
        StorageDamaged: It is none.
    """
    try:
        return json.loads(text)
    except (TypeError, ValueError) as error:
        raise StorageDamaged("the database", 0, f"a stored value is no JSON: {error}") from error


def event_out(run: int, event: Event) -> tuple[object, ...]:
    """The row of an event, ``run`` first, then the columns ``EVENT``."""
    type, klass, data, op, key, _, seq, timestamp, v = event
    text = encode(data)
    at = to_micros(timestamp)
    # As bytes say it: the checksum covers every column.
    text_of_all = f"{seq}\n{type}\n{klass}\n{op}\n{key}\n{at}\n{v}\n{text}"
    return (run, seq, str(type), str(klass), op, key, at, v, text, crc32(text_of_all.encode()))


def event_in(row: Any, run_id: str, file: str, seq: int) -> Event:
    """The event of a row, which must be the one with ``seq``.

    Raises:
        StorageDamaged: The row is not as it was written.
    """
    found, type, klass, op, key, at, v, text, crc = row
    try:
        text_of_all = f"{found}\n{type}\n{klass}\n{op}\n{key}\n{at}\n{v}\n{text}"
        if found == seq and crc32(text_of_all.encode()) == crc:
            return Event(type, klass, json.loads(text), op, key, run_id, seq, from_micros(at), v)
    except (TypeError, ValueError):
        pass
    raise StorageDamaged(file, 0, f"an event is not as it was written: run_id={run_id} seq={seq}")


def events_in(rows: Iterable[Any], run_id: str, file: str, after: int) -> list[Event]:
    """Events of rows that follow each other, the first with the seq behind ``after``."""
    return [event_in(row, run_id, file, seq) for seq, row in enumerate(rows, after + 1)]


def whole(events: list[Event], run_id: str, file: str, stop: int) -> list[Event]:
    """The events, if the last one's seq is ``stop``."""
    if events and events[-1].seq == stop:
        return events
    seq = events[-1].seq + 1 if events else stop
    raise StorageDamaged(file, 0, f"an event is missing: run_id={run_id} seq={seq}")


def item_out(item: WorkItem, *, parked: bool) -> tuple[object, ...]:
    """The columns of an item that may change."""
    due = to_micros(item.due_at)
    lease = item.lease
    if lease is None:
        free, owner, token, until = due, None, None, None
    else:
        owner, token, until = lease.owner, lease.token, to_micros(lease.until)
        free = max(due, until)
    return (
        str(item.kind),
        item.queue,
        fitting(item.priority, "priority"),
        parked and item.kind is not ItemKind.DELIVER,
        due,
        free,
        item.claims,
        owner,
        token,
        until,
        _micros(item.rung_at),
        encode(item.payload),
    )


def fitting(number: int, name: str) -> int:
    """The number, if a column can hold it."""
    if -_LARGEST <= number <= _LARGEST:
        return number
    raise SerializationError(f"a number of more than 64 bits: {name}={number}")


def item_in(row: Any, run_id: str) -> WorkItem:
    """The item of a row with the columns ``ITEM``."""
    item_id, kind, queue, priority, due, payload, claims, owner, token, until, rung = row
    return WorkItem(
        run_id=run_id,
        item_id=item_id,
        kind=ItemKind(kind),
        queue=queue,
        priority=priority,
        due_at=from_micros(due),
        payload=decode(payload) if payload != "{}" else {},
        claims=claims,
        lease=None if token is None else Lease(owner=owner, token=token, until=from_micros(until)),
        rung_at=_instant(rung),
    )


def damaged_run(file: str, run_id: str, error: Exception) -> StorageDamaged:
    """The error for a row that raised ``error``, one of ``UNREADABLE``."""
    detail = error.detail if isinstance(error, StorageDamaged) else error
    return StorageDamaged(file, 0, f"a run is not as it was written: run_id={run_id} {detail}")


def listed_run_in(row: Any, now: int, file: str) -> Run:
    """The run of a row, for a list: one that is damaged must not hide the others.

    What cannot be read is left out, and ``stalled`` says so.

    Raises:
        StorageDamaged: Not even its other columns can be read.
    """
    try:
        return run_in(row, now)
    except UNREADABLE as error:
        damage = damaged_run(file, row[0], error)
    left = list(row)
    left[_ERROR], left[_TAGS], left[_ATTRIBUTES] = None, "[]", "{}"
    left[_STALLED] = f"StorageDamaged: {damage}"
    try:
        return run_in(left, now)
    except UNREADABLE:
        raise damage from None


def run_in(row: Any, now: int) -> Run:
    """The run of a row with the columns ``RUN``, as it stands at ``now``."""
    (
        run_id, workflow, version, args, result, error, key, parent_id, parent_op, root, next_,
        queue, priority, tags, attributes, created, started, updated, finished, deadline, last,
        seen, paused, stalled, final, leased_until, claims, due,
    ) = row  # fmt: skip
    if final is not None:
        status = RunStatus(final)
    elif stalled is not None:
        status = RunStatus.STALLED
    elif paused:
        status = RunStatus.PAUSED
    elif leased_until is not None and leased_until > now:
        status = RunStatus.RUNNING
    elif seen == 0 and not claims:
        status = RunStatus.PENDING
    elif due is not None and due <= now:
        status = RunStatus.RUNNING
    else:
        status = RunStatus.SUSPENDED
    return Run(
        run_id=run_id,
        workflow=workflow,
        version=version,
        status=status,
        args_text=args,
        result_text=result,
        error=None if error is None else ErrorInfo.from_json(decode(error)),
        idempotency_key=key,
        parent=None if parent_id is None else ParentRef(run_id=parent_id, op=parent_op),
        root=root,
        next=next_,
        queue=queue,
        priority=priority,
        tags=tuple(decode(tags)) if tags != "[]" else (),
        attributes=decode(attributes) if attributes != "{}" else {},
        created_at=from_micros(created),
        started_at=_instant(started),
        updated_at=from_micros(updated),
        finished_at=_instant(finished),
        deadline=_instant(deadline),
        history_length=last,
        seen_seq=seen,
        paused=bool(paused),
        stalled=stalled,
    )
