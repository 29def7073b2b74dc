"""What must hold after every change of the store: the invariants, looked at where something changed.

``fsck`` reads a whole store. Here each call's own run is read, and of its history only what is new,
so that looking after every single change costs about as much as the change.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from pyworkflow.errors import Refusal
from pyworkflow.events import Event
from pyworkflow.runs import ItemKind, Lease, Run, WorkItem
from pyworkflow.spi.storage import (
    TURN,
    Change,
    Claimed,
    ClaimRef,
    Committed,
    ControlKind,
    StorageBackend,
)

__all__ = ["Broken", "Checks"]

_WRITES = frozenset({"commit", "claim", "renew", "release", "free", "announce", "purge"})
_ENDS = frozenset({"step.completed", "step.failed"})


class Broken(AssertionError):
    """A property does not hold: the property's name, the run and what was found."""

    def __init__(self, rule: str, run_id: str, detail: str) -> None:
        super().__init__(rule, run_id, detail)
        self.rule = rule
        self.run_id = run_id
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.rule} run_id={self.run_id}: {self.detail}"


@dataclass(slots=True)
class _Known:
    """What a run looked like after the last change."""

    events: list[Event] = field(default_factory=list[Event])
    keys: dict[str, int] = field(default_factory=dict[str, int])
    ended: Counter[str] = field(default_factory=Counter[str])
    """Ops of steps and how many results they have."""
    cancelled: set[str] = field(default_factory=set[str])
    """Items of steps that the code gave up."""
    inputs: int = 0
    """seq of the last input."""
    seen: int = 0
    final: str | None = None
    paused: bool = False
    items: dict[str, WorkItem] = field(default_factory=dict[str, WorkItem])
    leases: dict[str, Lease] = field(default_factory=dict[str, Lease])
    """Item → who holds it, or held it last."""
    claimed: Counter[str] = field(default_factory=Counter[str])
    """Item → how often it was claimed."""
    claimed_by: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])
    """(item, owner) → how often by that one."""
    begun: Counter[tuple[str, int]] = field(default_factory=Counter[tuple[str, int]])
    """(op, try) → how often its body began."""
    changes: set[str] = field(default_factory=set[str])
    """Keys of changes that were accepted."""


@dataclass(slots=True)
class _Allowed:
    """What one call may do to leases that have not ended: who else loses one was robbed."""

    tokens: set[str] = field(default_factory=set[str])
    """Claims that the caller has."""
    renewed: set[str] = field(default_factory=set[str])
    items: set[tuple[str, str]] = field(default_factory=set[tuple[str, str]])
    """Steps that the holder of a turn gives up."""
    runs: set[str] = field(default_factory=set[str])
    """Runs that end."""
    owner: str | None = None
    """A process that is gone."""

    @classmethod
    def by(cls, method: str, args: tuple[Any, ...]) -> _Allowed:
        """By a call."""
        allowed = cls()
        if method == "commit":
            changes: list[Change] = args[0]
            for change in changes:
                if change.claim is not None:
                    allowed.tokens.add(change.claim.token)
                    allowed.items |= {(change.run_id, item_id) for item_id in change.drop}
                if change.final is not None:
                    allowed.runs.add(change.run_id)
        elif method == "release":
            allowed.tokens.add(args[0].token)
        elif method == "renew":
            allowed.renewed |= {ref.token for ref in args[0]}
        elif method == "free":
            allowed.owner = args[0]
        return allowed

    def ends(self, run_id: str, item_id: str, lease: Lease) -> bool:
        """Whether the call may end this lease."""
        return (
            lease.token in self.tokens
            or (run_id, item_id) in self.items
            or run_id in self.runs
            or lease.owner == self.owner
        )


