"""Every example runs as a script in an empty directory, prints its result and ends with 0."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.repo.clone import ROOT

EXAMPLES = sorted([*ROOT.glob("examples/*.py"), *ROOT.glob("examples/functional/*.py")])
OF_THE_README = {
    "simple_no_sleep.py",
    "simple_example.py",
    "basic_workflow.py",
    "distributed_example.py",
}


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    hidden = "PYWORKFLOW_"
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={key: value for key, value in os.environ.items() if not key.startswith(hidden)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_examples_of_the_readme_are_here() -> None:
    there = {path.name for path in ROOT.glob("examples/functional/*.py")}
    assert there >= OF_THE_README


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_prints_its_result_and_ends_well(example: Path, tmp_path: Path) -> None:
    done = run(example, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "result: " in done.stdout
    assert "Traceback" not in done.stderr
    assert (tmp_path / ".pyworkflow").is_dir()


def test_all_examples_can_be_served_by_one_worker(tmp_path: Path) -> None:
    done = run(
        "-c",
        "import sys; from pyworkflow.worker import import_modules; import_modules(sys.argv[1:])",
        *EXAMPLES,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
