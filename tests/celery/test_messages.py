"""In which order messages are taken, and that none waits for a run that waits."""

from __future__ import annotations

from tests.celery import _program
from tests.celery._harness import Fleet, new_tag


def test_runs_of_higher_priority_are_taken_first(fleet: Fleet) -> None:
    tags = [new_tag() for _ in range(4)]
    usual = [fleet.start(_program.ten, tag=tag) for tag in tags[:3]]
    soon = fleet.start(_program.urgent, tag=tags[3])
    fleet.eventually(lambda: fleet.waiting() == 4, "four messages")
    fleet.worker(pool="solo", concurrency=1)
    assert [fleet.result(run_id) for run_id in usual] == [10] * 3
    assert fleet.result(soon) == "urgent"
    began = [line.split()[0] for line in fleet.log.read_text("ascii").splitlines()]
    assert list(dict.fromkeys(began)) == [tags[3], *tags[:3]]


def test_a_blocking_step_stops_no_other_run_of_its_worker(fleet: Fleet) -> None:
    fleet.worker(pool="threads", concurrency=2)
    tag = new_tag()
    blocked = fleet.start(_program.waiting, tag=tag)
    fleet.begun(tag, "gated")
    assert fleet.result(fleet.start(_program.ten)) == 10
    fleet.open_gate(tag)
    assert fleet.result(blocked) == "gated"
