"""A sync step that outlives its hard timeout takes its pool process with it."""

from __future__ import annotations

import psutil

from tests.celery import _program
from tests.celery._harness import Fleet, new_tag


def _tries(fleet: Fleet, tag: str) -> list[int]:
    return [pid for name, pid in fleet.lines(tag) if name.startswith("stuck")]


def test_a_step_beyond_its_hard_timeout_ends_its_process_and_is_tried_again(fleet: Fleet) -> None:
    tag = new_tag()
    worker = fleet.worker(concurrency=2)
    run_id = fleet.start(_program.limited, 1, tag=tag)
    assert fleet.result(run_id) == "unblocked"
    first, second = _tries(fleet, tag)
    assert first != second
    assert not psutil.pid_exists(first) or first not in worker.children()
    retrying = [event for event in fleet.events(run_id) if event.type == "step.retrying"]
    assert [event.data["error"]["type"].rpartition(":")[2] for event in retrying] == ["StepTimeout"]
    fleet.check(run_id)


def test_its_last_try_fails_with_step_timeout_and_others_go_on(fleet: Fleet) -> None:
    tag, others = new_tag(), [new_tag() for _ in range(8)]
    fleet.worker(concurrency=2)
    run_id = fleet.start(_program.limited, 99, tag=tag)
    ids = [fleet.start(_program.mixed, tag=each) for each in others]
    assert fleet.result(run_id) == "StepTimeout"
    assert len(_tries(fleet, tag)) == 2
    for each in ids:
        assert fleet.result(each)[-1] == "c"
    fleet.check(run_id, *ids)


def test_at_most_once_it_is_a_timeout_and_not_an_interruption(fleet: Fleet) -> None:
    tag = new_tag()
    fleet.worker()
    run_id = fleet.start(_program.limited_once, tag=tag)
    assert fleet.result(run_id) == "StepTimeout"
    assert len(_tries(fleet, tag)) == 1
    fleet.check(run_id)


def test_where_no_process_can_end_the_next_try_waits_for_the_thread(fleet: Fleet) -> None:
    tag = new_tag()
    fleet.worker(pool="threads")
    run_id = fleet.start(_program.limited_once, tag=tag)
    fleet.begun(tag, "stuck_once")
    # No further try is due: it fails while its thread goes on.
    assert fleet.result(run_id) == "StepTimeout"
    fleet.open_gate(tag)
    fleet.check(run_id)
