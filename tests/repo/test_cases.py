"""Small programs of what users ran into; each ends with 0 when what it prints as `ok` holds.

A program is given an empty directory and a process of its own, as a user would run it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.devops.processes import environment
from tests.repo.clone import ROOT

CASES = sorted((ROOT / "tests" / "cases").glob("*.py"))
LIMIT = 1800.0
"""Seconds; reached only when something hangs: the longest takes half a minute on an idle machine."""


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem)
def test_a_case_holds(case: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, case],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stdout
