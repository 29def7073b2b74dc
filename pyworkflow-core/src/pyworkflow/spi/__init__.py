"""All that a plugin imports: the contracts, the values they pass, the refusals, the hook markers.

pluggy, the reference store and ``fsck`` load on first use, so that a backend costs only itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyworkflow._clock import from_micros, to_micros
from pyworkflow.errors import (
    ConfigurationError,
    Fenced,
    KeyTaken,
    PayloadTooLarge,
    Refusal,
    RunClosed,
    RunExists,
    RunNotFound,
    SchemaTooNew,
    SerializationError,
    StorageDamaged,
    StorageError,
    StorageFull,
    StorageUnavailable,
    UnseenInput,
)
from pyworkflow.events import (
    EVENT_VERSION,
    Event,
    EventClass,
    EventType,
    Json,
    event_class,
)
from pyworkflow.runs import (
    ErrorInfo,
    ItemKind,
    Lease,
    ParentRef,
    Run,
    RunStatus,
    WorkItem,
    derive_status,
)
from pyworkflow.spi._time import utcnow
from pyworkflow.spi.capabilities import (
    CONTRACT_VERSION,
    Capabilities,
    ExecutorCapabilities,
    StorageInfo,
)
from pyworkflow.spi.executor import Doorbell, Executor, Outcome, Runtime, doorbell_headers
from pyworkflow.spi.storage import (
    Answer,
    Change,
    Claim,
    Claimed,
    ClaimRef,
    ClaimRequest,
    Committed,
    Control,
    ControlKind,
    Held,
    NewRun,
    Page,
    Put,
    RunQuery,
    Settle,
    StorageBackend,
    Update,
)

if TYPE_CHECKING:
    from pyworkflow.spi._decide import decide
    from pyworkflow.spi._delta import record_from_json, record_to_json
    from pyworkflow.spi._fsck import fsck
    from pyworkflow.spi._state import KEPT_TOKENS, RunState, RunView
    from pyworkflow.spi.hookspecs import CliGroup, Codec, Registry, hookimpl, hookspec
    from pyworkflow.spi.reference import (
        Delta,
        KeyMark,
        Record,
        ReferenceStore,
        RunDelta,
        check_change,
    )

__all__ = [
    # contract
    "CONTRACT_VERSION",
    "EVENT_VERSION",
    "Answer",
    "Capabilities",
    "Change",
    "Claim",
    "ClaimRef",
    "ClaimRequest",
    "Claimed",
    "Committed",
    "Control",
    "ControlKind",
    "Held",
    "NewRun",
    "Page",
    "Put",
    "RunQuery",
    "Settle",
    "StorageBackend",
    "StorageInfo",
    "Update",
    # values
    "ErrorInfo",
    "Event",
    "EventClass",
    "EventType",
    "ItemKind",
    "Json",
    "Lease",
    "ParentRef",
    "Run",
    "RunStatus",
    "WorkItem",
    "derive_status",
    "event_class",
    # refusals and errors
    "ConfigurationError",
    "Fenced",
    "KeyTaken",
    "PayloadTooLarge",
    "Refusal",
    "RunClosed",
    "RunExists",
    "RunNotFound",
    "SchemaTooNew",
    "SerializationError",
    "StorageDamaged",
    "StorageError",
    "StorageFull",
    "StorageUnavailable",
    "UnseenInput",
    # executors
    "Doorbell",
    "Executor",
    "ExecutorCapabilities",
    "Outcome",
    "Runtime",
    # instants
    "from_micros",
    "to_micros",
    "utcnow",
    # on first use
    "CliGroup",
    "Codec",
    "Registry",
    "Delta",
    "KeyMark",
    "Record",
    "ReferenceStore",
    "RunDelta",
    "KEPT_TOKENS",
    "RunState",
    "RunView",
    "check_change",
    "decide",
    "doorbell_headers",
    "record_from_json",
    "record_to_json",
    "fsck",
    "hookimpl",
    "hookspec",
]

_LAZY = {
    "CliGroup": "hookspecs",
    "Codec": "hookspecs",
    "Registry": "hookspecs",
    "Delta": "reference",
    "KeyMark": "reference",
    "Record": "reference",
    "ReferenceStore": "reference",
    "RunDelta": "reference",
    "RunState": "_state",
    "RunView": "_state",
    "KEPT_TOKENS": "_state",
    "decide": "_decide",
    "record_from_json": "_delta",
    "record_to_json": "_delta",
    "check_change": "reference",
    "fsck": "_fsck",
    "hookimpl": "hookspecs",
    "hookspec": "hookspecs",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    # `fsck` is also its module's name, which the import just bound here: the function must win.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
