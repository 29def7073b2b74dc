"""The simulation finds bugs: each one that is planted here, within so many seeds."""

from __future__ import annotations

import pytest

from pyworkflow_conformance.simulation import simulate
from tests.simulation.bites import BITES, Bite, planted


@pytest.mark.parametrize("bite", BITES, ids=lambda bite: bite.name)
def test_a_planted_bug_is_found(bite: Bite) -> None:
    with planted(bite):
        for seed in range(bite.first, bite.first + bite.within):
            broken = simulate(seed, bite.profile).broken
            if broken is not None:
                assert broken.rule in bite.rules, f"seed={seed} {broken}"
                return
    pytest.fail(
        f"not found within {bite.within} seeds of profile={bite.profile} first={bite.first}"
    )
