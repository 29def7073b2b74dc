"""Runs that this connection has just written, so that the next change need not read them again.

What is kept is the truth as long as nobody else writes to the database, which SQLite tells
(``pragma data_version``), and no operation here goes past it: all but changes forget everything.
"""

from __future__ import annotations

import sqlite3
from typing import Final

from pyworkflow_storage_sql.sqlite._effects import LoadedRun, load_run

__all__ = ["KnownRuns"]

#: Beyond this many all are forgotten; what is worked on is read again at once.
_RUNS: Final = 4096
#: The same for the keys of their histories, in all.
_KEYS: Final = 100_000


class KnownRuns:
    """The runs of one namespace as they stand in the transaction of one connection."""

    def __init__(self) -> None:
        self._runs: dict[str, LoadedRun] = {}
        self._keys = 0
        self._version = -1

    def begin(self, cursor: sqlite3.Cursor) -> bool:
        """A transaction that holds the write lock has begun: forget what others have changed.

        Whether others have changed nothing since the last one.
        """
        (version,) = cursor.execute("pragma data_version").fetchone()
        if version == self._version:
            return True
        self._version = version
        self.forget()
        return False

    def forget(self) -> None:
        """Something else than a change was written, or a transaction did not end well."""
        if self._runs:
            self._runs = {}
            self._keys = 0

    def load(
        self, conn: sqlite3.Connection, file: str, namespace: int, run_id: str, change_key: str
    ) -> LoadedRun | None:
        """The run, or None. ``change_key`` is that of the change to be decided."""
        run = self._runs.get(run_id)
        if run is not None:
            run.change_key = change_key
            return run
        return load_run(conn, file, namespace, run_id, change_key)

    def keep(self, run: LoadedRun, events: int) -> None:
        """A change with so many events was written to the run, which knows."""
        if run.final is not None:
            self._runs.pop(run.run_id, None)
            return
        self._keys += events if run.run_id in self._runs else len(run.events)
        if len(self._runs) >= _RUNS or self._keys > _KEYS:
            self.forget()
        else:
            self._runs[run.run_id] = run
