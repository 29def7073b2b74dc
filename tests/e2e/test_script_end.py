"""The end of a script, on a real interpreter: what has begun goes on, and nothing is in its way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import asyncio
import time
from pyworkflow import sleep, start, step, workflow

@step
def in_a_thread() -> str:
    time.sleep(0.05)
    return "thread"

@step
async def to_thread() -> str:
    await asyncio.to_thread(time.sleep, 0.05)
    return "to_thread"

@workflow
async def several() -> str:
    parts = await asyncio.gather(in_a_thread(), to_thread())
    print("|".join(parts), flush=True)
    await sleep("1d")
    return "over"

if __name__ == "__main__":
    for _ in range(3):
        start(several)
"""


def test_threads_that_steps_need_are_there_when_the_script_has_ended(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "app.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0
    assert done.stdout.splitlines() == ["thread|to_thread"] * 3
    lines = done.stderr.splitlines()
    assert len(lines) == 2, done.stderr
    assert lines[0].startswith("pyworkflow: 3 runs still wait")
    assert "`pyworkflow worker app.py`" in lines[1]


def test_a_module_that_starts_a_run_when_it_is_imported_is_refused(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(SCRIPT.replace('if __name__ == "__main__":', "if True:"))
    done = subprocess.run(
        [sys.executable, "-m", "pyworkflow.cli", "worker", "app.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert '`if __name__ == "__main__":`' in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / ".pyworkflow").exists()
