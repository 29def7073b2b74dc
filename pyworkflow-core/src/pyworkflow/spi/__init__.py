"""The contract: storage, executors, codecs, hooks, and the values and refusals they pass.

What helps the author of a backend is in ``pyworkflow.storekit``. The hook markers load on first
use, with pluggy.
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
from pyworkflow.spi._delta import (
    Delta,
    KeyMark,
    Record,
    RunDelta,
    record_from_json,
    record_to_json,
)
from pyworkflow.spi._time import ticks, utcnow
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
    LeaseFor,
    NewRun,
    Page,
    Put,
    RunQuery,
    Settle,
    StorageBackend,
    TestClock,
    Update,
)

if TYPE_CHECKING:
    from pyworkflow.spi.hookspecs import CliGroup, Codec, Registry, hookimpl, hookspec

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
    "LeaseFor",
    "NewRun",
    "Page",
    "Put",
    "RunQuery",
    "Settle",
    "StorageBackend",
    "TestClock",
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
    # copies
    "Delta",
    "KeyMark",
    "Record",
    "RunDelta",
    "record_from_json",
    "record_to_json",
    # executors
    "Doorbell",
    "Executor",
    "ExecutorCapabilities",
    "Outcome",
    "Runtime",
    "doorbell_headers",
    # instants
    "from_micros",
    "to_micros",
    "ticks",
    "utcnow",
    # hooks, on first use
    "CliGroup",
    "Codec",
    "Registry",
    "hookimpl",
    "hookspec",
]

_HOOKS = frozenset({"CliGroup", "Codec", "Registry", "hookimpl", "hookspec"})
_MOVED = frozenset(
    {
        "KEPT_TOKENS",
        "ReferenceStore",
        "RunState",
        "RunView",
        "check_change",
        "decide",
        "embedded",
        "failpoints",
        "fsck",
        "reference",
    }
)
"""Names of ``pyworkflow.storekit`` that were here in 0.1; they are found here until 0.3."""


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name in _HOOKS:
        value: object = getattr(import_module("pyworkflow.spi.hookspecs"), name)
        globals()[name] = value
        return value
    if name in _MOVED:
        import warnings

        warnings.warn(
            f"pyworkflow.spi.{name} is pyworkflow.storekit.{name}; this name goes in 0.3",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(import_module("pyworkflow.storekit"), name)
    if name == "Held":
        import warnings

        warnings.warn(
            "pyworkflow.spi.Held is LeaseFor; the old name goes in 0.3",
            DeprecationWarning,
            stacklevel=2,
        )
        return LeaseFor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