class Checks:
    """Looks at the store after each call that may have changed it."""

    def __init__(self, store: StorageBackend, saw: Callable[[str], None]) -> None:
        self._store = store
        self._saw = saw
        self._runs: dict[str, _Known] = {}
        self._tokens: dict[str, tuple[str, str]] = {}
        self._gone: set[str] = set()
        """Tokens that were followed by others."""
        self._freed: set[str] = set()
        """Tokens whose lease was ended before its time, as is done with what is gone."""
        self._late: dict[tuple[str, str, str], str] = {}
        """(holder, run, item) → the token, when the answer that gave it was long under way and its
        holder has not asked since whether it stands."""
        self._marked_late: set[tuple[str, str, str]] = set()
        """(holder, run, item) whose begin was recorded, and the holder told of that too late."""
        self._bodies: dict[tuple[str, str, str], int] = {}
        """(process, run, op) of a body that runs → the claims that others had had when it began."""
        self._allowed = _Allowed()
        self._now = datetime.min.replace(tzinfo=UTC)
        """The store's clock at the call that is looked at."""
        self.on_commit: Callable[[str, str, Change, Committed], None] | None = None
        """Called with who sent a change that was accepted."""
        self.on_announce: Callable[[list[WorkItem]], None] | None = None
        """Called with what a sweep was told of."""
        self.losses = 0
        """What went wrong so far that may have cost somebody a claim."""
        self.stood_still = False
        """A worker was stopped, or the clock jumped over its leases."""
        self.longest_wait: timedelta | None = None
        """How long an item may be due before somebody claims it."""
        self.misled = False
        """The store's clock jumped, a call of it did not go well, an answer was read late, or a
        step's end took the turn from its own worker: a worker may claim what it works on, since a
        lease has ended of which it knew nothing."""
        self.clock_went_back = False
        """Time as workers reckon it may be ahead of the store's from then on."""
        self.length = 0
        """Events of all runs."""

    def known(self, run_id: str) -> list[Event]:
        """The run's history as it was seen to grow."""
        return self._runs[run_id].events

    def runs(self) -> list[str]:
        """Every run that was seen."""
        return list(self._runs)

    def begins(self, owner: str, run_id: str, op: str, attempt: int) -> None:
        """The body of a try begins in a worker's process. Raises ``Broken``."""
        run = self._runs.get(run_id)
        if run is None:
            raise Broken("lost", run_id, f"a body begins, and there is no run: op={op}")
        step = f"step:{op}"
        # Who stood still may have lost the step, have the turn all the same, and begin late.
        items = (TURN, step) if not self.stood_still else (step if run.claimed[step] else TURN,)
        held = [run.leases[item] for item in items if item in run.leases]
        if run.ended[op] and any(h.owner == owner and h.until > self._now for h in held):
            raise Broken("again", run_id, f"its result is recorded, and it begins: op={op}")
        run.begun[op, attempt] += 1
        times, claims = run.begun[op, attempt], run.claimed[TURN] + run.claimed[step]
        if times > claims:
            raise Broken("again", run_id, f"begun {times} times in {claims} claims: op={op}")
        item = step if run.claimed[step] else TURN
        if (owner, run_id, item) in self._late:
            raise Broken("told late", run_id, f"begun under a claim not asked for again: op={op}")
        if (owner, run_id, item) in self._marked_late:
            raise Broken("told late", run_id, f"begun though that was recorded late: op={op}")
        place = (owner, run_id, op)
        others = claims - run.claimed_by[TURN, owner] - run.claimed_by[step, owner]
        if self._bodies.get(place) == others and not self.misled:
            raise Broken("beside itself", run_id, f"its body runs in this process: op={op}")
        if item in run.leases and run.leases[item].owner == owner:
            self._bodies[place] = others
        # Else it has lost the step and does not know: the next try may come here all the same.

    def ends(self, owner: str, run_id: str, op: str) -> None:
        """A body that began in that process is over."""
        self._bodies.pop((owner, run_id, op), None)

    def marked(self, owner: str, change: Change, *, late: bool) -> None:
        """It is recorded that a step which begins at most once begins, and its worker was told."""
        if change.claim is not None:
            place = (owner, change.run_id, change.claim.item_id)
            self._marked_late.discard(place)
            if late:
                self._marked_late.add(place)

    def clock_jumped(self, *, back: bool) -> None:
        """The store's clock has jumped, perhaps over leases."""
        self.stood_still = self.misled = True
        self.clock_went_back = self.clock_went_back or back

    def told(self, items: Iterable[WorkItem], *, late: bool) -> None:
        """The answer with these claims has reached their holder."""
        for item in items:
            if item.lease is not None:
                place = (item.lease.owner, item.run_id, item.item_id)
                self._late.pop(place, None)
                if late:
                    self._late[place] = item.lease.token

    def asks_again(self, refs: Sequence[ClaimRef]) -> None:
        """Somebody asks whether these claims stand."""
        if self._late:
            tokens = {ref.token for ref in refs}
            self._late = {place: t for place, t in self._late.items() if t not in tokens}

    async def after(self, who: str, method: str, args: tuple[Any, ...], result: Any) -> None:
        """A call was carried out. Raises ``Broken``."""
        if method not in _WRITES:
            return
        self._allowed = _Allowed.by(method, args)
        self._now = await self._store.now()
        if method == "commit":
            if isinstance(result, list):
                answers: list[Any] = [*result]  # pyright: ignore[reportUnknownArgumentType] - a list of whatever it is
                await self._all_committed(who, args[0], answers)
        elif method == "claim":
            if isinstance(result, Claimed):
                for claim in result.claims:
                    self._given(claim.item, result.now)
                await self._look_at(dict.fromkeys(c.item.run_id for c in result.claims))
        elif method in ("renew", "release"):
            refs = args[0] if method == "renew" else (args[0],)
            await self._look_at(dict.fromkeys(ref.run_id for ref in refs))
        elif method in ("free", "announce", "purge"):
            if method == "announce" and isinstance(result, list) and self.on_announce is not None:
                rung: list[WorkItem] = [*result]  # pyright: ignore[reportUnknownArgumentType] - as above
                self.on_announce(rung)
                await self._look_at(dict.fromkeys(item.run_id for item in rung))
            elif result:
                await self._look_at(self._runs)

    def _given(self, item: WorkItem, now: datetime) -> None:
        """A claim was given by asking: the item was due, and nobody held it."""
        lease = item.lease
        assert lease is not None
        run = self._runs.get(item.run_id)
        standing = None if run is None else run.leases.get(item.item_id)
        if run is not None and run.paused and item.kind is not ItemKind.DELIVER:
            raise Broken(
                "paused", item.run_id, f"an item of a paused run was claimed: {item.item_id}"
            )
        if item.due_at > now:
            raise Broken("claims", item.run_id, f"claimed before its time: {item.item_id}")
        if self.longest_wait is not None and now - item.due_at > self.longest_wait:
            raise Broken("late", item.run_id, f"due since {now - item.due_at}: {item.item_id}")
        if standing is not None:
            if standing.until > now:
                raise Broken("I6", item.run_id, f"a held item was claimed: {item.item_id}")
            if not self.losses and standing.token not in self._freed:
                raise Broken("takeover", item.run_id, f"left without any reason: {item.item_id}")
            self._saw("lease takeover")

    async def _all_committed(self, who: str, changes: list[Change], answers: list[Any]) -> None:
        # What was held before the first of them: a look at a run shows what all of them did.
        held = {
            change.run_id: run.leases
            for change in changes
            if (run := self._runs.get(change.run_id)) is not None
        }
        for change, answer in zip(changes, answers, strict=True):
            await self._committed(who, change, answer, held.get(change.run_id, {}))

    async def _committed(
        self, who: str, change: Change, answer: Any, held: dict[str, Lease]
    ) -> None:
        run_id = change.run_id
        if not isinstance(answer, Committed):
            if isinstance(answer, Refusal):
                self._saw(_REFUSED.get(type(answer).__name__, f"refused: {type(answer).__name__}"))
            return
        run = self._runs.get(run_id)
        if run is None:
            run = self._runs[run_id] = _Known()
        if answer.duplicate:
            self._saw("duplicate change answered")
        else:
            if change.control is None or _PAUSES.get(change.control.kind) != run.paused:
                # Else there was nothing to do, and so nothing to remember.
                if change.key in run.changes:
                    raise Broken("I1", run_id, f"the change was applied twice: key={change.key}")
                run.changes.add(change.key)
            if change.claim is not None:
                standing = held.get(change.claim.item_id)
                if standing is None or standing.token != change.claim.token:
                    raise Broken(
                        "I4", run_id,
                        f"a change under a lost claim was taken: item={change.claim.item_id} "
                        f"token={change.claim.token} the item's token={standing and standing.token}",
                    )  # fmt: skip
                if standing.until <= answer.now:
                    self._saw("commit under an expired lease")
            if change.claim is not None and change.claim.item_id != TURN and TURN in held:
                took = any(item.item_id == TURN for item in answer.claims)
                self.misled |= took and held[TURN].token not in self._freed
            if change.final is not None and change.control is None and change.claim is not None:
                seen = max(change.seen or 0, run.seen)
                if run.inputs > seen:
                    raise Broken("final", run_id, f"ended with an unseen input: seq={run.inputs}")
            if answer.skipped:
                self._saw("second result skipped")
        seen = run.seen
        await self._look(run_id, run)
        if not answer.duplicate:
            self._item_of(change, answer, run, (change.seen or 0) > seen)
            for seq, event in zip(answer.seqs, change.events, strict=True):
                stored = run.events[seq - 1] if 0 < seq <= len(run.events) else None
                if stored is None or (stored.type, stored.op) != (event.type, event.op):
                    raise Broken("I3", run_id, f"an acknowledged event is not there: seq={seq}")
            if self.on_commit is not None:
                self.on_commit(who, run_id, change, answer)

    def _item_of(self, change: Change, answer: Committed, run: _Known, moved: bool) -> None:
        """Progress forgives the claims before it; a try that failed is not made before its time."""
        claim = change.claim
        item = None if claim is None else run.items.get(claim.item_id)
        new = (e for i, e in enumerate(change.events) if i not in answer.skipped)
        moved = moved or any(event.klass != "O" for event in new)
        lease = None if claim is None or item is None else item.lease
        if moved and claim and item and lease and lease.token == claim.token and item.claims != 1:
            found = f"claims={item.claims} after progress: item={item.item_id}"
            raise Broken("claims", change.run_id, found)
        for event in change.events:
            retried = run.items.get(f"step:{event.op}")
            if event.type == "step.retrying" and retried is not None:
                until = datetime.fromisoformat(str(event.data["retry_at"]))
                if retried.due_at < until:
                    raise Broken("early", change.run_id, f"tried again too soon: op={event.op}")

    async def _look_at(self, run_ids: Iterable[str]) -> None:
        for run_id in list(run_ids):
            known = self._runs.get(run_id)
            if known is not None:
                await self._look(run_id, known)

    async def _look(self, run_id: str, known: _Known) -> None:
        """Read the run; compare it with what it was."""
        run = await self._store.get_run(run_id)
        if run is None:
            raise Broken("I3", run_id, "the run is gone")
        if run.history_length != len(known.events):
            new = await self._store.get_events(run_id, after=len(known.events))
            self._history(run, known, new)
        known.paused = run.paused
        if run.seen_seq != known.seen:
            if not known.seen < run.seen_seq <= len(known.events):
                raise Broken("seen", run_id, f"seen_seq went from {known.seen} to {run.seen_seq}")
            known.seen = run.seen_seq
        self._items(run, known, await self._store.list_work(run_id))

    def _history(self, run: Run, known: _Known, new: list[Event]) -> None:
        run_id = run.run_id
        events = known.events
        if run.history_length != len(events) + len(new):
            raise Broken("I2", run_id, f"history_length={run.history_length}, not dense")
        for event in new:
            if event.seq != len(events) + 1:
                raise Broken("I2", run_id, f"seq={event.seq} after {len(events)}")
            if events and event.timestamp < events[-1].timestamp:
                raise Broken("I2", run_id, f"timestamps decrease: seq={event.seq}")
            if known.final is not None and event.klass != "O":
                raise Broken("I8", run_id, f"{event.type} after the end: seq={event.seq}")
            if event.key is not None and known.keys.setdefault(event.key, event.seq) != event.seq:
                raise Broken("I7", run_id, f"two events have one key: {event.key}")
            if event.type in _ENDS:
                known.ended[str(event.op)] += 1
                if known.ended[str(event.op)] > 1:
                    raise Broken("once", run_id, f"two results were recorded: op={event.op}")
            if event.type == "step.cancelled":
                known.cancelled.add(f"step:{event.op}")
            if event.klass == "I":
                known.inputs = event.seq
                due = "deadline" if event.type == "workflow.deadline" else "until"
                early = event.timestamp.isoformat() < str(event.data.get(due, ""))
                if early and not self.clock_went_back:
                    raise Broken("early", run_id, f"{event.op} fired before its time")
            events.append(event)
        self.length += len(new)

    def _items(self, run: Run, known: _Known, items: list[WorkItem]) -> None:
        run_id = run.run_id
        if run.status.is_terminal:
            if known.final is None:
                known.final = str(run.status)
            elif known.final != run.status:
                raise Broken("I8", run_id, f"ended {known.final}, and now {run.status}")
            for item in items:
                if item.kind is not ItemKind.DELIVER:
                    raise Broken("I8", run_id, f"ended, and owns {item.item_id}")
        elif known.final is not None:
            raise Broken("I8", run_id, f"ended {known.final}, and now {run.status}")
        elif known.inputs > run.seen_seq and not any(item.item_id == TURN for item in items):
            raise Broken("I5", run_id, f"no turn is owed for the input seq={known.inputs}")
        leases: dict[str, Lease] = {}
        known.items = {item.item_id: item for item in items}
        for item in items:
            if item.item_id in known.cancelled:
                raise Broken("given up", run_id, f"was given up, and is still owed: {item.item_id}")
            lease = item.lease
            if lease is None:
                continue
            place = (run_id, item.item_id)
            if self._tokens.setdefault(lease.token, place) != place:
                raise Broken("I4", run_id, f"a token was issued twice: {lease.token}")
            before = known.leases.get(item.item_id)
            leases[item.item_id] = lease
            if before is None or before.token != lease.token:
                known.claimed[item.item_id] += 1
                known.claimed_by[item.item_id, lease.owner] += 1
            if before is not None and before.token != lease.token and lease.token in self._gone:
                raise Broken("I4", run_id, f"a token came back: {lease.token}")
            if before is not None and before.token != lease.token:
                self._gone.add(before.token)
        self._held(run_id, known.leases, leases)
        known.leases = leases

    def _held(self, run_id: str, before: dict[str, Lease], after: dict[str, Lease]) -> None:
        """Nobody's lease ends or grows but by its holder, the holder of the turn, or the run's end."""
        for item_id, was in before.items():
            lease = after.get(item_id)
            same = lease is not None and lease.token == was.token
            if lease is not None and same and lease.until > was.until:
                if was.token not in self._allowed.renewed:
                    raise Broken("I6", run_id, f"a lease grew that nobody renewed: {item_id}")
                continue
            if lease is not None and same and lease.until < was.until:
                self._freed.add(was.token)
            stands = lease is not None and same and lease.until == was.until
            live = was.until > self._now
            if live and not stands and not self._allowed.ends(run_id, item_id, was):
                raise Broken("I6", run_id, f"a lease was taken from its holder: {item_id}")


_PAUSES = {ControlKind.PAUSE: True, ControlKind.UNPAUSE: False}
_REFUSED = {
    "Fenced": "fenced commit",
    "UnseenInput": "unseen input",
    "KeyTaken": "idempotency key taken",
    "RunExists": "run exists",
}
