"""Clusters under seeds: everything holds, every path is taken, and a seed decides everything."""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest

from pyworkflow import _plugins
from pyworkflow.errors import ConfigurationError
from pyworkflow.runs import Run
from pyworkflow.spi import ClaimRef, Page, RunQuery, StorageBackend, hookimpl, utcnow
from pyworkflow.storage.memory import MemoryStorageBackend
from pyworkflow_conformance.faults import FaultPlan, FaultyStorage
from pyworkflow_conformance.simulation import PROFILES, _cli, assert_holds, simulate
from pyworkflow_conformance.simulation._cli import main
from pyworkflow_conformance.simulation._coverage import missing
from pyworkflow_conformance.simulation._many import check_backend, run_many, shrink
from tests.simulation.bites import BITES, planted
from tests.watched import until

FULL = os.environ.get("PYWORKFLOW_FULL") == "1"
SEEDS = 5000 if FULL else 400
REGRESSIONS = [
    (int(seed), profile)
    for line in (Path(__file__).parent / "regressions.txt").read_text("utf-8").splitlines()
    if line and not line.startswith("#")
    for seed, profile in [line.split()[:2]]
]

# The trace of some seeds, one alone and after others: nothing may be left of them.
TRACES = """
import hashlib
from pyworkflow_conformance.simulation import simulate
told = hashlib.sha256()
for seed in (3, 4, 5, 4, 11):
    told.update("\\n".join(simulate(seed, "all", tracing=True).trace).encode())
print(told.hexdigest())
"""


@pytest.mark.parametrize("profile", PROFILES)
def test_everything_holds_and_every_path_is_taken(profile: str) -> None:
    total = run_many(range(SEEDS), profile)
    assert total.failed == []
    assert total.seeds == SEEDS
    assert missing(profile, total.seeds, total.seen) == []


@pytest.mark.parametrize(("seed", "profile"), REGRESSIONS)
def test_a_seed_that_failed_once_holds(seed: int, profile: str) -> None:
    assert simulate(seed, profile).broken is None


def test_a_seed_gives_the_same_trace_in_any_process() -> None:
    found = {
        subprocess.run(
            [sys.executable, "-c", TRACES],
            env={**os.environ, "PYTHONHASHSEED": salt},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for salt in ("1", "2")
    }
    assert len(found) == 1


def test_a_trace_does_not_depend_on_what_ran_before() -> None:
    def told() -> str:
        lines = simulate(4, "all", tracing=True).trace
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    first = told()
    simulate(9, "crash")
    assert told() == first


def test_without_faults_no_step_runs_twice() -> None:
    for seed in range(20):
        report = simulate(seed, "calm")
        assert report.broken is None
        assert "body begun again" not in report.seen


def test_what_cannot_be_simulated_is_refused() -> None:
    def fails() -> StorageBackend:
        raise OSError("no disk")

    with pytest.raises(OSError, match="no disk"):
        simulate(1, "calm", make_store=fails)
    with pytest.raises(ConfigurationError, match="make_store made None"):
        simulate(1, "calm", make_store=lambda: None)  # type: ignore[arg-type,return-value]  # wrong on purpose
    with pytest.raises(ValueError, match="seed=-1"):
        simulate(-1)

    async def inside() -> None:
        simulate(1)

    with pytest.raises(RuntimeError, match="where none is running"):
        asyncio.run(inside())


def test_an_unknown_profile_is_refused() -> None:
    with pytest.raises(ValueError, match="calm, crash"):
        simulate(1, "stormy")


def test_a_failing_plan_is_made_smaller() -> None:
    bite = next(b for b in BITES if b.name == "token_is_not_checked")
    with planted(bite):
        seed = next(s for s in range(bite.within) if simulate(s, "crash").broken is not None)
        whole = simulate(seed, "crash")
        report, kept = shrink(seed, "crash")
    assert report.broken is not None
    assert whole.broken is not None
    assert report.broken.rule == whole.broken.rule
    assert len(kept) == len(report.faults) <= len(whole.faults)
    assert any("BROKEN" in line for line in report.trace)


def test_the_command_tells_what_came_of_the_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "0:8", "--profile", "calm"]) == 0
    told = capsys.readouterr().out
    assert "profile=calm seeds=8 failed=0" in told
    assert "step handed off" in told


def test_the_command_explains_a_failing_seed(capsys: pytest.CaptureFixture[str]) -> None:
    bite = next(b for b in BITES if b.name == "turn_is_not_owed_for_an_unseen_input")
    with planted(bite):
        assert main(["--seeds", "0:5", "--profile", "calm"]) == 1
    told = capsys.readouterr().out
    assert "broken: I5" in told
    assert "again: pyworkflow-sim --seeds 0 --profile calm --keep none --trace" in told


def test_the_command_runs_one_seed_with_its_trace(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "4", "--profile", "crash", "--keep", "none", "--trace"]) == 0
    told = capsys.readouterr().out
    assert "body of" in told
    assert "everything held" in told


