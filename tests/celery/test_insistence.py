"""A second signal while a worker drains: whoever insists waits for no step."""

from __future__ import annotations

import signal
from time import monotonic

import pytest

from tests.celery import _program
from tests.celery._harness import CONT, QUIT, STOP, TERM, Fleet, new_tag
from tests.celery.test_children import gone

INT = signal.SIGINT
#: No drain is over before the test is.
LONG = {"PYWORKFLOW_DRAIN": "300s"}
#: Seconds in which a second signal counts as the first one, which came twice.
AS_ONE = 0.1


@pytest.mark.parametrize(
    ("pool", "number"),
    [
        ("prefork", INT),
        pytest.param("prefork", QUIT, marks=pytest.mark.long),
        ("prefork", TERM),
        ("threads", INT),
        pytest.param("threads", TERM, marks=pytest.mark.long),
        pytest.param("solo", QUIT),
        pytest.param("solo", INT, marks=pytest.mark.long),
    ],
)
def test_who_insists_waits_for_no_step(fleet: Fleet, pool: str, number: int) -> None:
    worker = fleet.worker(pool=pool, **LONG)
    tag = new_tag()
    run_id = fleet.start(_program.waiting, tag=tag)
    fleet.begun(tag, "gated")
    children = worker.children()
    worker.signal(number)
    fleet.eventually(lambda: "another signal ends it" in worker.log, "it has heard")
    heard = monotonic()
    fleet.eventually(lambda: monotonic() - heard > AS_ONE * 2, "time passes")
    worker.signal(number)
    worker.wait()
    assert all(map(gone, children))
    # What it held was given back: the lease is five minutes.
    fleet.worker(**LONG)
    fleet.begun(tag, "gated", 2)
    fleet.open_gate(tag)
    assert fleet.result(run_id) == "gated"
    fleet.check(run_id)


@pytest.mark.parametrize(
    ("pool", "how", "number"),
    [
        ("prefork", "sleeps", INT),
        ("threads", "sleeps", INT),
        ("solo", "computes", INT),
        pytest.param("prefork", "computes", TERM, marks=pytest.mark.long),
        pytest.param("threads", "computes", TERM, marks=pytest.mark.long),
        pytest.param("solo", "sleeps", TERM, marks=pytest.mark.long),
    ],
)
def test_o01_the_second_signal_ends_a_worker_whose_event_loop_is_blocked(
    fleet: Fleet, pool: str, how: str, number: int
) -> None:
    worker = fleet.worker(pool=pool, **LONG)
    tag = new_tag()
    run_id = fleet.start(_program.clogged, how, tag=tag)
    fleet.begun(tag, "clogging")
    children = worker.children()
    worker.signal(number)
    fleet.eventually(lambda: "another signal ends it" in worker.log, "it has heard")
    heard = monotonic()
    fleet.eventually(lambda: monotonic() - heard > AS_ONE * 2, "time passes")
    worker.signal(number)
    worker.wait()
    assert all(map(gone, children))
    # What it held is free since it is gone: the lease is five minutes.
    fleet.worker(pool="threads", **LONG)
    fleet.begun(tag, "clogging", 2)
    fleet.open_gate(tag)
    assert fleet.result(run_id) == "clogged"


def test_an_interrupt_that_comes_twice_at_once_is_one(fleet: Fleet) -> None:
    worker = fleet.worker(**LONG)
    tag = new_tag()
    run_id = fleet.start(_program.waiting, tag=tag)
    fleet.begun(tag, "gated")
    # As of a terminal, which tells the whole group, and a program in it that passes it on.
    worker.signal(STOP)
    worker.signal(INT)
    worker.signal(TERM)
    worker.signal(CONT)
    fleet.eventually(lambda: "another signal ends it" in worker.log, "it has heard")
    fleet.open_gate(tag)
    worker.wait()
    assert fleet.executions(tag) == {"gated": 1, "gated-end": 1}
    fleet.worker(**LONG)
    assert fleet.result(run_id) == "gated"


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_worker_ends_although_its_broker_hangs(fleet: Fleet, pool: str) -> None:
    worker = fleet.worker(pool=pool, **LONG | {"PYWORKFLOW_DRAIN": "2s"})
    tag = new_tag()
    run_id = fleet.start(_program.waiting, tag=tag)
    fleet.begun(tag, "gated")
    fleet.broker.pause()
    try:
        worker.signal(TERM)
        worker.wait()
    finally:
        fleet.broker.resume()
    # The step was given back: the lease is five minutes.
    fleet.worker(pool="threads", **LONG | {"PYWORKFLOW_MUTE": "1s"})
    fleet.begun(tag, "gated", 2)
    fleet.open_gate(tag)
    assert fleet.result(run_id) == "gated"
