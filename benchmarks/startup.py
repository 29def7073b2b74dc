"""What a process pays before it does anything; each number comes from processes of their own."""

from __future__ import annotations

import importlib.util
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.readings import Reading, Setting, Workload

_IMPORT = """
import time
began = time.perf_counter()
import pyworkflow
print((time.perf_counter() - began) * 1e3)
"""
_PUBLIC = """
import time
began = time.perf_counter()
from pyworkflow import *
print((time.perf_counter() - began) * 1e3)
"""
_FIRST_RUN = """
from pyworkflow import run, step, workflow

@step
async def echo(x: int) -> int:
    return x

@workflow
async def first(x: int) -> int:
    return await echo(x)

assert run(first, 1) == 1
"""


def _process(*args: str, cwd: Path) -> tuple[float, str]:
    """Wall ms of one Python process, and what it printed."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *args], cwd=cwd, capture_output=True, text=True, check=False
    )
    took = (time.perf_counter() - began) * 1e3
    if done.returncode:
        raise RuntimeError(done.stderr.strip().rpartition("\n")[2] or f"status={done.returncode}")
    return took, done.stdout


def _startup(setting: Setting) -> Iterator[Reading]:
    times = setting.size(5, 3)
    with setting.scratch() as cwd:
        script = cwd / "first.py"
        script.write_text(_FIRST_RUN, encoding="utf-8")

        def wall(*args: str) -> float:
            return statistics.median(_process(*args, cwd=cwd)[0] for _ in range(times))

        def inside(code: str) -> float:
            return statistics.median(float(_process("-c", code, cwd=cwd)[1]) for _ in range(times))

        bare = wall("-c", "pass")
        whole = wall("-c", "import pyworkflow")
        yield Reading("import pyworkflow", inside(_IMPORT), "ms", aim=150.0, better="less")
        yield Reading("from pyworkflow import *", inside(_PUBLIC), "ms", better="less")
        yield Reading("python -c pass", bare, "ms", better="less")
        yield Reading("python -c 'import pyworkflow'", whole, "ms", aim=150.0, better="less")
        yield Reading(
            "a script with one run of one step, file store",
            wall(str(script)),
            "ms",
            better="less",
        )
        if importlib.util.find_spec("pyworkflow.cli") is not None:
            code = "import sys; sys.argv = ['pyworkflow', '--help']; from pyworkflow.cli import main; main()"
            yield Reading("pyworkflow --help", wall("-c", code), "ms", better="less")


WORKLOADS = [Workload("start", ("-",), _startup)]
