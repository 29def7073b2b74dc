"""The storage contract: one atomic write path, claims with fencing tokens, and reads.

Storage keeps runs, events and work items, and changes them by one method, ``commit``. The
invariants I1 to I12 of the architecture page are this contract; the conformance suite tests them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeGuard, TypeVar, final

from pyworkflow.errors import ConfigurationError, Refusal, RunClosed, RunNotFound
from pyworkflow.events import Event, Json
from pyworkflow.runs import ErrorInfo, ItemKind, ParentRef, Run, RunStatus, WorkItem
from pyworkflow.spi._delta import Delta, KeyMark, RunDelta, row_of
from pyworkflow.spi._polling import DueWatch, wait_for_run
from pyworkflow.spi.capabilities import StorageInfo

__all__ = [
    "Answer",
    "Change",
    "Claim",
    "ClaimRef",
    "ClaimRequest",
    "Claimed",
    "Committed",
    "Control",
    "ControlKind",
    "LeaseFor",
    "NewRun",
    "Page",
    "Put",
    "RunQuery",
    "Settle",
    "StorageBackend",
    "TestClock",
    "Update",
]

T = TypeVar("T")
TURN = "turn"
# A third of the time that the class itself takes.
_new: Any = getattr(tuple, "__new__")  # noqa: B009 - pyright does not know its generic type


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRun:
    """The run that a change creates. Its first event is ``workflow.started``."""

    workflow: str
    version: str
    args: str
    """Payload text."""
    idempotency_key: str | None = None
    """Unique per namespace; ``KeyTaken(owner)`` when another run has it."""
    parent: ParentRef | None = None
    root: str | None = None
    queue: str = "default"
    priority: int = 0
    tags: tuple[str, ...] = ()
    attributes: Mapping[str, Json] = field(default_factory=dict[str, Json])
    deadline: datetime | None = None


@dataclass(frozen=True, slots=True)
class ClaimRef:
    """A claim as its holder names it."""

    run_id: str
    item_id: str
    token: str


class ControlKind(StrEnum):
    """Changes of a run's condition that do not come from its code."""

    PAUSE = "pause"
    UNPAUSE = "unpause"
    STALL = "stall"
    """By the turn's holder, with ``reason``."""
    UNSTALL = "unstall"
    CANCEL = "cancel"
    """With ``final``: close without code a run that no turn has run or that is stalled.
    ``Fenced`` when a turn has run and the run is not stalled, or when its turn is held."""
    TERMINATE = "terminate"
    """With ``final``: close without code, whatever the run is doing."""


@dataclass(frozen=True, slots=True)
class Control:
    """What a control change does, and why."""

    kind: ControlKind
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """Fields of the run that a change sets; None leaves a field alone. ``attributes`` merge."""

    result: str | None = None
    error: ErrorInfo | None = None
    attributes: Mapping[str, Json] | None = None
    next: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settle:
    """What becomes of the item under whose claim a change is made.

    Nothing given: the item is gone. ``reschedule_at``: given back, due exactly then (an unseen input
    makes a turn due at once all the same, unless the change stalls the run). ``keep``: still held
    by the sender. ``payload`` replaces the item's payload.
    """

    reschedule_at: datetime | None = None
    payload: Mapping[str, Json] | None = None
    keep: bool = False


@dataclass(frozen=True, slots=True)
class LeaseFor:
    """A new item is born claimed by its writer: the storage gives it a token at once."""

    owner: str
    lease: timedelta


@dataclass(frozen=True, slots=True, kw_only=True)
class Put:
    """A new item of the change's run, or an existing one brought forward (and nothing else)."""

    item_id: str
    kind: ItemKind
    due_at: datetime | None = None
    """None: at once."""
    queue: str | None = None
    """None: the run's queue."""
    priority: int | None = None
    """None: the run's priority."""
    payload: Mapping[str, Json] = field(default_factory=dict[str, Json])
    notified: bool = False
    """The sender rings for it: ``announce`` stays silent for the mute time."""
    claimed: LeaseFor | None = None


