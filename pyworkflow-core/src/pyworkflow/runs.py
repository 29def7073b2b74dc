"""Runs and work items: what a store keeps beside the histories."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

from pyworkflow.events import Json

__all__ = [
    "EncodedPayload",
    "ErrorInfo",
    "ItemKind",
    "Lease",
    "ParentRef",
    "Run",
    "RunStatus",
    "WorkItem",
    "derive_status",
]


class RunStatus(StrEnum):
    """Where a run stands. Derived by the storage, never written by two parties."""

    PENDING = "pending"
    """No input was delivered yet, and no worker holds the run."""
    RUNNING = "running"
    """A turn or step is claimed, or due."""
    SUSPENDED = "suspended"
    """Everything it owns lies in the future, or it waits for the outside."""
    PAUSED = "paused"
    STALLED = "stalled"
    """The code does not fit the history, or cannot go on; a fixed worker heals it."""
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    TERMINATED = "terminated"
    CONTINUED = "continued"

    @property
    def is_terminal(self) -> bool:
        """True when the run has ended and never changes again."""
        return self in _TERMINAL


_TERMINAL = frozenset(
    {
        RunStatus.COMPLETED,
        RunStatus.FAILED,
        RunStatus.CANCELLED,
        RunStatus.TERMINATED,
        RunStatus.CONTINUED,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorInfo:
    """An exception as it is stored. ``portable`` types come back as themselves."""

    type: str
    """``module:qualname`` of the exception's type."""
    message: str
    traceback: str = ""
    portable: bool = False
    details: Mapping[str, Json] = field(default_factory=dict[str, Json])
    """What rebuilding needs: args, attributes, notes, cause."""

    def to_json(self) -> dict[str, Json]:
        """The error as a JSON object."""
        return {
            "type": self.type,
            "message": self.message,
            "traceback": self.traceback,
            "portable": self.portable,
            "details": dict(self.details),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Json]) -> ErrorInfo:
        """Inverse of ``to_json``; unknown fields are ignored, absent ones take their default."""
        details = data.get("details")
        return cls(
            type=str(data.get("type", "")),
            message=str(data.get("message", "")),
            traceback=str(data.get("traceback", "")),
            portable=bool(data.get("portable", False)),
            details=details if isinstance(details, dict) else {},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ParentRef:
    """The run and the op that started a run."""

    run_id: str
    op: str


@dataclass(frozen=True, slots=True)
class EncodedPayload:
    """Arguments or a result that codecs compressed, encrypted or offloaded, not decoded here.

    ``Client.get_run`` decodes them where the process has the keys and files.
    """

    text: str = field(repr=False)
    """The payload as it is stored."""
    codecs: str
    """In words: the codecs and the size."""

    def __str__(self) -> str:
        return f"encoded payload {self.codecs}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One execution of a workflow, as its store shows it.

    The store keeps arguments and result as text (``args_text``, ``result_text``). ``args`` and
    ``result`` decode it each time they are read; nothing else does.
    """

    run_id: str
    workflow: str
    version: str
    status: RunStatus
    args_text: str | None = None
    """The arguments as JSON text. A store shows it as it is stored, ``Client.get_run`` without
    compression, encryption and offload."""
    result_text: str | None = None
    """The result as JSON text, likewise; None while there is none."""
    error: ErrorInfo | None = None
    idempotency_key: str | None = None
    parent: ParentRef | None = None
    root: str | None = None
    next: str | None = None
    """The run that this one continued as."""
    queue: str = "default"
    priority: int = 0
    tags: tuple[str, ...] = ()
    attributes: Mapping[str, Json] = field(default_factory=dict[str, Json])
    created_at: datetime
    started_at: datetime | None = None
    """When the first input was delivered."""
    updated_at: datetime
    finished_at: datetime | None = None
    deadline: datetime | None = None
    history_length: int = 0
    """``seq`` of the last event."""
    seen_seq: int = 0
    """``seq`` of the last input that a committed turn delivered to the workflow."""
    paused: bool = False
    stalled: str | None = None
    """Why the run stalled; None when it did not."""

    @property
    def args(self) -> Any:
        """The arguments, a dict by the names of parameters; an ``EncodedPayload`` if encoded.

        Raises:
            SerializationError: a type in it is not imported here; ``args_text`` has the text.
        """
        return _values().arguments_of(self.workflow, self.args_text)

    @property
    def result(self) -> Any:
        """The result, None while there is none; an ``EncodedPayload`` if encoded.

        Raises:
            SerializationError: a type in it is not imported here; ``result_text`` has the text.
        """
        return _values().result_of(self.workflow, self.result_text)


def _values() -> Any:
    # The way up: values need the serializer and the workflows, which are above this module.
    return importlib.import_module("pyworkflow._run_values")


class ItemKind(StrEnum):
    """What a work item owes."""

    TURN = "turn"
    """Drive the run; at most one per run, with item id ``turn``."""
    STEP = "step"
    """One dispatched step; item id ``step:{op}``."""
    DELIVER = "deliver"
    """A message from this run to another; outlives the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """Who holds an item, under which token, until when (on the storage's clock)."""

    owner: str
    token: str
    until: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkItem:
    """Something that is still owed."""

    run_id: str
    item_id: str
    """Unique within the run."""
    kind: ItemKind
    queue: str
    priority: int
    """Higher is sooner."""
    due_at: datetime
    payload: Mapping[str, Json]
    claims: int = 0
    """Claims since progress: a commit under the claim that records a command or input, delivers
    one (``seen``), heals a stall, or gives the item back with a new payload resets it."""
    lease: Lease | None = None
    """None, or the last claim, which may be over: compare ``until`` with the storage's clock."""
    rung_at: datetime | None = None
    """When somebody was last told of it."""


def derive_status(
    *,
    final: RunStatus | None,
    stalled: str | None,
    paused: bool,
    seen_seq: int,
    items: list[WorkItem],
    now: datetime,
) -> RunStatus:
    """The status that a run's stored fields and items amount to at the storage's ``now``."""
    if final is not None:
        return final
    if stalled is not None:
        return RunStatus.STALLED
    if paused:
        return RunStatus.PAUSED
    leased = any(i.lease is not None and i.lease.until > now for i in items)
    if seen_seq == 0 and not leased and not any(i.claims for i in items):
        return RunStatus.PENDING
    if leased or any(i.due_at <= now for i in items if i.kind is not ItemKind.DELIVER):
        return RunStatus.RUNNING
    return RunStatus.SUSPENDED
