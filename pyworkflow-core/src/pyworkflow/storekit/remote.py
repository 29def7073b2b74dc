"""A kit for a store behind a network: what ``decide`` reads, loaded before it is called.

``decide`` is synchronous, and a server is not. ``touched`` says what a change reads; a backend loads
that in one or two packets, and ``decide_loaded`` calls ``decide`` with it. What was not loaded
raises ``Missing``: it is loaded, and ``decide`` is called again. No rule of the contract is left for
the backend: it locks, reads, writes the delta and commits.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Generic, TypeVar, overload

from pyworkflow.errors import Refusal, RunClosed, RunNotFound
from pyworkflow.events import Event
from pyworkflow.runs import RunStatus, WorkItem
from pyworkflow.spi._delta import Delta, KeyMark, Record, RunDelta
from pyworkflow.spi.storage import TURN, Answer, Change, ClaimRequest
from pyworkflow.storekit._decide import decide
from pyworkflow.storekit._items import key_owner
from pyworkflow.storekit._remote_calls import Calls, Look, Poller
from pyworkflow.storekit._state import RunState, size_of

__all__ = [
    # what a change reads, and what was read
    "Loaded",
    "Loader",
    "LoadedRun",
    "Missing",
    "Rows",
    "Touched",
    "touched",
    # decisions
    "Decided",
    "decide_loaded",
    # the events of claims
    "history_after",
    "within",
    # cancelled callers
    "Calls",
    # one poller per object
    "Look",
    "Poller",
]

T = TypeVar("T")
_NAMES = frozenset[str]()


@dataclass(frozen=True, slots=True, kw_only=True)
class Touched:
    """What changes of one run read of it, besides its row. Two of them are joined by ``|``."""

    run_id: str
    items: frozenset[str] = _NAMES
    """Ids of work items."""
    all_items: bool = False
    """All items of the run: it ends."""
    keys: frozenset[str] = _NAMES
    """Event keys, whose seq is asked."""
    answers: frozenset[str] = _NAMES
    """Keys of changes from outside, whose kept answers are asked."""
    tokens: frozenset[str] = _NAMES
    """Claim tokens, whose last kept answers are asked."""
    owners: frozenset[str] = _NAMES
    """Idempotency keys, whose marks are asked."""
    after: int | None = None
    """Events with a higher seq are read. None: no events."""
    unseen: bool = False
    """Of those, only the ones after the row's ``seen_seq``: the greater of the two counts."""

    def __or__(self, other: Touched) -> Touched:
        reading = [each for each in (self, other) if each.after is not None]
        return Touched(
            run_id=self.run_id,
            items=self.items | other.items,
            all_items=self.all_items or other.all_items,
            keys=self.keys | other.keys,
            answers=self.answers | other.answers,
            tokens=self.tokens | other.tokens,
            owners=self.owners | other.owners,
            after=min((each.after or 0 for each in reading), default=None),
            unseen=bool(reading) and all(each.unseen for each in reading),
        )


