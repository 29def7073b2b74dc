"""The guide to a backend of one's own, followed: its files are made, installed and pass the suite."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

from tests.repo.clone import ROOT
from tests.repo.run_readme import Block, blocks

GUIDE = ROOT / "docs" / "how-to" / "write-a-backend.md"
EXAMPLE = ROOT / "examples" / "third_party_backend"
PACKAGE = "pyworkflow_storage_acme"
LIMIT = 1800.0
"""Seconds; reached only when something hangs: the suite takes half a minute on an idle machine."""


def found() -> list[Block]:
    return list(blocks(GUIDE.read_text("utf-8")))


def place_of(block: Block) -> str:
    """The file that the guide calls a block, by a comment on its first line."""
    match = re.match(r"# ((?:src|tests)/[\w./]+|pyproject\.toml)\n", block.code)
    return match[1] if match else ""


@pytest.fixture
def followed(tmp_path: Path) -> Path:
    """The guide's directory, as if installed: its metadata lie beside its package.

    It lies in a project with other ideas of tests, as a directory in a clone does.
    """
    (tmp_path / "pyproject.toml").write_text(
        '[tool.pytest.ini_options]\naddopts = ["--import-mode=importlib"]\n'
    )
    tmp_path = tmp_path / "acme"
    for block in found():
        if place := place_of(block):
            path = tmp_path / place
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.code, "utf-8")
    (tmp_path / "src" / PACKAGE / "__init__.py").touch()
    # "Let `_plugin.py` make a `DurableStorageBackend`"
    plugin = tmp_path / "src" / PACKAGE / "_plugin.py"
    text = plugin.read_text("utf-8").replace("_backend import", "_journal import")
    plugin.write_text(text.replace("AcmeStorageBackend", "DurableStorageBackend"), "utf-8")
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text("utf-8"))["project"]
    metadata = tmp_path / "src" / f"{PACKAGE}-{project['version']}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    (metadata / "entry_points.txt").write_text(
        "".join(
            f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
            for group, points in project["entry-points"].items()
        )
    )
    return tmp_path


def python(folder: Path, *arguments: str, **environment: str) -> str:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYWORKFLOW_")}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=kept | {"PYTHONPATH": str(folder / "src")} | environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_backends_of_the_guide_pass_the_suite(followed: Path) -> None:
    done = python(followed, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests")
    assert " passed" in done
    assert " failed" not in done


def test_the_plugin_of_the_guide_is_found_by_its_scheme(followed: Path) -> None:
    (followed / "program.py").write_text(
        "from pyworkflow import run, workflow\n"
        "@workflow\n"
        "async def hello(name: str) -> str:\n"
        "    return f'hello {name}'\n"
        "if __name__ == '__main__':\n"
        "    print(run(hello, 'you'))\n"
    )
    cli = ("-c", "from pyworkflow.cli import main; main()")
    listed = python(followed, *cli, "plugins")
    assert re.search(r"^acme +pyworkflow-storage-acme 0\.1\.0 +storage", listed, re.MULTILINE)
    place = f"acme://{followed}/store"
    assert python(followed, "program.py", PYWORKFLOW_STORAGE=place) == "hello you\n"


def test_the_backend_of_the_guide_is_simulated(followed: Path) -> None:
    (followed / "made.py").write_text(
        "import tempfile\n"
        f"from {PACKAGE}._backend import AcmeStorageBackend\n"
        "def make_store():\n"
        "    return AcmeStorageBackend(tempfile.mkdtemp(dir='.'))\n"
    )
    command = ("--backend", "made:make_store", "--profile", "calm", "--seeds", "0:6")
    assert "failed=0" in python(followed, "-m", "pyworkflow_conformance.simulation", *command)


def test_excerpts_are_what_the_example_has() -> None:
    quoted = [block for block in found() if block.mark.startswith("not run: from ")]
    assert quoted
    for block in quoted:
        path = EXAMPLE / block.mark.removeprefix("not run: from ")
        text = path.read_text("utf-8")
        body = textwrap.indent(block.code, "    ")  # of a function or class
        assert block.code in text or body in text, f"line {block.line} is not in {path.name}"


def test_the_example_imports_nothing_but_the_contract() -> None:
    allowed = {"pyworkflow.spi", "pyworkflow.storekit", "pyworkflow.errors"}
    for path in sorted((EXAMPLE / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            foreign = {n for n in names if n.partition(".")[0] == "pyworkflow"} - allowed
            assert not foreign, f"{path.name}: {foreign}"
