"""Workers that are told to end, killed, stopped: nothing is lost, little waits for a lease."""

from __future__ import annotations

import os

import psutil
import pytest

from tests.celery import _program
from tests.celery._harness import CONT, KILL, QUIT, SHORT_LEASE, STOP, TERM, Fleet, new_tag

POOLS = ("prefork", "threads", "solo")


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("number", [TERM, QUIT])
def test_f12_a_step_ends_in_its_grace_time(fleet: Fleet, pool: str, number: int) -> None:
    tag = new_tag()
    worker = fleet.worker(pool=pool)
    run_id = fleet.start(_program.waiting, tag=tag)
    fleet.begun(tag, "gated")
    worker.signal(number)
    fleet.open_gate(tag)
    worker.wait()
    assert fleet.executions(tag) == {"gated": 1, "gated-end": 1}
    fleet.worker(pool="threads")
    assert fleet.result(run_id) == "gated"
    assert fleet.executions(tag)["gated"] == 1
    fleet.check(run_id)


@pytest.mark.parametrize("pool", POOLS)
def test_f12_a_step_beyond_its_grace_time_is_given_back_at_once(fleet: Fleet, pool: str) -> None:
    tag = new_tag()
    worker = fleet.worker(pool=pool, PYWORKFLOW_DRAIN="0.5s")
    run_id = fleet.start(_program.waiting, tag=tag)
    fleet.begun(tag, "gated")
    fleet.begin(pool="threads")
    fleet.eventually(lambda: fleet.workers[1].ready, "the next worker is ready")
    worker.signal(TERM)
    # The lease is five minutes: nobody waited for it.
    fleet.begun(tag, "gated", 2)
    fleet.open_gate(tag)
    assert fleet.result(run_id) == "gated"
    worker.wait()
    fleet.check(run_id)


def test_f13_told_to_end_under_load_every_commit_is_whole_or_absent(fleet: Fleet) -> None:
    tags = [new_tag() for _ in range(24)]
    worker = fleet.worker()
    ids = [fleet.start(_program.mixed, tag=tag) for tag in tags]
    fleet.begun(tags[0], "part0")
    worker.signal_all(TERM)
    fleet.worker(concurrency=4)
    for run_id in ids:
        assert fleet.result(run_id)[-1] == "c"
    worker.wait()
    fleet.check(*ids)


def test_f09_a_killed_child_frees_its_step_at_once(fleet: Fleet) -> None:
    tag = new_tag()
    fleet.worker()
    run_id = fleet.start(_program.doomed, 1, tag=tag)
    fleet.begun(tag, "suicidal", 2)
    assert fleet.result(run_id) == "alive"
    assert fleet.executions(tag) == {"suicidal": 2}
    fleet.check(run_id)


def test_f09_a_step_that_kills_three_processes_fails(fleet: Fleet) -> None:
    tag = new_tag()
    worker = fleet.worker()
    other = fleet.start(_program.ten)
    run_id = fleet.start(_program.doomed, 99, tag=tag)
    assert fleet.result(run_id) == "WorkerLost"
    assert 3 <= fleet.executions(tag)["suicidal"] <= 4
    assert fleet.result(other) == 10
    assert worker.process.poll() is None
    fleet.check(run_id)


def test_f09_a_child_killed_from_outside_frees_its_step_at_once(fleet: Fleet) -> None:
    tag = new_tag()
    fleet.worker()
    run_id = fleet.start(_program.waiting, tag=tag)
    pid = fleet.begun(tag, "gated")
    os.kill(pid, KILL)
    assert fleet.begun(tag, "gated", 2) != pid
    fleet.open_gate(tag)
    assert fleet.result(run_id) == "gated"


def test_f10_a_step_that_wants_too_much_memory_fails_and_its_worker_lives(fleet: Fleet) -> None:
    worker = fleet.worker()
    run_id = fleet.start(_program.hungry)
    assert fleet.result(run_id) in ("MemoryError", "StepError")
    assert fleet.result(fleet.start(_program.ten)) == 10
    assert "died" not in worker.log


@pytest.mark.parametrize("pool", POOLS)
def test_f08_all_processes_killed_inside_a_step_it_is_done_again(fleet: Fleet, pool: str) -> None:
    tag = new_tag()
    worker = fleet.worker(pool=pool)
    run_id = fleet.start(_program.waiting, tag=tag)
    fleet.begun(tag, "gated")
    worker.signal_all(KILL)
    worker.wait()
    fleet.worker(pool="threads")
    fleet.begun(tag, "gated", 2)
    fleet.open_gate(tag)
    assert fleet.result(run_id) == "gated"
    assert fleet.executions(tag)["gated"] == 2
    fleet.check(run_id)


def test_f11_timers_of_a_worker_that_is_gone_fire_elsewhere(fleet: Fleet) -> None:
    tags = [new_tag() for _ in range(5)]
    worker = fleet.worker()
    ids = [fleet.start(_program.napper, 3.0, tag=tag) for tag in tags]
    fleet.eventually(
        lambda: all(fleet.status(run_id) == "suspended" for run_id in ids), "they sleep"
    )
    assert fleet.waiting() == 0  # no message waits for an instant
    with fleet.redis() as client:
        assert not client.exists("unacked")
    worker.signal_all(KILL)
    worker.wait()
    fleet.worker(pool="threads")
    assert [fleet.result(run_id) for run_id in ids] == ["after"] * 5
    assert all(fleet.executions(tag) == {"before": 1, "after": 1} for tag in tags)


