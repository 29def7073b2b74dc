"""Each module imports only from its own floor and from those below; a new module is given a floor.

Imports inside functions count, because they run; imports for type checkers alone do not.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.repo.clone import ROOT

CORE = ROOT / "pyworkflow-core" / "src"

# Lowest first; a package stands for all its modules.
FLOORS = """errors _names _text _duration _clock _least_size _serialization _tagged _portable _failures _restore _annotations _shapes _same
events event_schema runs _retry _tracebacks
_replay
spi
storekit
_parameters _run_values _option_values _signature _defining _registry _definitions _declared _primitives _resources _context _logging _plugins _hooks _config _urls _memory _memory_plugin _codecs _codec_plugin
_engine _local _local_plugin
_client _functions _routing _copy _operations _queries _results worker testing
celery conformance storage
cli __main__
"""
FLOOR_OF = {
    name: number for number, floor in enumerate(FLOORS.split("\n")) for name in floor.split()
}
# The facade, pyworkflow/__init__.py, stands on all of them: nothing below may import from it.
FACADE = ""
FLOOR_OF[FACADE] = 1 + max(FLOOR_OF.values())
PLUGIN_PACKAGES = frozenset(
    path.name for path in ROOT.glob("pyworkflow-*/src/pyworkflow_*") if path.is_dir()
)
# A door that is no module of the doors' floor, since users know it by this path.
DOORS = frozenset({"pyworkflow.testing.simulation"})
# The paths that 0.1 had for modules of the store kit. They warn, and go in 0.3.
ALIASES = frozenset(f"pyworkflow.spi.{name}" for name in ("embedded", "failpoints", "reference"))
# Kept apart although the floors would allow it: replay knows nothing of storage, so that it can be
# fed by hand, by a file or by any backend.
FORBIDDEN = {"_replay": frozenset({"spi"})}


def module_name(path: Path, root: Path) -> str:
    """The dotted name that `path` is imported under from `root`."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unit(module: str) -> str:
    """The part of `pyworkflow.<part>.…` that has a floor; the facade is the empty one."""
    return module.split(".")[1] if "." in module else FACADE


def is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def executed(node: ast.AST) -> Iterator[ast.AST]:
    """Every node that can run, which leaves out the bodies of `if TYPE_CHECKING`."""
    yield node
    if isinstance(node, ast.If) and is_type_checking(node.test):
        children: Iterator[ast.AST] = iter(node.orelse)
    else:
        children = ast.iter_child_nodes(node)
    for child in children:
        yield from executed(child)


def imports(tree: ast.AST, module: str, is_package: bool, known: frozenset[str]) -> Iterator[str]:
    """The modules that `tree` imports, by absolute name."""
    for node in executed(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                package = parts[: len(parts) - node.level + is_package]
                base = ".".join([*package, base] if base else package)
            for alias in node.names:
                # `from package import x` imports the module x when there is one.
                name = f"{base}.{alias.name}"
                yield name if name in known else base


def core_modules() -> dict[str, Path]:
    return {module_name(path, CORE): path for path in sorted(CORE.rglob("*.py"))}


def violations(module: str, tree: ast.AST, is_package: bool, known: frozenset[str]) -> list[str]:
    own = unit(module)
    found: list[str] = []
    for imported in imports(tree, module, is_package, known):
        top, theirs = imported.split(".")[0], unit(imported)
        is_door = FLOOR_OF[own] == FLOOR_OF["storage"] or module in DOORS
        if top in PLUGIN_PACKAGES and not is_door:
            found.append(f"{module} names the plugin {imported}; only doors may")
        if top != "pyworkflow" or theirs == own:
            continue
        if theirs not in FLOOR_OF:
            found.append(f"{module} imports {imported}, which has no floor")
        elif FLOOR_OF[theirs] > FLOOR_OF[own] and module not in ALIASES:
            found.append(
                f"{module} (floor {FLOOR_OF[own]}) imports {imported} (floor {FLOOR_OF[theirs]})"
            )
        elif theirs in FORBIDDEN.get(own, frozenset()):
            found.append(f"{module} imports {imported}: kept apart")
    return found


def test_every_core_module_has_a_floor() -> None:
    homeless = sorted(name for name in core_modules() if unit(name) not in FLOOR_OF)
    assert not homeless, f"give these a floor in {Path(__file__).name}: {homeless}"


def test_core_modules_import_only_from_their_floor_and_below() -> None:
    modules = core_modules()
    known = frozenset(modules)
    found = [
        line
        for name, path in modules.items()
        if unit(name) in FLOOR_OF
        for line in violations(
            name, ast.parse(path.read_text("utf-8")), path.stem == "__init__", known
        )
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("package", sorted(PLUGIN_PACKAGES))
def test_plugins_import_only_what_the_contract_gives_them(package: str) -> None:
    folder = next(ROOT.glob(f"pyworkflow-*/src/{package}"))
    # A placeholder raises an error of the core and has no other way to say so than the core's own.
    kit = "pyworkflow.storekit"
    allowed = {"pyworkflow.spi", kit, f"{kit}.embedded", f"{kit}.failpoints", "pyworkflow.errors"}
    if package == "pyworkflow_celery":
        allowed.add("pyworkflow.worker")
    if package == "pyworkflow_conformance":
        allowed |= {name for name in core_modules() if unit(name) in {"spi", "storekit", "testing"}}
        allowed |= {"pyworkflow.events", "pyworkflow.runs", "pyworkflow.worker"}
    found: list[str] = []
    for path in sorted(folder.rglob("*.py")):
        name = module_name(path, folder.parent)
        tree = ast.parse(path.read_text("utf-8"))
        for imported in imports(tree, name, path.stem == "__init__", frozenset(core_modules())):
            if imported.split(".")[0] == "pyworkflow" and imported not in allowed:
                found.append(f"{name} imports {imported}")
            if imported.split(".")[0] in PLUGIN_PACKAGES - {package}:
                found.append(f"{name} imports another plugin, {imported}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source", "caught"),
    [
        ("pyworkflow.events", "from pyworkflow._client import start", True),
        ("pyworkflow.events", "def late():\n    import pyworkflow._client", True),
        ("pyworkflow.events", "from pyworkflow import start", True),
        ("pyworkflow.events", "from ._engine import session", True),
        ("pyworkflow._replay.loop", "from pyworkflow.spi.storage import Change", True),
        ("pyworkflow._client", "import pyworkflow_storage_file", True),
        ("pyworkflow._client", "from pyworkflow import errors", False),
        ("pyworkflow.events", "from pyworkflow.runs import Run", False),
        ("pyworkflow.storage.file", "import pyworkflow_storage_file", False),
        (
            "pyworkflow.errors",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pyworkflow.events",
            False,
        ),
    ],
)
def test_the_checker_sees(module: str, source: str, caught: bool) -> None:
    known = frozenset({"pyworkflow.errors", "pyworkflow._engine.session"})
    assert bool(violations(module, ast.parse(source), False, known)) is caught
