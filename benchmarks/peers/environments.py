"""Where peers live: a virtual environment each, outside the repository, made once and kept."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


class CannotSetUp(Exception):
    """A peer cannot be had here; the message says why."""


def default_cache() -> Path:
    """The folder of this user for what can be made again."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "pyworkflow-peers"


def python(cache: Path, name: str, requirements: Sequence[str]) -> Path:
    """The interpreter of a virtual environment that holds the requirements.

    Of the version that runs this; from the package index that pip is set up for. The folder's name
    tells version and requirements, so that others get an environment of their own.
    """
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    mark = hashlib.sha256("\n".join(requirements).encode()).hexdigest()[:8]
    home = cache / f"{name}-py{version}-{mark}"
    program = home / "bin" / "python"
    done = home / "installed"
    if done.exists():
        return program
    shutil.rmtree(home, ignore_errors=True)
    home.parent.mkdir(parents=True, exist_ok=True)
    _run([sys.executable, "-m", "venv", str(home)], name)
    _run([str(program), "-m", "pip", "install", "--quiet", *requirements], name)
    done.touch()
    return program


def node(cache: Path, name: str, packages: Sequence[str]) -> Path:
    """The folder ``node_modules`` that holds the packages."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        raise CannotSetUp(f"{name} needs node and npm, which are not here")
    mark = hashlib.sha256("\n".join(packages).encode()).hexdigest()[:8]
    home = cache / f"{name}-node-{mark}"
    done = home / "installed"
    if not done.exists():
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        _run([npm, "install", "--prefix", str(home), "--no-fund", "--no-audit", *packages], name)
        done.touch()
    return home / "node_modules"


def _run(command: Sequence[str], name: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().rpartition("\n")[2]
        raise CannotSetUp(f"{name} could not be installed: {said}")
