"""Fleets of real Celery workers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.celery._harness import Fleet, fleet_on

AMQP = "PYWORKFLOW_TEST_AMQP"


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """RabbitMQ comes as no wheel: its tests are there when a server is given."""
    return True if collection_path.name == "test_amqp.py" and AMQP not in os.environ else None


def pytest_report_header() -> str:
    """Say so, rather than skip in silence."""
    given = "tested" if AMQP in os.environ else f"not tested, {AMQP} is not set"
    return f"RabbitMQ: {given}"


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    """A broker and a store of the test's own."""
    with fleet_on(tmp_path) as made:
        yield made
