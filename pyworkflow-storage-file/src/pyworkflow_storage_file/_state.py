"""What the files amount to: the reference store of one namespace, and its clock's offset.

Also keeps count of what is garbage in the files, and of what is news to those who watch.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from pyworkflow.spi import Delta
from pyworkflow.storekit import ReferenceStore, RunState
from pyworkflow_storage_file._codec import decode
from pyworkflow_storage_file._lines import Line
from pyworkflow_storage_file._merge import CLOCK, DELTA, SNAPSHOT
from pyworkflow_storage_file._packs import RUNS, Pack, PackedRun, entries_of
from pyworkflow_storage_file._records import Record

__all__ = ["State"]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
#: A guess at what a line has beside its body.
_OVERHEAD: Final = 80


class State:
    """The state of one namespace. Used by whoever has the writer's mutex."""

    def __init__(self) -> None:
        self.store = ReferenceStore()
        self.shift = timedelta(0)
        """What ``now`` adds to the machine's clock."""
        self.touched: dict[str, tuple[int, bool]] = {}
        """Runs that changed since ``take_news``: the seq of the last new event, and whether they
        ended."""
        self.work = False
        """A free item came or changed since ``take_news``."""
        self.segment = ""
        """The segment of the records that come."""
        self.garbage = 0
        """Bytes of records in segments that nothing needs any more."""
        self._garbage: dict[str, int] = {}
        """The same by segment: bytes of claims, and of runs that were removed."""
        self._tail: dict[str, tuple[str, int]] = {}
        """Of runs that segments have: the last segment, and the bytes in all of them."""
        self._latest: datetime | None = None

    @property
    def latest(self) -> int:
        """The latest instant at which a run changed, without the clock's offset, ns; 0 for none."""
        if self._latest is None:
            return 0
        return (self._latest - _EPOCH - self.shift) // timedelta(microseconds=1) * 1000

    def reset(self) -> None:
        """Forget everything but the news."""
        self.store = ReferenceStore()
        self.shift = timedelta(0)
        self.garbage, self._garbage, self._tail = 0, {}, {}

    def load(self, kind: bytes, body: bytes) -> None:
        """Apply a record of a segment."""
        if kind in {DELTA, SNAPSHOT}:
            delta = Delta.from_json(decode(body))
            self.store.apply(delta)
            self.note(delta, len(body), needed=kind == SNAPSHOT)
            for part in delta.parts:
                at = part.fields.get("updated_at")
                if isinstance(at, datetime) and (self._latest is None or at > self._latest):
                    self._latest = at
        elif kind == CLOCK:
            self._set_clock(body)
        else:
            raise ValueError(f"unknown kind of record: {kind!r}")

    def note(self, delta: Delta, size: int, *, needed: bool = False) -> None:
        """Count a change that the store has applied, of ``size`` bytes as a record."""
        size += _OVERHEAD
        segment, tail = self.segment, self._tail
        garbage = 0
        for part in delta.parts:
            run_id = part.run_id
            seq, ended = self.touched.get(run_id, (0, False))
            if part.events:
                seq = part.events[-1].seq
            self.touched[run_id] = seq, ended or part.removed or "final" in part.fields
            for item in part.items:
                if item.lease is None:
                    self.work = True
            if part.removed:
                garbage += tail.pop(run_id, ("", 0))[1]
            elif part.events or part.fields:
                needed = True
                tail[run_id] = segment, tail.get(run_id, ("", 0))[1] + size
            else:
                tail[run_id] = segment, tail.get(run_id, ("", 0))[1]
        if not needed:
            garbage += size
        if garbage:
            self.garbage += garbage
            self._garbage[segment] = self._garbage.get(segment, 0) + garbage

    def take_news(self) -> tuple[dict[str, tuple[int, bool]], bool]:
        """The runs that changed since the last call, and whether there may be work."""
        news = self.touched, self.work
        self.touched, self.work = {}, False
        return news

    def clock_record(self) -> Record:
        """The record that sets the offset of the clock."""
        return Record(CLOCK, b'{"shift":%d}' % (self.shift // timedelta(microseconds=1)))

    def _set_clock(self, body: bytes) -> None:
        shift = decode(body)["shift"]
        if not isinstance(shift, int):
            raise TypeError("shift")
        self.shift = timedelta(microseconds=shift)

    # --- packs --------------------------------------------------------------------------------

    def load_pack(self, pack: Pack, line: Line) -> None:
        """Apply a line of a pack. Packs come before segments, in order."""
        store = self.store
        if line.kind == RUNS:
            start = _body_of(line)
            for entry in entries_of(line.body):
                head = entry.head
                run_id = head["id"]
                known = store.find(run_id)
                if known is None:
                    run = PackedRun(run_id)
                else:
                    assert isinstance(known, PackedRun)
                    run = known
                    store.drop(run)
                run.take(head)
                run.add_place(pack, start + entry.start, head)
                store.adopt(run)
        elif line.kind == DELTA:
            delta = Delta.from_json(decode(line.body))
            delta.parts = [part for part in delta.parts if store.find(part.run_id) is not None]
            store.apply(delta)
        elif line.kind == CLOCK:
            self._set_clock(line.body)
        else:
            raise ValueError(f"unknown kind of record: {line.kind!r}")

    def exchange(
        self, packs: Sequence[Pack], came: Sequence[Pack], went: Sequence[Pack], first: str
    ) -> None:
        """Use other packs for what is known: nothing changes but where runs lie.

        ``packs`` are all from now on, ``first`` is the first segment that is not in them.
        """
        places: dict[str, list[tuple[Any, ...]]] = {}
        removed: dict[str, Pack] = {}
        for pack in came:
            for line in pack.lines(bodies=frozenset({RUNS, DELTA})):
                if line.kind == DELTA:
                    for part in Delta.from_json(decode(line.body)).parts:
                        places[part.run_id] = []
                        removed[part.run_id] = pack
                    continue
                start = _body_of(line)
                for entry in entries_of(line.body):
                    head = entry.head
                    place = pack, start + entry.start, head["row"], head["all"], head["n"]
                    places.setdefault(head["id"], []).append(place)
        order = {pack: index for index, pack in enumerate(packs)}
        gone = set(went)
        for run_id, new in places.items():
            run = self.store.find(run_id)
            if run is None or not new:
                continue
            home = run.home if isinstance(run, RunState) else run
            assert home is None or isinstance(home, PackedRun)
            since = order[removed[run_id]] if run_id in removed else -1
            kept = [] if home is None else home.list_places()
            all_places = sorted(
                (p for p in [*kept, *new] if p[0] not in gone and order[p[0]] >= since),
                key=lambda place: order[place[0]],
            )
            self._move(run_id, all_places, home, first)
        self._tail = {
            run_id: (segment, size)
            for run_id, (segment, size) in self._tail.items()
            if segment >= first
        }
        self._garbage = {s: size for s, size in self._garbage.items() if s >= first}
        self.garbage = sum(self._garbage.values())

    def _move(
        self, run_id: str, places: list[tuple[Any, ...]], home: PackedRun | None, first: str
    ) -> None:
        """Note where a run lies. One that no later record changes need not be in memory."""
        run = self.store.find(run_id)
        if isinstance(run, PackedRun):
            run.set_places(places)
            return
        assert isinstance(run, RunState)
        moved = home if home is not None else PackedRun(run_id)
        moved.set_places(places)
        run.home = moved
        if self._tail.get(run_id, ("", 0))[0] < first and moved.stored == run.length:
            moved.take_head(run)
            self.store.adopt(moved)


def _body_of(line: Line) -> int:
    """The offset of a line's body in its file."""
    return line.end - 2 - len(line.body)
