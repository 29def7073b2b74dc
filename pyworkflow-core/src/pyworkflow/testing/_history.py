"""Histories as files, and replaying them against today's code.

A history that was recorded once and is replayed in every test run tells whether a change of the
workflow's code would stall the runs that are under way.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from os import PathLike
from pathlib import Path
from typing import Any, cast

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, JsonValue, ValidationError

from pyworkflow._definitions import Workflow, find_workflow
from pyworkflow._engine.guard import shared_guard
from pyworkflow._replay.commands import CancelRun, CompleteRun, FailRun
from pyworkflow._replay.replay import Replay
from pyworkflow.errors import (
    ConfigurationError,
    RunNotFound,
    SchemaTooNew,
    SerializationError,
    WorkflowError,
)
from pyworkflow.events import EVENT_VERSION, Event, EventClass, EventType, Json
from pyworkflow.runs import Run, RunStatus
from pyworkflow.spi.storage import StorageBackend
from pyworkflow.testing._local import opened, refuse_in_workflow

__all__ = ["HISTORY_VERSION", "History", "ReplayResult", "replay"]

#: Version of the file format that this code writes.
HISTORY_VERSION = 1

#: Ends that the engine decides by its limits, whatever the code did.
_BY_LIMIT = ("pyworkflow.errors:HistoryTooLong", "pyworkflow.errors:PayloadTooLarge")
_SLICE = 500


class _EventRecord(BaseModel):
    model_config = ConfigDict(frozen=True)
    v: int = Field(ge=1)
    seq: int = Field(ge=1)
    timestamp: AwareDatetime
    type: str
    klass: str = Field(alias="class")
    op: str | None = None
    key: str | None = None
    data: dict[str, JsonValue]


class _RunRecord(BaseModel):
    model_config = ConfigDict(frozen=True)
    run_id: str
    workflow: str
    version: str
    status: RunStatus
    created_at: AwareDatetime
    updated_at: AwareDatetime
    finished_at: AwareDatetime | None = None


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)
    v: int = Field(ge=1)
    run: _RunRecord
    seen_seq: int = Field(ge=0)
    events: list[_EventRecord]


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """All that happened to one run, as a value.

    ``dump`` writes it as JSON (one event per line, so that changes can be read), ``load`` reads it.
    """

    v: int = HISTORY_VERSION
    """Version of the file format."""
    run: Run
    """The run; from a file it has its identity, status and times."""
    seen_seq: int
    """``seq`` of the last input that a committed turn delivered: replay delivers no later one."""
    events: tuple[Event, ...]
    """In order of ``seq``, from 1."""

    @classmethod
    def load(cls, path: str | PathLike[str]) -> History:
        """Read a file that ``dump`` wrote.

        Raises:
            SchemaTooNew: A newer version wrote it.
            SerializationError: It is no history; the message names the file and what is wrong.
            OSError: It cannot be read.
        """
        try:
            document: Any = json.loads(Path(path).read_text("utf-8"))
        except ValueError as exc:
            raise SerializationError(
                f"the file is no history: file={path}: no JSON: {exc}"
            ) from exc
        version = cast("dict[str, Any]", document).get("v") if isinstance(document, dict) else None
        if isinstance(version, int) and version > HISTORY_VERSION:
            raise SchemaTooNew(f"history file={path}", version, HISTORY_VERSION)
        try:
            record = _Record.model_validate(document)
        except ValidationError as exc:
            wrong = "; ".join(
                f"{'.'.join(map(str, one['loc'])) or 'document'}: {one['msg']}"
                for one in exc.errors()[:5]
            )
            raise SerializationError(f"the file is no history: file={path}: {wrong}") from exc
        for number, event in enumerate(record.events, 1):
            if event.seq != number:
                raise SerializationError(
                    f"the file is no whole history: file={path}: event {number} has "
                    f"seq={event.seq}; export it again"
                )
            if event.v > EVENT_VERSION:
                raise SchemaTooNew(f"event seq={number} file={path}", event.v, EVENT_VERSION)
        return cls(
            v=record.v,
            run=_run_of(record),
            seen_seq=record.seen_seq,
            events=tuple(_event_of(record.run.run_id, one) for one in record.events),
        )

    def dump(self, path: str | PathLike[str]) -> None:
        """Write the history as JSON; ``load`` brings it back equal but for the run's payloads."""
        run = self.run
        head: dict[str, Json] = {
            "run_id": run.run_id,
            "workflow": run.workflow,
            "version": run.version,
            "status": str(run.status),
            "created_at": run.created_at.isoformat(),
            "updated_at": run.updated_at.isoformat(),
            "finished_at": None if run.finished_at is None else run.finished_at.isoformat(),
        }
        events = ",\n".join(f"  {_text(_json_of(event))}" for event in self.events)
        Path(path).write_text(
            f'{{\n "v": {self.v},\n "run": {_text(head)},\n "seen_seq": {self.seen_seq},\n'
            f' "events": [\n{events}\n ]\n}}\n',
            "utf-8",
        )

    @classmethod
    async def fetch(cls, run_id: str, storage: StorageBackend | None = None) -> History:
        """The history of a run as it stands in ``storage``, or in the configured store.

        Raises:
            RunNotFound: No run has this id.
            StorageError: The store cannot be used.
        """
        async with opened(storage) as store:
            while True:
                run = await store.get_run(run_id)
                if run is None:
                    raise RunNotFound(run_id)
                events = await store.get_events(run_id)
                if len(events) == run.history_length:  # else a turn committed in between
                    return cls(run=run, seen_seq=run.seen_seq, events=tuple(events))


