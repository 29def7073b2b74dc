"""Dispatched steps: tries that have a work item of their own, under its claim."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from datetime import timedelta
from time import monotonic
from typing import TYPE_CHECKING, Any, cast

from pyworkflow._clock import from_micros, utcnow
from pyworkflow._codecs import opened_text
from pyworkflow._definitions import Step, find_step
from pyworkflow._engine.leases import ref_of
from pyworkflow._engine.records import end_events, started_event
from pyworkflow._engine.session import FLUSH
from pyworkflow._engine.steps import StepEnd, StepTry, took_too_long
from pyworkflow._engine.suspects import KILLS
from pyworkflow._failures import encode_error
from pyworkflow._names import step_name, step_names
from pyworkflow._retry import RetryPolicy
from pyworkflow.errors import (
    PayloadTooLarge,
    SerializationError,
    StepInterrupted,
    StepTimeout,
    StorageUnavailable,
    WorkerLost,
)
from pyworkflow.events import Event, EventClass, EventType
from pyworkflow.runs import ItemKind, Run, WorkItem
from pyworkflow.spi.storage import TURN, Change, Claim, ClaimRef, Committed, LeaseFor, Put, Settle
from pyworkflow.storekit import failpoints

if TYPE_CHECKING:
    from pyworkflow._engine.worker import Worker

__all__ = ["DispatchedSteps"]

_log = logging.getLogger("pyworkflow.engine")

failpoints.register(
    __name__,
    StorageUnavailable,
    {
        "step.before_start": "an at-most-once step is claimed, and not recorded as begun",
        "step.after_start": "an at-most-once step is recorded as begun, and its body has not begun",
    },
)

_SUSPICION = 10.0
"""Seconds that a step whose worker died runs before another such step may begin beside it."""
_TURN_OF_A_SUSPECT = timedelta(milliseconds=250)
_UNREADABLE = timedelta(seconds=1)
_REMEMBERED = 10_000


class DispatchedSteps:
    """The dispatched steps that run in one worker."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._running: dict[tuple[str, str], tuple[str, asyncio.Task[Any]]] = {}
        """(run, item) → the claim's token, and the task that works under it."""
        self._adopted: dict[str, set[asyncio.Task[Any]]] = {}
        self._changes: dict[ClaimRef, int] = {}
        self._workflows: dict[ClaimRef, str] = {}
        self._for_others: dict[ClaimRef, Run] = {}
        """Runs whose turns are in a queue of other workers, though their steps came here."""
        self._ending: set[str] = set()
        """Tokens of claims that a commit under way settles: nobody's to cancel any more."""
        self._unread: set[tuple[str, str]] = set()
        """(run, item) of steps whose arguments could not be read here, and people were told."""
        self._suspect: tuple[tuple[str, str], float] | None = None

    def room(self) -> int:
        """How many more may begin."""
        settings = self._worker.settings
        waiting = len(self._worker.runner.waiting)  # their slots are free
        return settings.concurrency + settings.threads + waiting - len(self._running)

    def begin(self, claim: Claim) -> None:
        """Work on a step item that was claimed."""
        ref = claim.ref
        self._workflows[ref] = claim.run.workflow
        if not self._worker.serves(claim.run.queue):
            self._for_others[ref] = claim.run
        self._worker.leases.add(ref)
        task = self._worker.spawn(self._worker.contained(self._work(claim), ref))
        self._track(ref, task)

    def adopt(
        self, what: StepTry, item: WorkItem, task: asyncio.Task[None] | None, end: StepEnd | None
    ) -> None:
        """Go on with a step that a session handed off."""
        ref = ref_of(item)
        worker = self._worker
        self._workflows[ref] = what.workflow
        worker.leases.add(ref)
        if end is not None:
            task = worker.spawn(worker.finish_step(what, end, item, started=True))
        elif task is None:
            task = worker.spawn(worker.contained(self._run(what, item, started=True), ref))
        else:
            worker.keep_task(task)
        self._track(ref, task)
        self._adopted.setdefault(ref.run_id, set()).add(task)
        task.add_done_callback(lambda ended: self._let_go(ref.run_id, ended))

    def _let_go(self, run_id: str, task: asyncio.Task[Any]) -> None:
        adopted = self._adopted[run_id]
        adopted.discard(task)
        if not adopted:
            del self._adopted[run_id]

    def _track(self, ref: ClaimRef, task: asyncio.Task[Any]) -> None:
        key = (ref.run_id, ref.item_id)
        self._running[key] = ref.token, task

        def done(ended: asyncio.Task[Any]) -> None:
            if self._running.get(key) == (ref.token, ended):
                del self._running[key]
            self._changes.pop(ref, None)
            self._workflows.pop(ref, None)
            self._for_others.pop(ref, None)
            self._ending.discard(ref.token)
            self._worker.leases.discard(ref)
            if self.room() == 1:
                self._worker.wake()

        task.add_done_callback(done)

    def cancel(self, run_id: str, item_id: str, token: str | None = None) -> None:
        """End a step that nobody waits for, if it runs here (``token``: under that claim)."""
        found = self._running.get((run_id, item_id))
        if found is not None and token in (None, found[0]) and found[0] not in self._ending:
            found[1].cancel()

    def cancel_run(self, run_id: str) -> None:
        """End the steps of a run that has ended, as far as they run here."""
        for run, item_id in [key for key in self._running if key[0] == run_id]:
            self.cancel(run, item_id)

    def task_of(self, ref: tuple[str, str]) -> asyncio.Task[Any] | None:
        """What works on a (run, item) here."""
        found = self._running.get(ref)
        return None if found is None else found[1]

    def waiting(self) -> set[asyncio.Task[Any] | None]:
        """What works on steps that wait for other runs."""
        waiting = self._worker.runner.waiting
        return {self.task_of((run, name)) for run, op in waiting for name in step_names(op)}

    def works_for(self, run_id: str) -> bool:
        """Whether a step of the run is in progress here."""
        return any(run == run_id for run, _ in self._running)

    def adopted(self, run_id: str) -> list[asyncio.Task[Any]]:
        """The run's steps that a session handed off to this worker."""
        return list(self._adopted.get(run_id, ()))

    def ending(self) -> list[asyncio.Task[Any]]:
        """Tasks whose last commit is on its way: it may bring a turn that they must drive."""
        return [task for token, task in self._running.values() if token in self._ending]

    # --- one try --------------------------------------------------------------------------------

    async def _work(self, claim: Claim) -> None:
        item, payload = claim.item, cast("dict[str, Any]", claim.item.payload)
        step = find_step(str(payload["name"]))
        if step is None:
            _log.error(
                "no step of this name is defined here: step=%s run_id=%s; import its module in "
                "this worker",
                payload["name"],
                item.run_id,
            )
            await self._worker.storage.release(claim.ref, delay=timedelta(seconds=1))
            return
        what = _try_of(claim, step, payload)
        if payload.get("overran") == what.attempt:
            # Its process, and the thread with it, is gone: the try is over.
            end = StepEnd(error=StepTimeout(took_too_long(what)), kind="timeout")
            await self.finish(what, end, item, started=True)
            return
        if payload.get("begun") is not None:
            message = (
                f"at-most-once step {step.name!r} was begun, and its worker disappeared: it may "
                "or may not have run"
            )
            end = StepEnd(error=StepInterrupted(message), kind="interrupted")
            await self._give_up(what, end, item)
            return
        if item.claims > KILLS:
            message = f"step {step.name!r} took its worker down {item.claims - 1} times"
            await self._give_up(what, StepEnd(error=WorkerLost(message), kind="worker_lost"), item)
            return
        if item.claims > 1 and not self._may_begin(item):
            await self._worker.storage.release(claim.ref, delay=_TURN_OF_A_SUSPECT)
            return
        try:
            what.args = await opened_text(what.args)
            what.call = step.stored_arguments(what.args)
        except SerializationError as exc:
            await self._unreadable(what, claim, exc)
            return
        if step.semantics == "at_most_once" and not await self._mark_begun(what, item):
            return
        await self._run(what, item, started=step.semantics == "at_most_once")

    async def _unreadable(self, what: StepTry, claim: Claim, problem: SerializationError) -> None:
        """Leave a step to a worker that can read its arguments: no try of it was begun."""
        reason = f"step {what.step.name!r} cannot begin in this worker: {problem}"
        told = (claim.ref.run_id, claim.ref.item_id)
        if told not in self._unread:
            if len(self._unread) >= _REMEMBERED:
                self._unread.clear()
            self._unread.add(told)
            _log.error("%s run_id=%s", reason, claim.ref.run_id)
            line: dict[str, Any] = {"message": reason, "fields": {"op": what.op}}
            await self._commit(
                claim.item, [Event(EventType.LOG_ERROR, EventClass.OBSERVATION, line)]
            )
        await self._worker.storage.release(claim.ref, delay=_UNREADABLE)

    def _may_begin(self, item: WorkItem) -> bool:
        """Let steps whose worker died begin one at a time.

        Each of them may be what took the worker down; beside each other, all would be counted
        for what one does. After a while the next may begin all the same.
        """
        key, now = (item.run_id, item.item_id), monotonic()
        if self._suspect is not None:
            other, since = self._suspect
            if other != key and other in self._running and now - since < _SUSPICION:
                return False
        self._suspect = key, now
        return True

    async def _mark_begun(self, what: StepTry, item: WorkItem) -> bool:
        """Record that the body is about to begin; False when it must not any more."""
        if failpoints.active:
            failpoints.hit("step.before_start")
        sent = monotonic()
        what.began = utcnow()
        payload = dict(item.payload) | {"begun": ref_of(item).token}
        await self._commit(
            item,
            [started_event(what, self._worker.owner, dispatched=True)],
            settle=Settle(keep=True, payload=payload),
        )
        if failpoints.active:
            failpoints.hit("step.after_start")
        # The lease was given at ``sent`` at the latest: begin only with half of it left.
        return monotonic() - sent < self._worker.settings.lease.total_seconds() / 2

    async def _run(self, what: StepTry, item: WorkItem, *, started: bool) -> None:
        self._worker.guard.begin()
        body = asyncio.get_running_loop().create_task(
            self._worker.runner.run(what), context=contextvars.Context()
        )
        try:
            if not started:
                done, _ = await asyncio.wait({body}, timeout=FLUSH)
                if not done and what.began is not None:
                    # People see that a long step has started.
                    event = started_event(what, self._worker.owner, dispatched=True)
                    await self._commit(item, [event])
                    started = True
            end = await body
        except BaseException:
            body.cancel()
            raise
        if end.overran:
            await self._end_process(what, item)
            return
        await self.finish(what, end, item, started=started)

    async def _end_process(self, what: StepTry, item: WorkItem) -> None:
        """End a thread that outlived its step's hard timeout, with this process.

        What is noted here becomes the try's end in whichever process takes the item then: the next
        try must not begin beside the thread.
        """
        _log.warning(
            "%s run_id=%s; its process ends, as hard_timeout says", took_too_long(what), what.run_id
        )
        payload = dict(item.payload) | {"overran": what.attempt}
        try:
            await self._commit(item, [], settle=Settle(keep=True, payload=payload))
        finally:
            if self._worker.end_process is not None:
                self._worker.end_process()
        await asyncio.get_running_loop().create_future()  # the claim is kept to the last

    async def finish(self, what: StepTry, end: StepEnd, item: WorkItem, *, started: bool) -> None:
        """Record the end of a try: the result and the turn that follows, or the next try."""
        events, retry_us = end_events(self._worker, what, end, started=started, dispatched=True)
        try:
            if retry_us is None:
                await self._result(item, events)
                return
            payload = dict(item.payload) | {"attempt": what.attempt + 1}
            await self._commit(
                item, events, settle=Settle(reschedule_at=from_micros(retry_us), payload=payload)
            )
        except (PayloadTooLarge, SerializationError) as exc:
            await self._give_up(what, StepEnd(error=exc), item)
            return
        self._worker.wake()

    async def _give_up(self, what: StepTry, end: StepEnd, item: WorkItem) -> None:
        """Fail a step without running it."""
        assert end.error is not None
        self._worker.raised.note(what.run_id, what.op, end.error)
        data: dict[str, Any] = {
            "name": what.step.name,
            "digest": what.digest,
            "attempt": what.attempt,
            "error": encode_error(end.error),
            "kind": end.kind,
        }
        key = step_name(what.op)
        await self._result(
            item, [Event(EventType.STEP_FAILED, EventClass.INPUT, data, what.op, key)]
        )

    async def _result(self, item: WorkItem, events: list[Event]) -> None:
        worker = self._worker
        other = self._for_others.get(ref_of(item))
        held = None if worker.is_stopping or other is not None else worker.held()
        answer = await self._commit(item, events, settle=Settle(), take_turn=held)
        turn = answer.turn
        if turn is None and other is not None:
            worker.tell_of(item.run_id, other, [Put(item_id=TURN, kind=ItemKind.TURN)])
            return
        if turn is None:
            worker.wake()
            return
        await worker.continue_turn(turn, answer, answer.stored(item.run_id, events))

    async def _commit(
        self,
        item: WorkItem,
        events: list[Event],
        *,
        settle: Settle | None = None,
        take_turn: LeaseFor | None = None,
    ) -> Committed:
        ref = ref_of(item)
        if settle is not None and not settle.keep:
            self._ending.add(ref.token)
        number = self._changes[ref] = self._changes.get(ref, 0) + 1
        answer = await self._worker.pipeline.commit(
            Change(
                run_id=ref.run_id,
                key=f"{ref.token}:{number}",
                claim=ref,
                events=events,
                settle=settle,
                take_turn=take_turn,
            )
        )
        self._worker.committed(ref.run_id, self._workflows.get(ref, ""), events, answer)
        return answer


def _try_of(claim: Claim, step: Step[..., Any], payload: dict[str, Any]) -> StepTry:
    timeout = payload.get("timeout")
    return StepTry(
        run_id=claim.item.run_id,
        workflow=claim.run.workflow,
        op=str(payload["op"]),
        step=step,
        args=str(payload["args"]),
        digest=str(payload["digest"]),
        attempt=int(payload["attempt"]),
        policy=RetryPolicy.from_json(payload["policy"]),
        timeout=None if timeout is None else timedelta(seconds=timeout),
    )
