"""Reads beside the writer: a connection of aiosqlite, so that a long listing holds up nobody."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import aiosqlite

from pyworkflow.storekit.embedded import Watchers, add_forkable
from pyworkflow_storage_sql.sqlite._place import Place
from pyworkflow_storage_sql.sqlite._schema import OPEN_TIMEOUT, storage_error

__all__ = ["NOW", "Reader"]

#: The store's clock as SQL on ``namespaces n``, with ``Reader.shown()`` as parameter.
NOW: Final = "(max(?, n.latest) + n.clock_offset)"
#: Connections of a parent process: closed, and never to be touched again.
_abandoned: list[object] = []


class _Rows:
    """What is left of a cursor that was read to its end."""

    def __init__(self, rows: list[Any]) -> None:
        self._rows = rows

    def fetchall(self) -> list[Any]:
        return self._rows


class _Connection(sqlite3.Connection):
    """Executes and fetches under a lock, so that a fork finds nothing half read."""

    lock: threading.Lock

    def execute(self, sql: str, parameters: Any = (), /) -> Any:
        with self.lock:
            cursor = super().execute(sql, parameters)
            rows = cursor.fetchall()
            cursor.close()
        return _Rows(rows)


class Reader:
    """A connection that only reads, opened when it is needed."""

    def __init__(self, place: Place, namespace: str, shown: Callable[[], int]) -> None:
        self.path = place.path
        self.shown = shown
        """What the store's clock shows as far as this process knows, microseconds."""
        self._files = place
        self._namespace = namespace
        self._lock = threading.Lock()
        self._raw: _Connection | None = None
        self._conn: aiosqlite.Connection | None = None
        self._opening = asyncio.Lock()
        self._version: int | None = None
        add_forkable(self)

    async def fetch(self, sql: str, values: Sequence[object] = ()) -> list[Any]:
        """The rows of one statement: one moment of the database.

        Raises:
            StorageError: It failed, or was not in the file at the path.
        """
        try:
            while True:
                conn = self._conn or await self._open()
                try:
                    rows = await conn.execute_fetchall(sql, values)
                    self._files.check()
                    return list(rows)
                except (ValueError, sqlite3.ProgrammingError):
                    if self._conn is conn:
                        raise
                    # A fork closed it.
        except (OSError, sqlite3.Error) as error:
            raise storage_error(error, self.path) from error

    async def _open(self) -> aiosqlite.Connection:
        async with self._opening:
            if self._conn is not None:
                return self._conn
            self._files.check()

            def connector(*args: Any, **kwargs: Any) -> _Connection:
                raw = _Connection(*args, **kwargs)
                raw.lock = self._lock
                with self._lock:
                    self._raw = raw
                return raw

            conn = aiosqlite.connect(
                self.path,
                timeout=OPEN_TIMEOUT,
                isolation_level=None,
                check_same_thread=False,
                factory=connector,
            )
            # Whoever forgets to close must be able to end all the same.
            _thread(conn).daemon = True
            await conn
            await conn.execute_fetchall("pragma query_only = on")
            self._conn = conn
            return conn

    async def look(self, watchers: Watchers) -> None:
        """Tell the watchers what others wrote."""
        version = (await self.fetch("pragma data_version"))[0][0]
        if version == self._version:
            return
        runs = watchers.runs
        touched: dict[str, tuple[int, bool]] = {}
        work = 0
        if not runs:  # an empty list would be compared with each run
            news = "select work from namespaces where name = ?"
            work = max((row[0] for row in await self.fetch(news, (self._namespace,))), default=0)
        for start in range(0, len(runs), 500):
            part = runs[start : start + 500]
            marks = ", ".join("?" * len(part))
            rows = await self.fetch(
                "select n.work, r.run_id, r.last_seq, r.final is not null from namespaces n "  # noqa: S608 - marks
                f"left join runs r on r.namespace = n.id and r.run_id in ({marks}) where n.name = ?",
                (*part, self._namespace),
            )
            for news_count, run_id, length, ended in rows:
                work = max(work, news_count)
                if run_id is not None:
                    touched[run_id] = (length, bool(ended))
        self._version = version
        watchers.tell(touched, work)

    async def close(self) -> None:
        """Close the connection and end its thread. Idempotent."""
        conn, self._conn = self._conn, None
        if conn is not None:
            await conn.close()

    def stop(self) -> None:
        """The same without a loop, for an object that nobody closed."""
        conn, self._conn = self._conn, None
        if conn is None:
            return

        thread = threading.Thread(target=_end, args=(conn,), daemon=True)
        thread.start()
        thread.join(5)

    # --- forks --------------------------------------------------------------------------------

    def before_fork(self) -> None:
        """Close the connection under whoever uses it: the next read opens another."""
        self._lock.acquire()
        conn, self._conn = self._conn, None
        raw, self._raw = self._raw, None
        if raw is not None:
            raw.close()
        if conn is not None:
            _abandoned.append(conn)

    def after_fork(self) -> None:
        """In the parent: go on, and end the thread of the connection that was closed."""
        self._lock.release()
        while _abandoned:
            conn = _abandoned.pop()
            assert isinstance(conn, aiosqlite.Connection)
            threading.Thread(target=_end, args=(conn,), daemon=True).start()

    def after_fork_in_child(self) -> None:
        """In the child the connection's thread does not exist."""


def _thread(conn: aiosqlite.Connection) -> threading.Thread:
    # Before 0.22 the connection itself is the thread.
    return cast("threading.Thread", getattr(conn, "_thread", conn))


def _end(conn: aiosqlite.Connection) -> None:
    """On a thread of its own, where no loop is found to which the answer would be sent."""
    stop = cast("Callable[[], object] | None", getattr(conn, "stop", None))
    if stop is not None:  # before 0.22 the thread ends with the process
        stop()
        _thread(conn).join(5)
