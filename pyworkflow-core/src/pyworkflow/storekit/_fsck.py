"""A check of any store, by reads of the contract alone: what must hold at any time, does it?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime

from pyworkflow.errors import StorageDamaged
from pyworkflow.events import Event
from pyworkflow.runs import ItemKind, Run, WorkItem, derive_status
from pyworkflow.spi.storage import TURN, RunQuery, StorageBackend

__all__ = ["Violation", "fsck"]

_EVENTS_AT_ONCE = 5000
_TRIES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """Something that no store may show."""

    rule: str
    """Which invariant is broken (``I2`` …), ``items``, ``run``, or ``damaged``: unreadable."""
    run_id: str
    detail: str

    def __str__(self) -> str:
        return f"{self.rule} run_id={self.run_id}: {self.detail}"


@dataclass(frozen=True, slots=True)
class _Picture:
    """What was read of one run, while it did not change."""

    run: Run
    events: list[Event]
    items: list[WorkItem]
    owner: str | None
    """Who has the run's idempotency key."""
    before: datetime
    after: datetime


async def fsck(storage: StorageBackend) -> list[Violation]:
    """Read every run, and say what is wrong. Empty for a sound store; safe while it is in use.

    Covers I2, the states of I4 and I6, I5, I7, I8, and whether rows, histories and items agree.
    A run that changes faster than it can be read is looked at only once it rests.
    """
    found: list[Violation] = []
    ids: dict[str, None] = {}
    cursor: str | None = None
    while True:
        page = await storage.list_runs(RunQuery(limit=1000), cursor)
        for run in page.items:
            if run.run_id in ids:
                found.append(_violation(run, "run", "the listing shows the run twice"))
            ids[run.run_id] = None
        cursor = page.cursor
        if cursor is None:
            break
    tokens: dict[str, str] = {}
    for run_id in ids:
        try:
            picture = await _look(storage, run_id)
        except StorageDamaged as damage:
            found.append(Violation(rule="damaged", run_id=run_id, detail=str(damage)))
            continue
        if picture is not None:
            found += _check(picture, tokens)
    return found


async def _look(storage: StorageBackend, run_id: str) -> _Picture | None:
    """A picture of the run between two changes; None when it was purged or never rests."""
    for _ in range(_TRIES):
        before = await storage.now()
        run = await storage.get_run(run_id)
        if run is None:
            return None
        items = await storage.list_work(run_id)
        events: list[Event] = []
        while True:
            more = await storage.get_events(run_id, after=len(events), limit=_EVENTS_AT_ONCE)
            events += more
            if len(more) < _EVENTS_AT_ONCE:
                break
        owner = None
        if run.idempotency_key is not None:
            owner = await storage.find_run(run.idempotency_key)
        again = await storage.list_work(run_id)
        latest = await storage.get_run(run_id)
        after = await storage.now()
        if (
            latest is not None
            and replace(latest, status=run.status) == run
            and items == again
            # The status follows the time, too: only one that stood throughout can be judged.
            and latest.status == run.status
        ):
            return _Picture(run, events, items, owner, before, after)
    return None


def _violation(run: Run, rule: str, detail: str) -> Violation:
    return Violation(rule=rule, run_id=run.run_id, detail=detail)


def _check(picture: _Picture, tokens: dict[str, str]) -> list[Violation]:
    run = picture.run
    return [
        _violation(run, rule, detail)
        for rule, detail in (
            *_check_history(run, picture.events),
            *_check_row(run, picture.events, picture.owner),
            *_check_status(picture),
            *_check_work(run, picture.events, picture.items),
            *_check_items(run, picture.items, tokens),
        )
    ]


