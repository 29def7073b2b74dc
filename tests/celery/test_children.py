"""Pool children and their main process: who ends alone, and what becomes of the work."""

from __future__ import annotations

import os
import signal

import psutil
import pytest

from tests.celery import _program
from tests.celery._harness import Fleet, new_tag


def gone(pid: int) -> bool:
    """Whether a process has ended."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_step_survives_the_main_process_alone_being_killed(fleet: Fleet) -> None:
    worker = fleet.worker(PYWORKFLOW_DRAIN="20s")
    tag = new_tag()
    run_id = fleet.start(_program.waiting, tag=tag)
    child = fleet.begun(tag, "gated")
    children = worker.children()
    assert child in children
    try:
        worker.signal(signal.SIGKILL)
        worker.wait()
        fleet.open_gate(tag)
        fleet.eventually(lambda: all(map(gone, children)), "the children end")
    finally:
        for pid in children:
            if not gone(pid):
                os.kill(pid, signal.SIGKILL)
    fleet.worker(PYWORKFLOW_DRAIN="20s")
    assert fleet.result(run_id) == "gated"
    assert fleet.executions(tag) == {"gated": 1, "gated-end": 1}
    fleet.check(run_id)


def test_a_child_that_is_told_to_end_finishes_its_step(fleet: Fleet) -> None:
    worker = fleet.worker(PYWORKFLOW_DRAIN="20s")
    tag = new_tag()
    run_id = fleet.start(_program.waiting, tag=tag)
    child = fleet.begun(tag, "gated")
    os.kill(child, signal.SIGTERM)
    assert fleet.result(fleet.start(_program.ten)) == 10
    assert not gone(child)
    fleet.open_gate(tag)
    assert fleet.result(run_id) == "gated"
    assert fleet.executions(tag) == {"gated": 1, "gated-end": 1}
    fleet.eventually(lambda: gone(child), "the child ends")
    fleet.eventually(lambda: len(worker.children()) == 2, "another takes its place")
    assert fleet.result(fleet.start(_program.ten)) == 10


@pytest.mark.long
def test_children_that_are_exchanged_lose_nothing_and_hold_nothing(fleet: Fleet) -> None:
    fleet.worker("--max-tasks-per-child", "2", PYWORKFLOW_DRAIN="20s")
    tags = [new_tag() for _ in range(8)]
    ids = [fleet.start(_program.ten, tag=tag) for tag in tags]
    assert [fleet.result(run_id) for run_id in ids] == [10] * 8
    assert all(sum(fleet.executions(tag).values()) == 10 for tag in tags)
    pids = {pid for tag in tags for _, pid in fleet.lines(tag)}
    assert len(pids) >= 3
    fleet.check(*ids)
