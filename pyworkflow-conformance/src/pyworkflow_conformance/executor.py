"""``ExecutorConformance``: all checks of an executor in one class to inherit from."""

# ruff: noqa: E402 - pytest has to know the modules before they are imported

from __future__ import annotations

import pytest

# The checks are plain asserts: failures must show what they compared.
pytest.register_assert_rewrite(
    *(
        f"pyworkflow_conformance.{module}"
        for module in (
            "_case",
            "_children",
            "_executor_bells",
            "_executor_case",
            "_executor_faults",
            "_executor_meta",
            "_executor_steps",
        )
    )
)

from pyworkflow_conformance._executor_bells import BellChecks
from pyworkflow_conformance._executor_case import Broker, ExecutorCase, WorkerHandle
from pyworkflow_conformance._executor_faults import FaultChecks
from pyworkflow_conformance._executor_meta import EXECUTOR_PROOFS, MetaChecks, executor_checks
from pyworkflow_conformance._executor_steps import StepChecks

__all__ = [
    "EXECUTOR_PROOFS",
    "Broker",
    "ExecutorCase",
    "ExecutorConformance",
    "WorkerHandle",
    "executor_checks",
]


class ExecutorConformance(MetaChecks, BellChecks, FaultChecks, StepChecks):
    """Inherit from this, override ``environment``, declare ``capabilities``; then run pytest.

    Every check has a namespace, a client process and worker processes of its own, and ends with
    ``fsck``. A check that the executor knowingly fails is named in ``gaps`` with the reason;
    overriding one is an error.
    """