@pytest.mark.parametrize(
    "point",
    [
        pytest.param("before:1", id="f06-before-1"),
        pytest.param("before:3", id="f06-before-3", marks=pytest.mark.long),
        pytest.param("after:1", id="f07-after-1"),
        pytest.param("after:3", id="f07-after-3", marks=pytest.mark.long),
    ],
)
def test_f06_f07_a_process_killed_at_a_commit_leaves_its_run_to_others(
    fleet: Fleet, point: str
) -> None:
    tag = new_tag()
    fleet.open_gate("failpoint")
    fleet.worker(concurrency=1, FAILPOINT=point)
    run_id = fleet.start(_program.mixed, tag=tag)
    fleet.begun("failpoint", point.partition(":")[0])
    assert fleet.result(run_id)[-1] == "c"
    executions = fleet.executions(tag)
    # Whatever had no result yet is done once more, all else is not.
    assert max(count for name, count in executions.items() if name != "shaky") <= 2
    fleet.check(run_id)


@pytest.mark.parametrize("nth", [1, pytest.param(3, marks=pytest.mark.long)])
def test_f13_told_to_end_in_a_commit_it_is_whole(fleet: Fleet, nth: int) -> None:
    tag = new_tag()
    fleet.open_gate("failpoint")
    worker = fleet.worker(concurrency=1, FAILPOINT=f"term:{nth}")
    run_id = fleet.start(_program.mixed, tag=tag)
    assert worker.wait() == 0
    assert fleet.executions("failpoint") == {"term": 1}
    fleet.check(run_id)
    fleet.worker(pool="threads")
    assert fleet.result(run_id)[-1] == "c"
    assert {name: n for name, n in fleet.executions(tag).items() if n != 1} == {"shaky": 2}
    fleet.check(run_id)


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.long)])
def test_f06_f07_f11_workers_killed_under_load_lose_nothing(fleet: Fleet, seed: int) -> None:
    tags = [new_tag() for _ in range(12)]
    worker = fleet.worker()
    ids = [fleet.start(_program.mixed, tag=tag) for tag in tags]
    fleet.begun(tags[seed], "a")
    worker.signal_all(KILL)
    worker.wait()
    fleet.worker(concurrency=4)
    for run_id in ids:
        assert fleet.result(run_id)[-1] == "c"
    fleet.check(*ids)


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_f14_a_worker_stopped_past_its_lease_changes_nothing_when_it_goes_on(
    fleet: Fleet, pool: str
) -> None:
    tag = new_tag()
    worker = fleet.worker(pool=pool, **SHORT_LEASE)
    run_id = fleet.start(_program.waiting, tag=tag)
    fleet.begun(tag, "gated")
    worker.signal_all(STOP)
    try:
        fleet.worker(pool="threads")
        fleet.begun(tag, "gated", 2)
        fleet.open_gate(tag)
        assert fleet.result(run_id) == "gated"
        before = fleet.events(run_id)
    finally:
        worker.signal_all(CONT)
    fleet.eventually(lambda: fleet.executions(tag)["gated-end"] == 2, "the zombie ends its step")
    assert fleet.result(fleet.start(_program.ten)) == 10
    assert fleet.events(run_id) == before
    fleet.check(run_id)


def test_f46_a_workflow_that_kills_its_process_stalls_after_ten_and_harms_no_other(
    fleet: Fleet,
) -> None:
    tag = new_tag()
    fleet.worker()
    run_id = fleet.start(_program.poisoned, tag=tag)
    other = fleet.start(_program.ten)
    fleet.eventually(lambda: fleet.status(run_id) == "stalled", "it stalls")
    assert fleet.executions(tag)["poisoned"] == 10
    assert fleet.result(other) == 10


def test_found_h02_runs_claimed_with_a_step_that_kills_its_process_resume_at_once(
    fleet: Fleet,
) -> None:
    tag = new_tag()
    # Bells that come back to back: a process claims turns beyond the one that its bell names.
    names = [f"n{number}" for number in range(14)] + ["deadly"] + [f"m{n}" for n in range(11)]
    runs = {name: fleet.start(_program.beside, name, tag=tag) for name in names}
    fleet.worker(concurrency=1)
    # The lease is five minutes: what waited for its end would not complete.
    results = {name: fleet.result(run_id) for name, run_id in runs.items()}
    assert results == {name: name for name in names} | {"deadly": "WorkerLost"}
    died = {pid for name, pid in fleet.lines(tag) if name == "deadly"}
    assert {name for name, pid in fleet.lines(tag) if pid in died} > {"deadly"}
    fleet.check(*runs.values())


def test_f48_children_share_no_connection_with_their_parent_or_each_other(fleet: Fleet) -> None:
    worker = fleet.worker(concurrency=3)
    fleet.result(fleet.start(_program.fan, 9))
    sockets = {pid: established(pid) for pid in (worker.pid, *worker.children())}
    ports = [port for its in sockets.values() for port in its]
    assert len(ports) == len(set(ports)), sockets


def established(pid: int) -> set[int]:
    """Local ports of the connections that a process has."""
    return {c.laddr.port for c in psutil.Process(pid).net_connections("tcp") if c.raddr}
