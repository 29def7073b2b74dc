"""The local executor passes the executor suite: ``pyworkflow worker`` on a SQLite store."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pyworkflow._local import LocalExecutor
from pyworkflow_conformance import ExecutorConformance


class TestLocal(ExecutorConformance):
    capabilities = LocalExecutor.capabilities

    def environment(self, namespace: str, folder: Path) -> Mapping[str, str]:
        return {
            "PYWORKFLOW_EXECUTOR": "local://",
            "PYWORKFLOW_STORAGE": f"sqlite:///{folder}/runs.db",
        }
