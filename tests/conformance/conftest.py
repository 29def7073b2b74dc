"""Which checks of the suite run here: all, or those up to a level."""

from __future__ import annotations

import os

import pytest

from pyworkflow_conformance._levels import GROUPS, LEVELS

#: The whole suite runs on one Python of continuous integration, the base level on the others.
PROFILE = "PYWORKFLOW_CONFORMANCE_PROFILE"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    profile = os.environ.get(PROFILE, "full")
    above = LEVELS[LEVELS.index(profile) + 1 :]
    beyond = [item for item in items if _level(item) in above]
    items[:] = [item for item in items if _level(item) not in above]
    config.hook.pytest_deselected(items=beyond)


def _level(item: pytest.Item) -> str | None:
    """The level of a check of the suite; None for other tests."""
    group = item.name.removeprefix("test_").partition("_")[0]
    if group == "EXE":  # of the executor suite, which has no levels: real workers throughout
        return "distributed"
    return GROUPS[group][0] if group in GROUPS else None
