"""For all tests of the core."""

from __future__ import annotations

import pytest

from pyworkflow._engine.guard import shared_guard


@pytest.fixture(autouse=True)
def _patient_watchdog(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine interrupts no workflow; tests of the watchdog set their own limit."""
    monkeypatch.setattr(shared_guard(), "_limit", 60.0)
