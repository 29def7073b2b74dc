"""Deltas: what one accepted change did to the reference store, as plain effects.

A delta names values, never requests or rules, so that a journal of deltas means the same for every
later version of the rules. ``to_json`` and ``from_json`` are exact inverses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol, cast

from pyworkflow._clock import from_micros, to_micros
from pyworkflow.errors import SchemaTooNew
from pyworkflow.events import Event, Json
from pyworkflow.runs import ErrorInfo, ItemKind, Lease, ParentRef, Run, RunStatus, WorkItem

__all__ = [
    "DELTA_VERSION",
    "Delta",
    "KeyMark",
    "Record",
    "RunDelta",
    "record_from_json",
    "record_to_json",
    "row_of",
]

#: Version of the JSON form that this code writes.
DELTA_VERSION = 1


@dataclass(slots=True)
class Record:
    """The answer to an applied change, kept under its key so that it can be given again."""

    key: str
    token: str | None
    """The claim's token; None for a change from outside."""
    last_seq: int
    seen_seq: int
    paused: bool
    timestamp: datetime
    now: datetime
    seqs: list[int] = field(default_factory=list[int])
    skipped: list[int] = field(default_factory=list[int])
    held: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    """(item id, token) of the claims that the answer gave."""


@dataclass(slots=True)
class RunDelta:
    """What changed of one run."""

    run_id: str
    fields: dict[str, object] = field(default_factory=dict[str, object])
    """Names of the run's row → new values, as ``RunState`` has them; of a new run, all that are not
    the default. None and False reset a field (``stalled``, ``paused``)."""
    events: list[Event] = field(default_factory=list[Event])
    """Appended, with seq and timestamp."""
    items: list[WorkItem] = field(default_factory=list[WorkItem])
    """Put in place of what has the same id."""
    gone: list[str] = field(default_factory=list[str])
    """Item ids removed; comes before ``items``."""
    records: list[Record] = field(default_factory=list[Record])
    removed: bool = False
    """The run is purged, with all that it had."""


@dataclass(slots=True)
class KeyMark:
    """Who owns an idempotency key, and until when if the run was purged."""

    owner: str
    until: datetime | None = None


@dataclass(slots=True)
class Delta:
    """Effects that happen together or not at all."""

    parts: list[RunDelta] = field(default_factory=list[RunDelta])
    taken: dict[str, KeyMark] = field(default_factory=dict[str, KeyMark])
    """Idempotency keys set."""
    freed: list[str] = field(default_factory=list[str])
    """Idempotency keys that anybody may take from now on."""

    def to_json(self) -> dict[str, Json]:
        """The delta as a JSON object; instants are microseconds since 1970."""
        data: dict[str, Json] = {"v": DELTA_VERSION, "runs": [_part_out(p) for p in self.parts]}
        if self.taken:
            data["taken"] = {
                key: [mark.owner, None if mark.until is None else to_micros(mark.until)]
                for key, mark in self.taken.items()
            }
        if self.freed:
            data["freed"] = [*self.freed]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Json]) -> Delta:
        """Inverse of ``to_json``.

        Raises:
            SchemaTooNew: a newer version wrote it.
        """
        raw = cast("Mapping[str, Any]", data)
        if raw["v"] > DELTA_VERSION:
            raise SchemaTooNew("delta", raw["v"], DELTA_VERSION)
        return cls(
            parts=[_part_in(p) for p in raw["runs"]],
            taken={
                key: KeyMark(owner, None if until is None else from_micros(until))
                for key, (owner, until) in raw.get("taken", {}).items()
            },
            freed=raw.get("freed", []),
        )


# Absent keys stand for defaults, so that a line costs what it says.


class _Convert(Protocol):
    def __call__(self, value: Any, /) -> Any: ...  # noqa: ANN401 - one table for fields of all types


_INSTANTS = ("created_at", "started_at", "updated_at", "finished_at", "deadline")
_OUT: dict[str, _Convert] = {
    **dict.fromkeys(_INSTANTS, to_micros),
    "error": lambda value: value.to_json(),
    "parent": lambda value: [value.run_id, value.op],
    "tags": list,
    "final": str,
}
_IN: dict[str, _Convert] = {
    **dict.fromkeys(_INSTANTS, from_micros),
    "error": ErrorInfo.from_json,
    "parent": lambda value: ParentRef(run_id=value[0], op=value[1]),
    "tags": tuple,
    "final": RunStatus,
}


def _fields_out(fields: Mapping[str, Any]) -> dict[str, Json]:
    return {
        name: _OUT[name](value) if value is not None and name in _OUT else value
        for name, value in fields.items()
    }


def _fields_in(fields: Mapping[str, Any]) -> dict[str, object]:
    return {
        name: _IN[name](value) if value is not None and name in _IN else value
        for name, value in fields.items()
    }


