"""The event schema: what a history is made of.

An event is written once and never changes. Its ``data`` is a JSON object; user values inside it
(arguments, results) are *payloads*: JSON text made by the serializer, opaque to storage.
The per-type schema of ``data`` is in ``event_schema.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import NamedTuple

from pyworkflow._clock import EPOCH

__all__ = ["EVENT_VERSION", "Event", "EventClass", "EventType", "Json", "event_class"]

#: Any JSON value. Integers are unbounded, floats finite.
Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]

#: Version of the event schema that this code writes.
EVENT_VERSION = 1


class EventClass(StrEnum):
    """Who produced an event, and what it means for replay."""

    COMMAND = "C"
    """Emitted by workflow code; replay must emit it again."""
    INPUT = "I"
    """From outside; replay delivers it, in order of ``seq``."""
    OBSERVATION = "O"
    """For people; nothing is decided by it."""


class EventType(StrEnum):
    """Every type of event that this version writes. Wire names are ``noun.past``."""

    WORKFLOW_STARTED = "workflow.started"
    WORKFLOW_RESUMED = "workflow.resumed"
    WORKFLOW_SUSPENDED = "workflow.suspended"
    WORKFLOW_COMPLETED = "workflow.completed"
    WORKFLOW_FAILED = "workflow.failed"
    WORKFLOW_CANCELLED = "workflow.cancelled"
    WORKFLOW_DEADLINE = "workflow.deadline"
    WORKFLOW_PAUSED = "workflow.paused"
    WORKFLOW_UNPAUSED = "workflow.unpaused"
    WORKFLOW_STALLED = "workflow.stalled"
    WORKFLOW_UNSTALLED = "workflow.unstalled"
    WORKFLOW_TERMINATED = "workflow.terminated"
    STEP_SCHEDULED = "step.scheduled"
    STEP_STARTED = "step.started"
    STEP_RETRYING = "step.retrying"
    STEP_COMPLETED = "step.completed"
    STEP_FAILED = "step.failed"
    STEP_CANCELLED = "step.cancelled"
    SLEEP_CREATED = "sleep.created"
    SLEEP_COMPLETED = "sleep.completed"
    TIMER_FIRED = "timer.fired"
    CANCEL_REQUESTED = "cancel.requested"
    LIMIT_REACHED = "limit.reached"
    VERSION_MARKED = "version.marked"
    LOG_DEBUG = "log.debug"
    LOG_INFO = "log.info"
    LOG_WARNING = "log.warning"
    LOG_ERROR = "log.error"


_COMMANDS = frozenset(
    {
        EventType.WORKFLOW_COMPLETED,
        EventType.WORKFLOW_FAILED,
        EventType.WORKFLOW_CANCELLED,
        EventType.STEP_SCHEDULED,
        EventType.STEP_CANCELLED,
        EventType.SLEEP_CREATED,
        EventType.VERSION_MARKED,
    }
)
_INPUTS = frozenset(
    {
        EventType.WORKFLOW_STARTED,
        EventType.WORKFLOW_DEADLINE,
        EventType.STEP_COMPLETED,
        EventType.STEP_FAILED,
        EventType.SLEEP_COMPLETED,
        EventType.TIMER_FIRED,
        EventType.CANCEL_REQUESTED,
        EventType.LIMIT_REACHED,
    }
)


def event_class(type: EventType) -> EventClass:
    """The class of a known event type."""
    if type in _INPUTS:
        return EventClass.INPUT
    if type in _COMMANDS:
        return EventClass.COMMAND
    return EventClass.OBSERVATION


class Event(NamedTuple):
    """One entry of a run's history. Immutable; ``data`` is shared and must not be changed.

    A writer leaves ``run_id``, ``seq`` and ``timestamp`` out: the storage sets them at the commit.
    """

    type: str
    """Wire name, an ``EventType`` or one that a newer version wrote."""
    klass: str
    """``C``, ``I`` or ``O`` (``EventClass``); the wire calls it ``class``."""
    data: Mapping[str, Json]
    """JSON object; schema per type."""
    op: str | None = None
    """Identity of the command that this event belongs to, for example ``1.3#2:step``."""
    key: str | None = None
    """Unique within the run: a second event with this key is skipped."""
    run_id: str = ""
    seq: int = 0
    """1, 2, 3 … within the run, without a gap, in order of arrival."""
    timestamp: datetime = EPOCH
    """Aware UTC, whole microseconds; never decreases within a run."""
    v: int = EVENT_VERSION
    """Version of the schema of ``data``."""
