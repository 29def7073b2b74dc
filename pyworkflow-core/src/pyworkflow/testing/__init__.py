"""Testing workflows without a worker or a broker: in the test's own event loop.

Imports no test framework.
"""

from __future__ import annotations

from pyworkflow._resources import override
from pyworkflow.testing._environment import TestEnvironment
from pyworkflow.testing._history import History, ReplayResult, replay
from pyworkflow.testing._local import resume_local, start_local
from pyworkflow.testing._plugins import registered_plugin

__all__ = [
    "History",
    "ReplayResult",
    "TestEnvironment",
    "registered_plugin",
    "override",
    "replay",
    "resume_local",
    "start_local",
]
