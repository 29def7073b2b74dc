"""Pool children and their main process: who ends alone, and what becomes of the work."""

from __future__ import annotations

import os
import signal

import psutil
import pytest

from tests.celery import _program
from tests.celery._harness import Fleet, new_tag

#: A lease that no test waits for: what goes on before it is over was finished or given back.
NO_LEASE = {"PYWORKFLOW_LEASE": "120s", "PYWORKFLOW_DRAIN": "20s"}
SOON = 20.0


def gone(pid: int) -> bool:
    """Whether a process has ended."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_step_survives_the_main_process_alone_being_killed(fleet: Fleet) -> None:
    worker = fleet.worker(**NO_LEASE)
    tag = new_tag()
    run_id = fleet.start(_program.waiting, tag=tag)
    child = fleet.begun(tag, "gated")
    children = worker.children()
    assert child in children
    try:
        worker.signal(signal.SIGKILL)
        worker.wait()
        fleet.open_gate(tag)
        fleet.eventually(lambda: all(map(gone, children)), "the children end", deadline=SOON)
    finally:
        for pid in children:
            if not gone(pid):
                os.kill(pid, signal.SIGKILL)
    fleet.worker(**NO_LEASE)
    assert fleet.result(run_id, deadline=SOON) == "gated"
    assert fleet.executions(tag) == {"gated": 1, "gated-end": 1}
    fleet.check(run_id)


def test_a_child_that_is_told_to_end_finishes_its_step(fleet: Fleet) -> None:
    worker = fleet.worker(**NO_LEASE)
    tag = new_tag()
    run_id = fleet.start(_program.waiting, tag=tag)
    child = fleet.begun(tag, "gated")
    os.kill(child, signal.SIGTERM)
    assert fleet.result(fleet.start(_program.ten), deadline=SOON) == 10
    assert not gone(child)
    fleet.open_gate(tag)
    assert fleet.result(run_id, deadline=SOON) == "gated"
    assert fleet.executions(tag) == {"gated": 1, "gated-end": 1}
    fleet.eventually(lambda: gone(child), "the child ends", deadline=SOON)
    fleet.eventually(lambda: len(worker.children()) == 2, "another takes its place")
    assert fleet.result(fleet.start(_program.ten), deadline=SOON) == 10


@pytest.mark.long
def test_children_that_are_exchanged_lose_nothing_and_hold_nothing(fleet: Fleet) -> None:
    fleet.worker("--max-tasks-per-child", "2", **NO_LEASE)
    tags = [new_tag() for _ in range(8)]
    ids = [fleet.start(_program.ten, tag=tag) for tag in tags]
    assert [fleet.result(run_id, deadline=SOON * 2) for run_id in ids] == [10] * 8
    assert all(sum(fleet.executions(tag).values()) == 10 for tag in tags)
    pids = {pid for tag in tags for _, pid in fleet.lines(tag)}
    assert len(pids) >= 3
    fleet.check(*ids)
