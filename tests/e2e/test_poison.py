"""A turn or step that kills its process, beside others: it alone is stopped (found.md H2)."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from pyworkflow.runs import Run, RunStatus
from tests.e2e import _poison_program
from tests.e2e._stage import Stage, eventually, staged
from tests.watched import home, spawn

OTHERS = 20
MOST_DEATHS = 14
"""Ten claims of a turn without progress, and some for what the first batches had in common."""


@pytest.mark.parametrize("kind", ["file", "sqlite"])
def test_found_h02_a_turn_that_kills_its_worker_stalls_alone(kind: str, tmp_path: Path) -> None:
    with staged(kind, tmp_path) as stage:
        stage.start(_poison_program.fine, range(OTHERS // 2))
        (poison,) = stage.start(_poison_program.poison, [OTHERS])
        stage.start(_poison_program.fine, range(OTHERS // 2, OTHERS))
        deaths = restart_until_settled(stage)
        for run in stage.runs():
            if run.run_id == poison:
                assert run.status is RunStatus.STALLED
                assert "poison" in str(run.stalled)
            else:
                assert run.status is RunStatus.COMPLETED, run
        assert deaths <= MOST_DEATHS
        stage.check()


@pytest.mark.parametrize("kind", ["file", "sqlite"])
def test_found_h02_a_step_that_kills_its_worker_fails_alone(kind: str, tmp_path: Path) -> None:
    with staged(kind, tmp_path) as stage:
        stage.start(_poison_program.fine, range(OTHERS // 2))
        (killer,) = stage.start(_poison_program.killer, [OTHERS])
        stage.start(_poison_program.fine, range(OTHERS // 2, OTHERS))
        deaths = restart_until_settled(stage)
        results = {run.run_id: run for run in stage.runs()}
        assert results[killer].result == "WorkerLost"
        statuses = Counter(run.status for run in results.values())
        assert statuses == {RunStatus.COMPLETED: OTHERS + 1}
        assert deaths <= 6
        stage.check()


def is_settled(run: Run) -> bool:
    """Whether the run has ended, or has stalled."""
    return run.status.is_terminal or run.status is RunStatus.STALLED


def restart_until_settled(stage: Stage) -> int:
    """Restart a worker whenever it dies, as a service manager does, until all is settled."""
    deaths = 0
    worker = begin(stage)

    def look() -> bool:
        nonlocal deaths, worker
        if worker.poll() is not None:
            assert worker.returncode == 9, stage.output()[-3000:]
            deaths += 1
            home().forget(worker.pid)
            worker = begin(stage)
        return all(is_settled(run) for run in stage.runs())

    eventually(look, "all runs are settled", say=stage.output)
    return deaths


def begin(stage: Stage) -> subprocess.Popen[bytes]:
    """A worker with this file's workflows."""
    command = [sys.executable, "-m", "pyworkflow.cli", "worker", _poison_program.__name__]
    number = len(stage.processes)
    env = {**stage.environment(), "PYWORKFLOW_LEASE": "60s", "PYWORKFLOW_RENEW_EVERY": "20s"}
    with (stage.path / f"worker-{number}.log").open("wb") as log:
        process = spawn(command, env=env, cwd=stage.path, stdout=log, stderr=log)
    stage.processes.append(process)
    return process
