"""Builds every distribution's wheel, checks what is in it, and uses them away from the clone.

The wheels are installed by path: the index has an unrelated `pyworkflow`. Two environments are made:
one with everything, in which the examples run, and one with the bare core, which must say what to
install. Needs pip and hatchling in the running Python.

Usage, at the root: python -m tests.repo.check_wheels
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tests.repo.clone import ROOT

TIMEOUT = 600.0
OWNED = {  # distribution -> the one top-level package it may ship
    "pyworkflow": None,
    "pyworkflow_celery": "pyworkflow_celery",
    "pyworkflow_conformance": "pyworkflow_conformance",
    "pyworkflow_core": "pyworkflow",
    "pyworkflow_storage_file": "pyworkflow_storage_file",
    "pyworkflow_storage_redis": "pyworkflow_storage_redis",
    "pyworkflow_storage_sql": "pyworkflow_storage_sql",
}
USE_EVERYTHING = """
import sys
import pyworkflow
heavy = {"pydantic", "asyncio", "pluggy"} & set(sys.modules)
assert not heavy, f"import pyworkflow loads {heavy}"
assert "site-packages" in pyworkflow.__file__, pyworkflow.__file__

from importlib.metadata import entry_points
from importlib import import_module
points = entry_points(group="pyworkflow")
for point in points:
    point.load()
    print("plugin", point.name, point.value)
assert {"file", "local", "memory", "celery", "redis", "sqlite", "postgresql"} <= points.names

from pyworkflow.storage.file import FileStorageBackend
from pyworkflow.storage.memory import MemoryStorageBackend
from pyworkflow.celery import attach
from pyworkflow.celery.app import app
assert "pyworkflow.handle" in app.tasks, sorted(app.tasks)
import pyworkflow.testing
for name in pyworkflow.__all__:
    getattr(pyworkflow, name)
"""
USE_THE_CORE = """
from pyworkflow.storage.memory import MemoryStorageBackend
try:
    import pyworkflow.storage.file
except ModuleNotFoundError as error:
    assert "from a clone './pyworkflow-storage-file'" in str(error), error
else:
    raise AssertionError("the file door opened without its plugin")
"""


def run(*command: str | Path, cwd: Path = ROOT, expect: int = 0) -> str:
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "TOX_", "PYWORKFLOW_")
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={key: value for key, value in os.environ.items() if not key.startswith(hidden)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    if done.returncode != expect:
        shown = " ".join(str(part) for part in command)[:300]
        sys.exit(f"{done.stdout}\n{shown}: status={done.returncode}, expected {expect}")
    return done.stdout


def check_contents(wheel: Path) -> None:
    """One top-level package, `py.typed`, the license, and nothing else."""
    distribution, version = wheel.name.split("-")[:2]
    package, info = OWNED[distribution], f"{distribution}-{version}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert "Apache License" in archive.read(f"{info}/licenses/LICENSE").decode(), wheel.name
    tops = {name.split("/")[0] for name in names} - {info}
    assert tops == ({package} if package else set()), (wheel.name, tops)
    assert package is None or f"{package}/py.typed" in names, wheel.name
    strays = [name for name in names if name.endswith((".pyc", ".log", ".toml"))]
    assert not strays, (wheel.name, strays)


def new_environment(folder: Path, *wheels: str) -> Path:
    """A fresh environment with the wheels and, from the index, only what is pinned."""
    run(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", *wheels)
    return python


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        wheels, elsewhere = Path(folder, "wheels"), Path(folder, "elsewhere")
        elsewhere.mkdir()
        sources = sorted(path.parent for path in ROOT.glob("*/pyproject.toml"))
        build = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation")
        run(*build, "-w", wheels, ROOT, *sources)
        built = {path.name.split("-")[0]: path for path in sorted(wheels.glob("*.whl"))}
        assert built.keys() == OWNED.keys(), sorted(built)
        for wheel in built.values():
            check_contents(wheel)
            print("built", wheel.name)

        # A direct reference with the extra, because a path and a name would be two requirements.
        core = f"pyworkflow-core[cli] @ {built['pyworkflow_core'].as_uri()}"
        others = [str(path) for name, path in built.items() if name != "pyworkflow_core"]
        python = new_environment(Path(folder, "everything"), core, *others)
        print(run(python, "-c", USE_EVERYTHING, cwd=elsewhere), end="")
        command = python.with_name("pyworkflow")
        run(command, "--help", cwd=elsewhere)
        print(run(command, "plugins", cwd=elsewhere), end="")
        examples = sorted([*ROOT.glob("examples/*.py"), *ROOT.glob("examples/functional/*.py")])
        assert examples, "no examples"
        for example in examples:
            place = elsewhere / example.stem
            place.mkdir()
            print(f"--- {example.relative_to(ROOT)}\n{run(python, example, cwd=place)}", end="")

        bare = new_environment(Path(folder, "bare"), str(built["pyworkflow_core"]))
        run(bare, "-c", USE_THE_CORE, cwd=elsewhere)
        said = run(bare.with_name("pyworkflow"), "plugins", cwd=elsewhere, expect=2)
        assert "pip install" in said, said
    print("wheels: ok")


if __name__ == "__main__":
    main()
