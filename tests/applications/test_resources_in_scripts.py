"""Resources of steps in a script: opened when a step needs one, closed when the process ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
from collections.abc import AsyncIterator, Iterator
from pyworkflow import configure, resource, run, start, step, workflow

@resource
async def client() -> AsyncIterator[str]:
    print("open client", flush=True)
    yield "client"
    print("close client", flush=True)

@resource
def model() -> Iterator[str]:
    print("open model", flush=True)
    yield "model"
    print("close model", flush=True)

@step
async def on_the_loop() -> str:
    return await client.get() + await model.get()

@step
def in_a_thread() -> str:
    return client.get_sync() + model.get_sync()

@workflow
async def flow(first: str) -> None:
    for each in (on_the_loop, in_a_thread) if first == "loop" else (in_a_thread, on_the_loop):
        assert await each() == "clientmodel"
    print("done", flush=True)

if __name__ == "__main__":
    configure(storage="memory://")
    if sys.argv[2] == "run":
        run(flow, sys.argv[1])
    else:
        start(flow, sys.argv[1])  # its steps run while the process ends
"""


@pytest.mark.parametrize("how", ["run", "start"])
@pytest.mark.parametrize("first", ["loop", "thread"])
def test_n09_a_script_closes_what_its_steps_opened(tmp_path: Path, first: str, how: str) -> None:
    (tmp_path / "script.py").write_text(SCRIPT, "utf-8")
    done = subprocess.run(
        [sys.executable, "script.py", first, how],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYWORKFLOW_")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = ["open client", "open model", "done", "close model", "close client"]
    assert done.stdout.splitlines() == expected, done.stderr