def touched(change: Change) -> Touched:
    """What ``decide`` reads of the run for this change.

    It is enough for each change that is new. One that is sent again may raise ``Missing`` for the
    items and events of its answer.
    """
    claim = change.claim
    items = {TURN, *change.drop, *(put.item_id for put in change.put)}
    if claim is not None:
        items.add(claim.item_id)
    driven = claim is not None and (
        claim.item_id == TURN
        or change.take_turn is not None
        or any(put.item_id == TURN and put.claimed is not None for put in change.put)
    )
    reads_events = driven or (change.final is not None and change.control is None)
    new = change.create
    return Touched(
        run_id=change.run_id,
        items=frozenset(items),
        all_items=change.final is not None,
        keys=frozenset(event.key for event in change.events if event.key is not None),
        answers=frozenset({change.key}) if claim is None else _NAMES,
        tokens=_NAMES if claim is None else frozenset({claim.token}),
        owners=_NAMES
        if new is None or new.idempotency_key is None
        else frozenset({new.idempotency_key}),
        after=(change.seen or 0) if reads_events else None,
        unseen=reads_events,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """What a store has of a run: its row, and of the rest what was asked for."""

    fields: Mapping[str, object]
    """As ``RunDelta.fields``: the names and values that were written. ``decide`` does not read
    ``args``, ``result`` and ``error``, which may be large: leave them out."""
    length: int
    """The number of the run's events."""
    last_input: int
    """The seq of the last event of class ``I``, or 0."""
    events: Sequence[Event] = ()
    """In the order of seq, to the last one of the run."""
    keys: Mapping[str, int] = field(default_factory=dict[str, int])
    items: Sequence[WorkItem] = ()
    records: Sequence[Record] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What a loader read, with the runs' rows locked."""

    now: datetime
    """The storage's clock, read after the last lock was taken."""
    runs: Mapping[str, Rows] = field(default_factory=dict[str, Rows])
    """By run id; a run that is not there is left out."""
    marks: Mapping[str, KeyMark] = field(default_factory=dict[str, KeyMark])
    """Idempotency keys that are there, lapsed ones included."""


Loader = Callable[[Sequence[Touched]], Awaitable[Loaded]]


class Missing(Exception):
    """``decide`` reads something that was not loaded: load ``touched``, then call it again."""

    def __init__(self, touched: Touched) -> None:
        super().__init__(touched)
        self.touched = touched


class _Known(Mapping[str, T], Generic[T]):
    """Names that were asked for, with the values of those that are there."""

    def __init__(self, missing: Callable[[str | None], Missing]) -> None:
        self._missing = missing
        self._found: dict[str, T] = {}
        self._asked: set[str] = set()
        self._all = False

    def add(self, asked: frozenset[str], found: Mapping[str, T], *, all_: bool = False) -> None:
        """Take over what was read, but for names that are known: changes may have set them."""
        if not self._all:
            for name, value in found.items():
                if name not in self._asked:
                    self._found[name] = value
        self._asked |= asked | set(found)
        self._all = self._all or all_

    def set(self, name: str, value: T) -> None:
        self._asked.add(name)
        self._found[name] = value

    def remove(self, name: str) -> None:
        self._asked.add(name)
        self._found.pop(name, None)

    def __getitem__(self, name: str) -> T:
        if name in self._found:
            return self._found[name]
        if self._all or name in self._asked:
            raise KeyError(name)
        raise self._missing(name)

    def __iter__(self) -> Iterator[str]:
        if not self._all:
            raise self._missing(None)
        return iter(self._found)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class _History(Sequence[Event]):
    """A history of which the last part was read."""

    def __init__(self, run_id: str, length: int) -> None:
        self._run_id = run_id
        self._first = self._length = length
        self._events: list[Event] = []

    def add(self, after: int, events: Sequence[Event]) -> None:
        if after < self._first:
            self._events[:0] = [each for each in events if after < each.seq <= self._first]
            self._first = after

    def append(self, events: Sequence[Event]) -> None:
        self._events += events
        self._length += len(events)

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Event: ...
    @overload
    def __getitem__(self, index: slice) -> list[Event]: ...
    def __getitem__(self, index: int | slice) -> Event | list[Event]:
        if isinstance(index, int):
            place = range(self._length)[index]
            return self[place : place + 1][0]
        places = range(self._length)[index]
        if places and places[0] < self._first:
            raise Missing(Touched(run_id=self._run_id, after=places[0]))
        return [self._events[place - self._first] for place in places]


class LoadedRun:
    """A ``RunView`` of what was loaded. Everything else raises ``Missing``."""

    def __init__(self, touched: Touched, rows: Rows) -> None:
        run_id = touched.run_id
        self.run_id = run_id
        self.last_input = rows.last_input
        self.events = _History(run_id, rows.length)
        self.keys = _Known[int](
            lambda name: Missing(Touched(run_id=run_id, keys=frozenset({name or ""})))
        )
        self.items = _Known[WorkItem](
            lambda name: Missing(
                Touched(run_id=run_id, items=frozenset({name or TURN}), all_items=name is None)
            )
        )
        self.external_answers = _Known[Record](
            lambda name: Missing(Touched(run_id=run_id, answers=frozenset({name or ""})))
        )
        self.answers_by_token = _Known[Record](
            lambda name: Missing(Touched(run_id=run_id, tokens=frozenset({name or ""})))
        )
        self.row = RunState(run_id)
        self._take_fields(rows.fields)
        self.add(touched, rows)

    def _take_fields(self, fields: Mapping[str, object]) -> None:
        self.row.apply(RunDelta(self.run_id, dict(fields)))
        row = self.row
        self.create_key = row.create_key
        self.attributes = row.attributes
        self.queue = row.queue
        self.priority = row.priority
        self.updated_at = row.updated_at
        self.seen_seq = row.seen_seq
        self.paused = row.paused
        self.stalled = row.stalled
        self.final: RunStatus | None = row.final

    def add(self, touched: Touched, rows: Rows) -> None:
        """Take over what was read later. Names and events that are known stay as they are."""
        self.keys.add(touched.keys, rows.keys)
        items = {item.item_id: item for item in rows.items}
        self.items.add(touched.items, items, all_=touched.all_items)
        outside = {each.key: each for each in rows.records if each.token is None}
        self.external_answers.add(touched.answers, outside)
        claims = {each.token: each for each in rows.records if each.token is not None}
        self.answers_by_token.add(touched.tokens, claims)
        if touched.after is not None:
            after = max(touched.after, self.seen_seq) if touched.unseen else touched.after
            self.events.add(min(after, rows.length), rows.events)

    def apply(self, part: RunDelta) -> None:
        """Take over the effects of a change, for the next one of the same transaction."""
        self._take_fields(part.fields)
        self.events.append(part.events)
        for event in part.events:
            if event.key is not None:
                self.keys.set(event.key, event.seq)
            if event.klass == "I":
                self.last_input = event.seq
        for item_id in part.gone:
            self.items.remove(item_id)
        for item in part.items:
            self.items.set(item.item_id, item)
        for record in part.records:
            if record.token is None:
                self.external_answers.set(record.key, record)
            else:
                self.answers_by_token.set(record.token, record)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """The answers to some changes, and the effects to be written in the same transaction."""

    answers: list[Answer]
    delta: Delta
    """Parts in the order of the changes (several of one run, where it had several), and the
    idempotency keys of new runs in ``taken``. Without parts there is nothing to write."""
    now: datetime


class _Transaction:
    """The runs and keys that were loaded, as the changes before left them."""

    def __init__(self, loaded: Loaded) -> None:
        self.now = loaded.now
        self.runs: dict[str, LoadedRun | None] = {}
        self.marks: _Known[KeyMark] = _Known(
            lambda name: Missing(Touched(run_id=self.deciding, owners=frozenset({name or ""})))
        )
        self.deciding = ""

    def add(self, wanted: Sequence[Touched], loaded: Loaded) -> None:
        for each in wanted:
            rows = loaded.runs.get(each.run_id)
            run = self.runs.get(each.run_id)
            if run is not None and rows is not None:
                run.add(each, rows)
            elif run is None:
                self.runs[each.run_id] = None if rows is None else LoadedRun(each, rows)
            self.marks.add(
                each.owners, {key: loaded.marks[key] for key in each.owners if key in loaded.marks}
            )

    def owner_of(self, key: str) -> str | None:
        return key_owner(self.marks.get(key), now=self.now)

    def apply(self, change: Change, part: RunDelta, delta: Delta) -> None:
        delta.parts.append(part)
        run = self.runs[change.run_id]
        if run is None:
            everything = Touched(run_id=change.run_id, all_items=True, after=0)
            run = LoadedRun(everything, Rows(fields={}, length=0, last_input=0))
            for known in (run.keys, run.external_answers, run.answers_by_token):
                known.add(_NAMES, {}, all_=True)
            self.runs[change.run_id] = run
        run.apply(part)
        new = change.create
        if new is not None and new.idempotency_key is not None:
            mark = delta.taken[new.idempotency_key] = KeyMark(change.run_id)
            self.marks.set(new.idempotency_key, mark)


async def decide_loaded(
    load: Loader, changes: Sequence[Change], *, token: Callable[[], str]
) -> Decided:
    """Decide changes that ``check_change`` has passed, in the order given.

    Call it inside a transaction, and write the delta before that ends. A refused change writes
    nothing and does not disturb the others. Nothing is kept between calls: after a conflict the
    whole transaction, this call included, is done again.

    Args:
        load: Reads what is touched. The first call has each run once, in the order of run ids: lock
            the rows in that order, then the marks, then read the clock. Further calls have what a
            repeated change reads besides; the runs are locked by then.
        changes: Of any runs; several of one run see each other's effects.
        token: Gives a claim token that this store never gave before. Tokens may be asked for and
            not used, when ``decide`` is called again.

    Raises:
        ValueError: A change is not sound; nothing may be written.
    """
    by_run: dict[str, Touched] = {}
    for change in changes:
        reads, before = touched(change), by_run.get(change.run_id)
        by_run[change.run_id] = reads if before is None else before | reads
    wanted = [by_run[run_id] for run_id in sorted(by_run)]
    loaded = await load(wanted)
    transaction = _Transaction(loaded)
    transaction.add(wanted, loaded)
    delta = Delta()
    answers = [await _decide_one(load, transaction, each, token, delta) for each in changes]
    return Decided(answers=answers, delta=delta, now=transaction.now)


async def _decide_one(
    load: Loader,
    transaction: _Transaction,
    change: Change,
    token: Callable[[], str],
    delta: Delta,
) -> Answer:
    transaction.deciding = change.run_id
    while True:
        try:
            answer, part = decide(
                transaction.runs[change.run_id],
                change,
                now=transaction.now,
                token=token,
                owner_of=transaction.owner_of,
            )
        except Missing as missing:
            more = [missing.touched]
            transaction.add(more, await load(more))
            continue
        except (Refusal, RunNotFound, RunClosed) as refusal:
            return refusal
        if part is not None:
            transaction.apply(change, part, delta)
        return answer


def history_after(request: ClaimRequest, run_id: str, length: int) -> int:
    """After which seq a claimed turn brings events: what the claimer knows, if that can be true."""
    after = request.known.get(run_id, 0)
    return after if 0 <= after <= length else 0


def within(events: Sequence[Event], budget: int) -> tuple[Sequence[Event], int]:
    """The first of ``events``, as many as ``budget`` bytes allow, and how many bytes they are."""
    total = 0
    for place, event in enumerate(events):
        size = 96 + size_of(event.data)
        if total + size > budget:
            return events[:place], total
        total += size
    return events, total
