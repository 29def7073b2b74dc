"""The file backend passes the suite."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import pytest

from pyworkflow.spi import StorageBackend
from pyworkflow_conformance import StorageConformance
from pyworkflow_storage_file import FileStorageBackend
from tests.conformance.sizes import MANY_RUNS


class TestFile(StorageConformance):
    capabilities = FileStorageBackend("unused").info().capabilities
    many_runs = MANY_RUNS

    @pytest.fixture(autouse=True)
    def _directory(self, tmp_path: Path) -> None:
        self.path = tmp_path / "store"

    async def make(self, namespace: str) -> StorageBackend:
        return FileStorageBackend(self.path, namespace=namespace)

    def writes(self, namespace: str) -> object:
        files = sorted(each for each in self.path.rglob("*") if each.is_file())
        return [(each.name, each.stat().st_size, each.stat().st_mtime_ns) for each in files]

    async def make_fresh(self) -> str:
        return f"file:{self.path.with_name(uuid4().hex)}"
