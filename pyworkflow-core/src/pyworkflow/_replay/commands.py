"""What workflow code asks for. Replay emits these; the session carries them out."""

from __future__ import annotations

from collections.abc import Coroutine, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from pyworkflow.events import Json

__all__ = [
    "CancelRun",
    "CancelStep",
    "Command",
    "CompleteRun",
    "EmitLog",
    "FailRun",
    "MarkVersion",
    "Outcome",
    "RunStep",
    "StartSleep",
    "StepSpec",
    "WorkflowSpec",
]


class StepSpec(Protocol):
    """What replay needs of a step's definition."""

    @property
    def name(self) -> str:
        """The name that is recorded and matched."""
        ...

    def encode_call(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> str:
        """Arguments as payload text; the same for equal arguments. ``SerializationError``."""
        ...

    def bound_call(self, text: str) -> dict[str, Any]:
        """The tree of these arguments with all that can be by position; digests are of that."""
        ...

    def equal_calls(self, text: str) -> Iterator[str]:
        """Every way to write the call with these arguments."""
        ...

    def decode_result(self, payload: str) -> object:
        """The result as the workflow gets it. ``SerializationError`` when it no longer fits."""
        ...


class WorkflowSpec(Protocol):
    """What replay needs of a workflow's definition."""

    @property
    def name(self) -> str:
        """The name that runs record."""
        ...

    @property
    def check_args(self) -> str:
        """``stall`` or ``warn`` when a recorded argument digest differs."""
        ...

    def call(self, args: str) -> Coroutine[Any, Any, object]:
        """The coroutine for these arguments (payload text). ``SerializationError``."""
        ...

    def encode_result(self, value: object, limit: int = 0) -> str:
        """The result as payload text. ``SerializationError``, ``PayloadTooLarge``."""
        ...


@dataclass(slots=True)
class RunStep:
    """Run this step."""

    op: str
    step: StepSpec
    args: str
    digest: str


@dataclass(slots=True)
class CancelStep:
    """The workflow no longer waits for this step."""

    op: str
    name: str


@dataclass(slots=True)
class StartSleep:
    """Record this sleep; it ends at ``until`` (µs since the epoch)."""

    op: str
    until: int


@dataclass(slots=True)
class MarkVersion:
    """Record that new code was taken at ``patched(id)``."""

    id: str


@dataclass(slots=True)
class EmitLog:
    """Record a log line of workflow code."""

    level: str
    message: str
    fields: Mapping[str, Json]


@dataclass(slots=True)
class CompleteRun:
    """The workflow returned; ``result`` is payload text."""

    result: str


@dataclass(slots=True)
class FailRun:
    """An exception left the workflow."""

    error: BaseException


@dataclass(slots=True)
class CancelRun:
    """A cancellation was delivered, and CancelledError left the workflow."""

    reason: str


Command = RunStep | CancelStep | StartSleep | MarkVersion | EmitLog
Outcome = CompleteRun | FailRun | CancelRun
