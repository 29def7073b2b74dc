"""What goes to the scripts and comes back: headers in JSON, payloads as text beside them.

A header holds names and numbers, which Lua reads. Everything else, user values above all, is JSON
text that Lua moves about without looking at it, so that nothing in it can change. Instants are
decimal text: no double rounds them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, cast

from pyworkflow.spi import (
    Answer,
    Change,
    Claim,
    Committed,
    Delta,
    ErrorInfo,
    Event,
    Fenced,
    ItemKind,
    KeyTaken,
    Lease,
    NewRun,
    ParentRef,
    Put,
    Record,
    Run,
    RunClosed,
    RunDelta,
    RunExists,
    RunNotFound,
    RunStatus,
    UnseenInput,
    Update,
    WorkItem,
)

__all__ = [
    "answer_in",
    "change_out",
    "claim_in",
    "delta_out",
    "events_in",
    "export_in",
    "instant",
    "item_in",
    "micros",
    "run_in",
    "span",
    "text_of",
]

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_NONE = frozenset[int]()
_INSTANTS = ("created_at", "started_at", "updated_at", "finished_at", "deadline")

text_of = json.JSONEncoder(ensure_ascii=False, check_circular=False, separators=(",", ":")).encode


def micros(moment: datetime) -> str:
    """Microseconds since 1970."""
    gap = moment.astimezone(UTC) - EPOCH
    return str((gap.days * 86_400 + gap.seconds) * 1_000_000 + gap.microseconds)


def span(length: timedelta) -> str:
    """A duration in microseconds."""
    return str(length // _MICROSECOND)


def instant(value: int | str) -> datetime:
    """The inverse of ``micros``."""
    return EPOCH + timedelta(microseconds=int(value))


# --- changes ------------------------------------------------------------------------------------


def change_out(change: Change) -> list[bytes]:
    """The arguments that a change is for ``commit.lua``."""
    texts: list[str] = []
    header: dict[str, Any] = {"run": change.run_id, "key": change.key}
    header["ev"] = [(e.klass, False if e.key is None else e.key) for e in change.events]
    texts += [_fragment(event) for event in change.events]
    row: dict[str, str] = {}
    if change.create is not None:
        _create_out(change.create, change.key, header, row)
    if change.claim is not None:
        header["claim"] = (change.claim.item_id, change.claim.token)
    if change.control is not None:
        header["ctl"] = change.control.kind.value
        header["reason"] = change.control.reason
    if change.update is not None:
        header["upd"] = True
        _update_out(change.update, row)
    if row:
        header["row"] = list(row)
        texts += row.values()
    if change.seen is not None:
        header["seen"] = change.seen
    if change.drop:
        header["drop"] = list(change.drop)
    settle = change.settle
    if settle is not None:
        entry: dict[str, Any] = {}
        if settle.keep:
            entry["keep"] = True
        if settle.reschedule_at is not None:
            entry["due"] = micros(settle.reschedule_at)
        if settle.payload is not None:
            entry["payload"] = True
            texts.append(text_of(dict(settle.payload)))
        header["set"] = entry
    if change.put:
        header["put"] = [_put_out(put, texts) for put in change.put]
    if change.final is not None:
        header["fin"] = change.final.value
    if change.take_turn is not None:
        header["take"] = (change.take_turn.owner, span(change.take_turn.lease))
    header["n"] = len(texts)
    return [text_of(header).encode(), *[text.encode() for text in texts]]


def _fragment(event: Event) -> str:
    """The event without what the store gives it: the end of a JSON list."""
    return text_of((event.klass, event.type, dict(event.data), event.op, event.key, event.v))[1:-1]


def _create_out(new: NewRun, key: str, header: dict[str, Any], row: dict[str, str]) -> None:
    header["new"] = True
    header["workflow"] = new.workflow
    header["queue"] = new.queue
    header["priority"] = str(new.priority)
    row |= {
        "create_key": key,
        "workflow": new.workflow,
        "version": new.version,
        "args": new.args,
        "queue": new.queue,
    }
    if new.idempotency_key is not None:
        header["idem"] = row["idempotency_key"] = new.idempotency_key
    if new.parent is not None:
        row["parent_run"], row["parent_op"] = new.parent.run_id, new.parent.op
    if new.root is not None:
        row["root"] = new.root
    if new.priority:
        row["priority"] = str(new.priority)
    if new.tags:
        row["tags"] = text_of(list(new.tags))
    if new.deadline is not None:
        row["deadline"] = micros(new.deadline)
    for name, value in new.attributes.items():
        row["@" + name] = text_of(value)


def _update_out(update: Update, row: dict[str, str]) -> None:
    if update.result is not None:
        row["result"] = update.result
    if update.error is not None:
        row["error"] = text_of(update.error.to_json())
    if update.next is not None:
        row["next"] = update.next
    for name, value in (update.attributes or {}).items():
        row["@" + name] = text_of(value)


def _put_out(put: Put, texts: list[str]) -> dict[str, Any]:
    entry: dict[str, Any] = {"id": put.item_id, "kind": put.kind.value}
    if put.due_at is not None:
        entry["due"] = micros(put.due_at)
    if put.queue is not None:
        entry["queue"] = put.queue
    if put.priority is not None:
        entry["priority"] = str(put.priority)
    if put.payload:
        entry["payload"] = True
        texts.append(text_of(dict(put.payload)))
    if put.notified:
        entry["rung"] = True
    if put.claimed is not None:
        entry["held"] = (put.claimed.owner, span(put.claimed.lease))
    return entry


def answer_in(raw: Sequence[Any], change: Change) -> Answer:
    """The answer that one change got: success, or the refusal.

    Raises:
        ValueError: The change speaks of events that are not there.
    """
    run_id = change.run_id
    if type(raw[0]) is not str:
        again, last, seen, paused, at, now, seqs, skipped, unseen, claims = raw
        moment = instant(now)
        return Committed(
            last_seq=last,
            seen_seq=seen,
            paused=bool(paused),
            timestamp=moment if at == now else instant(at),
            now=moment,
            seqs=seqs,
            skipped=frozenset(skipped) if skipped else _NONE,
            unseen_events=events_in(run_id, unseen) if unseen else (),
            claims=[item_in(run_id, item) for item in claims] if claims else (),
            duplicate=bool(again),
        )
    match raw[0]:
        case "exists":
            return RunExists(run_id)
        case "absent":
            return RunNotFound(run_id)
        case "closed":
            return RunClosed(run_id, RunStatus(raw[1]))
        case "fenced":
            return Fenced(run_id, raw[1])
        case "unseen":
            events = events_in(run_id, raw[2])
            return UnseenInput(run_id, [e for e in events if e.klass == "I" and e.seq > raw[1]])
        case "taken":
            assert change.create is not None
            return KeyTaken(cast("str", change.create.idempotency_key), raw[1])
        case _:
            raise ValueError(f"nothing has this seq yet: seen={raw[1]} last_seq={raw[2]}")


# --- rows, events, items ------------------------------------------------------------------------


def events_in(run_id: str, raw: Sequence[Any]) -> list[Event]:
    """Events as they are stored: seq, instant, class, type, data, op, key, version."""
    return [
        Event(type, klass, data, op, key, run_id, seq, instant(at), v)
        for seq, at, klass, type, data, op, key, v in raw
    ]


def item_in(run_id: str, raw: Sequence[Any]) -> WorkItem:
    """An item as ``item_json`` in Lua writes it."""
    item_id, kind, queue, priority, due, claims, owner, token, until, rung, payload = raw
    return WorkItem(
        run_id=run_id,
        item_id=item_id,
        kind=ItemKind(kind),
        queue=queue,
        priority=priority,
        due_at=instant(due),
        payload=payload,
        claims=claims,
        lease=None if token is None else Lease(owner=owner, token=token, until=instant(until)),
        rung_at=None if rung is None else instant(rung),
    )


def _fields_in(flat: Sequence[str]) -> dict[str, str]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _attributes(row: Mapping[str, str]) -> dict[str, Any]:
    return {name[1:]: json.loads(text) for name, text in row.items() if name.startswith("@")}


def run_in(run_id: str, raw: Sequence[Any]) -> Run:
    """A run: its row as the hash has it, and the status that it amounts to."""
    row, status = _fields_in(raw[0]), raw[1]
    moments = {name: instant(row[name]) if name in row else None for name in _INSTANTS}
    return Run(
        run_id=run_id,
        workflow=row.get("workflow", ""),
        version=row.get("version", ""),
        status=RunStatus(status),
        args_text=row.get("args", ""),
        result_text=row.get("result"),
        error=ErrorInfo.from_json(json.loads(row["error"])) if "error" in row else None,
        idempotency_key=row.get("idempotency_key"),
        parent=_parent(row),
        root=row.get("root"),
        next=row.get("next"),
        queue=row.get("queue", "default"),
        priority=int(row.get("priority", 0)),
        tags=tuple(json.loads(row["tags"])) if "tags" in row else (),
        attributes=_attributes(row),
        created_at=moments["created_at"] or EPOCH,
        started_at=moments["started_at"],
        updated_at=moments["updated_at"] or EPOCH,
        finished_at=moments["finished_at"],
        deadline=moments["deadline"],
        history_length=int(row.get("last_seq", 0)),
        seen_seq=int(row.get("seen_seq", 0)),
        paused="paused" in row,
        stalled=row.get("stalled"),
    )


def _parent(row: Mapping[str, str]) -> ParentRef | None:
    if "parent_run" not in row:
        return None
    return ParentRef(run_id=row["parent_run"], op=row["parent_op"])


def claim_in(raw: Sequence[Any]) -> Claim:
    """One claim."""
    run_id, item, run, after, cut, events = raw
    return Claim(
        item=item_in(run_id, item),
        run=run_in(run_id, run),
        events=events_in(run_id, events),
        after=after,
        cut=cut,
    )


# --- copies -------------------------------------------------------------------------------------

_TEXTS = (
    "create_key",
    "workflow",
    "version",
    "args",
    "result",
    "idempotency_key",
    "root",
    "next",
    "queue",
    "stalled",
)


def export_in(run_id: str, raw: Sequence[Any]) -> RunDelta:
    """A run without its events, as ``export_run`` gives it."""
    row = _fields_in(raw[0])
    fields: dict[str, Any] = {name: row[name] for name in _TEXTS if name in row}
    fields |= {name: instant(row[name]) for name in _INSTANTS if name in row}
    for name in ("number", "priority", "seen_seq"):
        if int(row.get(name, 0)):
            fields[name] = int(row[name])
    if row.get("queue") == "default":
        del fields["queue"]
    for name in ("create_key", "workflow", "version", "args"):
        if not fields.get(name):
            fields.pop(name, None)
    if "error" in row:
        fields["error"] = ErrorInfo.from_json(json.loads(row["error"]))
    if "parent_run" in row:
        fields["parent"] = _parent(row)
    if "tags" in row:
        fields["tags"] = tuple(json.loads(row["tags"]))
    attributes = _attributes(row)
    if attributes:
        fields["attributes"] = attributes
    if "paused" in row:
        fields["paused"] = True
    if "final" in row:
        fields["final"] = RunStatus(row["final"])
    items = sorted((item_in(run_id, item) for item in raw[1]), key=lambda item: item.item_id)
    # As they were written: those of claims must be taken over from the oldest to the latest.
    kept = sorted(raw[2], key=lambda record: (record[1] is not None, record[10]))
    records = [
        Record(
            key, token, last, seen, bool(paused), instant(at), instant(now), seqs, skipped,
            [(item, given) for item, given in held],
        )
        for key, token, last, seen, paused, at, now, seqs, skipped, held, _ in kept
    ]  # fmt: skip
    return RunDelta(run_id, fields, items=items, records=records)


def delta_out(delta: Delta) -> list[bytes]:
    """The arguments that a delta is for ``import.lua``."""
    texts: list[str] = []
    runs: list[dict[str, Any]] = []
    for part in delta.parts:
        entry: dict[str, Any] = {
            "run": part.run_id,
            "removed": part.removed,
            "gone": part.gone,
            "ev": [(e.klass, False if e.key is None else e.key, e.seq) for e in part.events],
            "records": [_record_out(record) for record in part.records],
        }
        texts += [f"[{e.seq},{micros(e.timestamp)},{_fragment(e)}]" for e in part.events]
        row, unset = _row_out(part.fields)
        entry["row"], entry["unset"] = list(row), unset
        entry["attributes"] = "attributes" in part.fields
        texts += row.values()
        entry["items"] = [_item_out(item) for item in part.items]
        texts += [text_of(dict(item.payload)) for item in part.items]
        runs.append(entry)
    taken = [
        (key, mark.owner, "" if mark.until is None else micros(mark.until))
        for key, mark in delta.taken.items()
    ]
    header = {"runs": runs, "taken": taken, "freed": delta.freed}
    return [text_of(header).encode(), *[text.encode() for text in texts]]


def _row_out(fields: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    row: dict[str, str] = {}
    unset: list[str] = []
    for name, value in fields.items():
        if name == "number":
            continue
        if name == "attributes":
            row |= {"@" + key: text_of(entry) for key, entry in value.items()}
        elif name == "parent":
            if value is None:
                unset += ["parent_run", "parent_op"]
            else:
                row["parent_run"], row["parent_op"] = value.run_id, value.op
        elif name == "paused":
            if value:
                row["paused"] = "1"
            else:
                unset.append("paused")
        elif value is None:
            unset.append(name)
        elif name in _INSTANTS:
            row[name] = micros(value)
        elif name == "error":
            row[name] = text_of(value.to_json())
        elif name == "tags":
            row[name] = text_of(list(value))
        else:
            row[name] = str(value)
    return row, unset


def _item_out(item: WorkItem) -> tuple[str, list[Any]]:
    lease = item.lease
    return item.item_id, [
        item.kind.value,
        item.queue,
        str(item.priority),
        micros(item.due_at),
        item.claims,
        False if lease is None else lease.owner,
        False if lease is None else lease.token,
        False if lease is None else micros(lease.until),
        False if item.rung_at is None else micros(item.rung_at),
    ]


def _record_out(record: Record) -> list[Any]:
    return [
        record.key,
        record.token or "",
        record.last_seq,
        record.seen_seq,
        int(record.paused),
        micros(record.timestamp),
        micros(record.now),
        record.seqs,
        record.skipped,
        record.held,
    ]
