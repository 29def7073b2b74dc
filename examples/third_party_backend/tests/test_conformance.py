"""The backend passes the suite."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import lmdb
import pytest
from pyworkflow_storage_lmdb import LmdbStorageBackend

from pyworkflow.conformance import StorageConformance
from pyworkflow.spi import StorageBackend


class TestLmdb(StorageConformance):
    capabilities = LmdbStorageBackend("unused").info().capabilities

    @pytest.fixture(autouse=True)
    def _directory(self, tmp_path: Path) -> None:
        self.path = tmp_path / "store"

    async def make(self, namespace: str) -> StorageBackend:
        return LmdbStorageBackend(self.path, namespace=namespace)

    def url(self, namespace: str) -> str:
        return f"lmdb://{self.path}"

    def files(self, namespace: str) -> list[Path]:
        return [self.path / namespace / "data.mdb"]

    async def make_fresh(self) -> str:
        return f"lmdb://{self.path.with_name(uuid4().hex)}"

    async def make_newer(self, namespace: str) -> None:
        """Say that a version of tomorrow wrote the store."""
        path = str(self.path / namespace)
        with lmdb.open(path) as environment, environment.begin(write=True) as txn:
            txn.put(b"mschema", b"99")
