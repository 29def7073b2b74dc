"""The clock of the store under test."""

from __future__ import annotations

from datetime import timedelta

from pyworkflow.spi.storage import StorageBackend, has_test_clock


async def shift_clock(store: StorageBackend, by: timedelta) -> None:
    """Move the store's clock, which the suite needs so that no check has to wait."""
    name = store.info().name
    assert has_test_clock(store), (
        f"the suite moves the clock of the store: storage={name}; "
        "give the backend a method shift_clock (pyworkflow.spi.TestClock)"
    )
    await store.shift_clock(by)