def test_the_command_ends_quietly_when_nobody_reads_on() -> None:
    command = ["--seeds", "4", "--profile", "crash", "--trace"]
    ended = subprocess.Popen(
        [sys.executable, "-m", "pyworkflow_conformance.simulation", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert ended.stdout is not None
    assert ended.stderr is not None
    with ended, ended.stderr:
        ended.stdout.close()
        assert ended.stderr.read() == ""
    assert ended.returncode == 141


def test_the_processes_of_a_command_that_was_killed_end_with_it() -> None:
    words = ["-m", "pyworkflow_conformance.simulation", "--seeds", "0:100000", "--jobs", "2"]
    command = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE)
    parent = psutil.Process(command.pid)
    # The pool's two, and what multiprocessing has of its own.
    children = until(
        lambda: len(found := parent.children()) >= 3 and found, "the pool begins", deadline=60
    )
    command.kill()
    # Who holds the pipe keeps whoever reads it waiting.
    assert command.communicate(timeout=60)[0] == b""
    assert not psutil.wait_procs(children, timeout=60)[1]


def test_an_interrupted_command_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_cli, "run_many", interrupt)
    assert main(["--seeds", "0:5"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_plugins_of_the_process_change_nothing_in_a_simulation() -> None:
    class Listener:
        @staticmethod
        @hookimpl
        def pyworkflow_events_committed(run_id: str, events: Any) -> None:
            heard.append(run_id)

    heard: list[str] = []
    alone = simulate(3, "crash", tracing=True)
    listener = Listener()
    _plugins.register(listener, "listener")
    try:
        beside = simulate(3, "crash", tracing=True)
    finally:
        _plugins.unregister(listener)
    assert (beside.trace, heard) == (alone.trace, [])


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (["--seeds", "a"], "FIRST:END"),
        (["--seeds", "10:5"], "FIRST:END"),
        (["--seeds", "-3"], "FIRST:END"),
        (["--profile", "x"], "there are calm"),
        (["--jobs", "-1"], "jobs=-1"),
        (["--backend", "nowhere:x"], "backend=nowhere:x"),
        (["--backend", "os:getcwd"], "empty store"),
        (["--backend", "json:dumps"], "empty store"),
        (["--backend", f"{__name__}:unwilling"], "RuntimeError('no disk here')"),
        (["--backend", f"{__name__}:Threaded"], "wait for something else"),
        (["--backend", f"{__name__}:OwnClock"], "its clock is not the simulation's"),
        (["--backend", f"{__name__}:OtherClone"], "clone() of OtherClone makes a MemoryStorage"),
        (["--backend", f"{__name__}:Failing"], "it failed: OSError"),
        (["--backend", f"{__name__}:Used"], "not empty"),
        (["--seeds", "1", "--profile", "crash", "--keep", "99"], "this plan has"),
        (["--seeds", "1", "--profile", "crash", "--keep", "x"], "this plan has"),
        (["--seeds", "0:9", "--trace"], "one seed"),
        (["--seeds", "1", "--profile", "each", "--trace"], "one seed"),
    ],
)
def test_the_command_refuses_what_it_cannot_use(
    wrong: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(wrong)
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


def unwilling() -> MemoryStorageBackend:
    raise RuntimeError("no disk here")


class Threaded(MemoryStorageBackend):
    async def now(self) -> datetime:
        await asyncio.get_running_loop().create_future()  # a thread would answer, and never does
        return await super().now()


class OwnClock(MemoryStorageBackend):
    async def now(self) -> datetime:
        return datetime(2030, 1, 1, tzinfo=UTC)


class OtherClone(MemoryStorageBackend):
    def clone(self) -> Any:
        return MemoryStorageBackend()


class Failing(MemoryStorageBackend):
    async def open(self) -> None:
        raise OSError("no disk")


class Used(MemoryStorageBackend):
    async def list_runs(self, query: RunQuery, cursor: str | None = None) -> Page[Run]:
        return Page(items=[Run.__new__(Run)])


class Forgetful(MemoryStorageBackend):
    async def renew(self, refs: Sequence[ClaimRef], lease: timedelta) -> list[bool]:
        return [True for _ in refs]


def test_a_subclass_of_the_memory_backend_is_simulated_with_its_faults() -> None:
    seed = next(s for s in range(60) if simulate(s, "calm", make_store=Forgetful).broken)
    with pytest.raises(AssertionError, match=f"--seeds {seed} .*:Forgetful --keep none --trace"):
        assert_holds(seed, "calm", make_store=Forgetful)


class OnTheMachinesClock(MemoryStorageBackend):
    """Its clock is the machine's, taken from where plugins take it."""

    async def now(self) -> datetime:
        return utcnow()


def test_a_store_that_takes_the_time_from_the_contract_is_simulated() -> None:
    check_backend(f"{__name__}:OnTheMachinesClock")


def store_behind_a_line() -> StorageBackend:
    """A backend that is not the memory backend itself: its calls are awaited."""
    return FaultyStorage(MemoryStorageBackend(), FaultPlan(rate=0))


def test_another_backend_is_simulated() -> None:
    for seed in range(10):
        assert simulate(seed, "crash", make_store=store_behind_a_line).broken is None
