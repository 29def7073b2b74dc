"""The schema of every event type's ``data``, as pydantic models and as JSON Schema.

Writers may add fields; readers ignore those that they do not know. Nothing here is on the hot
path: replay and storage never validate, tests, tools and conformance do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Annotated, Any, ClassVar, Literal, NoReturn

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError
from pydantic.json_schema import models_json_schema

from pyworkflow.errors import SerializationError
from pyworkflow.events import EVENT_VERSION, Event, EventType, event_class

__all__ = ["DATA_MODELS", "EventData", "schema", "validate_event"]


def _check_payload(text: str) -> str:
    # Integers of any length are fine and need not be built (Python bounds their digits).
    json.loads(text, parse_int=len, parse_constant=_refuse_constant)
    return text


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _check_instant(text: str) -> str:
    if datetime.fromisoformat(text).utcoffset() != timedelta(0):
        raise ValueError("not UTC")
    return text


Payload = Annotated[
    str,
    AfterValidator(_check_payload),
    Field(
        description="A user value as JSON text, made by the serializer.",
        json_schema_extra={"contentMediaType": "application/json"},
    ),
]
Instant = Annotated[
    str,
    AfterValidator(_check_instant),
    Field(
        description="UTC with whole microseconds.",
        pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?\+00:00$",
        json_schema_extra={"format": "date-time"},
    ),
]
Attempt = Annotated[int, Field(ge=1, description="1-based try of the step.")]
Digest = Annotated[str, Field(description="Canonical digest of the arguments.")]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class EventData(BaseModel):
    """Base of all: strict types, unknown fields are kept."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)
    event_type: ClassVar[EventType]


class ErrorData(BaseModel):
    """An exception as it is stored (``ErrorInfo``)."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)
    type: str
    message: str
    traceback: str = ""
    portable: bool = False
    details: dict[str, JsonValue] = {}


class ParentData(BaseModel):
    """The run and op that started a run."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)
    run_id: str
    op: str


