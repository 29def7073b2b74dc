"""Celery workers killed at the failpoints of their messages: another worker goes on."""

from __future__ import annotations

import pytest

from docs.write_failpoints import all_failpoints
from tests.celery import _program
from tests.celery._harness import KILL, Fleet, fleet_on, new_tag

NAMES = [name for name in all_failpoints() if name.startswith("celery.")]


def killed(fleet: Fleet, name: str, number: int) -> bool:
    """Kill a worker at the hit of a failpoint, if it comes to that, and let another go on."""
    orders = f"{name}=kill@{number}"
    doomed = fleet.begin(pool="threads", PYWORKFLOW_FAILPOINTS=orders)
    tags = [new_tag() for _ in range(2)]
    ids = [
        fleet.start(_program.fan, 4, tag=tags[0]),
        fleet.start(_program.ten, tag=tags[1]),
    ]

    def over() -> bool:
        return doomed.process.poll() is not None or all(
            fleet.run(run_id).status.is_terminal for run_id in ids
        )

    fleet.eventually(over, "the worker dies, or all runs end")
    reached = doomed.process.poll() is not None
    if reached:
        assert doomed.wait() == -KILL, doomed.log
        fleet.worker(pool="threads")
        assert len(fleet.result(ids[0])) == 4
        assert fleet.result(ids[1]) == 10
    assert "FAILPOINTS ARE ON" in doomed.log
    fleet.check(*ids)
    for tag in tags:
        # Once in each worker that came to it and did not record its end.
        assert set(fleet.executions(tag).values()) <= {1, 2}
    assert len(fleet.executions(tags[1])) == 10
    return reached


@pytest.mark.parametrize("name", NAMES)
def test_f03_a_worker_killed_at_a_failpoint_of_its_messages_loses_nothing(
    fleet: Fleet, name: str
) -> None:
    assert killed(fleet, name, 1)


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_f03_a_worker_killed_at_every_hit_of_such_a_failpoint_loses_nothing(
    tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    number, reached = 1, True
    while reached:
        with fleet_on(tmp_path_factory.mktemp("fleet")) as fleet:
            reached = killed(fleet, name, number)
        number += 1
    assert number > 2
