"""The rules of ``commit``: what a change may do, and which effects it has.

A plan reads the run's state and collects effects beside it, in the order that ``Change`` documents;
nothing is touched until all rules have spoken.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from pyworkflow.errors import Fenced, RunClosed, UnseenInput
from pyworkflow.events import Event
from pyworkflow.runs import ItemKind, Lease, RunStatus, WorkItem
from pyworkflow.spi._delta import Record, RunDelta
from pyworkflow.spi.storage import (
    TURN,
    Change,
    Committed,
    Control,
    ControlKind,
    LeaseFor,
    Put,
    Settle,
    Update,
    stored_event,
)
from pyworkflow.storekit._items import with_lease
from pyworkflow.storekit._state import RunView

__all__ = ["Plan", "refuse"]

#: A stalled run's new inputs bring its turn forward no further than this.
STALLED_PAUSE = timedelta(seconds=1)
_NONE = frozenset[int]()
# Records live as long as their run: they share what is empty. Nobody changes a record.
_NO_SKIPPED: list[int] = []
_NO_HELD: list[tuple[str, str]] = []


def refuse(run: RunView, change: Change, now: datetime) -> None:
    """Raise ``RunClosed`` or ``Fenced`` if that is the answer."""
    if run.final is not None and not _fits_closed_run(run, change):
        raise RunClosed(run.run_id, run.final)
    claim = change.claim
    if claim is not None:
        item = run.items.get(claim.item_id)
        # An expired lease that nobody took over is as good as any: only the token counts.
        if item is None or item.lease is None or item.lease.token != claim.token:
            raise Fenced(run.run_id, claim.item_id)
    holds_turn = claim is not None and claim.item_id == TURN
    if (change.seen is not None or change.drop) and not holds_turn:
        raise Fenced(run.run_id, TURN)
    if change.control is not None:
        _refuse_control(run, change.control, holds_turn, now)


def _fits_closed_run(run: RunView, change: Change) -> bool:
    if (
        change.control is not None
        or change.final is not None
        or change.update is not None
        or change.seen is not None
        or change.drop
        or any(event.klass != "O" for event in change.events)
    ):
        return False
    if change.claim is not None and change.claim.item_id in run.items:
        # A closed run owns `deliver` items alone.
        return all(put.kind is ItemKind.DELIVER for put in change.put)
    return change.settle is None and not change.put


def _refuse_control(run: RunView, control: Control, holds_turn: bool, now: datetime) -> None:
    if control.kind is ControlKind.STALL:
        if not holds_turn:
            raise Fenced(run.run_id, TURN)
    elif control.kind is ControlKind.CANCEL:
        turn = run.items.get(TURN)
        held = turn is not None and turn.lease is not None and turn.lease.until > now
        if (run.seen_seq > 0 and run.stalled is None) or (held and not holds_turn):
            raise Fenced(run.run_id, TURN)


class Plan:
    """The effects of one change on one run, collected rule by rule."""

    __slots__ = (
        "at",
        "change",
        "events",
        "fields",
        "items",
        "last_input",
        "last_seq",
        "leased",
        "now",
        "paused",
        "progress",
        "run",
        "seen",
        "seqs",
        "settled_turn",
        "skipped",
        "token",
    )

    def __init__(
        self, run: RunView, change: Change, now: datetime, token: Callable[[], str]
    ) -> None:
        self.run = run
        self.change = change
        self.paused = run.paused
        self.now = now
        self.token = token
        # Never before what the run already has: the clock may have been set back.
        self.at = max(now, run.updated_at)
        self.fields: dict[str, object] = {}
        self.events: list[Event] = []
        self.items: dict[str, WorkItem | None] = {}
        self.leased: list[str] = []
        self.seqs: list[int] = []
        self.skipped: list[int] = []
        self.last_seq = len(run.events)
        self.last_input = run.last_input
        self.seen = run.seen_seq
        self.progress = False
        self.settled_turn = False

    def apply_rules(self) -> None:
        """Apply every part of the change but ``create``, in order.

        Raises:
            UnseenInput: The run is to end without knowing all of its inputs.
        """
        change = self.change
        if change.control is not None:
            self._control(change.control)
        if change.events:
            self._append()
        if change.update is not None:
            self._update(change.update)
        if change.seen is not None:
            self._see(change.seen)
        if change.final is not None and change.control is None:
            self._refuse_unseen()
        for item_id in change.drop:
            item = self._item(item_id)
            if item is not None and item.kind is ItemKind.STEP:
                self.items[item_id] = None
        if change.claim is not None:
            self._settle(change.claim.item_id, change.settle)
        for put in change.put:
            self._put(put)
        if change.final is not None:
            self._end(change.final)
        elif self.run.final is None:
            if self.last_input > self.seen:
                self._owe_turn()
            if change.take_turn is not None:
                self._take_turn(change.take_turn)

    def delta(self) -> RunDelta | None:
        """The effects with the answer to remember, or None when there are none."""
        if not (self.fields or self.events or self.items):
            return None
        if self.fields or self.events:
            self.fields["updated_at"] = self.at
        change = self.change
        put: list[WorkItem] = []
        gone: list[str] = []
        held = _NO_HELD
        if self.items:
            for item_id, item in self.items.items():
                if item is not None:
                    put.append(item)
                elif item_id in self.run.items:
                    gone.append(item_id)
            held = [
                (item.item_id, item.lease.token)
                for item_id in self.leased
                if (item := self.items[item_id]) is not None and item.lease is not None
            ]
        record = Record(
            change.key,
            None if change.claim is None else change.claim.token,
            self.last_seq,
            self.seen,
            self.paused,
            self.at,
            self.now,
            self.seqs,
            self.skipped or _NO_SKIPPED,
            held,
        )
        return RunDelta(self.run.run_id, self.fields, self.events, put, gone, [record])

    def answer(self) -> Committed:
        """The answer to the change."""
        claim = self.change.claim
        return Committed(
            last_seq=self.last_seq,
            seen_seq=self.seen,
            paused=self.paused,
            timestamp=self.at,
            now=self.now,
            seqs=self.seqs,
            skipped=frozenset(self.skipped) if self.skipped else _NONE,
            # Called before the effects are applied: the run's events are all of others.
            # Only who drives the run delivers what others added.
            unseen_events=self.run.events[self.seen :]
            if claim is not None and (claim.item_id == TURN or TURN in self.leased)
            else (),
            claims=[i for item_id in self.leased if (i := self.items[item_id]) is not None]
            if self.leased
            else (),
        )

    # The parts of a change, in the order in which they apply.

    def _item(self, item_id: str) -> WorkItem | None:
        if item_id in self.items:
            return self.items[item_id]
        return self.run.items.get(item_id)

    def _stalled(self) -> bool:
        return self.fields.get("stalled", self.run.stalled) is not None

    def _control(self, control: Control) -> None:
        kind = control.kind
        if kind is ControlKind.PAUSE:
            if not self.run.paused:
                self.fields["paused"] = self.paused = True
        elif kind is ControlKind.UNPAUSE:
            if self.run.paused:
                self.fields["paused"] = self.paused = False
                if self.last_input > self.seen:
                    self._bring_forward(self.now)
        elif kind is ControlKind.STALL:
            if self.run.stalled != control.reason:
                self.fields["stalled"] = control.reason
        elif kind is ControlKind.UNSTALL and self.run.stalled is not None:
            self.fields["stalled"] = None
            self.progress = True
            self._bring_forward(self.now)

    def _append(self) -> None:
        run, at, keys, events, seqs = self.run, self.at, self.run.keys, self.events, self.seqs
        run_id = run.run_id
        own: dict[str, int] = {}
        seq = self.last_seq
        for index, event in enumerate(self.change.events):
            key = event.key
            if key is not None:
                standing = keys.get(key) or own.get(key)
                if standing is not None:
                    seqs.append(standing)
                    self.skipped.append(index)
                    continue
                own[key] = seq + 1
            seq += 1
            seqs.append(seq)
            klass = event.klass
            events.append(stored_event(event, run_id, seq, at))
            if klass == "I":
                self.last_input = seq
                self.progress = True
            elif klass == "C":
                self.progress = True
        self.last_seq = seq

    def _update(self, update: Update) -> None:
        if update.result is not None:
            self.fields["result"] = update.result
        if update.error is not None:
            self.fields["error"] = update.error
        if update.next is not None:
            self.fields["next"] = update.next
        if update.attributes:
            self.fields["attributes"] = {**self.run.attributes, **update.attributes}

    def _see(self, seen: int) -> None:
        if seen > self.last_seq:
            raise ValueError(f"nothing has this seq yet: seen={seen} last_seq={self.last_seq}")
        if seen > self.seen:
            if self.seen == 0:
                self.fields["started_at"] = self.at
            self.seen = self.fields["seen_seq"] = seen
            # A delivered input is progress, even when the code records nothing for it.
            self.progress = True

    def _refuse_unseen(self) -> None:
        if self.last_input > self.seen:
            history = [*self.run.events[self.seen :], *self.events]
            unseen = [e for e in history if e.klass == "I" and e.seq > self.seen]
            raise UnseenInput(self.run.run_id, unseen)

    def _settle(self, item_id: str, settle: Settle | None) -> None:
        item = self._item(item_id)
        if item is None:
            return
        if settle is None or settle.keep:
            payload = None if settle is None else settle.payload
            # Progress is counted with the claim that stands.
            claims = 1 if self.progress else item.claims
            if payload is not None or claims != item.claims:
                self.items[item_id] = with_lease(
                    item, lease=item.lease, payload=payload, claims=claims, rung_at=item.rung_at
                )
            return
        self.settled_turn = item.kind is ItemKind.TURN
        if settle.reschedule_at is None:
            self.items[item_id] = None
        else:
            # A new payload is the next try of a step: its holder is alive and well.
            self.progress = self.progress or settle.payload is not None
            self.items[item_id] = with_lease(
                item,
                lease=None,
                due_at=settle.reschedule_at.astimezone(UTC),
                payload=settle.payload,
                claims=0 if self.progress else None,
            )

    def _put(self, put: Put) -> None:
        due_at = self.now if put.due_at is None else put.due_at.astimezone(UTC)
        rung_at = self.now if put.notified else None
        item = self._item(put.item_id)
        if item is not None:
            if due_at < item.due_at:
                self.items[put.item_id] = with_lease(
                    item, lease=item.lease, due_at=due_at, rung_at=rung_at
                )
            return
        lease = None
        if put.claimed is not None:
            lease = self._lease(put.claimed)
            self.leased.append(put.item_id)
        self.items[put.item_id] = WorkItem(
            run_id=self.run.run_id,
            item_id=put.item_id,
            kind=put.kind,
            queue=self.run.queue if put.queue is None else put.queue,
            priority=self.run.priority if put.priority is None else put.priority,
            due_at=due_at,
            payload=put.payload,
            claims=0 if lease is None else 1,
            lease=lease,
            rung_at=rung_at if lease is None else None,
        )

    def _owe_turn(self) -> None:
        """I5: an input that was not delivered makes the turn due."""
        control = self.change.control
        turn = self._item(TURN)
        if turn is not None and turn.due_at <= self.now:
            return  # it is due already
        soon = self.now + STALLED_PAUSE if self._stalled() else self.now
        if turn is None:
            self._put(Put(item_id=TURN, kind=ItemKind.TURN, due_at=soon))
        elif control is not None and control.kind is ControlKind.STALL:
            pass  # its holder gave the turn back until code may be there that fits the history
        elif self._brought_input() or (self.settled_turn and not self._stalled()):
            self._bring_forward(soon)

    def _brought_input(self) -> bool:
        return self.last_input > self.run.last_input

    def _bring_forward(self, due_at: datetime) -> None:
        turn = self._item(TURN)
        if turn is not None and turn.due_at > due_at:
            self.items[TURN] = with_lease(turn, lease=turn.lease, due_at=due_at)

    def _end(self, final: RunStatus) -> None:
        self.fields["final"] = final
        self.fields["finished_at"] = self.at
        if self.run.stalled is not None:
            self.fields["stalled"] = None
        for item_id, item in [*self.run.items.items(), *self.items.items()]:
            if item is not None and item.kind is not ItemKind.DELIVER:
                self.items[item_id] = None

    def _take_turn(self, held: LeaseFor) -> None:
        turn = self._item(TURN)
        if (
            turn is not None
            and turn.due_at <= self.now
            and (turn.lease is None or turn.lease.until <= self.now)
            and not self.paused
        ):
            self.items[TURN] = with_lease(turn, lease=self._lease(held), claims=turn.claims + 1)
            self.leased.append(TURN)

    def _lease(self, held: LeaseFor) -> Lease:
        return Lease(owner=held.owner, token=self.token(), until=self.now + held.lease)
