"""Types of the user's script: found where the script runs, and never by running it again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pyworkflow._serialization import SerializationError, portable_name, resolve_type

SCRIPT = """
import os, sys
print("RUNS")
from dataclasses import dataclass
from pyworkflow import configure, run, step, workflow

configure(storage="memory://")

@dataclass
class Top:
    n: int

class Broken(Exception):
    pass

@step(max_retries=0)
async def fail(where: str):
    class Local(Exception):
        pass
    raise (Local if where == "local" else Broken)("no")

@step(max_retries=0)
async def give(where: str):
    @dataclass
    class Local:
        n: int
    return Local(1) if where == "local" else Top(1)

@workflow()
async def flow():
    said = []
    for where in ("local", "top"):
        for what in (fail, give):
            try:
                said.append(repr(await what(where)))
            except Exception as error:
                said.append(type(error).__name__)
    return said

if __name__ == "__main__":
    print(run(flow, timeout=60))
"""
SAID = "['StepError', 'SerializationError', 'Broken', 'Top(n=1)']"


@pytest.mark.parametrize(
    "command", [["shop/orders.py"], ["-m", "shop.orders"], ["shop/__main__.py"], ["-m", "shop"]]
)
def test_v02_a_script_runs_once_whatever_types_it_stores(
    tmp_path: Path, command: list[str]
) -> None:
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "__init__.py").touch()
    for name in ("orders.py", "__main__.py"):
        (tmp_path / "shop" / name).write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines() == ["RUNS", SAID], done.stderr


NAMED = """
import sys
print("RUNS", __name__)
from pyworkflow._serialization import resolve_type, register_portable
class Top: pass
register_portable("shop")
if __name__ == "__main__":
    for name in ("shop.orders:Top", "orders:Top"):
        assert resolve_type(name) is Top, name
    for name in ("shop.orders:Gone", "orders:f.<locals>.Top"):
        try:
            resolve_type(name)
        except Exception as error:
            print(type(error).__name__)
"""


def test_v02_the_name_that_others_have_for_the_script_does_not_import_it(tmp_path: Path) -> None:
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "__init__.py").touch()
    (tmp_path / "shop" / "orders.py").write_text(NAMED)
    done = subprocess.run(
        [sys.executable, "shop/orders.py"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == ["RUNS", "__main__", *2 * ["SerializationError"]], done.stderr


def test_v02_a_class_of_a_function_is_not_looked_up() -> None:
    class Local: ...

    with pytest.raises(SerializationError, match="of a function's body"):
        resolve_type(portable_name(Local))
