"""``StorageConformance``: all groups of checks in one class to inherit from."""

from __future__ import annotations

from pyworkflow.conformance._claims import ClaimChecks
from pyworkflow.conformance._contract import ContractChecks
from pyworkflow.conformance._keys import KeyChecks
from pyworkflow.conformance._races import RaceChecks
from pyworkflow.conformance._turns import TurnChecks
from pyworkflow.conformance._values import ValueChecks

__all__ = ["StorageConformance"]


class StorageConformance(
    ContractChecks, KeyChecks, ClaimChecks, TurnChecks, ValueChecks, RaceChecks
):
    """Inherit from this, override ``make``, declare ``capabilities``; then run pytest.

    Every check has an empty store of its own, and ends with ``fsck``. A check that the backend
    knowingly fails is named in ``Capabilities.gaps`` with the reason; overriding one is an error.
    """