def _text(value: Json) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(", ", ": "))


def _json_of(event: Event) -> dict[str, Json]:
    record: dict[str, Json] = {
        "v": event.v,
        "run_id": event.run_id,
        "seq": event.seq,
        "timestamp": event.timestamp.isoformat(),
        "type": str(event.type),
        "class": str(event.klass),
    }
    if event.op is not None:
        record["op"] = event.op
    if event.key is not None:
        record["key"] = event.key
    record["data"] = dict(event.data)
    return record


def _event_of(run_id: str, one: _EventRecord) -> Event:
    at = one.timestamp.astimezone(UTC)
    return Event(one.type, one.klass, one.data, one.op, one.key, run_id, one.seq, at, one.v)


def _run_of(record: _Record) -> Run:
    run = record.run

    def utc(at: datetime | None) -> datetime | None:
        return None if at is None else at.astimezone(UTC)

    return Run(
        run_id=run.run_id,
        workflow=run.workflow,
        version=run.version,
        status=run.status,
        created_at=run.created_at.astimezone(UTC),
        updated_at=run.updated_at.astimezone(UTC),
        finished_at=utc(run.finished_at),
        history_length=len(record.events),
        seen_seq=record.seen_seq,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayResult:
    """What today's code makes of a history."""

    status: RunStatus
    """Where the code came to: ``completed``, ``failed`` or ``cancelled``, ``suspended`` when it
    waits for more, ``pending`` when no turn had run, ``stalled`` on a mismatch."""
    mismatch: WorkflowError | None = None
    """Why the run would stall: ``NonDeterminism`` (with ``expected``, ``found`` and ``seq``),
    misuse in workflow code, or a stored value that can no longer be read."""
    waiting: tuple[str, ...] = ()
    """The ops that the code waits for."""

    @property
    def ok(self) -> bool:
        """Whether the code fits the history."""
        return self.mismatch is None

    def check(self) -> None:
        """Raise ``mismatch`` if there is one: ``NonDeterminism`` when code and history differ."""
        if self.mismatch is not None:
            raise self.mismatch


def replay(
    history: History | str | PathLike[str], workflow: Workflow[..., Any] | None = None
) -> ReplayResult:
    """Feed a history to a workflow's code and see whether it fits. Runs no step, writes nothing.

    Inputs are delivered up to ``seen_seq`` only: what a worker would deliver next is still open.
    Works inside and outside of a running event loop.

    Args:
        history: A history, or the path of a file that ``History.dump`` wrote.
        workflow: The code to try; by default the workflow that has the recorded name.

    Raises:
        ConfigurationError: No workflow of the recorded name is defined here.
        SchemaTooNew, SerializationError: The file cannot be used; see ``History.load``.
    """
    refuse_in_workflow("replay()")
    if not isinstance(history, History):
        history = History.load(history)
    code = find_workflow(history.run.workflow) if workflow is None else workflow
    if code is None:
        raise ConfigurationError(
            f"no workflow of this name is defined here: workflow={history.run.workflow}; import "
            "its module first, or pass the workflow"
        )
    by_limit = any(_is_by_limit(event) for event in history.events)
    events = [
        event
        for event in history.events
        if (event.klass != EventClass.INPUT or event.seq <= history.seen_seq)
        and not _is_by_limit(event)
    ]
    live = Replay(code, history.run.run_id)
    live.acknowledge(history.seen_seq)
    live.know_markers(history.events)
    try:
        if history.seen_seq > 0:
            # In slices, since the watchdog measures each call.
            for start in range(0, len(events), _SLICE):
                shared_guard().feed(live, events[start : start + _SLICE])
        if live.problem is not None:
            return ReplayResult(status=RunStatus.STALLED, mismatch=live.problem)
        status = RunStatus.FAILED if by_limit else _status(live, history)
        waiting = () if status.is_terminal else tuple(live.waiting_for())
        return ReplayResult(status=status, waiting=waiting)
    finally:
        live.close()


def _status(live: Replay, history: History) -> RunStatus:
    match live.outcome:
        case CompleteRun():
            return RunStatus.COMPLETED
        case FailRun():
            return RunStatus.FAILED
        case CancelRun():
            return RunStatus.CANCELLED
        case None if history.run.status.is_terminal:
            return history.run.status  # closed from outside, without code
        case None:
            return RunStatus.SUSPENDED if history.seen_seq else RunStatus.PENDING


def _is_by_limit(event: Event) -> bool:
    if event.type != EventType.WORKFLOW_FAILED:
        return False
    error = event.data.get("error")
    return isinstance(error, dict) and error.get("type") in _BY_LIMIT
