"""The core of it over RabbitMQ; collected when ``PYWORKFLOW_TEST_AMQP`` gives one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.celery import _program
from tests.celery._harness import TERM, Fleet, fleet_on, new_tag


@pytest.fixture
def rabbit(tmp_path: Path) -> Iterator[Fleet]:
    with fleet_on(tmp_path) as made:
        made.broker_url = os.environ["PYWORKFLOW_TEST_AMQP"]
        yield made


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_runs_complete_over_rabbitmq_and_nothing_runs_twice(rabbit: Fleet, pool: str) -> None:
    queue = new_tag()  # the server is shared
    env = {"PYWORKFLOW_NAMESPACE": "default"}
    workers = [rabbit.begin(pool=pool, queues=f"pyworkflow,{queue}", **env) for _ in range(2)]
    rabbit.eventually(lambda: all(worker.ready for worker in workers), "two workers")
    tags = [new_tag() for _ in range(5)]
    ids = [rabbit.start(_program.mixed, tag=tag) for tag in tags]
    urgent = rabbit.start(_program.urgent)
    for run_id in ids:
        assert rabbit.result(run_id) == ["a", "b", "steady", 3, "c"]
    assert rabbit.result(urgent) == "urgent"
    assert all(rabbit.executions(tag)["c"] == 1 for tag in tags)
    rabbit.check(*ids)
    for worker in workers:
        worker.signal(TERM)
    assert [worker.wait() for worker in workers] == [0, 0]
