"""What a client does on one storage object, in the event loop of that object."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import secrets
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any, cast

from pyworkflow import _plugins
from pyworkflow._clock import LAST
from pyworkflow._codecs import opened_events, opened_run, writer_for
from pyworkflow._config import settings
from pyworkflow._definitions import RunOptions, Workflow, find_workflow
from pyworkflow._duration import parse_duration
from pyworkflow._engine.bells import bell_of_put
from pyworkflow._engine.pipeline import Pipeline, StorageClock
from pyworkflow._engine.records import cancelled_error
from pyworkflow._engine.worker import Worker
from pyworkflow._registry import check_findable
from pyworkflow._replay._cpython import ASYNCIO_PROFILE
from pyworkflow._serialization import (
    decode,
    decode_arguments,
    decode_error,
    encode,
    payload_size,
)
from pyworkflow.errors import (
    ArgumentError,
    Fenced,
    IdempotencyConflict,
    KeyTaken,
    PayloadTooLarge,
    RunCancelled,
    RunClosed,
    RunExists,
    RunNotFound,
    RunTerminated,
    SerializationError,
    StorageError,
    StorageUnavailable,
)
from pyworkflow.events import Event, EventClass, EventType
from pyworkflow.runs import ItemKind, Run, RunStatus
from pyworkflow.spi.executor import Executor
from pyworkflow.spi.storage import (
    TURN,
    Change,
    Claim,
    Control,
    ControlKind,
    NewRun,
    Page,
    Put,
    RunQuery,
    StorageBackend,
    Update,
)
from pyworkflow.storekit import failpoints

__all__ = ["Operations"]

D = str | int | float | timedelta

_log = logging.getLogger("pyworkflow.client")
failpoints.register(
    __name__,
    StorageUnavailable,
    {"client.after_start": "a run is durable, nobody was told, and its caller has no id yet"},
)

_POLL = timedelta(seconds=5)
_NEVER = 2**62
_LOCAL = 1.0
"""Seconds that a result waits for this process's own turn before it watches the store: who else ends
the run meanwhile is noticed that much later."""
_LONGEST_REASON = 4096
_LONGEST_KEY = 1024


class Operations:
    """What a client does, in the loop of one storage object."""

    def __init__(
        self, storage: StorageBackend, worker: Worker | None, executor: Executor | None
    ) -> None:
        self.storage = storage
        self._worker = worker
        self._executor = executor
        self._settings = settings()
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
        text = workflow.encode_call(args, kwargs)
        key: Any = options.idempotency_key
        if key is not None and not (isinstance(key, str) and 0 < len(key) <= _LONGEST_KEY):
            raise ArgumentError(
                f"idempotency_key={key!r:.80} is not text of 1 to {_LONGEST_KEY} characters"
            )
        asked: Any = options.run_id
        if asked is not None and not (isinstance(asked, str) and 0 < len(asked) <= _LONGEST_KEY):
            raise ArgumentError(
                f"run_id={asked!r:.80} is not text of 1 to {_LONGEST_KEY} characters"
            )
        if self._worker is None:  # whose storage is open
            await self.storage.open()
        info = self.storage.info()
        check_findable(
            workflow,
            info.location,
            outlives=info.capabilities.multi_process or info.capabilities.durable,
            distributed=self._executor is not None,
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
        run_id = options.run_id or _new_id()
        change, started = await self._creation(run_id, workflow, text, options, limit)
        try:
            answer = await self._pipeline.commit(change)
        except KeyTaken as refusal:
            return await self._standing(refusal.owner, refusal.key, workflow, text)
        except RunExists:
            standing = await self.storage.get_run(run_id)
            key = options.idempotency_key
            if key is not None and standing is not None and standing.idempotency_key == key:
                return await self._standing(run_id, key, workflow, text)  # the same call again
            raise ArgumentError(
                f"a run of this id exists: run_id={run_id}; leave run_id out, or take another"
            ) from None
        if failpoints.active:
            failpoints.hit("client.after_start")
        _plugins.observe("pyworkflow_run_created", run_id=run_id, workflow=workflow.name)
        turn = next((i for i in answer.claims if i.item_id == TURN), None)
        if self._worker is not None and turn is not None:
            created = cast("NewRun", change.create)
            event = started._replace(run_id=run_id, seq=1, timestamp=answer.timestamp)
            fresh = _fresh_run(run_id, created, answer.timestamp)
            self._worker.begin_turn(Claim(item=turn, run=fresh, events=(event,)))
        else:
            await self._ring(run_id, cast("NewRun", change.create))
        return run_id

    async def _ring(self, run_id: str, run: Run | NewRun) -> None:
        """Tell workers that the run has a turn; how a broker takes that is the executor's affair."""
        if self._executor is None:
            return
        bell = bell_of_put(
            run_id,
            Put(item_id=TURN, kind=ItemKind.TURN),
            workflow=run.workflow,
            queue=run.queue,
            priority=run.priority,
        )
        try:
            await self._executor.ring([bell])
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
        held = None
        if self._worker is not None and find_workflow(workflow.name) is not None:
            held = self._worker.held()
        put = Put(item_id=TURN, kind=ItemKind.TURN, rung=self._executor is not None, claimed=held)
        key = f"start:{secrets.token_hex(8)}"
        return Change(run_id=run_id, key=key, create=new, events=[started], put=[put]), started

    async def _standing(
        self, run_id: str, key: str, workflow: Workflow[Any, Any], text: str
    ) -> str:
        """The run that has the key, if it was started with the same."""
        standing = await self.storage.get_run(run_id)
        if standing is None:
            return run_id  # purged: its key is kept so that nothing happens again
        standing = await opened_run(standing)
        differences: dict[str, tuple[str, str]] = {}
        if standing.workflow != workflow.name:
            differences["workflow"] = (standing.workflow, workflow.name)
        elif not workflow.same_call(str(standing.args), text):
            old, new = _named(workflow, str(standing.args)), _named(workflow, text)
            for name in dict.fromkeys((*old, *new)):
                if old.get(name, "—") != new.get(name, "—"):
                    differences[name] = (old.get(name, "—"), new.get(name, "—"))
        if differences:
            raise IdempotencyConflict(key, run_id, differences)
        return run_id

    async def get_run(self, run_id: str) -> Run:
        """The run, decoded."""
        found = await self.storage.get_run(run_id)
        if found is None:
            raise RunNotFound(run_id)
        return _decoded(await opened_run(found))

    async def result(self, run_id: str, timeout: D | None) -> Any:
        """Wait for the run's end; its result, or its error raised."""
        loop = asyncio.get_running_loop()
        end = None if timeout is None else loop.time() + parse_duration(timeout).total_seconds()
        while True:
            if self._worker is not None and (busy := self._worker.following(run_id)):
                # The usual end of a short run: no need to ask the store until it is there.
                left = _LOCAL if end is None else min(_LOCAL, max(0.0, end - loop.time()))
                await asyncio.wait(busy, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            found = await self.storage.get_run(run_id)
            if found is None:
                raise RunNotFound(run_id)
            if found.status.is_terminal:
                if found.next is None:
                    return _outcome(await opened_run(found))
                run_id = found.next
                continue
            wait = _POLL if end is None else timedelta(seconds=max(0.0, end - loop.time()))
            if wait <= timedelta(0):
                if found.stalled is not None:
                    raise TimeoutError(
                        f"the run is stalled: run_id={run_id}: {found.stalled}; it goes on when "
                        f"a worker has code that fits, `pyworkflow runs show {run_id}` tells more"
                    )
                raise TimeoutError(
                    f"the run has not ended within timeout={timeout}: run_id={run_id} "
                    f"status={found.status}; it goes on, ask again later"
                )
            if self._closed:
                raise StorageError(
                    f"the client was closed before the run had ended: run_id={run_id} "
                    f"status={found.status}; another client can wait for it"
                )
            # An ended run answers every watch: only the end is waited for, not each event.
            del found  # many may wait
            await self._watch(run_id, min(wait, _POLL))

    async def _watch(self, run_id: str, timeout: timedelta) -> None:
        watch = asyncio.ensure_future(self.storage.watch(run_id, after=_NEVER, timeout=timeout))
        self._watches.add(watch)
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
        workflow: str | None,
        limit: int,
        cursor: str | None,
    ) -> Page[Run]:
        """A page of runs, decoded."""
        query = RunQuery(status=_statuses(status), workflow=workflow, limit=limit)
        page = await self.storage.list_runs(query, cursor)
        items = [_decoded(await opened_run(found)) for found in page.items]
        return Page(items=items, cursor=page.cursor)

    async def get_events(self, run_id: str, after: int, limit: int | None) -> list[Event]:
        """Events of a run that exists, their payloads unwrapped where that can be done here."""
        events = await self.storage.get_events(run_id, after=after, limit=limit)
        if not events and await self.storage.get_run(run_id) is None:
            raise RunNotFound(run_id)
        return await opened_events(events, every=True)

    async def cancel(self, run_id: str, reason: str) -> None:
        """Make a request to cancel durable, or close a run that no code has to end."""
        if len(reason) > _LONGEST_REASON:
            raise ArgumentError(f"the reason is too long: limit={_LONGEST_REASON} characters")
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
                try:
                    await self._pipeline.commit(_closed_without_code(run_id, key, reason))
                except Fenced:
                    key += "+"  # a worker took it meanwhile: ask its code
                else:
                    return
            data: dict[str, Any] = {"reason": reason}
            event = Event(EventType.CANCEL_REQUESTED, EventClass.INPUT, data, None, key)
            await self._pipeline.commit(Change(run_id=run_id, key=key, events=[event]))
        except RunClosed as closed:
            if closed.status != RunStatus.CANCELLED:
                raise
        if self._worker is not None:
            self._worker.wake()
        else:
            await self._ring(run_id, found)


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


