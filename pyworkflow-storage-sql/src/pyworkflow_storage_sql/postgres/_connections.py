"""A few connections to one database, each used by one call at a time, renewed when broken."""

from __future__ import annotations

import asyncio
import json
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import unquote, urlsplit

import asyncpg  # type: ignore[import-untyped]  # it has no types

from pyworkflow.spi import ConfigurationError, PayloadTooLarge, StorageError, StorageUnavailable
from pyworkflow.storekit import failpoints
from pyworkflow_storage_sql.postgres._errors import AGAIN, translate

__all__ = ["Connections", "EventsMissing", "Settings", "Transport", "location"]

failpoints.register(
    __name__,
    OSError,
    {
        "postgres.before_send": "a statement is complete, and was not sent",
        "postgres.after_answer": "the server has answered a statement, nobody has the answer yet",
    },
)

_TRIES = 8
_SERVER = {
    "application_name": "pyworkflow",
    "default_transaction_isolation": "read committed",
    "jit": "off",
    "standard_conforming_strings": "on",
    "timezone": "UTC",
}
#: A role or database may have it off, and other values wait for more, which is not ours to undo.
_WAIT_FOR_DISK = (
    "SELECT pg_catalog.set_config('synchronous_commit', 'on', {local}) "
    "WHERE pg_catalog.current_setting('synchronous_commit') = 'off'"
)
#: Without its own incomplete annotations.
_driver: Any = asyncpg

Transport = Any
"""An asyncpg connection: the driver has no types of its own before 0.30."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How to connect."""

    dsn: str = field(repr=False)
    where: str
    """Host, port and database, for messages."""
    connections: int
    pooled: bool
    """Behind a pooler that shares server connections between transactions: no session state."""
    timeout: float
    """Seconds for one call, and for connecting."""


class EventsMissing(Exception):
    """A copy left events out."""

    def __init__(self, run_id: str, last: int, following: int) -> None:
        super().__init__(run_id, last, following)
        self.run_id, self.last, self.following = run_id, last, following

    def __str__(self) -> str:
        return (
            f"events are missing: run_id={self.run_id} last_seq={self.last} next={self.following}"
        )


