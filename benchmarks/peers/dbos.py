"""DBOS Transact for Python, on SQLite as it is delivered, on SQLite with WAL, and on PostgreSQL."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

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

    SKIPS: ClassVar[Mapping[str, str]] = {
        "W6B": "another process takes over only through DBOS Conductor, which is no part of the library"
    }


PEER = Dbos()