def _fresh_run(run_id: str, new: NewRun, at: datetime) -> Run:
    return Run(
        run_id=run_id,
        workflow=new.workflow,
        version=new.version,
        status=RunStatus.RUNNING,
        args=new.args,
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


def _decoded(found: Run) -> Run:
    """The run with its values instead of payload text; what cannot be decoded here stays text."""
    workflow = find_workflow(found.workflow)
    args, value = found.args, found.result
    try:
        positional, named = decode_arguments(str(found.args))
        args = (
            workflow.argument_names(positional, named)
            if workflow is not None
            else {**{str(i): v for i, v in enumerate(positional)}, **named}
        )
    except (SerializationError, TypeError):
        pass
    try:
        if isinstance(found.result, str):
            value = (workflow.decode_result if workflow is not None else decode)(found.result)
    except (SerializationError, TypeError):
        pass
    return dataclasses.replace(found, args=args, result=value)


def _outcome(found: Run) -> Any:
    match found.status:
        case RunStatus.COMPLETED:
            workflow = find_workflow(found.workflow)
            text = str(found.result)
            return (workflow.decode_result if workflow is not None else decode)(text)
        case RunStatus.FAILED if found.error is not None:
            raise decode_error(found.error.to_json())
        case RunStatus.TERMINATED:
            raise RunTerminated(found.run_id)
        case _:
            raise RunCancelled(found.run_id, found.error.message if found.error else "")


def _statuses(status: str | Iterable[str] | None) -> frozenset[RunStatus] | None:
    if status is None:
        return None
    wanted = [status] if isinstance(status, str) else list(status)
    try:
        return frozenset(RunStatus(s) for s in wanted)
    except ValueError:
        known = ", ".join(s.value for s in RunStatus)
        raise ArgumentError(f"not a status: {wanted!r}; there are {known}") from None
