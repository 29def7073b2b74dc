"""Shared by all tests: property tests are deterministic, so that a failure repeats everywhere."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile(
    "deterministic",
    derandomize=True,
    deadline=None,  # a slow machine is not a failure
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("deterministic")
