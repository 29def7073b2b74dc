"""Store and log on a disk that is full for a while (found.md M10)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e import _full_disk_ways

ROOT = Path(__file__).parents[2]
MOUNT = 'mount -t tmpfs -o size=16m tmpfs "$1" && exec "$2" "$3" "$1" "$4"'


@pytest.mark.parametrize("kind", ["file", "sqlite"])
def test_found_m10_a_full_disk_loses_nothing_and_work_goes_on_when_there_is_room(
    kind: str, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    program = str(Path(__file__).with_name("_full_disk.py"))
    words = ["sh", str(disk), sys.executable, program, kind]
    done = subprocess.run(
        [*_full_disk_ways.OWN_MOUNTS, "sh", "-c", MOUNT, *words],
        env={
            **{name: value for name, value in os.environ.items() if "PYWORKFLOW" not in name},
            "PYTHONPATH": os.pathsep.join([str(ROOT), *(path for path in sys.path if path)]),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert found["is_full"], found
    assert "room" in found["message"]
    assert found["right"], found
    assert found["results"] >= 10
    assert found["violations"] == []
    # Each operation that fails has one line, and so has the log file.
    assert len(found["warnings"]) == len({line.split(":")[0] for line in found["warnings"]})
    assert done.stderr.count("--- Logging error ---") <= 1
    # Well below the lease of ten minutes, which nothing waits for.
    assert found["recovered_s"] < 60
