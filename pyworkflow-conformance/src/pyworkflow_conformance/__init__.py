"""The suites that decide whether a storage backend or an executor is right. They run on pytest.

Subclass ``StorageConformance`` or ``ExecutorConformance`` in a test module and say how a store,
or a worker, is made; every check comes with the class. Or call ``run_conformance`` with a storage
URL.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyworkflow_conformance._case import Server
    from pyworkflow_conformance._formats import FORMATS, matrix, read_report, summary
    from pyworkflow_conformance._levels import LEVELS
    from pyworkflow_conformance._report import Report, Result
    from pyworkflow_conformance._run import check_prefix, look, run_conformance, wants_at_once
    from pyworkflow_conformance.executor import ExecutorConformance
    from pyworkflow_conformance.storage import StorageConformance

__version__ = "0.2.0.dev0"
__all__ = [
    "ExecutorConformance",
    "Report",
    "Result",
    "Server",
    "StorageConformance",
    "run_conformance",
    # for the command line
    "FORMATS",
    "LEVELS",
    "check_prefix",
    "look",
    "matrix",
    "read_report",
    "summary",
    "wants_at_once",
]

_HOMES = {
    "ExecutorConformance": "executor",
    "FORMATS": "_formats",
    "LEVELS": "_levels",
    "Report": "_report",
    "Result": "_report",
    "Server": "_case",
    "StorageConformance": "storage",
    "check_prefix": "_run",
    "look": "_run",
    "matrix": "_formats",
    "read_report": "_formats",
    "run_conformance": "_run",
    "summary": "_formats",
    "wants_at_once": "_run",
}


def __getattr__(name: str) -> object:
    # Late: pytest prepares the modules of the checks before they are imported.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
