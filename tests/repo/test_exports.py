"""The public names: what ``from pyworkflow import *`` gives, and what importing costs."""

from __future__ import annotations

import subprocess
import sys

import pyworkflow

PUBLIC = """
workflow step Workflow BoundWorkflow Step
sleep now uuid4 random is_replaying is_evicting logger step_context StepContext current Current resource Resource patched
deprecate_patch
start run result get_run list_runs get_events cancel Client Run RunStatus Event
configure configure_logging
start_async run_async result_async get_run_async list_runs_async get_events_async cancel_async
declare_workflow DeclaredWorkflow register_plugin unregister_plugin list_plugins PluginInfo
RunStalled RunIdConflict
WorkflowError FatalError RetryableError StepError StepTimeout StepInterrupted WorkerLost
WorkflowTimeout WorkflowContextError DefinitionError DuplicateName ArgumentError SerializationError
PayloadTooLarge HistoryTooLong NonDeterminism RunNotFound RunClosed RunCancelled RunTerminated
IdempotencyConflict ConfigurationError PluginNotFound PluginBroken StorageError StorageUnavailable
StorageDamaged StorageFull SchemaTooNew
"""


def test_the_public_names_are_these():
    assert sorted(pyworkflow.__all__) == sorted(PUBLIC.split())


def test_every_public_name_loads_on_first_use():
    for name in pyworkflow.__all__:
        assert getattr(pyworkflow, name) is not None
    assert set(pyworkflow.__all__) <= set(dir(pyworkflow))


def test_importing_loads_neither_pydantic_nor_asyncio_nor_a_plugin():
    code = (
        "import sys, pyworkflow; "
        "print([m for m in ('pydantic', 'asyncio', 'pluggy', 'pyworkflow_storage_file') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
