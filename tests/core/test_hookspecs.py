"""Hook specs: the names of the architecture page, and plain functions that plugins can meet."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from pyworkflow import spi
from pyworkflow.spi import hookspecs

NAMES = {
    # factories
    "pyworkflow_make_codec",
    "pyworkflow_make_executor",
    "pyworkflow_make_storage",
    # configuration
    "pyworkflow_cli",
    "pyworkflow_configure",
    "pyworkflow_error_class",
    "pyworkflow_inject_headers",
    "pyworkflow_register",
    "pyworkflow_route",
    # context managers
    "pyworkflow_around_step",
    "pyworkflow_around_turn",
    # observers
    "pyworkflow_events_committed",
    "pyworkflow_run_created",
    "pyworkflow_run_ended",
    "pyworkflow_run_stalled",
    "pyworkflow_step_ended",
    "pyworkflow_step_retrying",
    "pyworkflow_step_started",
    "pyworkflow_storage_error",
    "pyworkflow_sweep_ended",
    "pyworkflow_turn_ended",
    "pyworkflow_turn_started",
    "pyworkflow_worker_started",
    "pyworkflow_worker_stopping",
}


def test_the_specs_are_those_of_the_architecture():
    found = {name for name in vars(hookspecs) if name.startswith("pyworkflow_")}
    assert found == NAMES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_spec_is_marked_documented_and_typed(name):
    spec = getattr(hookspecs, name)
    assert spec.pyworkflow_spec
    assert spec.__doc__
    signature = inspect.signature(spec)
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(p.annotation is not p.empty for p in signature.parameters.values())


def calls_of_hooks():
    package = Path(hookspecs.__file__).parent.parent
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                hook = node.args[0].value
                if hook in NAMES and any(keyword.arg for keyword in node.keywords):
                    where = f"{path.relative_to(package)}:{node.lineno}"
                    yield where, hook, {keyword.arg for keyword in node.keywords}


def test_the_core_gives_each_hook_the_arguments_of_its_spec():
    wrong = [
        f"{where} {hook}: missing={sorted(expected - given)} unknown={sorted(given - expected)}"
        for where, hook, given in calls_of_hooks()
        if given != (expected := set(inspect.signature(getattr(hookspecs, hook)).parameters))
    ]
    assert not wrong, "\n".join(wrong)


def test_spi_offers_what_it_lists():
    for name in spi.__all__:
        assert getattr(spi, name) is not None
    assert set(spi.__all__) <= set(dir(spi))
    assert len(spi.__all__) == len(set(spi.__all__))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = spi.nonsense


def test_pluggy_loads_only_for_the_hook_markers():
    code = (
        "import sys; import pyworkflow.spi as spi; before = 'pluggy' in sys.modules; "
        "spi.hookimpl; print(before, 'pluggy' in sys.modules, 'pydantic' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == ["False", "True", "False"]


def test_a_doorbell_is_a_small_frozen_value():
    bell = spi.Doorbell("r", "turn")
    assert (bell.run_id, bell.item_id, bell.v) == ("r", "turn", 1)
    assert bell == spi.Doorbell("r", "turn", 1)
    assert hash(bell) == hash(spi.Doorbell("r", "turn"))
    with pytest.raises(AttributeError):
        bell.run_id = "other"
    assert [str(one) for one in spi.Outcome] == ["handled", "busy", "gone", "unknown_workflow"]
