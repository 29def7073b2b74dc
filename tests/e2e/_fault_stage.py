"""Workers for the tests of single faults, and which stores each test takes."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from tests.e2e import _fault_program
from tests.e2e._stage import KINDS, Stage
from tests.watched import spawn

__all__ = ["begin_worker", "kinds"]


def kinds(*fast: str) -> list[Any]:
    """Values for ``stage``: every kind of store, those that are not named in the long matrix."""
    return [
        pytest.param(kind, marks=() if kind in fast else pytest.mark.long, id=kind)
        for kind in KINDS
    ]


def begin_worker(stage: Stage, *words: str) -> subprocess.Popen[bytes]:
    """Begin a worker process, which dies where the words say if there are some."""
    head = ["-c", _fault_program.DYING, *words, "cli"] if words else ["-m", "pyworkflow.cli"]
    command = [sys.executable, *head, "worker", _fault_program.__name__]
    with (stage.path / f"worker-{len(stage.processes)}.log").open("wb") as log:
        process = spawn(command, env=stage.environment(), cwd=stage.path, stdout=log, stderr=log)
    stage.processes.append(process)
    return process
