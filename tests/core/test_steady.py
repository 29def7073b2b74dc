"""Clocks that never go back: the helper for stores, and the memory store's."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyworkflow import _memory
from pyworkflow._clock import ticks
from pyworkflow._memory import MemoryStorageBackend
from pyworkflow.storekit import SteadyClock


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(-100, 100)), min_size=1))
def test_found_h05_a_steady_clock_never_goes_back_and_is_never_slower_than_time(moves):
    clock, wall, now, last = SteadyClock(), 1000, 0, None
    for passed, jump in moves:
        now += passed
        wall += passed + jump
        shown = clock.read(wall, now)
        assert shown >= wall
        assert clock.lead(wall, now) == shown - wall
        if last is not None:
            assert shown - last[0] >= now - last[1]
            if jump <= 0:
                assert shown - last[0] == now - last[1]
        last = shown, now


def test_found_h05_a_steady_clock_resumes_after_what_others_have_shown():
    ahead, clock = SteadyClock(), SteadyClock()
    assert ahead.read(500, 10) == 500
    clock.resume(ahead.base)
    assert clock.read(100, 30) == 520
    assert clock.lead(100, 30) == 420
    after_boot = SteadyClock()
    after_boot.resume(520 - 3)  # of another boot, whose ticks began anew
    assert after_boot.read(90, 4) == 521
    assert after_boot.lead(1000, 4) < 0  # until it is read: the wall clock was set forward


def test_the_time_since_boot_passes():
    before = ticks()
    while ticks() == before:
        pass
    assert ticks() > before


@pytest.mark.parametrize("jump", [-7200, 7200])
def test_found_h05_the_memory_stores_clock_follows_forward_only(monkeypatch, jump):
    wall, since_boot = datetime(2026, 1, 1, tzinfo=UTC), 10**9
    monkeypatch.setattr(_memory, "utcnow", lambda: wall)
    monkeypatch.setattr(_memory, "ticks", lambda: since_boot)

    async def main():
        nonlocal wall, since_boot
        async with MemoryStorageBackend() as store:
            first = await store.now()
            wall += timedelta(seconds=jump)
            since_boot += 5_000_000
            passed = await store.now() - first
            assert passed == timedelta(seconds=5 if jump < 0 else jump)
            since_boot += 1_000_000
            assert await store.now() - first == passed + timedelta(seconds=1)

    asyncio.run(main())
