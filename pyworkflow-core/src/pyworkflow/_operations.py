"""What a client does on one storage object, in the event loop of that object."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any, Literal, cast

from pyworkflow import _plugins
from pyworkflow._clock import LAST
from pyworkflow._codecs import opened_events, opened_run, writer_for
from pyworkflow._config import settings
from pyworkflow._declared import DeclaredWorkflow
from pyworkflow._definitions import RunOptions, Workflow, find_workflow
from pyworkflow._engine.bells import bell_of_put
from pyworkflow._engine.observers import observed_hooks, tell_observers
from pyworkflow._engine.pipeline import Pipeline, StorageClock
from pyworkflow._engine.records import cancelled_error
from pyworkflow._engine.worker import Worker
from pyworkflow._names import check_limit, is_name
from pyworkflow._queries import Named, check_events, check_reason, check_run_id, query_of
from pyworkflow._registry import check_findable
from pyworkflow._replay._cpython import ASYNCIO_PROFILE
from pyworkflow._results import (
    POLL,
    Help,
    outcome,
    parse_timeout,
    stalled_since,
    still_running,
)
from pyworkflow._serialization import (
    decode_arguments,
    encode,
    payload_size,
)
from pyworkflow.errors import (
    ArgumentError,
    Fenced,
    IdempotencyConflict,
    KeyTaken,
    PayloadTooLarge,
    RunClosed,
    RunExists,
    RunIdConflict,
    RunNotFound,
    RunStalled,
    StorageError,
    StorageUnavailable,
    WorkflowError,
)
from pyworkflow.events import Event, EventClass, EventType
from pyworkflow.runs import ErrorInfo, ItemKind, Run, RunStatus
from pyworkflow.spi.executor import Executor
from pyworkflow.spi.storage import (
    TURN,
    Change,
    Claim,
    Committed,
    Control,
    ControlKind,
    NewRun,
    Page,
    Put,
    StorageBackend,
    Update,
)
from pyworkflow.storekit import failpoints

__all__ = ["IfStalled", "Operations"]

D = str | int | float | timedelta

_log = logging.getLogger("pyworkflow.client")
failpoints.register(
    __name__,
    StorageUnavailable,
    {"client.after_start": "a run is durable, nobody was told, and its caller has no id yet"},
)

IfStalled = Literal["raise", "wait"]

_LEAST = timedelta(milliseconds=10)
_LEAST_POLL = timedelta(milliseconds=50)
_STALLED = timedelta(seconds=1)
"""Between two looks at a stalled run: the store's clock may be ahead of the loop's."""
_NEVER = 2**62
_LOCAL = 1.0
"""Seconds that a result waits for this process's own turn before it watches the store: who else ends
the run meanwhile is noticed that much later."""


class Operations:
    """What a client does, in the loop of one storage object."""

    def __init__(
        self, storage: StorageBackend, worker: Worker | None, executor: Executor | None
    ) -> None:
        self.storage = storage
        self._worker = worker
        self._executor = executor
        self._settings = settings() if worker is None else worker.settings
        if worker is not None:
            self._pipeline = worker.pipeline
        else:
            self._pipeline = Pipeline(storage, StorageClock(), 10.0)
        self._watches: set[asyncio.Future[bool]] = set()
        self._closed = False

    async def start(
        self,
        workflow: Workflow[Any, Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        options: RunOptions,
    ) -> str:
        """Make a run durable and have it begun; its id."""
        return await self.start_encoded(workflow, workflow.encode_call(args, kwargs), options)

    async def start_encoded(
        self, workflow: Workflow[Any, Any], text: str, options: RunOptions
    ) -> str:
        """As ``start``, with arguments that ``Workflow.encode_call`` has encoded."""
        owner = await self._owner_of_long_key(options.idempotency_key)
        if owner is not None:
            run_id = await self._attach(owner, workflow, text, key=options.idempotency_key)
            return self.begun_here(run_id, workflow, options)
        limit = await self._limit(workflow, text, options)
        run_id = options.run_id or _new_id()
        change, started = await self._creation(run_id, workflow, text, options, limit)
        while True:
            try:
                answer = await self._pipeline.commit(change)
            except KeyTaken as refusal:
                run_id = await self._attach(refusal.owner, workflow, text, key=refusal.key)
                return self.begun_here(run_id, workflow, options)
            except RunExists:
                existing = await self.storage.get_run(run_id)
                if existing is None:
                    continue  # it was purged meanwhile
                await self._attach(run_id, workflow, text, asked_key=options.idempotency_key)
                return self.begun_here(run_id, workflow, options)
            break
        if failpoints.active:
            failpoints.hit("client.after_start")
        created = cast("NewRun", change.create)
        events = answer.stored(run_id, [started])
        _plugins.observe("pyworkflow_run_created", run_id=run_id, workflow=workflow.name)
        self._observe(run_id, workflow.name, events)
        self.begun_here(run_id, workflow, options)
        turn = answer.turn
        if self._worker is not None and turn is not None:
            fresh = _fresh_run(run_id, created, answer.timestamp)
            claim = Claim(item=turn, run=fresh, events=events)
            self._worker.begin_turn(claim)
        else:
            await self._ring(run_id, created)
        return run_id

    def begun_here(self, run_id: str, workflow: Workflow[Any, Any], options: RunOptions) -> str:
        """Tell the worker of a run that it can drive."""
        worker = self._worker
        if (
            worker is not None
            and worker.on_run_started is not None
            and self._is_for(worker, workflow, options)
        ):
            worker.on_run_started(run_id)
        return run_id

    def wake(self) -> None:
        """There may be something to claim for the worker."""
        if self._worker is not None:
            self._worker.wake()

    @staticmethod
    def _is_for(worker: Worker, workflow: Workflow[Any, Any], options: RunOptions) -> bool:
        queue = options.queue or workflow.queue or "default"
        return find_workflow(workflow.name) is not None and worker.serves(queue)

    def _observe(self, run_id: str, workflow: str, events: list[Event]) -> None:
        if hooks := observed_hooks():
            tell_observers(hooks, run_id, workflow, events)

    async def _owner_of_long_key(self, key: object) -> str | None:
        """The run that has a key which is too long for a new run: 0.1.0 took it."""
        if not isinstance(key, str) or not key or is_name(key):
            return None
        if self._worker is None:  # whose storage is open
            await self.storage.open()
        return await self.storage.find_run(key)

    async def _limit(self, workflow: Workflow[Any, Any], text: str, options: RunOptions) -> int:
        """The largest payload of the run; what is asked for is checked first."""
        _check_limits(workflow, options)
        if self._worker is None:  # whose storage is open
            await self.storage.open()
        info = self.storage.info()
        worker = self._worker
        if not isinstance(workflow, DeclaredWorkflow):  # whose code is elsewhere
            check_findable(
                workflow,
                info.location,
                outlives=info.capabilities.multi_process or info.capabilities.durable,
                distributed=self._executor is not None or (worker is not None and worker.rings),
            )
        limit = min(self._settings.max_payload, info.max_payload)
        if self._worker is None:
            # Made for what is written: a client that only reads needs no key to write with.
            self._pipeline.write_with(writer_for(self._settings), limit)
        codecs = self._pipeline.codecs
        if codecs is not None and codecs.offloads:
            limit = codecs.max_size
        elif codecs is not None:  # what codecs make of arguments must fit into the store, too
            limit = min(limit, codecs.most_arguments(self.storage.info().max_payload))
        if codecs is None and (size := payload_size(text)) > limit:
            raise PayloadTooLarge(f"the arguments of workflow {workflow.name!r}", size, limit)
        return limit

    async def _ring(self, run_id: str, run: Run | NewRun) -> None:
        """Tell workers that the run has a turn; how a broker takes that is the executor's affair."""
        put = Put(item_id=TURN, kind=ItemKind.TURN)
        if self._worker is not None:
            self._worker.tell_of(run_id, run, [put])
        if self._executor is None:
            return
        bell = bell_of_put(
            run_id,
            put,
            workflow=run.workflow,
            queue=run.queue,
            priority=run.priority,
        )
        try:
            await self._executor.notify([bell])
        except Exception:  # noqa: BLE001 - the run is durable: a plugin's fault must not hide that
            _log.exception("an executor could not ring: executor=%s", self._executor.name)

    async def _creation(
        self,
        run_id: str,
        workflow: Workflow[Any, Any],
        text: str,
        options: RunOptions,
        max_payload: int,
    ) -> tuple[Change, Event]:
        longest = options.max_duration
        if longest is None:
            longest = workflow.max_duration
        deadline = None if longest is None else _after(await self.storage.now(), longest)
        priority = workflow.priority if options.priority is None else options.priority
        new = NewRun(
            workflow=workflow.name,
            version=workflow.version,
            args=text,
            idempotency_key=options.idempotency_key,
            root=run_id,
            queue=options.queue or workflow.queue or "default",
            priority=priority,
            tags=tuple(dict.fromkeys((*workflow.tags, *options.tags))),
            attributes=options.attributes,
            deadline=deadline,
        )
        data: dict[str, Any] = {
            "workflow": workflow.name,
            "version": workflow.version,
            "args": text,
            "seed": secrets.token_hex(16),
            "idempotency_key": options.idempotency_key,
            "parent": None,
            "deadline": None if deadline is None else deadline.isoformat(),
            "attributes": options.attributes,
            "profile": ASYNCIO_PROFILE,
            "max_payload": max_payload,
        }
        if self._pipeline.codecs is not None and self._pipeline.codecs.secret:
            data["salt"] = encode(secrets.token_hex(16))
        started = Event(EventType.WORKFLOW_STARTED, EventClass.INPUT, data, None, "started")
        worker, held = self._worker, None
        if worker is not None and not worker.rings and self._is_for(worker, workflow, options):
            held = worker.held()
        notified = self._executor is not None or (worker is not None and worker.rings)
        put = Put(item_id=TURN, kind=ItemKind.TURN, notified=notified, claimed=held)
        key = f"start:{secrets.token_hex(8)}"
        return Change(run_id=run_id, key=key, create=new, events=[started], put=[put]), started

    async def _attach(
        self,
        run_id: str,
        workflow: Workflow[Any, Any],
        text: str,
        *,
        key: str | None = None,
        asked_key: str | None = None,
    ) -> str:
        """The existing run of this id, or with ``key`` of this key, if it was started with the same.

        Raises:
            IdempotencyConflict: the run has the key, and was started with something else.
            RunIdConflict: the run has the id, and was started with something else.
        """
        existing = await self.storage.get_run(run_id)
        if existing is None:
            return run_id  # purged: its key is kept so that nothing happens again
        existing = await opened_run(existing)
        differences: dict[str, tuple[str, str]] = {}
        if existing.workflow != workflow.name:
            differences["workflow"] = (existing.workflow, workflow.name)
        elif not workflow.same_call(existing.args_text or "", text):
            old, new = _named(workflow, existing.args_text or ""), _named(workflow, text)
            for name in dict.fromkeys((*old, *new)):
                if old.get(name, "—") != new.get(name, "—"):
                    differences[name] = (old.get(name, "—"), new.get(name, "—"))
            if not differences:  # what differs is not to be seen in the values as text
                differences["arguments"] = ((existing.args_text or "")[:200], text[:200])
        if asked_key is not None:
            if existing.idempotency_key == asked_key:
                key = asked_key
            else:
                known = existing.idempotency_key
                differences["idempotency_key"] = (repr(known), repr(asked_key))
        if differences and key is not None:
            raise IdempotencyConflict(key, run_id, differences)
        if differences:
            raise RunIdConflict(run_id, differences)
        return run_id

    async def get_run(self, run_id: str) -> Run:
        """The run, with plain texts where they can be unwrapped here."""
        check_run_id(run_id)
        found = await self.storage.get_run(run_id)
        if found is None:
            raise RunNotFound(run_id)
        return await opened_run(found)

    async def result(
        self, run_id: str, timeout: D | None, if_stalled: IfStalled | None = None
    ) -> Any:
        """Wait for the run's end; its result, or its error raised. In a step, help it on."""
        check_run_id(run_id)
        if if_stalled not in (None, "raise", "wait"):
            raise ArgumentError(f"if_stalled={if_stalled!r} is neither 'raise' nor 'wait'")
        end = None
        longest = parse_timeout(timeout)
        if longest is not None:
            end = asyncio.get_running_loop().time() + longest.total_seconds()
        helps = Help(self._worker)
        while True:
            with helps.awaiting(run_id):
                found = await self._end_of(run_id, timeout, end, if_stalled, helps)
            if found.next is None:
                return outcome(await opened_run(found))
            run_id = found.next

    async def _end_of(
        self,
        run_id: str,
        timeout: D | None,
        end: float | None,
        if_stalled: IfStalled | None,
        helps: Help,
    ) -> Run:
        """The run, once it has ended."""
        loop = asyncio.get_running_loop()
        # The store tells of the end alone: a run that stalls is noticed by looking at it.
        poll = POLL
        if if_stalled != "wait":
            poll = min(poll, max(self._settings.stalled_after, _LEAST_POLL))
        warn_at: float | None = loop.time() + self._settings.stalled_after.total_seconds()
        while True:
            if self._worker is not None and (busy := self._worker.following(run_id)):
                # The usual end of a short run: no need to ask the store until it is there.
                left = _LOCAL if end is None else min(_LOCAL, max(0.0, end - loop.time()))
                await asyncio.wait(busy, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            found = await self.storage.get_run(run_id)
            if found is None:
                raise RunNotFound(run_id)
            if found.status.is_terminal:
                return found
            wait = POLL if end is None else timedelta(seconds=max(0.0, end - loop.time()))
            if wait <= timedelta(0):
                raise still_running(found, timeout)
            if self._closed:
                raise StorageError(
                    f"the client was closed before the run had ended: run_id={run_id} "
                    f"status={found.status}; another client can wait for it"
                )
            if found.stalled is not None and if_stalled != "wait":
                wait = min(wait, await self._check_stalled(found))
            if warn_at is not None and loop.time() >= warn_at:
                warn_at = None
                self._warn_of_no_code(found)
            if await helps.with_run(run_id):
                continue
            # An ended run answers every watch: only the end is waited for, not each event.
            del found  # many may wait
            await self._watch(run_id, min(wait, poll, helps.pause))

    def _warn_of_no_code(self, run: Run) -> None:
        """A run that waits for others to have its code: this process has a worker, and not that."""
        if self._worker is None or run.status != RunStatus.PENDING or find_workflow(run.workflow):
            return
        _log.warning(
            "no worker has taken the run yet: run_id=%s workflow=%s queue=%s; this process only "
            "declares that workflow, if at all, and its own worker cannot run it: is the name "
            "right, and is a worker with its code running on this store? A process whose "
            "workflows run elsewhere needs no worker: set worker=False",
            *(run.run_id, run.workflow, run.queue),
        )

    async def _check_stalled(self, run: Run) -> timedelta:
        """How long the run may go on to be stalled. ``RunStalled``."""
        since = await stalled_since(self.storage, run)
        if since is None:
            return _STALLED
        left = since + self._settings.stalled_after - await self.storage.now()
        if left <= timedelta(0):
            raise RunStalled(run.run_id, str(run.stalled))
        return min(max(left, _LEAST), _STALLED)

    async def _watch(self, run_id: str, timeout: timedelta) -> None:
        watch = asyncio.ensure_future(self.storage.watch(run_id, after=_NEVER, timeout=timeout))
        self._watches.add(watch)
        # It may fail while the caller is cancelled, who asks no more.
        watch.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        try:
            await asyncio.wait([watch])
            if not watch.cancelled():
                watch.result()
        finally:
            watch.cancel()
            self._watches.discard(watch)

    def close(self) -> None:
        """Let nobody wait for a result any longer."""
        self._closed = True
        for watch in self._watches:
            watch.cancel()

    async def list_runs(
        self,
        status: str | Iterable[str] | None,
        workflow: str | Named | None,
        limit: int,
        cursor: str | None,
    ) -> Page[Run]:
        """A page of runs, with plain texts where they can be unwrapped here.

        Raises:
            ArgumentError: no status, workflow or cursor, or a limit below 1.
        """
        if cursor is not None and not isinstance(cursor, str):  # pyright: ignore[reportUnnecessaryIsInstance] - callers pass what users wrote
            raise ArgumentError(f"cursor={cursor!r:.80} is not text; pass on a page's .cursor")
        query = query_of(status, workflow, limit)
        try:
            page = await self.storage.list_runs(query, cursor)
        except ValueError as error:
            if cursor is None or isinstance(error, WorkflowError):
                raise
            raise ArgumentError(str(error)) from error
        items = [await opened_run(found) for found in page.items]
        return Page(items=items, cursor=page.cursor)

    async def get_events(self, run_id: str, after: int, limit: int | None) -> list[Event]:
        """Events of a run that exists, their payloads unwrapped where that can be done here."""
        check_run_id(run_id)
        check_events(after, limit)
        events = await self.storage.get_events(run_id, after=after, limit=limit)
        if not events and await self.storage.get_run(run_id) is None:
            raise RunNotFound(run_id)
        return await opened_events(events, every=True)

    async def cancel(self, run_id: str, reason: str) -> None:
        """Make a request to cancel durable, or close a run that no code has to end."""
        check_run_id(run_id)
        check_reason(reason)
        found = await self.storage.get_run(run_id)
        if found is None:
            raise RunNotFound(run_id)
        if found.status == RunStatus.CANCELLED:
            return
        if found.status.is_terminal:
            raise RunClosed(run_id, str(found.status))
        key = f"cancel:{secrets.token_hex(8)}"
        try:
            if found.status in (RunStatus.PENDING, RunStatus.STALLED):
                change = _closed_without_code(run_id, key, reason)
                try:
                    answer = await self._pipeline.commit(change)
                except Fenced:
                    key += "+"  # a worker took it meanwhile: ask its code
                else:
                    self._tell(found, change, answer)
                    self._tell_end(found, cancelled_error(reason))
                    return
            data: dict[str, Any] = {"reason": reason}
            event = Event(EventType.CANCEL_REQUESTED, EventClass.INPUT, data, None, key)
            change = Change(run_id=run_id, key=key, events=[event])
            self._tell(found, change, await self._pipeline.commit(change))
        except RunClosed as closed:
            if closed.status != RunStatus.CANCELLED:
                raise
        await self._ring(run_id, found)

    def _tell(self, run: Run, change: Change, answer: Committed) -> None:
        """Tell observers of the events of a change."""
        self._observe(
            run.run_id,
            run.workflow,
            [
                e._replace(run_id=run.run_id, seq=answer.seqs[i], timestamp=answer.timestamp)
                for i, e in enumerate(change.events)
                if i not in answer.skipped
            ],
        )

    def _tell_end(self, run: Run, error: ErrorInfo) -> None:
        if self._worker is not None:
            self._worker.run_ended(run, RunStatus.CANCELLED, error)
            return
        _plugins.observe(
            "pyworkflow_run_ended",
            run_id=run.run_id,
            workflow=run.workflow,
            status=RunStatus.CANCELLED,
            error=error,
        )


def _closed_without_code(run_id: str, key: str, reason: str) -> Change:
    data: dict[str, Any] = {"reason": reason, "kind": "control"}
    return Change(
        run_id=run_id,
        key=key,
        control=Control(ControlKind.CANCEL, reason),
        final=RunStatus.CANCELLED,
        update=Update(error=cancelled_error(reason)),
        events=[Event(EventType.WORKFLOW_CANCELLED, EventClass.COMMAND, data)],
    )


def _after(now: datetime, duration: timedelta) -> datetime:
    try:
        return now + duration
    except OverflowError:
        return LAST


def _new_id() -> str:
    return f"run_{secrets.token_hex(12)}"


def _check_limits(workflow: Workflow[Any, Any], options: RunOptions) -> None:
    """Refuse names of a new run that are too long for indexes. ``ArgumentError``."""
    if options.idempotency_key is not None:
        check_limit("idempotency_key", options.idempotency_key)
    if options.run_id is not None:
        check_limit("run_id", options.run_id)
    check_limit("workflow", workflow.name)
    check_limit("queue", options.queue or workflow.queue or "default")
    for tag in (*workflow.tags, *options.tags):
        check_limit("tag", tag)


def _fresh_run(run_id: str, new: NewRun, at: datetime) -> Run:
    return Run(
        run_id=run_id,
        workflow=new.workflow,
        version=new.version,
        status=RunStatus.RUNNING,
        args_text=new.args,
        queue=new.queue,
        priority=new.priority,
        created_at=at,
        updated_at=at,
        deadline=new.deadline,
        history_length=1,
    )


def _named(workflow: Workflow[Any, Any], text: str) -> dict[str, str]:
    args, kwargs = decode_arguments(text)
    return {n: repr(v)[:200] for n, v in workflow.argument_names(args, kwargs).items()}
