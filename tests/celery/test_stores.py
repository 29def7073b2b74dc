"""A mixed program on a pool of processes, on every store; and the optional scheduler."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.celery import _program
from tests.celery._harness import TERM, Fleet, fleet_on, new_tag


@pytest.mark.parametrize("kind", ["postgresql", "redis", "sqlite", "file"])
def test_a_mixed_program_on_every_store(tmp_path: Path, kind: str) -> None:
    with fleet_on(tmp_path, kind) as fleet:
        workers = [fleet.begin() for _ in range(2)]
        fleet.eventually(lambda: all(worker.ready for worker in workers), "two workers")
        tags = [new_tag() for _ in range(6)]
        ids = [fleet.start(_program.mixed, tag=tag) for tag in tags]
        ids += [fleet.start(_program.ten)]
        for run_id in ids[:-1]:
            assert fleet.result(run_id) == ["a", "b", "steady", 3, "c"]
        assert fleet.result(ids[-1]) == 10
        for tag in tags:
            assert fleet.executions(tag) == {
                "a": 1, "b": 1, "shaky": 2, "part0": 1, "part1": 1, "part2": 1, "c": 1,
            }  # fmt: skip
        fleet.check(*ids)
        for worker in workers:
            worker.signal(TERM)
        assert [worker.wait() for worker in workers] == [0, 0]
        for worker in workers:
            assert "Traceback" not in worker.log, worker.log


def test_beat_rings_and_a_worker_that_takes_its_messages_sweeps(fleet: Fleet) -> None:
    beat = fleet.beat()
    fleet.eventually(lambda: fleet.waiting() >= 1, "a message of the scheduler")
    worker = fleet.worker(pool="threads")
    fleet.eventually(lambda: "pyworkflow.sweep" in worker.log, "the worker swept")
    assert "Sending due task pyworkflow-sweep" in beat.log
    assert fleet.result(fleet.start_silently(_program.napper, 0.5)) == "after"
    beat.signal(TERM)
    assert beat.wait() == 0
    assert "Traceback" not in beat.log
