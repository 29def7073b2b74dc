"""``pyworkflow worker`` on every durable store, killed amid its runs: nothing lost, nothing twice."""

from __future__ import annotations

import random
import signal

import pytest

from tests.e2e import _program
from tests.e2e._stage import SERVED, Stage, eventually, stage

__all__ = ["stage"]

RUNS = range(8)


def test_workers_killed_amid_their_runs_lose_nothing_and_repeat_nothing_recorded(
    stage: Stage,
) -> None:
    rng = random.Random(8)
    stage.start(_program.journey, RUNS)
    workers = [stage.worker() for _ in range(2)]
    with stage.nothing_recorded_runs_again() as remember:
        for turn in range(3):
            stage.kill_at(workers[turn % 2], len(stage.lines()) + rng.randrange(5, 25))
            remember()
            workers[turn % 2] = stage.worker()
        eventually(stage.all_over, "all runs end", say=stage.output)
    stage.journeys_ended(RUNS)


def test_all_workers_killed_at_once_leave_a_sound_store_to_the_next(stage: Stage) -> None:
    stage.start(_program.journey, RUNS)
    with stage.nothing_recorded_runs_again() as remember:
        for lines in (20, 60):
            workers = [stage.worker() for _ in range(2)]
            stage.kill_at(workers[0], lines)
            workers[1].kill()
            workers[1].wait()
            remember()
            stage.check()
        stage.worker()
        eventually(stage.all_over, "all runs end", say=stage.output)
    stage.journeys_ended(RUNS)


def test_several_workers_on_one_store_never_run_a_step_twice(stage: Stage) -> None:
    for _ in range(2):
        stage.worker()
    runs = 0

    def both_had_their_share() -> bool:
        nonlocal runs
        stage.start(_program.errand, range(runs, runs + 20))
        runs += 20
        return len({process for _, _, process in stage.lines()}) == 2

    eventually(both_had_their_share, "both workers work", say=stage.output)
    eventually(stage.all_over, "all runs end", say=stage.output)
    assert {str(run.status) for run in stage.runs()} == {"completed"}
    executions = stage.executions()
    assert len(executions) == runs * 8
    assert set(executions.values()) == {1}
    stage.check()


def test_a_drained_worker_hands_its_runs_over_with_every_step_once(stage: Stage) -> None:
    stage.start(_program.errand, range(30))
    first = stage.worker()
    eventually(lambda: len(stage.lines()) >= 20, "the first worker works", pause=0.001)
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 0, stage.output()
    stage.worker()
    eventually(stage.all_over, "all runs end", say=stage.output)
    assert len(stage.executions()) == 30 * 8
    assert set(stage.executions().values()) == {1}
    stage.check()


@pytest.mark.parametrize("stage", SERVED, indirect=True)  # elsewhere it may hold the store's lock
def test_f14_a_worker_stopped_past_its_lease_writes_nothing_when_it_goes_on(stage: Stage) -> None:
    stage.start(_program.journey, RUNS)
    stopped = stage.worker()
    eventually(lambda: len(stage.lines()) >= 15, "the worker works", pause=0.001)
    with stage.nothing_recorded_runs_again() as remember:
        stopped.send_signal(signal.SIGSTOP)
        try:
            remember()
            stage.worker()
            eventually(stage.all_over, "another worker ends all runs", say=stage.output)
            before = {number: len(events) for number, events in stage.histories().items()}
        finally:
            stopped.send_signal(signal.SIGCONT)
        stopped.send_signal(signal.SIGTERM)
        assert stopped.wait(60) == 0, stage.output()
    assert {number: len(events) for number, events in stage.histories().items()} == before
    stage.journeys_ended(RUNS)
