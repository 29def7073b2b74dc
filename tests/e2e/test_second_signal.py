"""The second signal ends a worker at once, also while a step blocks (found.md O1)."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e._stage import Stage, eventually, staged
from tests.watched import spawn

APP = """
import re, sys, time
from pathlib import Path
from pyworkflow import run, step, workflow

@step(max_retries=0)
async def sleeps():
    Path("began").touch()
    time.sleep(120)

@step(max_retries=0)
async def computes():
    Path("began").touch()
    end = time.monotonic() + 120
    while time.monotonic() < end:
        pow(3, 200_000)

@step(max_retries=0)
def in_a_thread():
    Path("began").touch()
    time.sleep(120)

@workflow(name="o1_flow")
async def flow(which: str):
    await {"sleeps": sleeps, "computes": computes, "thread": in_a_thread}[which]()

if __name__ == "__main__":
    run(flow, sys.argv[1])
"""
BLOCKS = ("sleeps", "computes", "thread")
AT_ONCE_S = 30.0
"""What a busy machine needs for the end of a process; the steps take two minutes."""


def environment(stage: Stage) -> dict[str, str]:
    """A worker that would drain for two minutes."""
    return {**stage.environment(), "PYWORKFLOW_DRAIN": "120s", "PYWORKFLOW_LEASE": "60s"}


def begin(stage: Stage, *words: str) -> subprocess.Popen[bytes]:
    """A process whose step has begun."""
    (stage.path / "app.py").write_text(APP, "utf-8")
    (stage.path / "began").unlink(missing_ok=True)
    with (stage.path / "worker-0.log").open("ab") as log:
        process = spawn(
            [sys.executable, *words], env=environment(stage), cwd=stage.path, stdout=log, stderr=log
        )
    stage.processes.append(process)
    eventually((stage.path / "began").exists, "the step begins", say=stage.output)
    return process


def started(stage: Stage, which: str) -> None:
    """A run, started by a process that is gone."""
    code = f"import os, app; app.flow.start({which!r}); os._exit(0)"
    (stage.path / "app.py").write_text(APP, "utf-8")
    env = {**environment(stage), "PYWORKFLOW_EXECUTOR": "local://"}
    subprocess.run([sys.executable, "-c", code], env=env, cwd=stage.path, check=True, timeout=60)


def interrupt_twice(process: subprocess.Popen[bytes], stage: Stage, number: int) -> float:
    """Seconds until the process had ended after the second signal."""
    process.send_signal(number)
    time.sleep(0.3)  # signals that come together count as one
    assert process.poll() is None, stage.output()
    began = time.monotonic()
    process.send_signal(number)
    process.wait(60)
    return time.monotonic() - began


@pytest.mark.parametrize("which", BLOCKS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_o01_the_second_signal_ends_a_worker_whatever_blocks(
    which: str, number: signal.Signals, tmp_path: Path
) -> None:
    with staged("file", tmp_path) as stage:
        started(stage, which)
        worker = begin(stage, "-m", "pyworkflow.cli", "worker", "app.py")
        assert interrupt_twice(worker, stage, number) < AT_ONCE_S
        assert worker.returncode == 128 + number


@pytest.mark.parametrize("which", BLOCKS)
def test_o01_the_second_ctrl_c_ends_a_script_whatever_blocks(which: str, tmp_path: Path) -> None:
    with staged("file", tmp_path) as stage:
        script = begin(stage, "app.py", which)
        assert interrupt_twice(script, stage, signal.SIGINT) < AT_ONCE_S


@pytest.mark.parametrize("which", BLOCKS)
def test_o01_the_second_ctrl_c_ends_pyworkflow_run_whatever_blocks(
    which: str, tmp_path: Path
) -> None:
    with staged("file", tmp_path) as stage:
        (stage.path / "app.py").write_text(APP, "utf-8")
        command = begin(
            stage, *("-m", "pyworkflow.cli", "run", "app.py:flow", "--arg", f"which={which}")
        )
        assert interrupt_twice(command, stage, signal.SIGINT) < AT_ONCE_S
