"""Programs of pages as modules, on Celery workers of every pool."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.celery._harness import Fleet
from tests.repo.clone import ROOT
from tests.repo.run_readme import blocks

__all__ = ["block_of", "call"]


def block_of(page: str, mark: str) -> str:
    """The block of a page that has this text, with what it continues."""
    text = (ROOT / "docs/how-to" / page).read_text("utf-8")
    (code,) = [b.code for b in blocks(text) if mark in b.code]
    return code


def call(fleet: Fleet, code: str, cwd: Path, **env: str) -> str:
    """Run a program that starts runs and waits for their results; what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=fleet.environment(**env),
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\n{fleet.logs()}"
    return done.stdout
