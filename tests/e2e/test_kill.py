"""Real processes on one file store, killed at random instants."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from pyworkflow._operations import Operations
from pyworkflow.runs import Run
from pyworkflow.storage.file import FileStorageBackend
from pyworkflow.storekit import fsck
from tests.e2e import _program

PROGRAM = Path(_program.__file__)
PATIENCE = 60.0
KILLS = 2
"""A step that is running at three kills is taken to be their cause."""


class Stage:
    """A store, a log of executions, and the processes that a test begins."""

    def __init__(self, path: Path) -> None:
        self.store = path / "store"
        self.log = path / "steps.log"
        self.processes: list[subprocess.Popen[str]] = []

    def begin(self, *args: object) -> subprocess.Popen[str]:
        """Begin a process of the program."""
        process = subprocess.Popen(
            [sys.executable, str(PROGRAM), *map(str, args)],
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "STEP_LOG": str(self.log)},
            cwd=self.log.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        return process

    def alive(self, process: subprocess.Popen[str]) -> bool:
        """True; fails at once, with the reason, when a process that shall run has ended."""
        if process.poll() is not None:
            out, err = process.communicate()
            pytest.fail(f"the process ended: status={process.returncode} {out}\n{err}")
        return True

    def executions(self) -> Counter[tuple[str, str]]:
        """How often each (run, step) was begun."""
        return Counter((run, name) for run, name, _ in self.lines())

    def lines(self) -> list[list[str]]:
        """The lines of the log."""
        if not self.log.exists():
            return []
        return [line.split() for line in self.log.read_text("ascii").splitlines()]

    def run(self, coroutine: Callable[[FileStorageBackend], Any]) -> Any:
        """Ask the store, with an object of our own."""

        async def main() -> Any:
            async with FileStorageBackend(self.store) as storage:
                return await coroutine(storage)

        return asyncio.run(main())

    def start(self, workflow: Any, runs: range) -> list[str]:
        """Start runs, which others have to work on."""

        async def begin(storage: FileStorageBackend) -> list[str]:
            ops = Operations(storage, None, None)
            return [
                await ops.start(
                    workflow, (n,), {}, workflow.options(idempotency_key=f"run-{n}").options
                )
                for n in runs
            ]

        return list(self.run(begin))

    def runs(self) -> list[Run]:
        """All runs."""

        async def read(storage: FileStorageBackend) -> list[Run]:
            from pyworkflow.spi import RunQuery

            return (await storage.list_runs(RunQuery(limit=1000))).items

        return list(self.run(read))

    def completed(self) -> set[tuple[str, str]]:
        """(run, step) of every step whose result is in a history."""

        async def read(storage: FileStorageBackend) -> set[tuple[str, str]]:
            from pyworkflow._serialization import decode, decode_arguments
            from pyworkflow.spi import RunQuery

            found: set[tuple[str, str]] = set()
            for run in (await storage.list_runs(RunQuery(limit=1000))).items:
                (number,), _ = decode_arguments(run.args_text)
                for event in await storage.get_events(run.run_id):
                    if event.type == "step.completed":
                        found.add((str(number), decode(str(event.data["result"]))))
            return found

        return set(self.run(read))

    def check(self) -> None:
        """Histories are dense, and the store is sound."""

        async def look(storage: FileStorageBackend) -> None:
            from pyworkflow.spi import RunQuery

            assert [str(v) for v in await fsck(storage)] == []
            for run in (await storage.list_runs(RunQuery(limit=1000))).items:
                events = await storage.get_events(run.run_id)
                assert [e.seq for e in events] == list(range(1, len(events) + 1))
                assert len({e.key for e in events if e.key}) == sum(bool(e.key) for e in events)

        self.run(look)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    made = Stage(tmp_path)
    yield made
    for process in made.processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


def eventually(check: Callable[[], Any], what: str, *, pause: float = 0.02) -> Any:
    """Poll until ``check()`` is true; its value."""
    end = time.monotonic() + PATIENCE
    while not (found := check()):
        assert time.monotonic() < end, f"did not happen within {PATIENCE} s: {what}"
        time.sleep(pause)
    return found


def kill_at(stage: Stage, process: subprocess.Popen[str], lines: int) -> None:
    """kill -9 when the log has grown to so many lines, or when the process has ended."""
    eventually(
        lambda: process.poll() is not None or len(stage.lines()) >= lines,
        f"{lines} executions",
        pause=0.001,
    )
    process.kill()
    process.wait()


@contextmanager
def nothing_completed_runs_again(stage: Stage) -> Iterator[Callable[[], None]]:
    """Gives a function that remembers what has a result; at the end none of that ran again."""
    seen: list[tuple[set[tuple[str, str]], Counter[tuple[str, str]]]] = []

    def remember() -> None:
        completed = stage.completed()
        # What runs now and is not in the history yet may count later: look at the log second.
        seen.append((completed, stage.executions()))

    yield remember
    executions = stage.executions()
    for completed, before in seen:
        again = {key for key in completed if executions[key] != before[key]}
        assert again == set()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_m09_a_script_killed_at_random_instants_completes_when_it_is_run_again(
    stage: Stage, seed: int
) -> None:
    rng = random.Random(seed)
    with nothing_completed_runs_again(stage) as remember:
        for _ in range(KILLS):
            process = stage.begin("script", stage.store, 4)
            kill_at(stage, process, len(stage.lines()) + rng.randrange(1, 14))
            remember()
            stage.check()
        out, err = stage.begin("script", stage.store, 4).communicate(timeout=PATIENCE)
        assert out == "done\n"
        # What a step fails with on purpose is told; nothing else is.
        told = [line for line in err.splitlines() if "step failed, next try" not in line]
        assert told == []
    runs = stage.runs()
    assert len(runs) == 4
    assert {str(r.status) for r in runs} == {"completed"}
    stage.check()


@pytest.mark.parametrize("seed", [1, 2])
def test_m09_workers_killed_at_random_instants_lose_nothing(stage: Stage, seed: int) -> None:
    rng = random.Random(seed)
    ids = stage.start(_program.journey, range(6))
    workers = [stage.begin("serve", stage.store) for _ in range(2)]

    def all_over() -> bool:
        return all(r.status.is_terminal for r in stage.runs())

    with nothing_completed_runs_again(stage) as remember:
        kill_at(stage, workers[0], rng.randrange(1, 30))
        remember()
        workers[0] = stage.begin("serve", stage.store)
        kill_at(stage, workers[1], len(stage.lines()) + rng.randrange(1, 30))
        workers[0].kill()
        workers[0].wait()
        remember()
        stage.check()
        stage.begin("serve", stage.store)
        eventually(all_over, "all runs end", pause=0.1)
    runs = {r.run_id: r for r in stage.runs()}
    assert set(runs) == set(ids)
    assert {str(r.status) for r in runs.values()} == {"completed"}
    # The retry counts two executions; every kill may repeat what had no result yet.
    assert set(stage.executions()) == {
        (str(n), name) for n in range(6) for name in _program.EXPECTED
    }
    stage.check()


def test_m10_two_workers_on_one_store_never_run_a_step_twice(stage: Stage) -> None:
    for _ in range(2):
        stage.begin("serve", stage.store)
    runs = 0

    def both_had_their_share() -> bool:
        nonlocal runs
        stage.start(_program.errand, range(runs, runs + 20))
        runs += 20
        return len({pid for _, _, pid in stage.lines()}) == 2

    eventually(both_had_their_share, "both workers work", pause=0.1)
    stage.start(_program.errand, range(runs, runs + 40))
    runs += 40
    eventually(lambda: all(r.status.is_terminal for r in stage.runs()), "the end", pause=0.1)
    assert {str(r.status) for r in stage.runs()} == {"completed"}
    executions = stage.executions()
    assert len(executions) == runs * 8
    assert set(executions.values()) == {1}
    stage.check()


def test_m09_a_step_that_takes_its_worker_down_three_times_fails(stage: Stage) -> None:
    (run_id,) = stage.start(_program.doomed, range(1))
    ended = 0
    while ended < 6 and not stage.run(lambda s: s.get_run(run_id)).status.is_terminal:
        process = stage.begin("serve", stage.store)
        eventually(
            lambda p=process: (
                p.poll() is not None or stage.run(lambda s: s.get_run(run_id)).status.is_terminal
            ),
            "the worker dies, or the run ends",
        )
        ended += process.poll() is not None
    run = stage.run(lambda s: s.get_run(run_id))
    assert (run.status, run.result) == ("completed", "WorkerLost")
    # In place once, before anybody could know; then three times with an item that counts.
    assert 3 <= stage.executions()["0", "deadly"] <= 4
    stage.check()


def test_sigterm_lets_a_step_end_and_a_second_worker_goes_on(stage: Stage) -> None:
    worker = stage.begin("serve", stage.store)
    (run_id,) = stage.start(_program.slow, range(1))
    eventually(
        lambda: stage.alive(worker) and ["0", "patient", str(worker.pid)] in stage.lines(),
        "the step begins",
    )
    worker.send_signal(signal.SIGTERM)
    out, err = worker.communicate(timeout=PATIENCE)
    assert (worker.returncode, out) == (0, ""), err
    assert stage.executions() == {("0", "patient"): 1, ("0", "patient-end"): 1}
    if not stage.run(lambda s: s.get_run(run_id)).status.is_terminal:
        stage.begin("serve", stage.store)
        eventually(lambda: stage.runs()[0].status.is_terminal, "the run ends")
    assert stage.executions()["0", "patient"] == 1
    assert stage.runs()[0].result == "ended"
    stage.check()


def test_a_script_that_ends_waits_for_its_runs_and_says_what_sleeps(stage: Stage) -> None:
    script = stage.begin("ends", stage.store)
    out, err = script.communicate(timeout=PATIENCE)
    assert script.returncode == 0
    slow, napper = out.split()
    runs = {r.run_id: r for r in stage.runs()}
    assert runs[slow].status == "completed"
    assert runs[napper].status == "suspended"
    assert stage.executions() == {
        ("1", "patient"): 1, ("1", "patient-end"): 1, ("2", "before"): 1,
    }  # fmt: skip
    assert "1 run still waits" in err
    assert napper in err
    assert "pyworkflow worker" in err
    assert slow not in err
    stage.run(lambda s: s.shift_clock(timedelta(hours=1)))
    stage.begin("serve", stage.store)
    eventually(lambda: all(r.status.is_terminal for r in stage.runs()), "the sleeper ends")
    assert stage.executions()["2", "after"] == 1
    stage.check()


def test_a_killed_script_leaves_its_runs_to_the_next_worker(stage: Stage) -> None:
    script = stage.begin("ends", stage.store)
    eventually(
        lambda: stage.alive(script) and ["1", "patient", str(script.pid)] in stage.lines(),
        "the step begins",
    )
    script.kill()
    script.wait()
    assert all(not r.status.is_terminal for r in stage.runs() if r.workflow == "slow")
    stage.begin("serve", stage.store)
    # The lease of a process that is gone is not waited for: it is five minutes.
    eventually(
        lambda: any(r.workflow == "slow" and r.status.is_terminal for r in stage.runs()),
        "the run ends",
    )
    assert stage.executions()["1", "patient"] == 2
    stage.check()
