"""What is stored under which key, and ways to read and write it inside one transaction.

A key is a letter and fixed-length parts; numbers are 8 bytes, names are digests, since LMDB keys
have at most 511 bytes. Values are JSON, in the form that ``Delta.to_json`` gives.

=== =============================== ===========================================================
m   name                            schema; next (run number); latest (clock); offset (clock)
i   run id                          run number
r   number                          row: id, set (fields), length, last_input, tokens (recent)
e   number, seq                     event
k   number, event key               [event key, seq]
w   number, item id                 work item
a   number, change key              record: the answer to an applied change from outside
t   number, token                   record: the answer to the last change under a claim
d   priority, due, number, item id  what may be claimed: wake, queue, workflow, kind, run, item
n   idempotency key                 [idempotency key, owner, until]
f   finished at, number             ended runs
l   until, idempotency key          keys of purged runs, by when they lapse
=== =============================== ===========================================================
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from typing import Any, TypeVar, cast, overload

import lmdb

from pyworkflow.spi import (
    Delta,
    Event,
    ItemKind,
    KeyMark,
    Record,
    Run,
    RunDelta,
    WorkItem,
    record_from_json,
    record_to_json,
)
from pyworkflow.storekit import KEPT_TOKENS, RunState

__all__ = ["StoredRun", "Tables", "digest", "instant", "micros", "pack"]

T = TypeVar("T")
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MIDDLE = 1 << 63


def micros(at: datetime) -> int:
    """Microseconds since 1970, exact."""
    return (at - EPOCH) // timedelta(microseconds=1)


def instant(number: int) -> datetime:
    """Inverse of ``micros``."""
    return EPOCH + timedelta(microseconds=number)


def pack(*numbers: int) -> bytes:
    """Numbers as bytes in the same order; negative ones too."""
    clipped = [min(max(number + MIDDLE, 0), 2 * MIDDLE - 1) for number in numbers]
    return struct.pack(f">{len(clipped)}Q", *clipped)


def unpack(key: bytes) -> int:
    """The last number of a key."""
    return int.from_bytes(key[-8:]) - MIDDLE


def digest(name: str) -> bytes:
    """A name of any length as 20 bytes."""
    return blake2b(name.encode(), digest_size=20).digest()


def due_key(number: int, item: WorkItem) -> bytes:
    """Where an item stands among those that may be claimed: highest priority, then oldest due."""
    place = pack(-item.priority, micros(item.due_at), number)
    return b"d" + place + digest(item.item_id)


def part_to_json(part: RunDelta) -> dict[str, Any]:
    """The JSON form of one run's effects."""
    return cast("list[dict[str, Any]]", Delta([part]).to_json()["runs"])[0]


def part_from_json(run_id: str, data: Mapping[str, Any]) -> RunDelta:
    """Inverse of ``part_to_json``, for any of its fields."""
    return Delta.from_json({"v": 1, "runs": [{"id": run_id, **data}]}).parts[0]


