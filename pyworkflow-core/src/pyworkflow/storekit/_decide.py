"""One change, decided: refused, answered again, or turned into effects. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from pyworkflow.errors import KeyTaken, Refusal, RunClosed, RunExists, RunNotFound
from pyworkflow.events import Event
from pyworkflow.runs import WorkItem
from pyworkflow.spi._delta import Record, RunDelta
from pyworkflow.spi.storage import TURN, Answer, Change, Committed, NewRun
from pyworkflow.storekit._plan import Plan, refuse
from pyworkflow.storekit._state import RunState, RunView

__all__ = ["REFUSALS", "answer_each", "decide"]

#: What refuses one change, with nothing written, and leaves the others of a commit alone.
REFUSALS = (Refusal, RunNotFound, RunClosed)


def decide(
    run: RunView | None,
    change: Change,
    *,
    now: datetime,
    token: Callable[[], str],
    owner_of: Callable[[str], str | None],
) -> tuple[Committed, RunDelta | None]:
    """What a change that ``check_change`` has passed does to ``run`` (None: it is not there).

    For any backend in Python: load the run as it stands, call this, write the effects and the
    answer in one transaction. ``run`` is only read, and only where the change touches it, so that
    its parts may be loaded when they are asked for (see ``RunView``). No effects: nothing to write.

    This is a pure function, and may be called again for the same change: a part of ``run`` that was
    not loaded may raise an exception of the backend's own, which passes through, and the backend
    loads the part and calls again. ``token`` and ``owner_of`` are then called again as well; tokens
    of a call that raised are never used. ``pyworkflow.storekit.remote`` does this for drivers that
    are asynchronous.

    What the backend does with the effects, in one transaction: set ``fields``; append ``events``
    and remember the seq of the last one of class ``I`` (``last_input``); remove the items in
    ``gone``, then put ``items`` in place; keep ``records``, those without a token as long as the
    run, of the others the last of each of the ``KEPT_TOKENS`` tokens used last; when ``paused`` is
    among the fields, hide or show all items of the run but deliveries to claims. For a created run
    it gives the next ``number`` (the order of ``list_runs``) and notes the idempotency key.

    Args:
        run: The run as it stands, or None.
        change: What is asked.
        now: The storage's clock.
        token: Gives a claim token that this store never gave before.
        owner_of: The run that has an idempotency key, purged ones included, or None.

    Raises:
        RunExists, RunNotFound, RunClosed, Fenced, UnseenInput, KeyTaken: The refusal.
    """
    if change.create is not None:
        if run is not None:
            if run.create_key != change.key:
                raise RunExists(change.run_id)
            return _answer_again(run, run.external_answers[change.key], change), None
        return _create(change, change.create, now, token, owner_of)
    if run is None:
        raise RunNotFound(change.run_id)
    claim = change.claim
    record = (
        run.external_answers.get(change.key)
        if claim is None
        else run.answers_by_token.get(claim.token)
    )
    if record is not None and record.key == change.key:
        return _answer_again(run, record, change), None
    refuse(run, change, now)
    plan = Plan(run, change, now, token)
    plan.apply_rules()
    return plan.answer(), plan.delta()


def _create(
    change: Change,
    new: NewRun,
    now: datetime,
    token: Callable[[], str],
    owner_of: Callable[[str], str | None],
) -> tuple[Committed, RunDelta]:
    fields: dict[str, object] = {
        "create_key": change.key,
        "workflow": new.workflow,
        "version": new.version,
        "args": new.args,
        "created_at": now,
    }
    given: dict[str, object] = {
        "idempotency_key": new.idempotency_key,
        "parent": new.parent,
        "root": new.root,
        "queue": new.queue,
        "priority": new.priority,
        "tags": new.tags,
        "attributes": new.attributes,
        "deadline": None if new.deadline is None else new.deadline.astimezone(UTC),
    }
    fields |= {k: v for k, v in given.items() if v not in (None, 0, (), {})}
    run = RunState(change.run_id)
    run.apply(RunDelta(change.run_id, fields))
    plan = Plan(run, change, now, token)
    plan.apply_rules()
    if new.idempotency_key is not None:
        owner = owner_of(new.idempotency_key)
        if owner is not None:
            raise KeyTaken(new.idempotency_key, owner)
    plan.fields = {**fields, **plan.fields}
    delta = plan.delta()
    assert delta is not None
    return plan.answer(), delta


def answer_each(changes: Sequence[Change], commit: Callable[[Change], Committed]) -> list[Answer]:
    """The answers of ``StorageBackend.commit``, by a function that commits one change.

    Args:
        changes: Applied one after the other.
        commit: Applies a change and returns its answer; it raises a refusal before it writes.
    """
    answers: list[Answer] = []
    for change in changes:
        try:
            answers.append(commit(change))
        except REFUSALS as refusal:
            answers.append(refusal)
    return answers


def _answer_again(run: RunView, record: Record, change: Change) -> Committed:
    held: list[WorkItem] = []
    for item_id, token in record.held:
        item = run.items.get(item_id)
        if item is not None and item.lease is not None and item.lease.token == token:
            held.append(item)
    unseen: list[Event] = []
    claim = change.claim
    if claim is not None and (claim.item_id == TURN or any(i.item_id == TURN for i in held)):
        skipped = set(record.skipped)
        own = {seq for index, seq in enumerate(record.seqs) if index not in skipped}
        later = run.events[record.seen_seq : record.last_seq]
        unseen = [event for event in later if event.seq not in own]
    return Committed(
        last_seq=record.last_seq,
        seen_seq=record.seen_seq,
        paused=record.paused,
        timestamp=record.timestamp,
        now=record.now,
        seqs=record.seqs,
        skipped=frozenset(record.skipped),
        unseen_events=unseen,
        claims=held,
        duplicate=True,
    )
