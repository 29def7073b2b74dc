"""Running the body of a step: one try, in this process."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import logging
import threading
from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timedelta
from time import monotonic
from typing import TYPE_CHECKING, Any

from pyworkflow import _plugins
from pyworkflow._clock import utcnow
from pyworkflow._codecs import Writer
from pyworkflow._context import StepContext, mark_cancelled, running_try, step_context
from pyworkflow._definitions import Step
from pyworkflow._engine.interrupts import may_be_ctrl_c
from pyworkflow._engine.places import Place
from pyworkflow._engine.resources import WorkerResources
from pyworkflow._engine.slots import Slots
from pyworkflow._engine.threads import Ended, StepThreads
from pyworkflow._failures import encode_error
from pyworkflow._retry import GiveUp, Retry, RetryPolicy, decide, is_programming_error
from pyworkflow._serialization import payload_size
from pyworkflow.errors import (
    ArgumentError,
    PayloadTooLarge,
    RetryableError,
    SerializationError,
    StepTimeout,
    StorageError,
)
from pyworkflow.events import Json
from pyworkflow.storekit import failpoints

if TYPE_CHECKING:
    from pyworkflow._engine.worker import Worker

__all__ = ["StepEnd", "StepRunner", "StepTry", "Verdict", "took_too_long"]

_log = logging.getLogger("pyworkflow.engine")
_making = threading.Lock()

failpoints.register(
    __name__,
    None,
    {"step.after_body": "the body of a step has ended, and its end is not recorded"},
)


@dataclass(slots=True)
class StepTry:
    """What is to be run: one try of one step."""

    run_id: str
    workflow: str
    op: str
    step: Step[Any, Any]
    args: str
    digest: str
    attempt: int
    policy: RetryPolicy
    timeout: timedelta | None
    call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    """The arguments, where they were decoded already."""
    began: datetime | None = None
    """When the body began, by this machine's clock; for people."""
    seen: StepContext | None = None
    """What the body sees of itself, once it asked, or wrote a log line."""
    runner: StepRunner | None = None
    """Where the body runs, or ran."""
    place: Place | None = None
    """The same for clients in the body, once one asked."""
    is_over: bool = False

    @property
    def context(self) -> StepContext:
        """What the body sees of itself, made for the first who asks: most bodies do not."""
        if self.seen is None:
            with _making:  # threads of the body may ask, and its end
                if self.seen is None:
                    self.seen = step_context(
                        self.run_id, self.op, self.step.name, self.workflow, self.attempt
                    )
        return self.seen

    @property
    def opener(self) -> WorkerResources | None:
        """What opens resources for the body."""
        return None if self.runner is None else self.runner.resources

    def payload(self, attempt: int | None = None) -> dict[str, Json]:
        """The payload of the work item that owes this step."""
        return {
            "v": 1,
            "op": self.op,
            "name": self.step.name,
            "args": self.args,
            "digest": self.digest,
            "attempt": self.attempt if attempt is None else attempt,
            "policy": dict(self.policy.to_json()),
            "timeout": None if self.timeout is None else self.timeout.total_seconds(),
            "semantics": self.step.semantics,
        }


@dataclass(slots=True)
class StepEnd:
    """How a try ended. ``result`` is payload text; without it, ``error`` says why."""

    result: str | None = None
    error: BaseException | None = None
    kind: str = "error"
    """``error`` or ``timeout``."""
    overran: bool = False
    """Its thread still runs, and is to end with its process."""


@dataclass(slots=True)
class Verdict:
    """What follows the end of a try: an input for the workflow, or another try."""

    retry_at: datetime | None
    error: dict[str, Json]