class Tables:
    """One transaction's view of the tables, at one instant."""

    def __init__(self, txn: lmdb.Transaction, clock: datetime) -> None:
        self.txn = txn
        # The machine's clock may be set back; the storage's stands still until it catches up.
        self.clock = max(clock, instant(self.get(b"mlatest") or 0))
        self.now = self.clock + timedelta(microseconds=self.get(b"moffset") or 0)
        self._dirty = False

    def get(self, key: bytes) -> Any:
        """The value, or None."""
        raw = self.txn.get(key)
        return None if raw is None else json.loads(bytes(raw))

    def put(self, key: bytes, value: object) -> None:
        """Set a value. The first one notes the clock: no later transaction sees an earlier now."""
        if not self._dirty:
            self._dirty = True
            self.put(b"mlatest", micros(self.clock))
        self.txn.put(key, json.dumps(value, separators=(",", ":")).encode())

    def delete(self, key: bytes) -> None:
        """Remove a value."""
        self.txn.delete(key)

    def scan(self, prefix: bytes, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """Keys with the prefix, in order, from ``start`` on. Do not write while it runs."""
        with self.txn.cursor() as cursor:
            found = cursor.set_range(max(prefix, start))
            while found and (key := bytes(cursor.key())).startswith(prefix):
                yield key, bytes(cursor.value())
                found = cursor.next()

    # --- one run --------------------------------------------------------------------------------

    def number(self, run_id: str) -> int | None:
        """The run's number, by which everything of it is stored."""
        number: int | None = self.get(b"i" + digest(run_id))
        return number

    def run(self, run_id: str) -> StoredRun | None:
        """The run, for ``decide`` and for reading."""
        number = self.number(run_id)
        return None if number is None else StoredRun(self, number)

    def apply(self, part: RunDelta) -> None:
        """Write the effects on one run. A new one gets its number here."""
        number = self.number(part.run_id)
        if number is None:
            number = self.get(b"mnext") or 1
            self.put(b"mnext", number + 1)
            self.put(b"i" + digest(part.run_id), number)
            fresh = {"id": part.run_id, "set": {"number": number}, "length": 0, "last_input": 0}
            self.put(b"r" + pack(number), {**fresh, "tokens": list[str]()})
        prefix = pack(number)
        row = self.get(b"r" + prefix)
        data = part_to_json(part)
        old_end = row["set"].get("finished_at")
        row["set"] |= data.get("set", {})
        for event, raw in zip(part.events, data.get("events", ()), strict=True):
            self.put(b"e" + pack(number, event.seq), raw)
            if event.key is not None:
                self.put(b"k" + prefix + digest(event.key), [event.key, event.seq])
            row["length"] = event.seq
            if event.klass == "I":
                row["last_input"] = event.seq
        for record in part.records:
            self._remember(prefix, row, record)
        if part.fields or part.events or part.records:
            self.put(b"r" + prefix, row)
        run = StoredRun(self, number, row)
        for item_id in part.gone:
            self._drop(run, item_id)
        for item in part.items:
            self._place(run, item)
        if "paused" in part.fields:
            for item in run.items.values():
                self._place(run, item)
        end = row["set"].get("finished_at")
        if end != old_end:
            if old_end is not None:
                self.delete(b"f" + pack(old_end, number))
            self.put(b"f" + pack(end, number), None)

    def _remember(self, prefix: bytes, row: dict[str, Any], record: Record) -> None:
        if record.token is None:
            self.put(b"a" + prefix + digest(record.key), record_to_json(record))
        else:
            self.put(b"t" + prefix + digest(record.token), record_to_json(record))
            tokens: list[str] = row["tokens"]
            if record.token in tokens:
                tokens.remove(record.token)
            tokens.append(record.token)
            if len(tokens) > KEPT_TOKENS:
                self.delete(b"t" + prefix + digest(tokens.pop(0)))

    def _place(self, run: StoredRun, item: WorkItem) -> None:
        self._drop(run, item.item_id)
        (raw,) = part_to_json(RunDelta(item.run_id, items=[item]))["items"]
        self.put(b"w" + pack(run.number) + digest(item.item_id), raw)
        if not run.paused or item.kind is ItemKind.DELIVER:
            wake = item.due_at if item.lease is None else max(item.due_at, item.lease.until)
            self.put(
                due_key(run.number, item),
                [micros(wake), item.queue, run.workflow, item.kind, item.run_id, item.item_id],
            )

    def _drop(self, run: StoredRun, item_id: str) -> None:
        old = run.items.get(item_id)
        if old is not None:
            self.delete(due_key(run.number, old))
            self.delete(b"w" + pack(run.number) + digest(item_id))

    def remove(self, run_id: str) -> None:
        """Remove a run and all that it has, its idempotency key apart."""
        run = self.run(run_id)
        if run is None:
            return
        for item_id in list(run.items):
            self._drop(run, item_id)
        prefix = pack(run.number)
        if run.finished_at is not None:
            self.delete(b"f" + pack(micros(run.finished_at), run.number))
        for letter in (b"r", b"e", b"k", b"a", b"t"):
            for key in [key for key, _ in self.scan(letter + prefix)]:
                self.delete(key)
        self.delete(b"i" + digest(run_id))

    # --- idempotency keys -----------------------------------------------------------------------

    def mark(self, key: str) -> KeyMark | None:
        """Who owns an idempotency key."""
        raw = self.get(b"n" + digest(key))
        return None if raw is None else mark_from_json(raw)

    def set_mark(self, key: str, mark: KeyMark | None) -> None:
        """Set or free an idempotency key."""
        old, name = self.mark(key), digest(key)
        if old is not None and old.until is not None:
            self.delete(b"l" + pack(micros(old.until)) + name)
        if mark is None:
            self.delete(b"n" + name)
            return
        until = None if mark.until is None else micros(mark.until)
        self.put(b"n" + name, [key, mark.owner, until])
        if until is not None:
            self.put(b"l" + pack(until) + name, key)


def mark_from_json(raw: Sequence[Any]) -> KeyMark:
    """The owner of an idempotency key, as it is stored."""
    return KeyMark(raw[1], None if raw[2] is None else instant(raw[2]))


class StoredRun:
    """A run whose row is read; its events, keys, items and answers are read when asked for.

    This is the ``RunView`` that ``decide`` takes.
    """

    def __init__(self, tables: Tables, number: int, row: dict[str, Any] | None = None) -> None:
        self._tables = tables
        self.row = tables.get(b"r" + pack(number)) if row is None else row
        self.number = number
        self.run_id: str = self.row["id"]
        prefix = pack(number)
        self.events = Events(tables, number, self.run_id, self.row["length"])
        self.last_input: int = self.row["last_input"]
        self.keys: Named[int] = Named(tables, b"k" + prefix, tuple)
        self.items = Named(tables, b"w" + prefix, self._item)
        self.external_answers = Named(tables, b"a" + prefix, _external_answer)
        self.answers_by_token = Named(tables, b"t" + prefix, _answer_of_token)
        state = RunState(self.run_id)
        state.apply(part_from_json(self.run_id, {"set": self.row["set"]}))
        self.state = state
        self.create_key = state.create_key
        self.workflow = state.workflow
        self.attributes = state.attributes
        self.queue = state.queue
        self.priority = state.priority
        self.updated_at = state.updated_at
        self.finished_at = state.finished_at
        self.seen_seq = state.seen_seq
        self.paused = state.paused
        self.stalled = state.stalled
        self.final = state.final

    def _item(self, raw: Any) -> tuple[str, WorkItem]:
        item = part_from_json(self.run_id, {"items": [raw]}).items[0]
        return item.item_id, item

    def view(self) -> Run:
        """The run as ``get_run`` shows it."""
        self.state.items = dict(self.items)
        return replace(self.state.view(self._tables.now), history_length=len(self.events))

    def export(self) -> RunDelta:
        """The run without its events."""
        answers_by_token = [self.answers_by_token[token] for token in self.row["tokens"]]
        return RunDelta(
            self.run_id,
            self.state.row(),
            items=[item for _, item in sorted(self.items.items())],
            records=[*self.external_answers.values(), *answers_by_token],
        )


def _external_answer(raw: Any) -> tuple[str, Record]:
    record = record_from_json(raw)
    return record.key, record


def _answer_of_token(raw: Any) -> tuple[str, Record]:
    record = record_from_json(raw)
    return record.token or "", record


class Named(Mapping[str, T]):
    """What one run has under names, read one by one."""

    def __init__(
        self, tables: Tables, prefix: bytes, decode: Callable[[Any], tuple[str, T]]
    ) -> None:
        self._tables, self._prefix, self._decode = tables, prefix, decode

    def __getitem__(self, name: str) -> T:
        raw = self._tables.get(self._prefix + digest(name))
        if raw is None:
            raise KeyError(name)
        return self._decode(raw)[1]

    def __iter__(self) -> Iterator[str]:
        raws = [json.loads(raw) for _, raw in self._tables.scan(self._prefix)]
        return iter([self._decode(raw)[0] for raw in raws])

    def __len__(self) -> int:
        return sum(1 for _ in self._tables.scan(self._prefix))


class Events(Sequence[Event]):
    """A history, read slice by slice: one of 100,000 events costs only what is asked of it."""

    def __init__(self, tables: Tables, number: int, run_id: str, length: int) -> None:
        self._tables, self._number, self._run_id = tables, number, run_id
        self._length = length

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Event: ...
    @overload
    def __getitem__(self, index: slice) -> list[Event]: ...
    def __getitem__(self, index: int | slice) -> Event | list[Event]:
        places = range(self._length)[index]
        if isinstance(places, int):
            return self[places : places + 1][0]
        return [event for event, _ in self.read(places.start, places.stop)]

    def read(self, start: int, stop: int) -> Iterator[tuple[Event, int]]:
        """Events with seq > ``start`` up to seq ``stop``, and how many bytes each takes."""
        prefix = b"e" + pack(self._number)
        for key, raw in self._tables.scan(prefix, b"e" + pack(self._number, start + 1)):
            if unpack(key) > stop:
                return
            (event,) = part_from_json(self._run_id, {"events": [json.loads(raw)]}).events
            yield event, len(raw)
