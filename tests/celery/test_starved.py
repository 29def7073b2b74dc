"""Leases of steps that keep the interpreter's lock for long, in every pool."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.celery import _program
from tests.celery._harness import Fleet, fleet_on, new_tag

LEASE_S = 10.0
LEASE = {"PYWORKFLOW_LEASE": f"{LEASE_S}s", "PYWORKFLOW_RENEW_EVERY": "3s"}
HOLDS = (0.01, 0.1, 0.5)
POOLS = ("prefork", "threads", "solo")


@pytest.fixture(scope="module", params=POOLS)
def pool(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    with fleet_on(tmp_path_factory.mktemp(request.param)) as made:
        workers = [
            made.begin(pool=request.param, concurrency=1, **LEASE) for _ in range(len(HOLDS) + 1)
        ]
        made.eventually(lambda: all(worker.ready for worker in workers), "the workers")
        yield made


def test_a_step_that_keeps_the_interpreters_lock_keeps_its_lease(pool: Fleet) -> None:
    tags = {hold: new_tag() for hold in HOLDS}
    runs = {
        hold: pool.start(_program.starved, hold, 2.5 * LEASE_S, tag=tags[hold]) for hold in HOLDS
    }
    results = {hold: pool.result(run_id) for hold, run_id in runs.items()}
    assert results == dict.fromkeys(HOLDS, "held")
    assert {hold: pool.executions(tag) for hold, tag in tags.items()} == {
        hold: {"holding": 1} for hold in HOLDS
    }
    pool.check(*runs.values())