class StepRunner:
    """Runs step bodies: async ones on this loop, sync ones in threads, each kind bounded."""

    def __init__(self, worker: Worker, max_payload: int, *, may_end_process: bool) -> None:
        settings, codecs = worker.settings, worker.codecs
        self.worker = worker
        """Whose steps these are: what clients inside them talk to."""
        self.resources = WorkerResources()
        """What the steps of this worker share."""
        self._codecs = codecs
        self._slots = Slots(settings.concurrency)
        self._threads = StepThreads(settings.threads)
        self._in_threads: dict[tuple[str, str], asyncio.Future[Ended]] = {}
        self._max_payload = max_payload
        # Codecs may make it smaller: then only what they take is sure.
        self._max_result = max_payload if codecs is None else codecs.max_size
        self._busy = Slots(settings.threads)
        self._may_end_process = may_end_process
        self.waiting: set[tuple[str, str]] = set()
        """Steps (run, op) that wait for a run, with their slot released."""
        self.awaited: Counter[str] = Counter()
        """The runs that steps wait for."""

    def place_of(self, what: StepTry) -> Place:
        """Where the attempt runs."""
        slots, threads = (self._slots, None) if what.step.is_async else (self._busy, self._threads)
        step = (what.run_id, what.op)
        return Place(self.worker, step, slots, threads, is_over=what.is_over)

    async def run(self, what: StepTry) -> StepEnd:
        """One try. Raises ``CancelledError`` only when this task is cancelled."""
        what.runner = self
        running_try.set(what)
        slots = self._slots if what.step.is_async else self._busy
        threads: list[asyncio.Future[Ended]] = []
        if not slots.take():
            await slots.acquire()
        try:
            what.began = utcnow()
            end = StepEnd()
            try:
                args, kwargs = what.call or what.step.arguments(what.args)
                if _plugins.hooks_active("pyworkflow_around_step"):
                    with _plugins.around(
                        "pyworkflow_around_step",
                        run_id=what.run_id,
                        workflow=what.workflow,
                        step_id=what.op,
                        step_name=what.step.name,
                        attempt=what.attempt,
                    ):
                        value = await self._call(what, args, kwargs, threads)
                elif what.step.is_async and what.timeout is None:
                    value = await what.step.fn(*args, **kwargs)
                else:
                    value = await self._call(what, args, kwargs, threads)
                text = _encoded(what, value, self._max_result)
                if self._codecs is not None:
                    text = await self._wrapped(self._codecs, what, text)
                else:
                    self._check_size(what, text)
                end.result = text
            except asyncio.CancelledError as exc:
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    mark_cancelled(what.context)
                    raise
                end.error = exc  # raised by the body itself
            except KeyboardInterrupt as exc:
                if may_be_ctrl_c() and not threads:
                    raise
                end.error = exc
            except _TimedOut as exc:
                end.error, end.kind = StepTimeout(str(exc)), "timeout"
                end.overran = exc.overran
            except BaseException as exc:  # noqa: BLE001 - whatever a step raises is its result
                end.error = exc
            if failpoints.active:
                failpoints.hit("step.after_body")
            # The task may go on with the turn that this end brings, which is not the step.
            running_try.set(None)
            return end
        finally:
            if threads and not threads[0].done():
                # A thread cannot be stopped: its slot is free when it has ended.
                threads[0].add_done_callback(lambda _: _over(what, slots))
                if what.place is not None:
                    what.place.end_waits()
            else:
                _over(what, slots)

    async def _call(
        self, what: StepTry, args: Any, kwargs: Any, threads: list[asyncio.Future[Ended]]
    ) -> object:
        if not what.step.is_async:
            return await self._sync(what, args, kwargs, threads)
        if what.timeout is None:
            return await what.step.fn(*args, **kwargs)
        limit = asyncio.timeout(what.timeout.total_seconds())
        try:
            async with limit:
                return await what.step.fn(*args, **kwargs)
        except TimeoutError:
            if limit.expired():
                raise _TimedOut(took_too_long(what)) from None
            raise

    def runs_async(self) -> bool:
        """Whether an async step is in progress."""
        return self._slots.in_use > 0

    def begin_threads(self) -> None:
        """Start the threads of sync steps now: at the end of a process none can start."""
        self._threads.begin()

    def in_threads(self, run_id: str | None = None) -> bool:
        """Whether a thread still runs a step (of this run), be it given up or not."""
        return any(run_id in (None, run) for run, _ in self._in_threads)

    async def threads_ended(self, timeout: float) -> bool:
        """Wait until no thread runs a step; False when some still do after ``timeout`` seconds."""
        if self._in_threads:
            await asyncio.wait(set(self._in_threads.values()), timeout=timeout)
        return not self._in_threads

    async def _sync(
        self, what: StepTry, args: Any, kwargs: Any, threads: list[asyncio.Future[Ended]]
    ) -> object:
        context = contextvars.copy_context()
        call = functools.partial(context.run, what.step.fn, *args, **kwargs)
        began = monotonic()
        body = self._threads.submit(call)
        threads.append(body)
        try:
            value = await self._in_thread(what, body)
        except BaseException:
            body.add_done_callback(_close_coroutine)
            raise
        if not inspect.isawaitable(value):
            return value
        # An ordinary wrapper round an async function: the body is what it returned.
        left = None
        if what.timeout is not None:
            left = max(0.0, what.timeout.total_seconds() - (monotonic() - began))
        limit = asyncio.timeout(left)
        try:
            async with limit:
                return await value
        except TimeoutError:
            if limit.expired():
                raise _TimedOut(took_too_long(what)) from None
            raise

    async def _in_thread(self, what: StepTry, body: asyncio.Future[Ended]) -> object:
        key = (what.run_id, what.op)
        self._in_threads[key] = body
        body.add_done_callback(lambda _: self._in_threads.pop(key, None))
        if what.timeout is None:
            return _returned(await asyncio.shield(body))
        done, _ = await asyncio.wait({body}, timeout=what.timeout.total_seconds())
        if done:
            return _returned(body.result())
        mark_cancelled(what.context)
        message = took_too_long(what)
        if what.step.hard_timeout and self._may_end_process:
            raise _TimedOut(message, overran=True)
        if what.attempt > what.policy.max_retries:
            raise _TimedOut(
                message + "; its thread is still running, for threads cannot be stopped"
            )
        if what.place is not None:
            what.place.end_waits()
        # A thread cannot be stopped: the next try starts when this one has ended, never beside it.
        await asyncio.wait({body})
        raise _TimedOut(message)

    async def _wrapped(self, codecs: Writer, what: StepTry, text: str) -> str:
        try:
            text = await codecs.wrap_text(text)
        except StorageError:
            # No failure of the step: the commit tries again, and waits if it has to.
            return text
        self._check_size(what, text)
        return text

    def _check_size(self, what: StepTry, text: str) -> None:
        size = payload_size(text)
        if size > self._max_payload:
            raise PayloadTooLarge(f"the result of step {what.step.name!r}", size, self._max_payload)

    def judge(self, what: StepTry, end: StepEnd, now: datetime) -> Verdict:
        """Whether a failed try is followed by another."""
        error = end.error
        assert error is not None
        opinion = _plugins.error_class(error) if isinstance(error, Exception) else None
        if isinstance(error, SerializationError | PayloadTooLarge | ArgumentError):
            opinion = "fatal"  # the same again: trying again only repeats the effect
        elif not isinstance(error, Exception):
            error = RetryableError(f"the step raised {type(error).__name__}")
        decision = decide(what.policy, what.attempt, error, now, opinion=opinion)
        if what.attempt == 1 and is_programming_error(end.error, what.step.fn.__code__):  # type: ignore[arg-type]  # not None, see above
            _log.warning(
                "step %s failed with what looks like a mistake in its own code: %r run_id=%s; "
                "it is tried again all the same, max_retries=%d",
                what.step.name,
                end.error,
                what.run_id,
                what.policy.max_retries,
                exc_info=end.error,
            )
        encoded: Any = encode_error(end.error)  # type: ignore[arg-type]  # not None, see above
        match decision:
            case Retry(at):
                return Verdict(at, encoded)
            case GiveUp():
                return Verdict(None, encoded)

    def close(self) -> None:
        """Let go of the threads; those that still run a step end by themselves."""
        self._threads.close()