def _part_out(part: RunDelta) -> dict[str, Json]:
    data: dict[str, Json] = {"id": part.run_id}
    if part.fields:
        data["set"] = _fields_out(part.fields)
    if part.events:
        data["events"] = [_event_out(e) for e in part.events]
    if part.gone:
        data["gone"] = [*part.gone]
    if part.items:
        data["items"] = [_item_out(i) for i in part.items]
    if part.records:
        data["keys"] = [record_to_json(r) for r in part.records]
    if part.removed:
        data["removed"] = True
    return data


def _part_in(data: Mapping[str, Any]) -> RunDelta:
    run_id: str = data["id"]
    return RunDelta(
        run_id,
        _fields_in(data.get("set", {})),
        [_event_in(run_id, e) for e in data.get("events", ())],
        [_item_in(run_id, i) for i in data.get("items", ())],
        data.get("gone", []),
        [record_from_json(r) for r in data.get("keys", ())],
        data.get("removed", False),
    )


def _event_out(event: Event) -> dict[str, Json]:
    data: dict[str, Json] = {
        "seq": event.seq,
        "at": to_micros(event.timestamp),
        "type": str(event.type),
        "class": str(event.klass),
        "data": dict(event.data),
    }
    if event.op is not None:
        data["op"] = event.op
    if event.key is not None:
        data["key"] = event.key
    if event.v != 1:
        data["v"] = event.v
    return data


def _event_in(run_id: str, data: Mapping[str, Any]) -> Event:
    return Event(
        data["type"],
        data["class"],
        data["data"],
        data.get("op"),
        data.get("key"),
        run_id,
        data["seq"],
        from_micros(data["at"]),
        # 1, not EVENT_VERSION: what an old journal leaves out keeps its meaning.
        data.get("v", 1),
    )


def _item_out(item: WorkItem) -> dict[str, Json]:
    data: dict[str, Json] = {
        "id": item.item_id,
        "kind": str(item.kind),
        "queue": item.queue,
        "due": to_micros(item.due_at),
    }
    if item.priority:
        data["priority"] = item.priority
    if item.payload:
        data["payload"] = dict(item.payload)
    if item.claims:
        data["claims"] = item.claims
    if item.lease is not None:
        data["lease"] = [item.lease.owner, item.lease.token, to_micros(item.lease.until)]
    if item.rung_at is not None:
        data["rung"] = to_micros(item.rung_at)
    return data


def _item_in(run_id: str, data: Mapping[str, Any]) -> WorkItem:
    lease = data.get("lease")
    rung = data.get("rung")
    return WorkItem(
        run_id=run_id,
        item_id=data["id"],
        kind=ItemKind(data["kind"]),
        queue=data["queue"],
        priority=data.get("priority", 0),
        due_at=from_micros(data["due"]),
        payload=data.get("payload", {}),
        claims=data.get("claims", 0),
        lease=None
        if lease is None
        else Lease(owner=lease[0], token=lease[1], until=from_micros(lease[2])),
        rung_at=None if rung is None else from_micros(rung),
    )


def record_to_json(record: Record) -> dict[str, Json]:
    """The record as a JSON object, as deltas have it."""
    data: dict[str, Json] = {
        "key": record.key,
        "last": record.last_seq,
        "seen": record.seen_seq,
        "at": to_micros(record.timestamp),
        "now": to_micros(record.now),
    }
    if record.token is not None:
        data["token"] = record.token
    if record.paused:
        data["paused"] = True
    if record.seqs:
        data["seqs"] = [*record.seqs]
    if record.skipped:
        data["skipped"] = [*record.skipped]
    if record.held:
        data["held"] = [[item_id, token] for item_id, token in record.held]
    return data


def record_from_json(data: Mapping[str, Any]) -> Record:
    """Inverse of ``record_to_json``."""
    return Record(
        data["key"],
        data.get("token"),
        data["last"],
        data["seen"],
        data.get("paused", False),
        from_micros(data["at"]),
        from_micros(data["now"]),
        data.get("seqs", []),
        data.get("skipped", []),
        [(item_id, token) for item_id, token in data.get("held", ())],
    )


def row_of(run: Run) -> dict[str, object]:
    """The fields of a run as a delta has them, without those that no ``Run`` shows."""
    fields: dict[str, object] = {
        "workflow": run.workflow,
        "version": run.version,
        "args": run.args_text,
        "queue": run.queue,
        "created_at": run.created_at,
        "updated_at": run.updated_at,
    }
    given: dict[str, object] = {
        "result": run.result_text,
        "error": run.error,
        "idempotency_key": run.idempotency_key,
        "parent": run.parent,
        "root": run.root,
        "next": run.next,
        "priority": run.priority,
        "tags": run.tags,
        "attributes": run.attributes,
        "started_at": run.started_at,
        "finished_at": run.finished_at,
        "deadline": run.deadline,
        "seen_seq": run.seen_seq,
        "paused": run.paused,
        "stalled": run.stalled,
        "final": run.status if run.status.is_terminal else None,
    }
    return fields | {name: value for name, value in given.items() if value not in (None, 0, (), {})}
