"""What the journal amounts to: the reference store of one namespace, and its clock's offset.

Also keeps count of what is garbage in the journal, and of what is news to those who watch.
"""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime, timedelta
from typing import cast

from pydantic_core import from_json, to_json

from pyworkflow.spi import Delta, Json, RunDelta, SerializationError, WorkItem
from pyworkflow.storekit import ReferenceStore
from pyworkflow_storage_file._journal import Record

__all__ = ["CLOCK", "DELTA", "State", "encode"]

DELTA = b"delta"
#: A delta of a rewritten journal: all of it is needed.
SNAPSHOT = b"snapshot"
CLOCK = b"clock"
#: A guess at what a line has beside its body.
_OVERHEAD = 80


class State:
    """The state of one namespace. Used by whoever holds the writer's mutex."""

    def __init__(self) -> None:
        self.store = ReferenceStore()
        self.shift = timedelta(0)
        """What ``now`` adds to the machine's clock."""
        self.touched: dict[str, tuple[int, bool]] = {}
        """Runs that changed since ``take_news``: the seq of the last new event, and whether they
        ended."""
        self.work = False
        """An item that nobody holds came or changed since ``take_news``."""
        self.bytes = 0
        """Of all records applied."""
        self.garbage = 0
        """Of records that nothing needs any more: claims, and runs that were purged."""
        self._run_bytes: dict[str, int] = {}

    def reset(self) -> None:
        """Forget everything but the news."""
        self.store = ReferenceStore()
        self.shift = timedelta(0)
        self.bytes = self.garbage = 0
        self._run_bytes = {}

    def load(self, kind: bytes, body: bytes) -> None:
        """Apply a record of the journal."""
        if kind in {DELTA, SNAPSHOT}:
            delta = Delta.from_json(_decode(body))
            self.store.apply(delta)
            self._announce(delta)
            self._count(delta, len(body), needed=kind == SNAPSHOT)
        elif kind == CLOCK:
            data = _decode(body)
            shift = data["shift"]
            if not isinstance(shift, int):
                raise TypeError("shift")
            self.shift = timedelta(microseconds=shift)
            self.bytes += len(body)
        else:
            raise ValueError(f"unknown kind of record: {kind!r}")

    def note(self, delta: Delta, size: int) -> None:
        """Count a change that the store has applied, of ``size`` bytes as a record."""
        self._announce(delta)
        self._count(delta, size, needed=False)

    def _announce(self, delta: Delta) -> None:
        for part in delta.parts:
            seq, ended = self.touched.get(part.run_id, (0, False))
            if part.events:
                seq = part.events[-1].seq
            self.touched[part.run_id] = seq, ended or part.removed or "final" in part.fields
            for item in part.items:
                if item.lease is None:
                    self.work = True

    def _count(self, delta: Delta, size: int, *, needed: bool) -> None:
        size += _OVERHEAD
        self.bytes += size
        for part in delta.parts:
            if part.removed:
                self.garbage += self._run_bytes.pop(part.run_id, 0)
            elif needed or part.events or part.fields:
                needed = True
                self._run_bytes[part.run_id] = self._run_bytes.get(part.run_id, 0) + size
        if not needed:
            self.garbage += size

    def take_news(self) -> tuple[dict[str, tuple[int, bool]], bool]:
        """The runs that changed since the last call, and whether there may be work."""
        news = self.touched, self.work
        self.touched, self.work = {}, False
        return news

    def compact(self) -> list[Record]:
        """Records that make an equal state from nothing; from now on they are what is counted."""
        records = [self.clock_record()]
        self.bytes = self.garbage = 0
        self._run_bytes = {}
        for delta in self.store.snapshot():
            body = encode(delta.to_json())
            self._count(delta, len(body), needed=True)
            records.append(Record(SNAPSHOT, body))
        return records

    def follow_jump(self, by: timedelta, now: datetime) -> Delta | None:
        """Apply that the wall clock was moved by ``by`` to ``now``; None when nothing is held.

        Leases keep the time they had left, and what was due stays due.
        """
        parts: list[RunDelta] = []
        for delta in self.store.snapshot():
            for part in delta.parts:
                items: list[WorkItem] = []
                for item in part.items:
                    due, lease = item.due_at, item.lease
                    if now < due <= now - by:
                        due = now
                    if lease is not None:
                        lease = replace(lease, until=lease.until + by)
                    if lease is not None or due != item.due_at:
                        items.append(replace(item, due_at=due, lease=lease))
                if items:
                    parts.append(RunDelta(part.run_id, items=items))
        if not parts:
            return None
        delta = Delta(parts=parts)
        self.store.apply(delta)
        return delta

    def clock_record(self) -> Record:
        """The record that sets the offset of the clock."""
        return Record(CLOCK, b'{"shift":%d}' % (self.shift // timedelta(microseconds=1)))


def encode(data: Json) -> bytes:
    """JSON text in UTF-8 without a raw newline; ``_decode`` gives back an equal value.

    Raises:
        SerializationError: no JSON can hold it as it is.
    """
    try:
        body = to_json(data, inf_nan_mode="constants")
    except Exception:  # noqa: BLE001  what pydantic refuses (deep nesting), json may still take
        body = b""
    if not body or b"NaN" in body or b"Infinity" in body:
        try:
            text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
            body = text.encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise SerializationError(
                f"the change cannot be stored as JSON: {error}; encode its values first"
            ) from error
    return body


def _decode(body: bytes) -> dict[str, Json]:
    try:
        value = from_json(body)
    except ValueError:  # nested deeper than pydantic reads
        value = json.loads(body)
    if not isinstance(value, dict):
        raise TypeError("the record is no JSON object")
    return cast("dict[str, Json]", value)
