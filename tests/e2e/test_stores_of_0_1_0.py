"""Stores that 0.1.0 wrote: today's code opens each, reads its runs, and ends those that are open."""

from __future__ import annotations

import asyncio
import gzip
import json
import tarfile
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import pytest

from pyworkflow import Client, IdempotencyConflict
from pyworkflow.spi import RunQuery, StorageBackend
from pyworkflow.storage.file import FileStorageBackend
from pyworkflow.storage.redis import RedisStorageBackend
from pyworkflow.storage.sql import PostgresStorageBackend, SQLiteStorageBackend
from pyworkflow.storekit import fsck
from pyworkflow.testing import History, replay
from tests.e2e.stores_of_0_1_0 import program

FOLDER = Path(__file__).parent / "stores_of_0_1_0"
RUNS: dict[str, dict[str, str]] = json.loads((FOLDER / "runs.json").read_text("utf-8"))
LONG = "order-" + "é" * 300
RECEIPT = program.Receipt(order=7, price=Decimal("10.50"))


def file(tmp_path: Path, request: pytest.FixtureRequest) -> StorageBackend:
    with tarfile.open(FOLDER / "file.tar.gz") as archive:
        archive.extractall(tmp_path / "store", filter="data")
    return FileStorageBackend(tmp_path / "store")


def sqlite(tmp_path: Path, request: pytest.FixtureRequest) -> StorageBackend:
    (tmp_path / "store.db").write_bytes(gzip.decompress((FOLDER / "sqlite.db.gz").read_bytes()))
    return SQLiteStorageBackend(tmp_path / "store.db")


def postgresql(tmp_path: Path, request: pytest.FixtureRequest) -> StorageBackend:
    server = request.getfixturevalue("postgres")
    url = server.database()
    server.sql(gzip.decompress((FOLDER / "postgresql.sql.gz").read_bytes()).decode(), url=url)
    return PostgresStorageBackend(url)


def redis(tmp_path: Path, request: pytest.FixtureRequest) -> StorageBackend:
    url = request.getfixturevalue("make_valkey")().url
    asyncio.run(load_keys(url))
    return RedisStorageBackend(url)


async def load_keys(url: str) -> None:
    from redis.asyncio import Redis

    async with Redis.from_url(url, encoding="latin-1", decode_responses=True) as server:
        for key, kind, content in json.loads((FOLDER / "redis.json").read_text("utf-8")):
            match kind:
                case "string":
                    await server.set(key, content)
                case "hash":
                    await server.hset(key, mapping=dict(content))
                case "zset":
                    await server.zadd(key, dict(content))
                case "list":
                    await server.rpush(key, *content)
                case "set":
                    await server.sadd(key, *content)
                case _:
                    raise AssertionError(kind)


STORES: dict[str, Callable[[Path, pytest.FixtureRequest], StorageBackend]] = {
    "file": file,
    "sqlite": sqlite,
    "postgresql": postgresql,
    "redis": redis,
}


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, StorageBackend]:
    return request.param, STORES[request.param](tmp_path, request)


def test_what_had_ended_is_read_as_it_was(store: tuple[str, StorageBackend]) -> None:
    name, storage = store
    ids = RUNS[name]

    async def main() -> None:
        async with storage:
            assert await fsck(storage) == []
            page = await storage.list_runs(RunQuery())
            assert {run.run_id for run in page.items} == set(ids.values()) - {ids["purged"]}
            assert await storage.find_run("purged") == ids["purged"]
            assert await storage.find_run(LONG) == ids["done"]
            for kind in ("done", "failed", "large", "cancelled", "sleeper"):
                history = await History.fetch(ids[kind], storage)
                assert replay(history).mismatch is None, kind
            async with Client(storage=storage, executor="local://") as client:
                assert await client.result(ids["done"]) == RECEIPT
                assert await client.result(ids["large"]) == "x" * 100_000
                with pytest.raises(Exception, match="refused: this"):
                    await client.result(ids["failed"])

    asyncio.run(main())


def test_what_was_open_is_ended_by_todays_code(store: tuple[str, StorageBackend]) -> None:
    name, storage = store
    ids = RUNS[name]

    async def main() -> None:
        async with storage, Client(storage=storage, executor="local://") as client:
            assert await client.result(ids["pending"], timeout=60) == RECEIPT
            assert await client.result(ids["sleeper"], timeout=60) == [10, 12, 20]
            assert await client.result(ids["flaky"], timeout=60) == 2
            assert await client.result(ids["stalled"], timeout=60) == 8
            assert await fsck(storage) == []
            # The key of a purged run, and a key longer than new ones may be, are still taken.
            again = await client.start(program.large, 10, idempotency_key="pending2")
            assert await client.result(again, timeout=60) == "x" * 10
            with pytest.raises(IdempotencyConflict):
                await client.start(program.large, 10, idempotency_key="pending")

    asyncio.run(main())
