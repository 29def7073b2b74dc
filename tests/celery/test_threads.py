"""The pool of threads: what it takes from the broker, and what it does with more than it can."""

from __future__ import annotations

from tests.celery import _program
from tests.celery._harness import Fleet, new_tag

#: No sweep rings for what was rung for: nobody waits for that.
LONG = {"PYWORKFLOW_MUTE": "300s"}


def test_doorbells_beyond_what_a_process_has_room_for_wait_for_room(fleet: Fleet) -> None:
    # Room for two steps in the loop and two in threads; doorbells may come in ten at a time.
    fleet.worker(pool="threads", concurrency=10, PYWORKFLOW_CONCURRENCY="2", **LONG)
    tags = [new_tag() for _ in range(12)]
    ids = [fleet.start(_program.waiting, tag=tag) for tag in tags]
    for tag in tags:
        fleet.open_gate(tag)
    assert [fleet.result(run_id) for run_id in ids] == ["gated"] * 12
    fan = fleet.start(_program.fan, 16)
    assert len(fleet.result(fan)) == 16
    fleet.check(fan, *ids)


def test_a_doorbell_stays_in_the_broker_while_all_threads_are_busy(fleet: Fleet) -> None:
    busy = fleet.worker(pool="threads", concurrency=1, **LONG)
    tag, other = new_tag(), new_tag()
    run_id = fleet.start(_program.waiting, tag=tag)
    assert fleet.begun(tag, "gated") == busy.pid
    waiting = fleet.start(_program.ten, tag=other)
    idle = fleet.worker(pool="threads", concurrency=1, **LONG)
    # The first worker has not taken it, to let it wait behind its long step.
    assert fleet.result(waiting) == 10
    assert {pid for _, pid in fleet.lines(other)} == {idle.pid}
    fleet.open_gate(tag)
    assert fleet.result(run_id) == "gated"


def test_a_thread_that_is_done_takes_the_next_doorbell_at_once(fleet: Fleet) -> None:
    worker = fleet.worker(pool="threads", concurrency=1, **LONG)
    tag = new_tag()
    run_id = fleet.start(_program.waiting, tag=tag)
    fleet.begun(tag, "gated")
    ids = [fleet.start(_program.ten) for _ in range(100)]
    fleet.open_gate(tag)

    def ended() -> bool:
        while ids and fleet.run(ids[-1]).status.is_terminal:
            ids.pop()
        return not ids

    # Were the next look of its consumer waited for, these would take a second each.
    fleet.eventually(ended, "they end")
    assert fleet.result(run_id) == "gated"
    assert worker.process.poll() is None