@dataclass(slots=True, kw_only=True)
class Change:
    """One transition of one run. Not frozen for speed: nobody changes it once it is sent.

    Applied in this order: create, control, events, update, ``seen``, ``drop``, ``settle``,
    ``put``, I5 (an unseen input makes the turn due), ``final`` (turn and steps go), ``take_turn``.
    """

    run_id: str
    key: str
    """Identity of the change: ``{token}:{n}`` under a claim (one in flight at a time, the storage
    keeps the last of each of at least the run's last 64 tokens), the key of its input from
    outside (kept as long as the run). A change sent again is answered as it was."""
    create: NewRun | None = None
    claim: ClaimRef | None = None
    seen: int | None = None
    """Last input *delivered* to the workflow; only under the turn's claim."""
    final: RunStatus | None = None
    control: Control | None = None
    events: Sequence[Event] = ()
    update: Update | None = None
    drop: Sequence[str] = ()
    """Step items given up by the holder of the turn; whoever holds one is fenced from then on."""
    settle: Settle | None = None
    put: Sequence[Put] = ()
    take_turn: LeaseFor | None = None
    """When after this change the run has a due turn that nobody holds (and is not paused), it is
    claimed for the sender in the same commit."""


@dataclass(slots=True, kw_only=True)
class Committed:
    """The answer to an accepted change."""

    last_seq: int
    seen_seq: int
    paused: bool
    timestamp: datetime
    """The timestamp of the change's own events."""
    now: datetime
    """The storage's clock at the commit."""
    seqs: Sequence[int] = ()
    """For each event of the change its seq; for a skipped one the seq of the standing event."""
    skipped: frozenset[int] = frozenset()
    """Indices of events that were skipped because their key stood."""
    unseen_events: Sequence[Event] = ()
    """All events after the run's ``seen_seq`` as it stands after this change, except the change's
    own, in order of seq. Only for the holder of the turn: for changes under the claim of the turn,
    and for those under another claim whose answer gives the turn; empty for all others."""
    claims: Sequence[WorkItem] = ()
    """Items now held by the sender: born claimed, and the turn taken."""
    duplicate: bool = False
    """The change had been applied before; this is its answer again."""

    @property
    def turn(self) -> WorkItem | None:
        """The run's turn, when this change claimed it for the sender (``take_turn``)."""
        for item in self.claims:
            if item.item_id == TURN:
                return item
        return None

    def stored(self, run_id: str, events: Sequence[Event]) -> list[Event]:
        """The change's own events as they are stored; skipped ones are left out.

        Args:
            run_id: The run of the change.
            events: The change's ``events``.
        """
        at, seqs, skipped = self.timestamp, self.seqs, self.skipped
        return [
            stored_event(event, run_id, seqs[index], at)
            for index, event in enumerate(events)
            if index not in skipped
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimRequest:
    """Which work to take. Without ``items``: whatever is due, highest priority, then oldest due."""

    owner: str
    lease: timedelta
    limit: int = 1
    items: Sequence[tuple[str, str]] | None = None
    """(run_id, item_id): only these, if due and free."""
    queues: frozenset[str] | None = None
    """None: every queue."""
    kinds: frozenset[ItemKind] | None = None
    workflows: frozenset[str] | None = None
    """Names of the workflows that the claimer has; None: any. Deliveries are not filtered."""
    known: Mapping[str, int] = field(default_factory=dict[str, int])
    """Run id → seq up to which the claimer has the history; a backend may look at 100 of them."""
    max_bytes: int = 1024 * 1024
    """Bound on the events returned in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A work item taken. A turn brings its run and the events after what the claimer knows."""

    item: WorkItem
    run: Run
    events: Sequence[Event] = ()
    after: int = 0
    """``events`` start after this seq."""
    cut: bool = False
    """The history was cut at ``max_bytes``: ``get_events`` brings the rest."""

    @property
    def ref(self) -> ClaimRef:
        """How the holder names this claim in changes."""
        assert self.item.lease is not None
        return ClaimRef(self.item.run_id, self.item.item_id, self.item.lease.token)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimed:
    """What a claim brought, and the storage's clock then."""

    claims: Sequence[Claim]
    now: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class RunQuery:
    """Filters of ``list_runs``; they compose. Newest first, stable while runs are added."""

    status: frozenset[RunStatus] | None = None
    workflow: str | None = None
    limit: int = 100
    """1 to 1,000."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Page(Generic[T]):
    """One page of a listing; ``cursor`` is opaque and None at the end."""

    items: list[T]
    cursor: str | None = None


Answer = Committed | Refusal | RunNotFound | RunClosed


class TestClock(Protocol):
    """A store whose clock tests can move. Optional; the conformance suite needs it.

    ``pyworkflow storage set-clock`` uses it, too: with it, a clock that was ahead is put right.
    """

    async def shift_clock(self, by: timedelta) -> None:
        """Move the storage's clock by an offset that the store keeps, for all its clients."""
        ...


def has_test_clock(store: object) -> TypeGuard[TestClock]:
    """Whether tests can move the store's clock.

    ``isinstance`` says no of a proxy that looks its attributes up, from Python 3.12 on.
    """
    return callable(getattr(store, "shift_clock", None))


def stored_event(event: Event, run_id: str, seq: int, at: datetime) -> Event:
    """The event as it is stored."""
    fields = (event.type, event.klass, event.data, event.op, event.key, run_id, seq, at, event.v)
    made: Event = _new(Event, fields)
    return made


class StorageBackend(ABC):
    """A store of runs, events and work items. Constructing one does no I/O; the first call opens.

    An object belongs to the event loop that first used it. After ``close``, from another loop, and
    (unless it opens anew) after a fork, calls raise ``StorageError`` with the remedy.

    Names differ when one byte of them differs. Those that users give (run id, idempotency key,
    workflow, step, queue, tag) have up to 255 bytes of UTF-8 and no NUL, those that the engine makes
    (event keys, item ids, change keys) up to 512. The engine enforces this for what is new; stores of
    0.1 hold longer ones, and a backend stores each name that it is given.

    Refusals of ``commit``, in this order, with nothing written: ``RunExists`` (a create whose change key is
    the standing create's is a duplicate, hence success) or ``RunNotFound``; a duplicate is answered
    as it was; ``RunClosed`` (not for changes made of observations alone, nor under the claim of a
    ``deliver`` item); ``Fenced``; ``UnseenInput`` (a final change with inputs after ``seen``; not
    for control changes); ``KeyTaken`` (create).
    """

    _due_watch: DueWatch | None = None

    # --- required -----------------------------------------------------------------------------

    @abstractmethod
    async def open(self) -> None:
        """Connect and ``migrate``. Idempotent."""

    @abstractmethod
    async def close(self) -> None:
        """Let go of everything. Idempotent; later calls raise ``StorageError``."""

    @abstractmethod
    def info(self) -> StorageInfo:
        """Name, location, capabilities and limits. Does no I/O."""

    @abstractmethod
    async def migrate(self) -> None:
        """Bring the schema forward; safe when several processes race. ``SchemaTooNew``."""

    async def pending_migrations(self) -> list[str]:
        """What ``migrate`` would do, by name; writes nothing. The default knows of none."""
        return []

    async def exists(self) -> bool:
        """Whether there is a store at the location; writes nothing, and need not be opened.

        False means that opening makes one, which commands that only look must not do. The default
        says True, for stores that a server makes.
        """
        return True

    @abstractmethod
    async def now(self) -> datetime:
        """The storage's clock, which alone decides due times, leases and timestamps."""

    @abstractmethod
    async def commit(self, changes: Sequence[Change]) -> list[Answer]:
        """Apply independent changes; those that were accepted are durable on return.

        Each change is applied whole or not at all, and accepted or refused alone: the answers are
        in the order of the changes, a refusal as an object that is not raised. Changes of the same
        run are applied in the order given.

        Raises:
            StorageUnavailable: unknown which of them were written; send the same changes again.
            PayloadTooLarge, SerializationError, ValueError: one of them cannot be stored; nothing
                was written.
        """

    @final
    async def commit_one(self, change: Change) -> Committed:
        """``commit`` for a single change, whose refusal is raised.

        Raises:
            RunExists, RunNotFound, RunClosed, Fenced, UnseenInput, KeyTaken: nothing was written.
            StorageUnavailable: unknown whether it was written; send the same change again.
            PayloadTooLarge, SerializationError: it cannot be stored; nothing was written.
        """
        (answer,) = await self.commit([change])
        if isinstance(answer, Committed):
            return answer
        raise answer

    @abstractmethod
    async def claim(self, request: ClaimRequest) -> Claimed:
        """Take due, free items of runs that are not paused. Writes nothing but the items.

        Highest priority first, then oldest due, the rest in any order. A claim counts, and ends
        the item's ``rung_at``. Workers ask again and again: one that finds nothing writes
        nothing. The events of the turns taken are at most ``max_bytes`` in all (about their size
        as JSON): what does not fit is left out and the claim says ``cut``, also when nothing fits.
        """

    @abstractmethod
    async def renew(self, refs: Sequence[ClaimRef], lease: timedelta) -> list[bool]:
        """Extend leases to now + ``lease``; False for each claim that is over."""

    @abstractmethod
    async def release(self, ref: ClaimRef, *, delay: timedelta | None = None) -> bool:
        """Give an item back uncounted.

        ``delay`` None keeps its due; else it is due at now + ``delay``. False, and nothing done,
        when the claim is over.
        """

    @abstractmethod
    async def next_due(
        self,
        *,
        queues: frozenset[str] | None = None,
        workflows: frozenset[str] | None = None,
    ) -> datetime | None:
        """When an item that can be claimed is due next (a held one: when its lease ends)."""

    @abstractmethod
    async def get_run(self, run_id: str) -> Run | None:
        """The run, or None."""

    @abstractmethod
    async def find_run(self, idempotency_key: str) -> str | None:
        """The id of the run that has the key, even when that run was purged; or None."""

    @abstractmethod
    async def list_runs(self, query: RunQuery, cursor: str | None = None) -> Page[Run]:
        """Runs, newest first. ``ValueError`` for a cursor that is none of ours or a bad limit."""

    @abstractmethod
    async def get_events(
        self, run_id: str, *, after: int = 0, limit: int | None = None
    ) -> list[Event]:
        """Events with seq > ``after`` in order of seq; empty for a run that is not there."""

    @abstractmethod
    async def list_work(self, run_id: str) -> list[WorkItem]:
        """The run's work items, ordered by item id."""

    @abstractmethod
    async def purge(
        self,
        *,
        before: datetime,
        limit: int = 1000,
        key_retention: timedelta = timedelta(days=30),
    ) -> int:
        """Remove up to ``limit`` runs that ended before ``before``.

        Only runs that own no items and whose parent is terminal or gone; any of them when there
        are more. Also lets go of keys whose time is over. The idempotency keys of what is removed
        stay taken until ``key_retention`` after their end. Returns how many were removed; 0 when
        nothing is left to do.
        """

    @abstractmethod
    def clone(self) -> StorageBackend:
        """Another object on the same store and namespace, for use in another event loop."""

    # --- with working defaults ----------------------------------------------------------------

    async def announce(self, limit: int, mute: timedelta) -> list[WorkItem]:
        """Due, free items that nobody rang for within ``mute``, which starts anew for them.

        In the order of claims. Sets ``rung_at``, and nothing else.

        The default remembers nothing: it lists what is due.
        """
        now = await self.now()
        due: list[WorkItem] = []
        async with aclosing(self._every_item()) as found:
            async for run, item in found:
                leased = item.lease is not None and item.lease.until > now
                paused = run.paused and item.kind is not ItemKind.DELIVER
                if item.due_at <= now and not leased and not paused:
                    due.append(item)
                    if len(due) >= limit:
                        break
        return due[:limit]

    async def holders(self) -> list[str]:
        """The owners of leases that have not ended."""
        now = await self.now()
        return sorted(
            {
                item.lease.owner
                async for _, item in self._every_item()
                if item.lease is not None and item.lease.until > now
            }
        )

    async def leases(self, owner: str) -> list[ClaimRef]:
        """The claims of ``owner`` whose leases have not ended, in any order.

        A worker compares them with its own work when an answer was lost. The default pages through
        all runs: a backend with an index of leases should answer from it.
        """
        now = await self.now()
        found: list[ClaimRef] = []
        async for _, item in self._every_item():
            lease = item.lease
            if lease is not None and lease.owner == owner and lease.until > now:
                found.append(ClaimRef(item.run_id, item.item_id, lease.token))
        return found

    async def free(self, owner: str) -> int:
        """End every lease of ``owner``, a process known to be gone; how many.

        Its items are due at once, and its claims stay counted.
        """
        refs = await self.leases(owner)
        return sum(await self.renew(refs, timedelta(0))) if refs else 0

    async def recover(self) -> None:
        """End all claims, and let no token be issued again that may have been issued before.

        For a store whose past is not sure: its clock was set, or it is an old copy. Every item that
        has a lease, ended or not, is released: its holder is fenced, the claim is not counted. A
        backend that counts its tokens adds 2**32 to the counter, beyond all that were issued after
        the copy was made. No worker may run meanwhile.

        The default pages through all runs, and knows of no counter.
        """
        async for _, item in self._every_item():
            if item.lease is not None:
                await self.release(ClaimRef(item.run_id, item.item_id, item.lease.token))

    async def watch(self, run_id: str | None, *, after: int, timeout: timedelta) -> bool:
        """Wait until ``run_id`` has an event after seq ``after``, or has ended.

        With None, until the store may hold news for a worker: it claims at once when this is True,
        and in any case when ``timeout`` (a second at most) is over. False on timeout.

        The default polls, and backs off from every 0.02 s to every 0.5 s while nothing changes:
        for a run its row, for a worker ``next_due()``.
        """
        if run_id is None:
            if self._due_watch is None:
                self._due_watch = DueWatch()
            return await self._due_watch.wait(self.next_due, timeout)
        return await wait_for_run(self.get_run, run_id, after, timeout)

    async def stats(self) -> Mapping[str, int]:
        """Numbers about the store; at least ``runs`` and one count per status.

        For operators: it may count all runs, and nothing of the engine calls it. The default pages
        through them.
        """
        counts: dict[str, int] = {"runs": 0}
        async for run in self._every_run():
            counts["runs"] += 1
            counts[run.status.value] = counts.get(run.status.value, 0) + 1
        return counts

    async def _every_run(self) -> AsyncGenerator[Run]:
        """All runs, newest first, page by page."""
        cursor: str | None = None
        while True:
            page = await self.list_runs(RunQuery(limit=1000), cursor)
            for run in page.items:
                yield run
            cursor = page.cursor
            if cursor is None:
                return

    async def _every_item(self) -> AsyncGenerator[tuple[Run, WorkItem]]:
        """All work items of all runs."""
        async for run in self._every_run():
            for item in await self.list_work(run.run_id):
                yield run, item

    # --- moving between stores ----------------------------------------------------------------

    async def export_run(self, run_id: str) -> RunDelta | None:
        """The run's row, items and kept answers, without its events; None when it is not there.

        ``get_events`` brings the events. The default knows no kept answers: after a copy, a change
        from outside that is sent again is recognised by the keys of its events alone.
        """
        run = await self.get_run(run_id)
        if run is None:
            return None
        return RunDelta(run_id, row_of(run), items=await self.list_work(run_id))

    async def export_keys(self, cursor: str | None = None) -> Page[tuple[str, KeyMark]]:
        """Idempotency keys and their owners, those of purged runs included, in a stable order.

        The default knows those of the runs that are there.
        """
        page = await self.list_runs(RunQuery(limit=1000), cursor)
        found = [
            (run.idempotency_key, KeyMark(run.run_id))
            for run in page.items
            if run.idempotency_key is not None
        ]
        return Page(items=found, cursor=page.cursor)

    async def import_delta(self, delta: Delta) -> None:
        """Write effects as they are, all or nothing: how a copy arrives. Durable on return.

        A part whose run is not there creates it as the newest (``number`` is not taken over); one
        whose run is there sets fields, items and records. Events at or below the run's last seq
        are skipped, so that a part may be sent again; one beyond the next seq is a ``ValueError``.
        Nothing is checked against the rules of ``commit``: ``fsck`` tells afterwards.

        Raises:
            ConfigurationError: This backend takes no copies.
        """
        raise ConfigurationError(
            f"this backend takes no copies: storage={self.info().name}; it lacks import_delta"
        )

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()
