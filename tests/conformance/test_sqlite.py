"""The SQLite backend passes the suite."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from uuid import uuid4

import pytest

from pyworkflow.spi import StorageBackend
from pyworkflow_conformance import StorageConformance
from pyworkflow_storage_sql import SQLiteStorageBackend
from tests.conformance.sizes import MANY_RUNS


class TestSQLite(StorageConformance):
    capabilities = SQLiteStorageBackend("unused").info().capabilities
    many_runs = MANY_RUNS

    @pytest.fixture(autouse=True)
    def _directory(self, tmp_path: Path) -> None:
        self.path = tmp_path

    def _file(self, namespace: str) -> Path:
        # One file for all namespaces, but for those whose file is new, or is made unreadable.
        alone = namespace.startswith("mig")
        return self.path / (f"{namespace}.db" if alone else "store.db")

    async def make(self, namespace: str) -> StorageBackend:
        return SQLiteStorageBackend(self._file(namespace), namespace=namespace)

    def url(self, namespace: str) -> str:
        return f"sqlite:///{self._file(namespace)}"

    def files(self, namespace: str) -> list[Path]:
        return [self._file(namespace)]

    def writes(self, namespace: str) -> object:
        # Not -shm, in which readers take their places.
        files = [self.path / "store.db", self.path / "store.db-wal"]
        there = [each.stat() for each in files if each.exists()]
        return [(each.st_size, each.st_mtime_ns) for each in there]

    async def make_fresh(self) -> str:
        return f"sqlite:///{self.path / uuid4().hex}.db"

    async def make_newer(self, namespace: str) -> None:
        with closing(sqlite3.connect(self._file(namespace))) as conn:
            conn.execute("pragma user_version = 99")
