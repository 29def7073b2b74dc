"""What every pool does: one worker each for all tests of this file that do not kill."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.celery import _program
from tests.celery._harness import SHORT_LEASE, Fleet, beyond_the_lease, fleet_on, new_tag

POOLS = ("prefork", "threads", "solo")


@pytest.fixture(scope="module", params=POOLS)
def pool(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    with fleet_on(tmp_path_factory.mktemp(request.param)) as made:
        first = made.begin(pool=request.param, **SHORT_LEASE)
        second = made.begin(pool=request.param, queues="gpu,pyworkflow", **SHORT_LEASE)
        made.eventually(lambda: first.ready and second.ready, "two workers")
        yield made


def test_ten_steps_in_a_row_cost_at_most_two_messages(pool: Fleet) -> None:
    before = pool.published()
    tag = new_tag()
    assert pool.result(pool.start(_program.ten, tag=tag)) == 10
    # Every message is one LPUSH of the broker's own count, whoever sent it.
    assert pool.published() - before <= 2
    assert sum(pool.executions(tag).values()) == 10
    assert len({pid for _, pid in pool.lines(tag)}) == 1


def test_branches_spread_over_processes(pool: Fleet) -> None:
    run_id = pool.start(_program.fan, 6)
    assert len(set(pool.result(run_id))) >= 2
    pool.check(run_id)


def test_a_step_of_a_queue_runs_in_a_worker_of_that_queue(pool: Fleet) -> None:
    tag, whole = new_tag(), new_tag()
    ids = [pool.start(_program.routed, tag=tag), pool.start(_program.whole_on_gpu, tag=whole)]
    assert [pool.result(run_id) for run_id in ids] == ["gpu", "whole"]
    worker = pool.workers[1]
    its = {worker.pid, *worker.children()}
    assert {pid for name, pid in pool.lines(tag) if name == "gpu"} <= its
    assert {pid for _, pid in pool.lines(whole)} <= its


def test_a_blocking_step_keeps_its_lease_beyond_its_time(pool: Fleet) -> None:
    tag = new_tag()
    run_id = pool.start(_program.waiting, tag=tag)
    pool.begun(tag, "gated")
    beyond_the_lease(pool)
    pool.open_gate(tag)
    assert pool.result(run_id) == "gated"
    assert pool.executions(tag) == {"gated": 1, "gated-end": 1}


def test_f15_a_computing_step_keeps_its_lease_beyond_its_time(pool: Fleet) -> None:
    tag = new_tag()
    run_id = pool.start(_program.computing, tag=tag)
    pool.begun(tag, "spinning")
    beyond_the_lease(pool)
    pool.open_gate(tag)
    assert pool.result(run_id) == "spun"
    assert pool.executions(tag) == {"spinning": 1}


def test_a_sleeper_holds_nothing_and_wakes_up(pool: Fleet) -> None:
    tag = new_tag()
    run_id = pool.start(_program.napper, 1.5, tag=tag)
    pool.eventually(lambda: pool.status(run_id) == "suspended", "it sleeps")
    (turn,) = pool.ask(lambda storage: storage.list_work(run_id))
    now = pool.ask(lambda storage: storage.now())
    assert turn.lease is None or turn.lease.until <= now
    assert pool.waiting() == 0
    assert pool.result(run_id) == "after"
    assert pool.executions(tag) == {"before": 1, "after": 1}


def test_a_step_that_fails_is_tried_again_after_its_delay(pool: Fleet) -> None:
    tag = new_tag()
    assert pool.result(pool.start(_program.retrying, tag=tag)) == "steady"
    assert pool.executions(tag) == {"shaky": 2}


def test_logs_show_the_names_of_workflows_and_steps(pool: Fleet) -> None:
    pool.result(pool.start(_program.fan, 2))
    said = "".join(worker.log for worker in pool.workers)
    assert f"Task {_program.fan.name}[" in said
    assert f"Task {_program.share.name}[" in said


def test_f16_a_workflow_that_blocks_stalls_and_its_worker_lives(pool: Fleet) -> None:
    tag = new_tag()
    run_id = pool.start(_program.blocked, tag=tag)
    pool.eventually(lambda: pool.status(run_id) == "stalled", "it is told that it blocks")
    assert "time.sleep()" in str(pool.run(run_id).stalled)
    pool.open_gate(tag)
    assert pool.result(run_id) == "ended"
    assert all(worker.process.poll() is None for worker in pool.workers)
