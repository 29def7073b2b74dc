"""DBOS Transact for Python, on SQLite as it is delivered, on SQLite with WAL, and on PostgreSQL."""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.peers import environments
from benchmarks.peers.peer import PROGRAMS, Files


class Dbos(Files):
    NAME = "dbos"
    #: ``sqlite-wal`` is tuned: the file's journal is switched to what ours uses, and its pool has
    #: one connection.
    STORES: ClassVar[Mapping[str, str]] = {
        "sqlite": "sqlite", "sqlite-wal": "sqlite", "postgres": "postgres",
    }  # fmt: skip
    #: Every sleeping run is a task in memory, and all are begun again when a process starts.
    SIZES: ClassVar[Mapping[str, Mapping[str, int]]] = {"W7": {"runs": 10_000}}

    def setup(self, cache: Path) -> list[str]:
        interpreter = environments.python(cache, self.NAME, ["dbos==3.4.0"])
        return [str(interpreter), str(PROGRAMS / "run_dbos.py")]

    def place(self, store: str, directory: Path) -> AbstractContextManager[dict[str, Any]]:
        found = sqlite3.sqlite_version_info
        if store.startswith("sqlite") and sys.version_info >= (3, 12) and found < (3, 42):
            raise environments.CannotSetUp(
                f"dbos on SQLite needs SQLite 3.42 from Python 3.12 on: found {sqlite3.sqlite_version}"
                "; run this with Python 3.11, or with a newer SQLite"
            )
        return super().place(store, directory)

    SKIPS: ClassVar[Mapping[str, str]] = {
        "W6B": "another process takes over only through DBOS Conductor, which is no part of the library"
    }


PEER = Dbos()
