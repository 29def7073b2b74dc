"""Each deliberately broken worker is failed by the check that is there for it."""

from __future__ import annotations

import sys

import pytest

from pyworkflow.spi import ExecutorCapabilities
from pyworkflow_conformance import ExecutorConformance, _executor_case

CAUGHT = [("deaf", "EXE_03"), ("drains_by_killing", "EXE_07"), ("ignores_queues", "EXE_20")]


@pytest.mark.parametrize(("kind", "check_id"), CAUGHT)
def test_a_broken_worker_is_failed_by_its_check(kind, check_id, monkeypatch):
    monkeypatch.setattr(_executor_case, "PATIENCE", 8.0)

    class Suite(ExecutorConformance):
        capabilities = ExecutorCapabilities(contract_version=2, graceful_drain=True)

        def environment(self, namespace, folder):
            return {
                "PYWORKFLOW_EXECUTOR": "local://",
                "PYWORKFLOW_STORAGE": f"sqlite:///{folder}/runs.db",
            }

        def worker_command(self, namespace, modules, queues, concurrency):
            script = [sys.executable, "-m", "tests.conformance.broken.executors"]
            return [*script, kind, ",".join(modules), *queues]

    (name,) = (name for name in dir(Suite) if name.startswith(f"test_{check_id}_"))
    with pytest.raises(AssertionError) as caught:
        getattr(Suite(), name)()
    assert f"check={check_id.replace('_', '-')}" in caught.value.__notes__[0]


def test_a_check_that_is_overridden_is_named():
    class Suite(ExecutorConformance):
        def test_EXE_03_notify_lost_swept(self):
            pass

    with pytest.raises(AssertionError, match="EXE_03_notify_lost_swept is overridden"):
        Suite().test_META_01_no_overrides()