class PolicyData(BaseModel):
    """The retry policy of a dispatched step."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)
    max_retries: Annotated[int, Field(ge=0)]
    delay: str | Seconds
    """``fixed``, ``exponential``, a duration or seconds; of ``delays``, the last."""
    delays: Annotated[list[str | Seconds], Field(min_length=1)] | None = None
    """A delay for each retry, the last of them for all further ones."""


# --- workflow ---------------------------------------------------------------------------------


class WorkflowStarted(EventData):
    """The first event of every run."""

    event_type = EventType.WORKFLOW_STARTED
    workflow: str
    version: str
    args: Payload
    seed: Annotated[str, Field(pattern="^[0-9a-f]+$")]
    idempotency_key: str | None = None
    parent: ParentData | None = None
    deadline: Instant | None = None
    attributes: dict[str, JsonValue]
    profile: int
    """Which asyncio behaviour the ops of this run follow."""
    max_payload: int | None = None
    """Bytes that one payload of this run may have, fixed at its start."""
    salt: Payload | None = None
    """Keys the argument digests of a run whose payloads are encrypted."""


class WorkflowResumed(EventData):
    """A worker took the run."""

    event_type = EventType.WORKFLOW_RESUMED
    worker: str
    cause: str
    replayed: Annotated[int, Field(ge=0)]
    """Events that lay behind the turn."""


class WorkflowSuspended(EventData):
    """The run waits; nothing is held."""

    event_type = EventType.WORKFLOW_SUSPENDED
    waiting: list[str]
    """Ops that the run waits for."""
    until: Instant | None = None


class WorkflowCompleted(EventData):
    """The workflow returned."""

    event_type = EventType.WORKFLOW_COMPLETED
    result: Payload


class WorkflowFailed(EventData):
    """An exception left the workflow."""

    event_type = EventType.WORKFLOW_FAILED
    error: ErrorData


class WorkflowCancelled(EventData):
    """A cancellation was delivered and left the workflow, or the run was closed without code."""

    event_type = EventType.WORKFLOW_CANCELLED
    reason: str


class WorkflowDeadline(EventData):
    """``max_duration`` is over."""

    event_type = EventType.WORKFLOW_DEADLINE
    deadline: Instant


class _ByOperator(EventData):
    reason: str
    actor: str | None = None


class WorkflowPaused(_ByOperator):
    """The run is not driven until it is unpaused."""

    event_type = EventType.WORKFLOW_PAUSED


class WorkflowUnpaused(_ByOperator):
    """The run is driven again."""

    event_type = EventType.WORKFLOW_UNPAUSED


class WorkflowTerminated(_ByOperator):
    """The run was closed without its code."""

    event_type = EventType.WORKFLOW_TERMINATED


class WorkflowStalled(EventData):
    """The code does not fit the history, or cannot go on; once per distinct cause."""

    event_type = EventType.WORKFLOW_STALLED
    reason: str
    error: ErrorData | None = None


class WorkflowUnstalled(EventData):
    """A fixed worker went on with the run."""

    event_type = EventType.WORKFLOW_UNSTALLED


# --- steps ------------------------------------------------------------------------------------


class StepScheduled(EventData):
    """A step is owed as a work item."""

    event_type = EventType.STEP_SCHEDULED
    name: str
    args: Payload
    digest: Digest
    attempt: Attempt
    policy: PolicyData
    timeout: Seconds | None = None
    queue: str | None
    semantics: Literal["at_least_once", "at_most_once"]


class StepStarted(EventData):
    """The body of a step began."""

    event_type = EventType.STEP_STARTED
    name: str
    attempt: Attempt
    worker: str
    at: Instant
    """When the body began: both events of a short step share one commit and its timestamp."""
    dispatched: bool


class StepRetrying(EventData):
    """A try failed and another one is due."""

    event_type = EventType.STEP_RETRYING
    name: str
    attempt: Attempt
    """The try that failed."""
    error: ErrorData
    retry_at: Instant


class StepCompleted(EventData):
    """A step has its result."""

    event_type = EventType.STEP_COMPLETED
    name: str
    digest: Digest
    attempt: Attempt
    result: Payload


class StepFailed(EventData):
    """A step failed for good."""

    event_type = EventType.STEP_FAILED
    name: str
    digest: Digest
    attempt: Attempt
    error: ErrorData
    kind: Literal["error", "timeout", "interrupted", "cancelled", "worker_lost"]


class StepCancelled(EventData):
    """A step was cancelled while it was pending or running."""

    event_type = EventType.STEP_CANCELLED
    name: str
    by: Literal["end"] | None = None
    """``end``: by the end of its run. Absent: by the workflow's code."""


# --- time, control, versions --------------------------------------------------------------------


class SleepCreated(EventData):
    """The workflow sleeps."""

    event_type = EventType.SLEEP_CREATED
    until: Instant


class SleepCompleted(EventData):
    """A sleep is over."""

    event_type = EventType.SLEEP_COMPLETED
    until: Instant
    lag: Seconds
    """How late it was recorded."""


class TimerFired(EventData):
    """A timer of asyncio is over."""

    event_type = EventType.TIMER_FIRED
    until: Instant
    lag: Seconds
    """How late it was recorded."""


class CancelRequested(EventData):
    """Somebody asked to cancel the run."""

    event_type = EventType.CANCEL_REQUESTED
    reason: str


class LimitReached(EventData):
    """The history has ``max_history`` events, or used up its reserve (op ``0#reserve``)."""

    event_type = EventType.LIMIT_REACHED
    length: int
    """Events that the history had."""
    limit: int
    reserve: int
    """Events that the run may add to clean up."""


class VersionMarked(EventData):
    """``patched(id)`` decided for the new code."""

    event_type = EventType.VERSION_MARKED
    id: str


# --- log --------------------------------------------------------------------------------------


