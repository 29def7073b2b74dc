"""Durable workflows for Python: plain async functions that survive crashes, deploys and sleep.

Public names load on first use, so that importing this package loads neither pydantic nor asyncio
nor a plugin.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyworkflow._client import Client
    from pyworkflow._config import configure
    from pyworkflow._context import Current, StepContext, current
    from pyworkflow._declared import DeclaredWorkflow, declare_workflow
    from pyworkflow._definitions import BoundWorkflow, Step, Workflow, step, workflow
    from pyworkflow._functions import (
        cancel,
        cancel_async,
        get_events,
        get_events_async,
        get_run,
        get_run_async,
        list_runs,
        list_runs_async,
        result,
        result_async,
        run,
        run_async,
        start,
        start_async,
    )
    from pyworkflow._logging import configure_logging, logger
    from pyworkflow._plugins import PluginInfo, list_plugins, register_plugin, unregister_plugin
    from pyworkflow._primitives import (
        deprecate_patch,
        is_evicting,
        is_replaying,
        now,
        patched,
        random,
        sleep,
        step_context,
        uuid4,
    )
    from pyworkflow._resources import Resource, resource
    from pyworkflow.errors import (
        ArgumentError,
        ConfigurationError,
        DefinitionError,
        DuplicateName,
        FatalError,
        HistoryTooLong,
        IdempotencyConflict,
        NonDeterminism,
        PayloadTooLarge,
        PluginBroken,
        PluginNotFound,
        RetryableError,
        RunCancelled,
        RunClosed,
        RunIdConflict,
        RunNotFound,
        RunStalled,
        RunTerminated,
        SchemaTooNew,
        SerializationError,
        StepError,
        StepInterrupted,
        StepTimeout,
        StorageDamaged,
        StorageError,
        StorageFull,
        StorageUnavailable,
        WorkerLost,
        WorkflowContextError,
        WorkflowError,
        WorkflowTimeout,
    )
    from pyworkflow.events import Event
    from pyworkflow.runs import Run, RunStatus

__version__ = "0.2.0.dev0"

_HOMES = {
    "pyworkflow._client": ("Client",),
    "pyworkflow._config": ("configure",),
    "pyworkflow._context": ("Current", "StepContext", "current"),
    "pyworkflow._declared": ("DeclaredWorkflow", "declare_workflow"),
    "pyworkflow._functions": (
        "cancel", "cancel_async", "get_events", "get_events_async", "get_run", "get_run_async",
        "list_runs", "list_runs_async", "result", "result_async", "run", "run_async", "start",
        "start_async",
    ),
    "pyworkflow._plugins": ("PluginInfo", "list_plugins", "register_plugin", "unregister_plugin"),
    "pyworkflow._definitions": ("BoundWorkflow", "Step", "Workflow", "step", "workflow"),
    "pyworkflow._logging": ("configure_logging", "logger"),
    "pyworkflow._primitives": (
        "deprecate_patch", "is_evicting", "is_replaying", "now", "patched", "random", "sleep",
        "step_context", "uuid4",
    ),
    "pyworkflow._resources": ("Resource", "resource"),
    "pyworkflow.errors": (
        "ArgumentError", "ConfigurationError", "DefinitionError", "DuplicateName", "FatalError",
        "HistoryTooLong", "IdempotencyConflict", "NonDeterminism", "PayloadTooLarge",
        "PluginBroken", "PluginNotFound", "RetryableError", "RunCancelled", "RunClosed",
        "RunIdConflict", "RunNotFound", "RunStalled", "RunTerminated", "SchemaTooNew", "SerializationError", "StepError",
        "StepInterrupted", "StepTimeout", "StorageDamaged", "StorageError", "StorageFull",
        "StorageUnavailable", "WorkerLost", "WorkflowContextError", "WorkflowError",
        "WorkflowTimeout",
    ),
    "pyworkflow.events": ("Event",),
    "pyworkflow.runs": ("Run", "RunStatus"),
}  # fmt: skip
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "ArgumentError",
    "BoundWorkflow",
    "Client",
    "ConfigurationError",
    "Current",
    "DeclaredWorkflow",
    "DefinitionError",
    "DuplicateName",
    "Event",
    "FatalError",
    "HistoryTooLong",
    "IdempotencyConflict",
    "NonDeterminism",
    "PayloadTooLarge",
    "PluginBroken",
    "PluginInfo",
    "PluginNotFound",
    "Resource",
    "RetryableError",
    "Run",
    "RunCancelled",
    "RunClosed",
    "RunIdConflict",
    "RunNotFound",
    "RunStalled",
    "RunStatus",
    "RunTerminated",
    "SchemaTooNew",
    "SerializationError",
    "Step",
    "StepContext",
    "StepError",
    "StepInterrupted",
    "StepTimeout",
    "StorageDamaged",
    "StorageError",
    "StorageFull",
    "StorageUnavailable",
    "WorkerLost",
    "Workflow",
    "WorkflowContextError",
    "WorkflowError",
    "WorkflowTimeout",
    "cancel",
    "cancel_async",
    "configure",
    "configure_logging",
    "current",
    "declare_workflow",
    "deprecate_patch",
    "get_events",
    "get_events_async",
    "get_run",
    "get_run_async",
    "is_evicting",
    "is_replaying",
    "list_plugins",
    "list_runs",
    "list_runs_async",
    "logger",
    "now",
    "patched",
    "random",
    "register_plugin",
    "resource",
    "result",
    "result_async",
    "run",
    "run_async",
    "sleep",
    "start",
    "start_async",
    "step",
    "step_context",
    "unregister_plugin",
    "uuid4",
    "workflow",
]


def __getattr__(name: str) -> object:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
