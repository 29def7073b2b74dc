"""Doors keep users' import paths, name the remedy when closed, and hide no other error."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from tests.repo.clone import ROOT

CORE = ROOT / "pyworkflow-core" / "src" / "pyworkflow"
HIDE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
"""


def python(code: str, *, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `code` in a process of its own: an import can be tried only once in each."""
    prologue = f"import sys; sys.path.insert(0, {str(path)!r})\n" if path else ""
    return subprocess.run(
        [sys.executable, "-c", prologue + code], capture_output=True, text=True, check=False
    )


def doors() -> list[Path]:
    return sorted([*(CORE / "storage").glob("*.py"), *(CORE / "celery").glob("*.py")])


def test_the_memory_door_needs_no_plugin() -> None:
    from pyworkflow._memory import MemoryStorageBackend as own
    from pyworkflow.storage.memory import MemoryStorageBackend as through_the_door

    assert through_the_door is own


DOORS = {
    "pyworkflow.celery": ("pyworkflow_celery", "attach"),
    "pyworkflow.storage.file": ("pyworkflow_storage_file", "FileStorageBackend"),
    "pyworkflow.storage.redis": ("pyworkflow_storage_redis", "RedisStorageBackend"),
    "pyworkflow.storage.sql": (
        "pyworkflow_storage_sql",
        "SQLiteStorageBackend",
        "PostgresStorageBackend",
    ),
}


@pytest.mark.parametrize("door", DOORS)
def test_a_door_gives_the_plugins_own_classes(door: str) -> None:
    package, *names = DOORS[door]
    for name in names:
        assert getattr(import_module(door), name) is getattr(import_module(package), name)


@pytest.mark.parametrize("door", DOORS)
def test_without_the_plugin_a_door_names_the_pip_command(door: str) -> None:
    package, *_ = DOORS[door]
    done = python(HIDE.format(package=package) + f"import {door}")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ModuleNotFoundError: the ")
    assert "not installed" in last
    assert f"pip install {package.replace('_', '-')}" in last.replace("'", "")


def test_the_celery_application_is_what_its_door_gives() -> None:
    # In a process of its own: it reads the settings.
    done = python(
        "from pyworkflow.celery.app import app; from pyworkflow_celery.app import app as own; "
        "assert app is own"
    )
    assert done.returncode == 0, done.stderr
    done = python(HIDE.format(package="pyworkflow_celery") + "import pyworkflow.celery.app")
    assert "from a clone './pyworkflow-celery'" in done.stderr


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("import a_library_that_is_missing", "No module named 'a_library_that_is_missing'"),
        ("raise RuntimeError('half installed')", "RuntimeError: half installed"),
    ],
)
def test_a_broken_plugin_is_reported_with_its_own_error(
    tmp_path: Path, body: str, error: str
) -> None:
    package = tmp_path / "pyworkflow_storage_file"
    package.mkdir()
    (package / "__init__.py").write_text(body)
    done = python("import pyworkflow.storage.file", path=tmp_path)
    assert done.returncode == 1
    assert error in done.stderr.strip().splitlines()[-1]
    assert "pip install" not in done.stderr


@pytest.mark.parametrize("door", doors(), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_door_holds_no_logic(door: Path) -> None:
    assert len(door.read_text("utf-8").splitlines()) <= 20


def test_the_package_is_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pyworkflow", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("pyworkflow, version ")
