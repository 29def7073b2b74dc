"""For all tests of the core."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pyworkflow._engine.guard import shared_guard


@pytest.fixture(autouse=True)
def _patient_watchdog() -> Iterator[None]:
    """A busy machine interrupts no workflow; tests of the watchdog set their own limit."""
    guard = shared_guard()
    limit, guard._limit = guard._limit, 60.0
    yield
    guard._limit = limit
