"""``StorageConformance``: all groups of checks in one class to inherit from."""

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
            "_claims",
            "_conduct",
            "_contract",
            "_copies",
            "_costs",
            "_crash",
            "_damage",
            "_faulty",
            "_fresh",
            "_keys",
            "_limits",
            "_meta",
            "_migrations",
            "_model",
            "_names",
            "_oracle",
            "_processes",
            "_profiles",
            "_races",
            "_soak",
            "_stateful",
            "_turns",
            "_values",
        )
    )
)

from pyworkflow_conformance._claims import ClaimChecks
from pyworkflow_conformance._conduct import ConductChecks
from pyworkflow_conformance._contract import ContractChecks
from pyworkflow_conformance._copies import CopyChecks
from pyworkflow_conformance._costs import CostChecks
from pyworkflow_conformance._crash import CrashChecks
from pyworkflow_conformance._damage import DamageChecks
from pyworkflow_conformance._faulty import FaultChecks
from pyworkflow_conformance._fresh import FreshChecks
from pyworkflow_conformance._keys import KeyChecks
from pyworkflow_conformance._limits import LimitChecks
from pyworkflow_conformance._meta import MetaChecks
from pyworkflow_conformance._migrations import MigrationChecks
from pyworkflow_conformance._model import ModelChecks
from pyworkflow_conformance._names import NameChecks
from pyworkflow_conformance._processes import ProcessChecks
from pyworkflow_conformance._profiles import EngineChecks
from pyworkflow_conformance._races import RaceChecks
from pyworkflow_conformance._soak import SoakChecks
from pyworkflow_conformance._turns import TurnChecks
from pyworkflow_conformance._values import ValueChecks

__all__ = ["StorageConformance"]


class StorageConformance(
    MetaChecks,
    ContractChecks,
    KeyChecks,
    ClaimChecks,
    TurnChecks,
    ValueChecks,
    NameChecks,
    LimitChecks,
    ConductChecks,
    RaceChecks,
    ProcessChecks,
    CrashChecks,
    DamageChecks,
    CopyChecks,
    MigrationChecks,
    FreshChecks,
    CostChecks,
    ModelChecks,
    FaultChecks,
    SoakChecks,
    EngineChecks,
):
    """Inherit from this, override ``make``, declare ``capabilities``; then run pytest.

    Every check has an empty store of its own, and ends with ``fsck``. A check that the backend
    knowingly fails is named in ``Capabilities.gaps`` with the reason; overriding one is an error.
    """
