"""What the page of the platforms says of systems without POSIX, tried without its modules."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.devops.processes import environment

PROGRAM = """
import sys
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
import pyworkflow
for name in pyworkflow.__all__:
    getattr(pyworkflow, name)
from pyworkflow import configure, run, workflow
from pyworkflow.errors import ConfigurationError
from pyworkflow.storage.sql import PostgresStorageBackend, SQLiteStorageBackend
@workflow
async def answer():
    return 42
configure(storage=sys.argv[1])
try:
    print(run(answer))
except ConfigurationError as error:
    print(error)
"""


def said(storage: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, storage],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_memory_and_sqlite_need_no_posix(tmp_path: Path) -> None:
    assert said("memory://", tmp_path) == "42"
    assert said("sqlite:///runs.db", tmp_path) == "42"


def test_the_file_store_refuses_with_the_remedy(tmp_path: Path) -> None:
    assert "POSIX file locks, which this system lacks; use sqlite" in said("file:runs", tmp_path)