def _check_history(run: Run, events: list[Event]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    keys: dict[str, int] = {}
    previous: datetime | None = None
    for expected, event in enumerate(events, 1):
        if event.seq != expected:
            found.append(("I2", f"seq is not dense: expected={expected} found={event.seq}"))
            break
        if event.timestamp.tzinfo is None or event.timestamp.utcoffset():
            found.append(("I2", f"the timestamp is not UTC: seq={event.seq}"))
        elif previous is not None and event.timestamp < previous:
            found.append(("I2", f"timestamps decrease: seq={event.seq}"))
        else:
            previous = event.timestamp
        if event.run_id != run.run_id:
            found.append(("I2", f"the event is of another run: seq={event.seq}"))
        if event.klass not in {"C", "I", "O"}:
            found.append(("I2", f"no such class: seq={event.seq} class={event.klass!r}"))
        if event.key is not None and keys.setdefault(event.key, event.seq) != event.seq:
            found.append(
                (
                    "I7",
                    f"two events have one key: key={event.key!r} seq={keys[event.key]} and {event.seq}",
                )
            )
        ended = run.finished_at is not None and event.timestamp > run.finished_at
        if ended and event.klass != "O":
            found.append(("I8", f"more than an observation after the end: seq={event.seq}"))
    return found


def _check_row(run: Run, events: list[Event], owner: str | None) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    if run.history_length != len(events):
        found.append(("run", f"history_length={run.history_length} events={len(events)}"))
    if events and events[0].type != "workflow.started":
        found.append(("run", f"the history begins with {events[0].type}"))
    if not 0 <= run.seen_seq <= len(events):
        found.append(("run", f"seen_seq={run.seen_seq} events={len(events)}"))
    if (run.started_at is not None) != (run.seen_seq > 0):
        found.append(("run", f"seen_seq={run.seen_seq} started_at={run.started_at}"))
    if (run.finished_at is not None) != run.status.is_terminal:
        found.append(("run", f"status={run.status} finished_at={run.finished_at}"))
    moments = [run.created_at, run.started_at, run.finished_at]
    if any(m is not None and m > run.updated_at for m in moments):
        found.append(("run", "something in it is later than updated_at"))
    if events and run.updated_at < events[-1].timestamp:
        found.append(("run", f"updated_at={run.updated_at} last event {events[-1].timestamp}"))
    if run.idempotency_key is not None and owner != run.run_id:
        found.append(
            ("I7", f"its idempotency key is another's: key={run.idempotency_key!r} owner={owner}")
        )
    return found


def _check_status(picture: _Picture) -> list[tuple[str, str]]:
    run = picture.run
    derived = {
        derive_status(
            final=run.status if run.status.is_terminal else None,
            stalled=run.stalled,
            paused=run.paused,
            seen_seq=run.seen_seq,
            items=picture.items,
            now=now,
        )
        for now in (picture.before, picture.after)
    }
    if run.status in derived:
        return []
    return [("run", f"status={run.status} fields and items say {' or '.join(sorted(derived))}")]


def _check_work(run: Run, events: list[Event], items: list[WorkItem]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    if run.status.is_terminal:
        found += [
            ("I8", f"the run has ended ({run.status}) and owns {item.item_id!r}")
            for item in items
            if item.kind is not ItemKind.DELIVER
        ]
    else:
        unseen = [e.seq for e in events if e.klass == "I" and e.seq > run.seen_seq]
        if unseen and not any(item.item_id == TURN for item in items):
            found.append(("I5", f"no turn is owed for the unseen inputs: seq={unseen[:10]}"))
    return found


def _check_items(run: Run, items: list[WorkItem], tokens: dict[str, str]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    ids = [item.item_id for item in items]
    if ids != sorted(set(ids)):
        found.append(("items", f"not unique, or not in order of id: {ids[:10]}"))
    for item in items:
        name = f"item_id={item.item_id!r}"
        if item.run_id != run.run_id:
            found.append(("items", f"of another run: {name}"))
        if (item.item_id == TURN) != (item.kind is ItemKind.TURN):
            found.append(("items", f"kind and id do not fit: {name} kind={item.kind}"))
        if item.due_at.tzinfo is None or item.due_at.utcoffset():
            found.append(("items", f"due_at is not UTC: {name}"))
        if item.claims < 0:
            found.append(("items", f"claims={item.claims}: {name}"))
        lease = item.lease
        if lease is None:
            continue
        if not lease.owner or not lease.token:
            found.append(("I4", f"a lease without owner or token: {name}"))
        elif tokens.setdefault(lease.token, f"{run.run_id} {name}") != f"{run.run_id} {name}":
            found.append(("I4", f"two items have one token: {name} and {tokens[lease.token]}"))
        if item.claims < 1:
            found.append(("I6", f"held, and never claimed: {name}"))
    return found
