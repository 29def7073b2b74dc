"""Steps of Celery workers that wait for other runs, with every process of the pool taken."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.celery import _program
from tests.celery._harness import fleet_on, new_tag


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_r01_more_steps_wait_than_the_pool_has_processes(pool: str, tmp_path: Path) -> None:
    with fleet_on(tmp_path) as fleet:
        fleet.worker(pool=pool)
        tags = [new_tag() for _ in range(6)]
        ids = [fleet.start(_program.asking, 3, tag=tag) for tag in tags]
        assert [fleet.result(run_id) for run_id in ids] == [3] * 6
        for tag in tags:
            assert fleet.executions(tag) == {"leaf": 1}
        fleet.check(*ids)
