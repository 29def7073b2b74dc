"""Fleets of real Celery workers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.celery._harness import Fleet, fleet_on

AMQP = "PYWORKFLOW_TEST_AMQP"
PROFILE = "PYWORKFLOW_CONFORMANCE_PROFILE"


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Which files belong to this run.

    RabbitMQ comes as no wheel: its tests are there when a server is given. One Python of continuous
    integration runs everything, the others what depends on the Python: pools and their processes.
    """
    name = collection_path.name
    if name == "test_amqp.py" and AMQP not in os.environ:
        return True
    if os.environ.get(PROFILE) == "base" and name.startswith("test_"):
        return name != "test_pools.py" or None
    return None


def pytest_report_header() -> str:
    """Say so, rather than skip in silence."""
    given = "tested" if AMQP in os.environ else f"not tested, {AMQP} is not set"
    return f"RabbitMQ: {given}"


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    """A broker and a store of the test's own."""
    with fleet_on(tmp_path) as made:
        yield made
