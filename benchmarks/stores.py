"""The stores that are measured, each with the rate of commits that nothing on it can beat.

PostgreSQL and Valkey are servers of this process alone, from the wheels that the tests use, reached
over TCP on the loopback and with every commit on disk before it is answered.
"""

from __future__ import annotations

import asyncio
import functools
import os
import sqlite3
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from pyworkflow._plugins import make_storage
from pyworkflow.spi import StorageBackend

if TYPE_CHECKING:
    from tests.servers import PostgresServer, ValkeyServer

STORES = ("memory", "file", "sqlite", "postgres", "redis", "redis-everysec")
#: What a row holds: as much as the two events of a short step.
ROW = "x" * 299
_flush = getattr(os, "fdatasync", os.fsync)


@functools.cache
def server(store: str) -> PostgresServer | ValkeyServer | None:
    """The server behind a store, started at the first call; none for stores in files."""
    from tests.servers import PostgresServer, ValkeyServer

    if store == "postgres":
        return PostgresServer()
    if store.startswith("redis"):
        return ValkeyServer({"appendfsync": store.partition("-")[2] or "always"})
    return None


def server_seconds(store: str) -> float | None:
    """Processor time that the store's server has used."""
    behind = server(store)
    return None if behind is None else behind.cpu_seconds()


@contextmanager
def scratch(directory: Path) -> Iterator[Path]:
    """A directory on the disk that is measured, removed afterwards."""
    with tempfile.TemporaryDirectory(
        prefix="pyworkflow-bench-", dir=directory, ignore_cleanup_errors=True
    ) as path:
        yield Path(path)


@contextmanager
def fresh(store: str, directory: Path) -> Iterator[StorageBackend]:
    """A new, empty store; whoever gets it closes it."""
    namespace = f"bench-{uuid4().hex[:8]}"
    if store == "memory":
        yield make_storage("memory://", namespace)
    else:
        with fresh_url(store, directory) as url:
            yield make_storage(url, namespace)


@contextmanager
def fresh_url(store: str, directory: Path) -> Iterator[str]:
    """The URL of a new, empty store that several processes may use."""
    if store in {"file", "sqlite"}:
        with scratch(directory) as path:
            yield f"file://{path}/store" if store == "file" else f"sqlite:///{path}/store.db"
    elif store == "postgres":
        postgres = _postgres()
        url = postgres.database()
        try:
            yield url
        finally:
            postgres.sql(f"DROP DATABASE {url.rpartition('/')[2]} WITH (FORCE)")
    else:
        valkey = _valkey(store)
        try:
            yield valkey.url
        finally:
            valkey.command("FLUSHALL")


def raw_rate(store: str, directory: Path, seconds: float = 0.25) -> float | None:
    """Commits of one row per second, one at a time; None for a store that has no disk.

    Through the driver of the backend and at its durability, with nothing around them.
    """
    if store == "memory":
        return None
    if store == "file":
        return _appends(directory, seconds)
    if store == "sqlite":
        return _rows(directory, seconds)
    if store == "postgres":
        return asyncio.run(_inserts(_postgres().url, seconds))
    return asyncio.run(_additions(_valkey(store).url, seconds))


def _postgres() -> PostgresServer:
    found = server("postgres")
    assert found is not None
    return found  # type: ignore[return-value]  # the store says which server it is


def _valkey(store: str) -> ValkeyServer:
    found = server(store)
    assert found is not None
    return found  # type: ignore[return-value]  # the store says which server it is


def _appends(directory: Path, seconds: float) -> float:
    """A line and a flush, as a journal without any engine would."""
    line = ROW.encode() + b"\n"
    with scratch(directory) as path:
        fd = os.open(path / "raw", os.O_RDWR | os.O_CREAT)
        try:
            _flush(fd)
            offset = 0

            def append() -> None:
                nonlocal offset
                os.pwrite(fd, line, offset)
                _flush(fd)
                offset += len(line)

            return _timed(append, seconds)
        finally:
            os.close(fd)


def _rows(directory: Path, seconds: float) -> float:
    with scratch(directory) as path, closing(sqlite3.connect(path / "raw.db")) as db:
        db.isolation_level = None  # each statement is a transaction
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("CREATE TABLE raw (id INTEGER PRIMARY KEY, data TEXT)")
        return _timed(lambda: db.execute("INSERT INTO raw (data) VALUES (?)", (ROW,)), seconds)


def _timed(once: Callable[[], object], seconds: float) -> float:
    count = 0
    began = time.perf_counter()
    while (took := time.perf_counter() - began) < seconds:
        once()
        count += 1
    return count / took


async def _timed_async(once: Callable[[], Awaitable[object]], seconds: float) -> float:
    await once()
    count = 0
    began = time.perf_counter()
    while (took := time.perf_counter() - began) < seconds:
        await once()
        count += 1
    return count / took


async def _inserts(url: str, seconds: float) -> float:
    import asyncpg

    connection = await asyncpg.connect(url)
    try:
        await connection.execute("CREATE TABLE IF NOT EXISTS raw (id bigserial, data text)")
        statement = await connection.prepare("INSERT INTO raw (data) VALUES ($1)")
        return await _timed_async(lambda: statement.fetch(ROW), seconds)
    finally:
        await connection.execute("DROP TABLE IF EXISTS raw")
        await connection.close()


async def _additions(url: str, seconds: float) -> float:
    from redis.asyncio import Redis

    client = Redis.from_url(url)
    try:
        return await _timed_async(lambda: client.xadd("raw", {"data": ROW}), seconds)
    finally:
        await client.delete("raw")
        await client.aclose()
