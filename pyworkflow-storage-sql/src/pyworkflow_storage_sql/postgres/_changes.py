"""Changes, claims and deltas as the server's functions take them: one JSON text for each call.

Payloads are JSON texts *inside* that JSON, as strings: the server never parses them as ``jsonb``,
which would alter 1e308 and -0.0.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from json.encoder import encode_basestring
from typing import Any

from pyworkflow.spi import (
    Change,
    ClaimRef,
    ClaimRequest,
    Delta,
    ErrorInfo,
    Event,
    Json,
    NewRun,
    ParentRef,
    PayloadTooLarge,
    Put,
    Record,
    RunDelta,
    Settle,
    Update,
    WorkItem,
)
from pyworkflow_storage_sql.postgres._names import Names, escape

__all__ = ["Encoder", "span"]

#: Bytes of a run id that comes in by a copy: with a key of 512 it fits into an entry of an index.
LONGEST_RUN_ID = 2000

_dump = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_quote = encode_basestring


def span(duration: timedelta) -> str:
    """The duration as PostgreSQL reads it, exact."""
    micros = (duration.days * 86_400 + duration.seconds) * 1_000_000 + duration.microseconds
    return f"{micros} us"


def _instant(instant: datetime) -> str:
    return instant.astimezone(UTC).isoformat()


def _maybe(instant: datetime | None) -> str | None:
    return None if instant is None else _instant(instant)


def _payload(value: Mapping[str, Json]) -> str:
    return _dump(value if type(value) is dict else dict(value)) if value else "{}"


def _text(text: str | None) -> str | None:
    return None if text is None else escape(text)


class Encoder:
    """Writes the arguments of the server's functions."""

    def __init__(self, names: Names) -> None:
        self.name = names.column

    def maybe(self, name: str | None) -> str | None:
        """A name that may be absent."""
        return None if name is None else self.name(name)

    # --- changes ------------------------------------------------------------------------------

    def change(self, change: Change) -> str:
        """One change: written by hand, as this is most of what a commit costs here."""
        name = self.name
        out = [f'{{"r":{_quote(name(change.run_id))},"k":{_quote(name(change.key))}']
        claim = change.claim
        if claim is not None:
            out.append(f',"ci":{_quote(name(claim.item_id))},"ck":{_quote(name(claim.token))}')
        if change.seen is not None:
            out.append(f',"sn":{change.seen:d}')
        if change.events:
            out.append(self._events(change.events))
        if change.create is not None:
            out.append(f',"cr":{_dump(self._create(change.create))}')
        if change.final is not None:
            out.append(f',"f":"{change.final}"')
        if change.control is not None:
            reason = _quote(escape(change.control.reason))
            out.append(f',"ct":"{change.control.kind}","cw":{reason}')
        if change.update is not None:
            out.append(f',"u":{_dump(self._update(change.update))}')
        if change.drop:
            out.append(f',"d":{_dump([name(item_id) for item_id in change.drop])}')
        if change.settle is not None:
            out.append(f',"st":{_dump(_settle(change.settle))}')
        if change.put:
            out.append(f',"p":{_dump([self._put(put) for put in change.put])}')
        if change.take_turn is not None:
            held = change.take_turn
            out.append(f',"t":{_dump([escape(held.owner), span(held.lease)])}')
        out.append("}")
        return "".join(out)

    def _events(self, events: Sequence[Event]) -> str:
        """The events, and what the server would find out about them one by one."""
        texts: list[str] = []
        keys: list[str] = []
        moves, last_input = "", 0
        for place, e in enumerate(events, 1):
            klass = str(e.klass)
            op = "null" if e.op is None else _quote(escape(e.op))
            key = "null"
            if e.key is not None:
                key = _quote(self.name(e.key))
                keys.append(key)
            v = "" if e.v == 1 else f",{e.v:d}"
            data = _quote(_payload(e.data))
            texts.append(f"[{_quote(escape(e.type))},{_quote(klass)},{data},{op},{key}{v}]")
            if klass != "O":
                moves = ',"mv":true'
                if klass == "I":
                    last_input = place
        out = f',"e":[{",".join(texts)}]{moves}'
        if last_input:
            out += f',"li":{last_input}'
        if keys:
            out += f',"ks":[{",".join(keys)}]'
            if len(keys) > 1 and len(set(keys)) < len(keys):
                out += ',"tw":true'
        return out

    def _create(self, new: NewRun) -> dict[str, Any]:
        out: dict[str, Any] = {
            "workflow": self.name(new.workflow),
            "version": escape(new.version),
            "args": escape(new.args),
            "queue": self.name(new.queue),
            "priority": new.priority,
            "tags": [escape(tag) for tag in new.tags],
            "attributes": _payload(new.attributes),
        }
        if new.idempotency_key is not None:
            out["idempotency_key"] = self.name(new.idempotency_key)
        if new.parent is not None:
            out["parent"] = self._parent(new.parent)
        if new.root is not None:
            out["root"] = self.name(new.root)
        if new.deadline is not None:
            out["deadline"] = _instant(new.deadline)
        return out

    def _parent(self, parent: ParentRef) -> list[str]:
        return [self.name(parent.run_id), escape(parent.op)]

    def _update(self, update: Update) -> dict[str, Any]:
        out: dict[str, Any] = {}
        if update.result is not None:
            out["result"] = escape(update.result)
        if update.error is not None:
            out["error"] = _dump(update.error.to_json())
        if update.next is not None:
            out["next"] = self.name(update.next)
        if update.attributes:
            out["attributes"] = _payload(update.attributes)
        return out

    def _put(self, put: Put) -> list[Any]:
        out: list[Any] = [
            self.name(put.item_id),
            str(put.kind),
            _maybe(put.due_at),
            self.maybe(put.queue),
            put.priority,
            _payload(put.payload),
            put.notified,
        ]
        if put.claimed is not None:
            out += [escape(put.claimed.owner), span(put.claimed.lease)]
        return out

    # --- claims -------------------------------------------------------------------------------

    def claim(self, request: ClaimRequest) -> str:
        """One request of ``claim_many``."""
        out: dict[str, Any] = {
            "owner": escape(request.owner),
            "lease": span(request.lease),
            "limit": request.limit,
            "max_bytes": request.max_bytes,
        }
        if request.items is not None:
            out["items"] = [[self.name(run), self.name(item)] for run, item in request.items]
        if request.queues is not None:
            out["queues"] = [self.name(queue) for queue in request.queues]
        if request.kinds is not None:
            out["kinds"] = [str(kind) for kind in request.kinds]
        if request.workflows is not None:
            out["workflows"] = [self.name(workflow) for workflow in request.workflows]
        if request.known:
            out["known"] = {self.name(run): seq for run, seq in request.known.items()}
        return _dump(out)

    def refs(self, refs: Iterable[ClaimRef]) -> str:
        """The argument of ``renew``."""
        return _dump(
            [[self.name(r.run_id), self.name(r.item_id), self.name(r.token)] for r in refs]
        )

    # --- copies -------------------------------------------------------------------------------

    def delta(self, delta: Delta) -> str:
        """The argument of ``import_delta``."""
        return _dump(
            {
                "parts": [self._part(part) for part in delta.parts],
                "taken": [
                    [self.name(key), self.name(mark.owner), _maybe(mark.until)]
                    for key, mark in delta.taken.items()
                ],
                "freed": [self.name(key) for key in delta.freed],
            }
        )

    def _part(self, part: RunDelta) -> dict[str, Any]:
        run_id = self.name(part.run_id)
        size = len(run_id.encode())
        if size > LONGEST_RUN_ID:
            raise PayloadTooLarge("a run id", size, LONGEST_RUN_ID, "store")
        out: dict[str, Any] = {
            "id": run_id,
            "set": {name: self._field(name, value) for name, value in part.fields.items()},
            "events": [
                [
                    e.seq,
                    _instant(e.timestamp),
                    escape(e.type),
                    str(e.klass),
                    _text(e.op),
                    self.maybe(e.key),
                    e.v,
                    _payload(e.data),
                ]
                for e in part.events
            ],
            "items": [self._item(item) for item in part.items],
            "gone": [self.name(item_id) for item_id in part.gone],
            "records": [
                [self.maybe(r.token), self.name(r.key), self._record(r)] for r in part.records
            ],
        }
        if part.removed:
            out["removed"] = True
        return out

    def _field(self, field: str, value: object) -> Any:
        if value is None or isinstance(value, bool | int):
            return value
        if isinstance(value, datetime):
            return _instant(value)
        if isinstance(value, ErrorInfo):
            return _dump(value.to_json())
        if isinstance(value, ParentRef):
            return self._parent(value)
        if isinstance(value, Mapping):
            return _dump(dict(value))  # pyright: ignore[reportUnknownArgumentType] - attributes
        if isinstance(value, str):
            return self.name(value) if field in _NAMES else escape(value)
        assert isinstance(value, tuple)
        return [escape(str(tag)) for tag in value]  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType] - tags

    def _item(self, item: WorkItem) -> list[Any]:
        lease = item.lease
        return [
            self.name(item.item_id),
            str(item.kind),
            self.name(item.queue),
            item.priority,
            _instant(item.due_at),
            _payload(item.payload),
            item.claims,
            *(
                (None, None, None)
                if lease is None
                else (escape(lease.owner), self.name(lease.token), _instant(lease.until))
            ),
            _maybe(item.rung_at),
        ]

    def _record(self, r: Record) -> str:
        return _dump(
            [
                r.last_seq,
                r.seen_seq,
                r.paused,
                _instant(r.timestamp),
                _instant(r.now),
                r.seqs,
                r.skipped,
                [[self.name(item_id), self.name(token)] for item_id, token in r.held],
            ]
        )


_NAMES = frozenset({"create_key", "workflow", "idempotency_key", "root", "next", "queue"})


def _settle(settle: Settle) -> dict[str, Any]:
    out: dict[str, Any] = {}
    if settle.reschedule_at is not None:
        out["again"] = _instant(settle.reschedule_at)
    if settle.payload is not None:
        out["payload"] = _payload(settle.payload)
    if settle.keep:
        out["keep"] = True
    return out
