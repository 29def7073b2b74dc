"""Hook specs: the names of the architecture page, and plain functions that plugins can meet."""

import inspect
import subprocess
import sys

import pytest

from pyworkflow import spi
from pyworkflow.spi import hookspecs

NAMES = {
    f"pyworkflow_{name}"
    for name in (
        "make_storage make_executor make_codec register configure cli route error_class "
        "inject_headers around_turn around_step run_created run_ended run_stalled turn_started "
        "turn_ended step_started step_ended step_retrying events_committed worker_started "
        "worker_stopping sweep_ended storage_error"
    ).split()
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


def test_spi_offers_what_it_lists():
    lazy = {"Delta", "ReferenceStore", "fsck"}  # of modules that are tested elsewhere
    for name in set(spi.__all__) - lazy:
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