def _over(what: StepTry, slots: Slots) -> None:
    """The body has ended, and its thread with it."""
    what.is_over = True
    if what.place is None:
        slots.release()
    else:
        what.place.end()


def _encoded(what: StepTry, value: object, limit: int) -> str:
    try:
        return what.step.encode_result(value, limit)
    except PayloadTooLarge as exc:
        name = f"the result of step {what.step.name!r}"
        raise PayloadTooLarge(name, exc.size, exc.limit) from None
    except SerializationError as exc:
        raise SerializationError(
            f"the result of step {what.step.name!r} cannot be stored: {exc}"
        ) from exc


class _TimedOut(Exception):
    """A try ran into its own ``timeout``, not into one of the body's."""

    def __init__(self, message: str, *, overran: bool = False) -> None:
        super().__init__(message)
        self.overran = overran


def took_too_long(what: StepTry) -> str:
    """What the error of a try says that ran into its ``timeout``."""
    assert what.timeout is not None
    return (
        f"step {what.step.name!r} took longer than timeout={what.timeout.total_seconds():g}s "
        f"attempt={what.attempt}"
    )


def _close_coroutine(body: asyncio.Future[Ended]) -> None:
    """Close what a thread returned to an attempt that is over."""
    if not body.cancelled() and inspect.iscoroutine(value := body.result()[0]):
        value.close()


def _returned(ended: Ended) -> object:
    value, error = ended
    if error is not None:
        raise error
    return value
