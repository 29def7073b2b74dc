"""What the suites and the simulation need of the engine's inside, in one place.

For distributions of this repository, which are released together with the core: names come and go
here without notice. Everything else imports ``pyworkflow.testing``.
"""

from pyworkflow import _clock as clock
from pyworkflow import _config as config
from pyworkflow import _definitions as definitions
from pyworkflow import _hooks as hooks
from pyworkflow import _memory as memory
from pyworkflow import _operations as operations
from pyworkflow import _primitives as primitives
from pyworkflow._config import Settings, check_namespace, settings
from pyworkflow._copy import copy_store
from pyworkflow._definitions import (
    RunOptions,
    Step,
    Workflow,
    find_step,
    find_workflow,
    step,
    workflow,
)
from pyworkflow._engine import dispatched, guard, owner, session
from pyworkflow._engine.keeper import LeaseKeeper
from pyworkflow._engine.worker import Worker
from pyworkflow._local import configured_executor, configured_storage
from pyworkflow._logging import logger
from pyworkflow._memory import MemoryStorageBackend
from pyworkflow._operations import Operations
from pyworkflow._plugins import make_executor, make_storage, redact_url, register
from pyworkflow._primitives import now, patched, random, sleep, step_context, uuid4
from pyworkflow._replay import replay as replaying
from pyworkflow._replay._cpython import Batch, prepare
from pyworkflow._replay.commands import CancelRun, CompleteRun, EmitLog, FailRun
from pyworkflow._replay.replay import Replay
from pyworkflow._serialization import decode

__all__ = [
    "Batch",
    "CancelRun",
    "CompleteRun",
    "EmitLog",
    "FailRun",
    "LeaseKeeper",
    "MemoryStorageBackend",
    "Operations",
    "Replay",
    "RunOptions",
    "Settings",
    "Step",
    "Worker",
    "Workflow",
    "check_namespace",
    "clock",
    "config",
    "configured_executor",
    "configured_storage",
    "copy_store",
    "decode",
    "definitions",
    "dispatched",
    "find_step",
    "find_workflow",
    "guard",
    "hooks",
    "logger",
    "make_executor",
    "make_storage",
    "memory",
    "now",
    "operations",
    "owner",
    "patched",
    "prepare",
    "primitives",
    "random",
    "redact_url",
    "register",
    "replaying",
    "session",
    "settings",
    "sleep",
    "step",
    "step_context",
    "uuid4",
    "workflow",
]
