"""The suites that decide whether a storage backend or an executor is right. They run on pytest.

Subclass ``StorageConformance`` or ``ExecutorConformance`` in a test module and say how a store,
or a worker, is made; every check comes with the class. Or call ``run_conformance`` with a storage
URL. Needs ``pip install pyworkflow-core[conformance]``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyworkflow.conformance._report import Report
    from pyworkflow.conformance._run import run_conformance
    from pyworkflow.conformance.executor import ExecutorConformance
    from pyworkflow.conformance.storage import StorageConformance

__all__ = ["ExecutorConformance", "Report", "StorageConformance", "run_conformance"]

_HOMES = {
    "ExecutorConformance": "executor",
    "Report": "_report",
    "StorageConformance": "storage",
    "run_conformance": "_run",
}


def __getattr__(name: str) -> object:
    # Late: whoever wants a report does not import the checks before pytest can prepare them.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
