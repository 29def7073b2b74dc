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
# Programs that still fail: each line goes with the change that makes its program end with 0.
FAILING = {
    "bytes_from_text",
    "contextvars_of_steps",
    "decimal_on_the_command_line",
    "exceptions_whole",
    "hash_in_path",
    "keyword_for_positional",
    "log_rotation",
    "names_in_tests",
    "scale_big_result_memory",
    "scale_file_reader_stops_writers",
    "scale_idle_reads_sleepers",
    "scale_log_injection",
    "scale_lost_claim_answer",
    "scale_outage_floods_log",
    "scale_stored_names_import",
    "second_signal",
    "typeddict_argument",
    "wrapped_async_step",
}
LIMIT = 300.0
"""Seconds; the longest takes half a minute on an idle machine."""


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem)
def test_a_case_holds(case: Path, tmp_path: Path) -> None:
    if case.stem in FAILING:
        return
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
