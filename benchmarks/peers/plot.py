"""The ratios as a picture. Drawn by matplotlib in an environment of its own: nothing here depends on it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from benchmarks.peers import environments
from benchmarks.peers.peer import PROGRAMS


def draw(readings: Path, picture: Path, cache: Path) -> None:
    """Draw what ``--json`` wrote."""
    interpreter = environments.python(cache, "plot", ["matplotlib>=3.9"])
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [str(interpreter), str(PROGRAMS / "draw.py"), str(picture), str(readings)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().rpartition("\n")[2])
