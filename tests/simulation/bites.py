"""Planted bugs of the engine and of a store, and how many seeds may pass before each is found."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from pyworkflow._engine import (
    bells,
    dispatched,
    keeper,
    kept,
    leases,
    pipeline,
    recovery,
    session,
    steps,
    turn,
    waits,
    worker,
)
from pyworkflow.errors import Fenced, StorageError
from pyworkflow.spi.storage import Settle
from pyworkflow.storekit import _decide, _due, _plan, _state, reference
from pyworkflow_conformance.simulation import _simulate


@dataclass(frozen=True)
class Bite:
    """One planted bug."""

    name: str
    profile: str
    within: int
    """Seeds of which one must fail."""
    rules: frozenset[str]
    """What may be broken by it."""
    plant: Callable[[Callable[[Any, str, Any], None]], None]
    """Replaces attributes with the function that it is given."""
    first: int = 0
    """The first seed; above 0 for what one seed in a thousand shows."""


@contextmanager
def planted(bite: Bite) -> Iterator[None]:
    """The bug is there until the end."""
    standing: list[tuple[Any, str, Any]] = []

    def put(owner: Any, name: str, value: Any) -> None:
        standing.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    _simulate._EXPECTED.clear()
    bite.plant(put)
    try:
        yield
    finally:
        for owner, name, value in reversed(standing):
            setattr(owner, name, value)
        _simulate._EXPECTED.clear()


BITES: list[Bite] = []


def _bite(
    profile: str, within: int, *rules: str, first: int = 0
) -> Callable[[Callable[..., None]], None]:
    def add(plant: Callable[..., None]) -> None:
        name = plant.__name__
        BITES.append(Bite(name, profile, within, frozenset(rules), plant, first))

    return add


# --- the store ------------------------------------------------------------------------------------


@_bite("crash", 150, "I4")
def token_is_not_checked(put: Any) -> None:
    def refuse(run: Any, change: Any, now: Any) -> None:
        try:
            _plan.refuse(run, change, now)
        except Fenced:
            if change.claim is None or change.claim.item_id not in run.items:
                raise

    put(_decide, "refuse", refuse)


@_bite("network", 120, "I1")
def change_that_comes_twice_is_applied_twice(put: Any) -> None:
    apply = _state.RunState.apply

    def forgets(self: Any, part: Any) -> None:
        apply(self, part)
        self.answers_by_token.clear()

    put(_state.RunState, "apply", forgets)


@_bite("calm", 20, "I6")
def held_item_is_claimed_again(put: Any) -> None:
    index_put = _due.DueIndex.put
    put(
        _due.DueIndex,
        "put",
        lambda self, item, workflow: index_put(self, replace(item, lease=None), workflow),
    )


@_bite("crash", 400, "final")
def end_is_taken_although_an_input_is_unseen(put: Any) -> None:
    put(_plan.Plan, "_refuse_unseen", lambda self: None)


@_bite("calm", 40, "I5")
def turn_is_not_owed_for_an_unseen_input(put: Any) -> None:
    put(_plan.Plan, "_owe_turn", lambda self: None)


@_bite("crash", 60, "idempotency", "fsck")
def idempotency_key_is_not_unique(put: Any) -> None:
    put(reference.ReferenceStore, "find_run", lambda self, key, *, now: None)


@_bite("calm", 20, "claims", "I6")
def item_is_claimed_before_its_time(put: Any) -> None:
    pop = _due.DueIndex.pop
    put(
        _due.DueIndex,
        "pop",
        lambda self, limit, now, *rest: pop(self, limit, now + timedelta(hours=1), *rest),
    )


@_bite("calm", 40, "I3", "I2", "seen", "engine")
def acknowledged_change_is_lost_now_and_then(put: Any) -> None:
    apply, number = reference.ReferenceStore._apply, itertools.count(1)

    def loses(self: Any, part: Any) -> None:
        if next(number) % 37:
            apply(self, part)

    put(reference.ReferenceStore, "_apply", loses)


@_bite("crash", 100, "I4")
def token_is_issued_twice(put: Any) -> None:
    from pyworkflow import _memory

    put(_memory._Shared, "token", lambda self: f"t{next(self._tokens) // 2}")


@_bite("calm", 60, "I8", "once", "fsck")
def end_leaves_the_items_of_steps(put: Any) -> None:
    end = _plan.Plan._end

    def leaves(self: Any, status: Any) -> None:
        before = {k: v for k, v in self.run.items.items() if k != "turn"}
        end(self, status)
        for item_id, item in before.items():
            self.items[item_id] = item

    put(_plan.Plan, "_end", leaves)


# --- the engine -----------------------------------------------------------------------------------


@_bite("calm", 20, "liveness", "work")
def timers_are_lost_when_a_turn_is_settled(put: Any) -> None:
    put(session, "Settle", lambda *, reschedule_at=None: Settle())


@_bite("calm", 60, "exactly once", "liveness", "work")
def retry_forgets_how_often_it_was_tried(put: Any) -> None:
    payload = steps.StepTry.payload
    put(steps.StepTry, "payload", lambda self, attempt=None: payload(self))


@_bite("crash", 600, "at most once")
def at_most_once_step_is_not_stamped(put: Any) -> None:
    async def begins(self: Any, what: Any, item: Any) -> bool:
        return True

    put(dispatched.DispatchedSteps, "_mark_begun", begins)


@_bite("network", 60, "liveness", "work")
def sweep_never_rings(put: Any) -> None:
    async def silent(self: Any, limit: int) -> int:
        await self._worker.storage.announce(limit, self._worker.settings.mute)
        return 0

    put(bells.Bells, "sweep", silent)


@_bite(
    "network",
    120,
    "liveness",
    "I1",
    "loop",
    "logs",
    "replay",
    "once",
    "I4",
    "result",
    "idempotency",
    "again",
)
def change_is_sent_again_under_another_key(put: Any) -> None:
    deliver, number = pipeline.Pipeline._deliver, itertools.count(1)

    class Renaming:
        def __init__(self, storage: Any) -> None:
            self._storage = storage

        async def commit(self, changes: Any) -> Any:
            return await self._storage.commit(
                [replace(c, key=f"{c.key}/{next(number)}") for c in changes]
            )

    async def renames(self: Any, changes: Any) -> Any:
        standing = self._storage
        if not isinstance(standing, Renaming):
            self._storage = Renaming(standing)
        return await deliver(self, changes)

    put(pipeline.Pipeline, "_deliver", renames)


@_bite("storage", 200, "liveness", "work", "replay", "engine", "result", "logs")
def coroutine_is_kept_after_a_refusal(put: Any) -> None:
    drop = kept.KeptRuns.drop

    def keeps(self: Any, live: Any) -> None:
        over = live.replay.outcome is not None or live.replay.problem is not None
        if over or len(self.runs) >= self._limit:
            drop(self, live)
        else:
            self.runs[live.run_id] = live
            self.known[live.run_id] = live.replay.fed

    put(kept.KeptRuns, "drop", keeps)


@_bite("calm", 60, "liveness", "work", "replay", "engine", "result")
def inputs_of_others_are_not_delivered(put: Any) -> None:
    to_feed = turn.Turn._to_feed
    put(
        turn.Turn,
        "_to_feed",
        lambda self, answer, events: to_feed(self, replace(answer, unseen_events=()), events),
    )


@_bite("calm", 60, "exactly once", "result", "late", "takeover", "again")
def leases_are_not_renewed(put: Any) -> None:
    async def sleeps(self: Any, storage: Any, age: float) -> None:
        return None

    put(keeper.LeaseKeeper, "_renew_once", sleeps)


@_bite("crash", 200, "liveness", "work", "engine", "replay", "result", "loop")
def evicted_coroutine_is_used_again(put: Any) -> None:
    def closes(self: Any, run_id: str | None = None) -> None:
        for live in list(self.runs.values()):
            live.replay.close()

    put(kept.KeptRuns, "evict", closes)


@_bite("calm", 40, "early")
def timers_fire_early(put: Any) -> None:
    from pyworkflow._replay.replay import Replay

    due = Replay.due_timers
    put(Replay, "due_timers", lambda self, now: due(self, now + 400_000))


@_bite("storage", 60, "liveness", "work")
def worker_gives_up_claiming_after_an_outage(put: Any) -> None:
    claim = leases.claim

    async def once(storage: Any, request: Any) -> Any:
        if getattr(storage, "gave_up", False):
            return replace(await claim(storage, replace(request, limit=1, items=[])), claims=[])
        try:
            return await claim(storage, request)
        except Exception:
            storage.gave_up = True
            raise

    put(worker, "claim", once)


@_bite("crash", 60, "interrupted", "replay")
def cancel_is_swallowed(put: Any) -> None:
    from pyworkflow._replay.replay import Replay

    put(Replay, "_cancel", lambda self, context, cause, reason: None)


@_bite("crash", 60, "given up")
def step_that_was_given_up_is_still_owed(put: Any) -> None:
    cancel = session.Session._cancel_step

    def keeps(self: Any, command: Any) -> None:
        cancel(self, command)
        self._drops = []

    put(session.Session, "_cancel_step", keeps)


@_bite("crash", 60, "early")
def deadline_comes_early(put: Any) -> None:
    from pyworkflow._replay.replay import Replay

    due_timers = Replay.due_timers
    put(Replay, "due_timers", lambda self, now: due_timers(self, now + 10_000))


@_bite("crash", 100, "I6", "result", "at most once")
def free_ends_the_leases_of_all(put: Any) -> None:
    free = reference.ReferenceStore.free

    def frees(self: Any, owner: str, *, now: Any) -> Any:
        owners = {item.lease.owner for item in self._leased(now)}
        return [free(self, each, now=now) for each in sorted(owners | {owner})][-1]

    put(reference.ReferenceStore, "free", frees)


@_bite("crash", 60, "I6")
def turn_is_taken_from_its_holder(put: Any) -> None:
    def takes(self: Any, held: Any) -> None:
        turn = self._item("turn")
        if turn is not None and turn.due_at <= self.now and not self.paused:
            self.items["turn"] = _plan.with_lease(
                turn, lease=self._lease(held), claims=turn.claims + 1
            )
            self.leased.append("turn")

    put(_plan.Plan, "_take_turn", takes)


@_bite("crash", 400, "I6")
def lease_of_somebody_else_is_renewed(put: Any) -> None:
    renewed = reference.renewed

    def of_anybody(item: Any, ref: Any, lease: Any, *, now: Any) -> Any:
        if item is not None and item.lease is not None:
            ref = replace(ref, token=item.lease.token)
        return renewed(item, ref, lease, now=now)

    put(reference, "renewed", of_anybody)


# --- found by nothing until starts without keys, pauses and the claims of items were looked at ------


@_bite("network", 60, "takeover")
def repeated_change_is_answered_without_its_claims(put: Any) -> None:
    # A worker finds leases that it does not know of: without that, their end takes a lease.
    again = _decide._answer_again
    put(_decide, "_answer_again", lambda *args: replace(again(*args), claims=()))
    put(recovery.Recovery, "wanted", lambda self: None)
    put(recovery.Recovery, "_look_if_idle", lambda self: None)


@_bite("network", 100, "takeover", "told late")
def lost_answer_counts_as_a_failure(put: Any) -> None:
    async def once(self: Any, changes: Any, sent: float) -> Any:
        try:
            return list(await self._storage.commit(changes))
        except StorageError as exc:
            return [exc] * len(changes)

    put(pipeline.Pipeline, "_deliver", once)


@_bite("storage", 150, "told late", "again")
def claims_of_a_late_answer_are_believed(put: Any) -> None:
    put(pipeline, "_claims", lambda answer: ())


@_bite("network", 150, "told late", "again")
def a_late_claim_is_believed(put: Any) -> None:
    async def believed(storage: Any, refs: Any, lease: Any) -> Any:
        return set(refs)

    put(leases, "still_held", believed)


@_bite("storage", 100, "told late", "at most once")
def a_begin_that_was_recorded_late_is_believed(put: Any) -> None:
    mark = dispatched.DispatchedSteps._mark_begun

    async def believed(self: Any, what: Any, item: Any) -> bool:
        await mark(self, what, item)
        return True

    put(dispatched.DispatchedSteps, "_mark_begun", believed)


@_bite("crash", 100, "beside itself", first=2200)
def a_worker_that_stood_still_claims_its_own_work(put: Any) -> None:
    async def nothing(self: Any, storage: Any) -> None:
        pass

    put(keeper.LeaseKeeper, "after_pause", nothing)


@_bite("crash", 150, "claims")
def progress_does_not_forgive_claims(put: Any) -> None:
    settle = _plan.Plan._settle

    def counts(self: Any, item_id: str, what: Any) -> None:
        before = self._item(item_id)
        settle(self, item_id, what)
        after = self._item(item_id)
        if after is not None and after.lease is not None:
            self.items[item_id] = _plan.with_lease(after, lease=after.lease, claims=before.claims)

    put(_plan.Plan, "_settle", counts)


@_bite("crash", 60, "liveness")
def run_that_was_paused_never_goes_on(put: Any) -> None:
    apply = reference.ReferenceStore._place

    def hides(self: Any, run: Any, item: Any) -> None:
        if (run.run_id, item.item_id) not in self._parked:
            apply(self, run, item)

    put(reference.ReferenceStore, "_place", hides)


@_bite("calm", 20, "early")
def retry_does_not_wait(put: Any) -> None:
    def at_once(*, reschedule_at: Any = None, **other: Any) -> Settle:
        return Settle(reschedule_at=reschedule_at and datetime(2020, 1, 1, tzinfo=UTC), **other)

    put(dispatched, "Settle", at_once)


@_bite("calm", 40, "late")
def timers_are_looked_at_now_and_then(put: Any) -> None:
    put(waits.Awaited, "seconds", lambda self, due, left: 5.0)