class _Log(EventData):
    message: str
    fields: dict[str, JsonValue]  # pyright: ignore[reportIncompatibleMethodOverride] - a deprecated method of BaseModel
    logger: str | None = None
    step: str | None = None
    """The step whose line it is; absent in lines of workflow code."""
    attempt: Attempt | None = None


class LogDebug(_Log):
    """A line of the workflow's logger."""

    event_type = EventType.LOG_DEBUG


class LogInfo(_Log):
    """A line of the workflow's logger."""

    event_type = EventType.LOG_INFO


class LogWarning(_Log):
    """A line of the workflow's logger."""

    event_type = EventType.LOG_WARNING


class LogError(_Log):
    """A line of the workflow's logger."""

    event_type = EventType.LOG_ERROR


_MODELS: tuple[type[EventData], ...] = (
    WorkflowStarted,
    WorkflowResumed,
    WorkflowSuspended,
    WorkflowCompleted,
    WorkflowFailed,
    WorkflowCancelled,
    WorkflowDeadline,
    WorkflowPaused,
    WorkflowUnpaused,
    WorkflowTerminated,
    WorkflowStalled,
    WorkflowUnstalled,
    StepScheduled,
    StepStarted,
    StepRetrying,
    StepCompleted,
    StepFailed,
    StepCancelled,
    SleepCreated,
    SleepCompleted,
    TimerFired,
    CancelRequested,
    LimitReached,
    VersionMarked,
    LogDebug,
    LogInfo,
    LogWarning,
    LogError,
)

#: Event type → the model of its ``data``.
DATA_MODELS: Mapping[EventType, type[EventData]] = {m.event_type: m for m in _MODELS}


def validate_event(event: Event) -> None:
    """Check an event against the schema of its type.

    Raises:
        SerializationError: An unknown type, a newer ``v``, another class than the type has, or
            data that does not fit; names the event and each wrong field.
    """
    facts = f"run_id={event.run_id} seq={event.seq} type={event.type} v={event.v}"
    try:
        model = DATA_MODELS[EventType(event.type)]
    except (KeyError, ValueError):
        raise SerializationError(
            f"the event's type is unknown: {facts}; a newer version wrote it, upgrade pyworkflow"
        ) from None
    if event.v > EVENT_VERSION:
        raise SerializationError(
            f"the event's schema is newer: {facts} supported={EVENT_VERSION}; upgrade pyworkflow"
        )
    if event.klass != event_class(model.event_type):
        raise SerializationError(
            f"the event has the wrong class: {facts} class={event.klass} "
            f"expected={event_class(model.event_type)}; its writer is wrong"
        )
    try:
        model.model_validate(dict(event.data))
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(map(str, one['loc'])) or 'data'}: {one['msg']}" for one in error.errors()
        )
        raise SerializationError(
            f"the event's data does not fit its type: {facts}: {wrong}; its writer is wrong"
        ) from error


def schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of an event as JSON, discriminated by ``type``."""
    refs, definitions = models_json_schema(
        [(model, "validation") for model in _MODELS], ref_template="#/$defs/{model}"
    )
    common: dict[str, Any] = {
        "v": {"type": "integer", "minimum": 1, "maximum": EVENT_VERSION},
        "run_id": {"type": "string"},
        "seq": {"type": "integer", "minimum": 1},
        "timestamp": {"type": "string", "format": "date-time"},
        "op": {"type": ["string", "null"]},
        "key": {"type": ["string", "null"]},
    }
    required = ["v", "run_id", "seq", "timestamp", "type", "class", "data"]
    variants = [
        {
            "title": known.value,
            "type": "object",
            "properties": {
                **common,
                "type": {"const": known.value},
                "class": {"const": event_class(known).value},
                "data": refs[model, "validation"],
            },
            "required": required,
        }
        for known, model in DATA_MODELS.items()
    ]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Event",
        "description": f"One entry of a run's history, schema version {EVENT_VERSION}.",
        "type": "object",
        "properties": {"type": {"enum": [known.value for known in DATA_MODELS]}},
        "required": required,
        "oneOf": variants,
        "$defs": definitions["$defs"],
    }
