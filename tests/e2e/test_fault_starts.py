"""Clients that die, or hear nothing, while they start a run."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from typing import Any

import pytest

from pyworkflow._definitions import RunOptions
from pyworkflow._operations import Operations
from pyworkflow.spi import StorageBackend
from pyworkflow_conformance.faults import Fault, FaultPlan, FaultyStorage
from tests.e2e import _fault_program
from tests.e2e._fault_stage import begin_worker, kinds
from tests.e2e._stage import Stage, eventually, served, stage, start_one

__all__ = ["served", "stage"]


def client(stage: Stage, *words: str) -> subprocess.CompletedProcess[str]:
    """A client process that starts run 7."""
    return subprocess.run(
        [sys.executable, "-c", _fault_program.DYING, *words, "client", "7"],
        env=stage.environment(),
        cwd=stage.path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def ended_once(stage: Stage) -> None:
    """One run there is, and it ended with every step begun once."""
    eventually(stage.all_over, "the run ends", say=stage.output)
    assert [str(run.status) for run in stage.runs()] == ["completed"]
    assert stage.executions() == {("7", "one"): 1, ("7", "two"): 1}
    stage.check()


def test_f01_f02_a_client_killed_after_its_commit_has_started_its_run(stage: Stage) -> None:
    died = client(stage, "after", "create")
    assert (died.returncode, died.stdout) == (-signal.SIGKILL, ""), died.stderr
    (run,) = stage.runs()
    # Who does not know what became of it asks again, under the same key.
    assert stage.start(_fault_program.fault_pair, [7]) == [run.run_id]
    begin_worker(stage)
    ended_once(stage)


@pytest.mark.parametrize("stage", kinds("file"), indirect=True)
def test_f02_a_client_killed_before_its_commit_has_started_nothing(stage: Stage) -> None:
    died = client(stage, "before", "create")
    assert (died.returncode, died.stdout) == (-signal.SIGKILL, ""), died.stderr
    assert stage.runs() == []
    (run_id,) = stage.start(_fault_program.fault_pair, [7])
    begin_worker(stage)
    ended_once(stage)
    assert [run.run_id for run in stage.runs()] == [run_id]


@pytest.mark.parametrize("fault", [Fault.BEFORE, Fault.AFTER, Fault.CANCEL])
def test_f02_a_start_whose_outcome_is_unknown_is_one_run(stage: Stage, fault: Fault) -> None:
    async def main(storage: StorageBackend) -> set[str]:
        plan = FaultPlan(rate=0.5, seed=2, kinds=[fault], methods=["commit"])
        faulty = FaultyStorage(storage, plan)
        found = {await start_one(faulty, _fault_program.fault_pair, 7) for _ in range(6)}
        assert plan.done[fault] > 1
        return found

    ids = stage.ask(main)
    assert [run.run_id for run in stage.runs()] == list(ids)
    stage.check()


def test_f02_a_start_without_a_key_whose_answer_is_lost_is_one_run(stage: Stage) -> None:
    async def main(storage: StorageBackend) -> list[str]:
        plan = FaultPlan(rate=0.5, seed=2, kinds=[Fault.AFTER], methods=["commit"])
        operations = Operations(FaultyStorage(storage, plan), None, None)
        workflow: Any = _fault_program.fault_pair
        found = [await operations.start(workflow, (7,), {}, RunOptions()) for _ in range(6)]
        assert plan.done[Fault.AFTER] > 1
        return found

    assert sorted(stage.ask(main)) == sorted(run.run_id for run in stage.runs())
    stage.check()


def test_f02_a_server_whose_answer_is_lost_has_started_one_run(served: Stage, make_proxy) -> None:
    proxy = make_proxy(served.url)
    server_url, served.url = served.url, proxy.url

    async def main() -> str:
        async with served.storage() as storage:
            await storage.now()
            proxy.drop_before_answer(2)
            found = await start_one(storage, _fault_program.fault_pair, 7)
            assert proxy.armed == 0
            return found

    run_id = asyncio.run(main())
    served.url = server_url
    assert [run.run_id for run in served.runs()] == [run_id]
    served.check()
