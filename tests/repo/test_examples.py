"""Every example runs as a script in an empty directory, prints its result and ends with 0.

Those of the README do so twice: on the local executor, and on Celery workers.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.devops.processes import Program, environment
from tests.repo.clone import ROOT
from tests.servers import ValkeyServer

EXAMPLES = sorted([*ROOT.glob("examples/*.py"), *ROOT.glob("examples/functional/*.py")])
OF_THE_README = {
    "simple_no_sleep.py",
    "simple_example.py",
    "basic_workflow.py",
    "distributed_example.py",
}


def run(*command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=environment(**variables),
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


def test_the_examples_of_the_readme_run_on_celery_workers(
    tmp_path: Path, make_valkey: Callable[..., ValkeyServer]
) -> None:
    examples = [path for path in EXAMPLES if path.name in OF_THE_README]
    here = tmp_path / "here"
    here.mkdir()
    variables = {
        "PYWORKFLOW_EXECUTOR": "celery://",
        "PYWORKFLOW_STORAGE": f"sqlite:///{tmp_path}/runs.db",
        "PYWORKFLOW_BROKER_URL": make_valkey({"appendonly": "no"}).url,
        "PYWORKFLOW_MODULES": ",".join(map(str, examples)),
    }
    celery = [sys.executable, "-m", "celery", "-A", "pyworkflow.celery.app", "worker"]
    with Program(
        [*celery, "--loglevel=info", "--concurrency=2"],
        env=environment(**variables),
        cwd=here,
        log=tmp_path / "log",
    ) as worker:
        worker.wait_for(" ready.")
        for example in examples:
            done = run(example, cwd=here, **variables)
            assert done.returncode == 0, f"{done.stdout}{done.stderr}{worker.said()}"
            assert "result: " in done.stdout
            assert "Traceback" not in done.stderr
        assert worker.end() == 0
        said = worker.said()
    for name in ("buy", "onboarding", "deliver_order", "crawl_site", "read_page"):
        assert f"Task {name}[" in said
    assert "charging 25.00" in said  # what a step prints is printed where it runs
    assert "Traceback" not in said
    assert list(here.iterdir()) == []
