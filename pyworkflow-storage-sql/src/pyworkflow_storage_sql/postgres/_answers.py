"""What the server's functions return, as the contract's values."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from pyworkflow.spi import (
    Answer,
    Change,
    Claim,
    Committed,
    ErrorInfo,
    Event,
    Fenced,
    ItemKind,
    KeyTaken,
    Lease,
    ParentRef,
    Record,
    Run,
    RunClosed,
    RunExists,
    RunNotFound,
    RunStatus,
    UnseenInput,
    WorkItem,
)
from pyworkflow_storage_sql.postgres._names import Names, unescape

__all__ = ["Decoder", "parse_cursor"]

_load = json.loads
_NONE = frozenset[int]()


def _instant(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


def _maybe(text: str | None) -> datetime | None:
    return None if text is None else _instant(text)


def _text(text: str | None) -> str | None:
    return None if text is None else unescape(text)


class Decoder:
    """Builds the contract's values."""

    def __init__(self, names: Names) -> None:
        self.name = names.text

    def maybe(self, name: str | None) -> str | None:
        """A name that may be absent."""
        return None if name is None else self.name(name)

    # --- answers to changes -------------------------------------------------------------------

    def answer(self, change: Change, row: Mapping[str, Any]) -> Answer | ValueError:
        """The answer of one row of ``commit_many``."""
        kind = row["o_kind"]
        run_id = change.run_id
        if kind == "done" or kind == "again":
            seqs: list[int] | None = row["o_seqs"]
            claims = row["o_claims"]
            given = () if claims is None else [self.item(i) for i in _load(claims)]
            claim = change.claim
            # What others added is for the holder of the turn alone.
            turn = claim is not None and (
                claim.item_id == "turn" or any(item.item_id == "turn" for item in given)
            )
            unseen = self.events(row["o_others"]) if turn else []
            skipped = row["o_skipped"]
            if seqs is None:
                last = row["o_last"]
                seqs = list(range(last - len(change.events) + 1, last + 1))
            if kind == "again" and unseen:
                left = set(skipped)
                own = {seq for index, seq in enumerate(seqs) if index not in left}
                unseen = [event for event in unseen if event.seq not in own]
            return Committed(
                last_seq=row["o_last"],
                seen_seq=row["o_seen"],
                paused=row["o_paused"],
                timestamp=row["o_at"],
                now=row["o_now"],
                seqs=seqs,
                skipped=frozenset(skipped) if skipped else _NONE,
                unseen_events=unseen,
                claims=given,
                duplicate=kind == "again",
            )
        if kind == "fenced":
            return Fenced(run_id, self.name(row["o_detail"]))
        if kind == "closed":
            return RunClosed(run_id, RunStatus(row["o_detail"]))
        if kind == "missing":
            return RunNotFound(run_id)
        if kind == "exists":
            return RunExists(run_id)
        if kind == "taken":
            assert change.create is not None
            assert change.create.idempotency_key is not None
            return KeyTaken(change.create.idempotency_key, self.name(row["o_detail"]))
        if kind == "unseen":
            return UnseenInput(run_id, self._unseen(change, row))
        return ValueError(f"nothing has this seq yet: seen={change.seen} last_seq={row['o_last']}")

    def _unseen(self, change: Change, row: Mapping[str, Any]) -> list[Event]:
        seqs = row["o_seqs"]
        skipped: set[int] = set(row["o_skipped"] or ())
        if seqs is None:
            seqs = range(row["o_last"] + 1, row["o_last"] + 1 + len(change.events))
        own = [
            Event(e.type, e.klass, e.data, e.op, e.key, change.run_id, seq, row["o_at"], e.v)
            for index, (e, seq) in enumerate(zip(change.events, seqs, strict=True))
            if index not in skipped
        ]
        history = [*self.events(row["o_others"]), *own]
        return [e for e in history if e.klass == "I" and e.seq > row["o_seen"]]

    # --- values -------------------------------------------------------------------------------

    def events(self, text: str | None) -> list[Event]:
        """Events of a JSON array."""
        if text is None:
            return []
        return [
            Event(
                unescape(e["type"]),
                e["class"],
                e["data"],
                _text(e["op"]),
                self.maybe(e["key"]),
                self.name(e["run_id"]),
                e["seq"],
                _instant(e["timestamp"]),
                e["v"],
            )
            for e in _load(text)
        ]

    def row(self, run_id: str, row: Mapping[str, Any]) -> Event:
        """An event of a row of the table."""
        return Event(
            unescape(row["type"]),
            row["class"],
            _load(row["data"]),
            _text(row["op"]),
            self.maybe(row["key"]),
            run_id,
            row["seq"],
            row["timestamp"],
            row["v"],
        )

    def item(self, i: Mapping[str, Any]) -> WorkItem:
        """A work item of a JSON object."""
        token = i["token"]
        return WorkItem(
            run_id=self.name(i["run_id"]),
            item_id=self.name(i["item_id"]),
            kind=ItemKind(i["kind"]),
            queue=self.name(i["queue"]),
            priority=i["priority"],
            due_at=_instant(i["due_at"]),
            payload=i["payload"],
            claims=i["claims"],
            lease=None
            if token is None
            else Lease(
                owner=unescape(i["owner"]),
                token=self.name(token),
                until=_instant(i["lease_until"]),
            ),
            rung_at=_maybe(i["rung_at"]),
        )

    def items(self, texts: Sequence[str]) -> list[WorkItem]:
        """Work items of JSON texts."""
        return [self.item(_load(text)) for text in texts]

    def run(self, text: str) -> Run:
        """A run with its status."""
        status, r = _load(text)
        return Run(
            run_id=self.name(r["run_id"]),
            workflow=self.name(r["workflow"]),
            version=unescape(r["version"]),
            status=RunStatus(status),
            args_text=unescape(r["args"]),
            result_text=_text(r["result"]),
            error=None if r["error"] is None else ErrorInfo.from_json(r["error"]),
            idempotency_key=self.maybe(r["idempotency_key"]),
            parent=self._parent(r),
            root=self.maybe(r["root"]),
            next=self.maybe(r["next"]),
            queue=self.name(r["queue"]),
            priority=r["priority"],
            tags=tuple(unescape(tag) for tag in r["tags"]),
            attributes=r["attributes"],
            created_at=_instant(r["created_at"]),
            started_at=_maybe(r["started_at"]),
            updated_at=_instant(r["updated_at"]),
            finished_at=_maybe(r["finished_at"]),
            deadline=_maybe(r["deadline"]),
            history_length=r["last_seq"],
            seen_seq=r["seen_seq"],
            paused=r["paused"],
            stalled=_text(r["stalled"]),
        )

    def number(self, text: str) -> int:
        """A run's place among all."""
        number: int = _load(text)[1]["number"]
        return number

    def _parent(self, r: Mapping[str, Any]) -> ParentRef | None:
        if r["parent_run_id"] is None:
            return None
        return ParentRef(run_id=self.name(r["parent_run_id"]), op=unescape(r["parent_op"]))

    def claim(self, row: Mapping[str, Any]) -> Claim:
        """One claim of ``claim_many``."""
        return Claim(
            item=self.item(_load(row["o_item"])),
            run=self.run(row["o_run"]),
            events=self.events(row["o_events"]),
            after=row["o_after"],
            cut=row["o_cut"],
        )

    # --- copies -------------------------------------------------------------------------------

    def fields(self, text: str) -> dict[str, object]:
        """A run's row as a delta has it: what differs from a fresh run's."""
        run = self.run(text)
        r = _load(text)[1]
        fields: dict[str, object] = {
            "number": r["number"],
            "create_key": self.name(r["create_key"]),
            "final": None if r["final"] is None else RunStatus(r["final"]),
        }
        fields |= {name: getattr(run, name) for name in _SHOWN}
        fields |= {"args": run.args_text, "result": run.result_text}
        return {name: value for name, value in fields.items() if value != _FRESH.get(name)}

    def record(self, token: str | None, key: str, text: str) -> Record:
        """A kept answer."""
        last, seen, paused, at, now, seqs, skipped, held = _load(text)
        if isinstance(seqs, int):
            seqs = list(range(last - seqs + 1, last + 1))
        return Record(
            self.name(key),
            self.maybe(token),
            last,
            seen,
            paused,
            _instant(at),
            _instant(now),
            seqs,
            skipped,
            [(self.name(item_id), self.name(held_token)) for item_id, held_token in held],
        )


_SHOWN = (
    *("workflow", "version", "error", "idempotency_key", "parent", "root"),
    *("next", "queue", "priority", "tags", "attributes", "created_at", "started_at"),
    *("updated_at", "finished_at", "deadline", "seen_seq", "paused", "stalled"),
)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_FRESH: dict[str, object] = {
    "number": 0,
    "create_key": "",
    "workflow": "",
    "version": "",
    "args": "",
    "queue": "default",
    "priority": 0,
    "tags": (),
    "attributes": {},
    "created_at": _EPOCH,
    "updated_at": _EPOCH,
    "seen_seq": 0,
    "paused": False,
}


def parse_cursor(cursor: str) -> int:
    """The number of the last run shown."""
    number = cursor.removeprefix("run-")
    if number == cursor or not number.isascii() or not number.isdigit() or len(number) > 18:
        raise ValueError(f"not a cursor of this store: cursor={cursor!r}; start without one")
    return int(number)
