"""What records of the journal amount to, run by run: the lines of a pack. No I/O."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, cast

from pyworkflow.spi import Json, SchemaTooNew
from pyworkflow.storekit import KEPT_TOKENS
from pyworkflow_storage_file._codec import decode, encode
from pyworkflow_storage_file._packs import RUNS

__all__ = ["CLOCK", "DELTA", "SNAPSHOT", "Merger", "join_runs"]

DELTA = b"delta"
#: A delta of a journal that 0.1.0 rewrote.
SNAPSHOT = b"snapshot"
CLOCK = b"clock"
_FORMAT: Final = 1
#: A line of a pack is about this long, unless it has one long run.
_LINE_BYTES: Final = 256 * 1024
_HEAD: Final = (
    "number",
    "workflow",
    "final",
    "finished_at",
    "idempotency_key",
    "seen_seq",
    "paused",
    "stalled",
)


class _Merged:
    """All that the records say of one run."""

    __slots__ = ("created", "events", "fields", "gone", "items", "outside", "recent")

    def __init__(self, created: bool) -> None:
        self.created = created
        """It was created here: nothing of it lies elsewhere."""
        self.fields: dict[str, Any] = {}
        self.events: list[Any] = []
        self.items: dict[str, Any] = {}
        self.gone: dict[str, None] = {}
        self.outside: dict[str, Any] = {}
        self.recent: dict[str, Any] = {}

    def add(self, part: dict[str, Any]) -> None:
        """Apply a delta's part, as a run's state does."""
        fields = part.get("set")
        if fields:
            self.fields.update(fields)
        events = part.get("events")
        if events:
            self.events += events
        for item_id in part.get("gone", ()):
            self.items.pop(item_id, None)
            if not self.created:
                self.gone[item_id] = None
        for item in part.get("items", ()):
            self.items[item["id"]] = item
        for record in part.get("keys", ()):
            token = record.get("token")
            if token is None:
                self.outside[record["key"]] = record
            else:
                self.recent.pop(token, None)
                self.recent[token] = record
                if len(self.recent) > KEPT_TOKENS:
                    del self.recent[next(iter(self.recent))]

    def encode(self, run_id: str) -> tuple[dict[str, Any], bytes]:
        """The head, and the JSON of the run."""
        fields = self.fields
        head: dict[str, Any] = {"id": run_id}
        for name in _HEAD:
            if name in fields:
                head[name] = fields[name]
        if fields.get("parent") is not None:
            head["parent"] = fields["parent"][0]
        if self.items:
            head["items"] = list(self.items.values())
        if self.gone:
            head["gone"] = list(self.gone)
        rest: dict[str, Any] = {"id": run_id}
        if self.events:
            rest["events"] = self.events
        if self.outside or self.recent:
            rest["keys"] = [*self.outside.values(), *self.recent.values()]
        row = encode(fields)
        text = b'{"set":%b,%b' % (row, encode(rest)[1:])
        head["row"], head["all"], head["n"] = len(row), len(text), len(self.events)
        return head, text


class Merger:
    """Collects records until ``take`` gives the lines that they amount to."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._runs: dict[str, _Merged] = {}
        self._removed: dict[str, None] = {}
        self._taken: dict[str, Any] = {}
        self._freed: dict[str, None] = {}
        self._clock: bytes | None = None

    def add(self, kind: bytes, body: bytes) -> None:
        """Take a record. An exception means that it is damaged."""
        if kind == CLOCK:
            self._clock = body
        elif kind in {DELTA, SNAPSHOT}:
            self._add(cast("dict[str, Any]", decode(body)))
        else:
            raise ValueError(f"unknown kind of record: {kind!r}")

    def _add(self, delta: dict[str, Any]) -> None:
        if delta["v"] > _FORMAT:
            raise SchemaTooNew("delta", delta["v"], _FORMAT)
        runs = self._runs
        for part in delta["runs"]:
            run_id = part["id"]
            run = runs.get(run_id)
            if part.get("removed"):
                if run is None or not run.created:
                    self._removed[run_id] = None
                runs.pop(run_id, None)
                continue
            if run is None:
                run = runs[run_id] = _Merged("number" in part.get("set", ()))
            run.add(part)
        for key in delta.get("freed", ()):
            self._taken.pop(key, None)
            self._freed[key] = None
        for key, mark in delta.get("taken", {}).items():
            self._freed.pop(key, None)
            self._taken[key] = mark

    def take(self) -> Iterator[tuple[bytes, bytes]]:
        """Kind and body of each line, in the order in which they have to be read."""
        if self._clock is not None:
            yield CLOCK, self._clock
        removed: list[Json] = [{"id": run_id, "removed": True} for run_id in self._removed]
        for start in range(0, len(removed), 1000):
            yield DELTA, encode({"v": _FORMAT, "runs": removed[start : start + 1000]})
        yield from join_runs(run.encode(run_id) for run_id, run in self._runs.items())
        keys: list[tuple[str, Any]] = [*self._taken.items(), *((key, 0) for key in self._freed)]
        for start in range(0, len(keys), 1000):
            some = keys[start : start + 1000]
            delta: dict[str, Json] = {"v": _FORMAT, "runs": []}
            delta["taken"] = {key: mark for key, mark in some if mark != 0}
            delta["freed"] = [key for key, mark in some if mark == 0]
            yield DELTA, encode(delta)
        self._clear()


def join_runs(runs: Iterator[tuple[dict[str, Any], bytes]]) -> Iterator[tuple[bytes, bytes]]:
    """Lines of kind ``runs``, of heads and the JSON of the runs."""
    heads: list[Any] = []
    texts: list[bytes] = []
    size = 0
    for head, text in runs:
        heads.append(head)
        texts.append(text)
        size += len(text)
        if size >= _LINE_BYTES:
            yield RUNS, _join(heads, texts)
            heads, texts, size = [], [], 0
    if heads:
        yield RUNS, _join(heads, texts)


def _join(heads: list[Any], texts: list[bytes]) -> bytes:
    listed = encode(cast("dict[str, Json]", {"heads": heads}))[1:-1]
    at, start = 0, b""
    while len(start) != at or not start:  # the number is part of what it counts
        at = len(start)
        start = b'{"v":%d,"at":%d,%b,"runs":[' % (_FORMAT, at, listed)
    return start + b",".join(texts) + b"]}"
