"""Door to the conformance suites: the import path stays, whichever distribution holds the code."""

from typing import TYPE_CHECKING

try:
    from pyworkflow_conformance import __getattr__ as __getattr__  # noqa: PLC0414 - type checkers: re-exported
except ModuleNotFoundError as error:
    if error.name != "pyworkflow_conformance":
        raise  # the distribution is there and broken: its own error says more
    raise ModuleNotFoundError(
        "the conformance suites are not installed: distribution=pyworkflow-conformance; "
        "pip install 'pyworkflow-conformance', from a clone './pyworkflow-conformance'",
        name=error.name,
    ) from None
if TYPE_CHECKING:
    from pyworkflow_conformance import (
        FORMATS,
        LEVELS,
        ExecutorConformance,
        Report,
        Result,
        Server,
        StorageConformance,
        check_prefix,
        look,
        matrix,
        read_report,
        run_conformance,
        summary,
        wants_at_once,
    )

__all__ = [
    "FORMATS",
    "LEVELS",
    "ExecutorConformance",
    "Report",
    "Result",
    "Server",
    "StorageConformance",
    "check_prefix",
    "look",
    "matrix",
    "read_report",
    "run_conformance",
    "summary",
    "wants_at_once",
]