class Connections:
    """The connections of one backend object in one event loop."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.plain = not settings.pooled
        """Whether a statement alone is a transaction as it should be: one, or two round trips.

        Behind a pooler that is for the server's defaults to say, which are asked once. Poolers
        leave a client its server from the first half of the driver's request to the second.
        """
        self.durable = True
        """Whether the server keeps what it acknowledged: as the server says, once it was asked."""
        self._free: list[Transport] = []
        self._made = 0
        self._queue: deque[asyncio.Future[None]] = deque()
        self._closed = False

    async def connect(self) -> Transport:
        """A new connection.

        Raises:
            StorageUnavailable, ConfigurationError: There is none to be had.
        """
        settings = self.settings
        connection: Transport = None
        try:
            connection = await _driver.connect(
                settings.dsn,
                timeout=settings.timeout,
                command_timeout=settings.timeout,
                statement_cache_size=0 if settings.pooled else 100,
                max_cached_statement_lifetime=0,
                server_settings=None if settings.pooled else _SERVER,
            )
            if not settings.pooled:
                await connection.execute(_WAIT_FOR_DISK.format(local="false"))
        except (Exception, asyncio.CancelledError) as exc:
            if connection is not None:
                _end(connection)
            if not isinstance(exc, Exception):
                raise
            # Not chained: the driver's text may hold the connection string.
            raise translate(exc, settings.where) from None
        return connection

    async def begin(self, connection: Transport) -> None:
        """Begin a transaction that relies on nothing a session holds."""
        await connection.execute(
            f"BEGIN ISOLATION LEVEL READ COMMITTED; {_WAIT_FOR_DISK.format(local='true')}"
        )

    async def call(self, query: str, *args: object) -> list[Any]:
        """The rows of one statement, in a transaction of its own.

        Deadlocks and serialization failures are tried again a few times.
        """
        for attempt in range(_TRIES):
            connection = await self._take()
            try:
                if failpoints.active:
                    failpoints.hit("postgres.before_send")
                if self.plain:
                    rows = await connection.fetch(query, *args)
                else:
                    await self.begin(connection)
                    try:
                        rows = await connection.fetch(query, *args)
                    except asyncpg.PostgresError:
                        await connection.execute("ROLLBACK")
                        raise
                    await connection.execute("COMMIT")
                if failpoints.active:
                    failpoints.hit("postgres.after_answer")
            except asyncpg.PostgresError as error:
                exc: Any = error  # its fields are not annotated
                self._give(connection, broken=exc.sqlstate in {"25006", "57P01", "57P02"})
                if exc.sqlstate in AGAIN and attempt < _TRIES - 1:
                    await asyncio.sleep(0.002 * 2**attempt * (0.5 + os.urandom(1)[0] / 255))
                    continue
                if exc.sqlstate == "PW001":
                    raise EventsMissing(*json.loads(str(exc.detail))) from None
                raise translate(error, self.settings.where) from error
            except (Exception, asyncio.CancelledError) as exc:
                # Nobody knows what its server does now.
                self._give(connection, broken=True)
                if not isinstance(exc, Exception):
                    raise
                if isinstance(exc, PayloadTooLarge | StorageError):
                    raise
                raise translate(exc, self.settings.where) from exc
            self._give(connection)
            return cast("list[Any]", rows)
        raise AssertionError("unreachable")  # the last attempt returns or raises

    async def script(self, connection: Transport, text: str) -> None:
        """Statements without answers, sent at once."""
        try:
            await connection.execute(text)
        except Exception as exc:
            raise translate(exc, self.settings.where) from exc

    async def borrow(self) -> Transport:
        """A connection for several statements; ``give`` brings it back."""
        return await self._take()

    def give(self, connection: Transport, *, broken: bool = False) -> None:
        """Bring a borrowed connection back."""
        self._give(connection, broken=broken)

    async def _take(self) -> Transport:
        while True:
            if self._closed:
                raise StorageUnavailable(f"the storage is closing: storage={self.settings.where}")
            while self._free:
                connection = self._free.pop()
                if not connection.is_closed():
                    return connection
                self._made -= 1
            if self._made < self.settings.connections:
                self._made += 1
                try:
                    return await self.connect()
                except BaseException:
                    self._made -= 1
                    self._wake()
                    raise
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._queue.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._wake()
                raise

    def _give(self, connection: Transport, *, broken: bool = False) -> None:
        if broken or self._closed or connection.is_closed():
            self._made -= 1
            _end(connection)
        else:
            self._free.append(connection)
        self._wake()

    def _wake(self) -> None:
        while self._queue:
            turn = self._queue.popleft()
            if not turn.done():
                turn.set_result(None)
                return

    async def close(self) -> None:
        """End what is free at once, and what is in use when its call returns."""
        self._closed = True
        await self.let_go()
        while self._queue:
            self._wake()

    async def let_go(self) -> None:
        """End what is free; a later call connects anew."""
        free, self._free = self._free, []
        self._made -= len(free)
        for connection in free:
            try:
                await connection.close(timeout=2)
            except Exception:  # noqa: BLE001 - it ends one way or the other
                _end(connection)


def _end(connection: Transport) -> None:
    try:
        terminate: Callable[[], None] = connection.terminate
        terminate()
    except Exception:  # noqa: BLE001 - it is gone already
        pass


def location(dsn: str) -> tuple[str, int]:
    """Host, port and database, without user and password."""
    try:
        parts = urlsplit(dsn)
        hosts = parts.netloc.rpartition("@")[2]
        port = parts.port or 5432 if "," not in hosts else 5432
    except ValueError:
        raise ConfigurationError(
            "the connection string is wrong; write postgresql://USER:PASSWORD@HOST:5432/DATABASE"
        ) from None
    if parts.scheme.lower() not in {"postgresql", "postgres"}:
        raise ConfigurationError(
            "the connection string is no URL; write postgresql://USER:PASSWORD@HOST:5432/DATABASE"
        )
    return f"{hosts or 'localhost'}/{unquote(parts.path.strip('/'))}", port
