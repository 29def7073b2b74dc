"""The Redis backend passes the suite, on Valkey with ``appendfsync always``."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import pytest

from pyworkflow.spi import StorageBackend
from pyworkflow_conformance import StorageConformance
from pyworkflow_storage_redis import RedisStorageBackend
from tests.conformance.sizes import MANY_RUNS
from tests.servers import ValkeyServer


class TestRedis(StorageConformance):
    capabilities = RedisStorageBackend("redis://unused", durable=True).info().capabilities
    many_runs = MANY_RUNS
    valkey: ValkeyServer
    databases = count(1)

    # Not the shared one, which keeps no file: some checks kill the server.
    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _valkey(cls) -> Iterator[None]:
        with ValkeyServer({"databases": 200}) as cls.valkey:
            yield

    async def make(self, namespace: str) -> StorageBackend:
        return RedisStorageBackend(self.valkey.url, namespace=namespace, durable=True)

    def url(self, namespace: str) -> str:
        return f"{self.valkey.url}?durable=true"

    def server(self, namespace: str) -> ValkeyServer:
        return self.valkey

    def writes(self, namespace: str) -> object:
        find = "return tonumber(redis.call('INFO', 'persistence'):match('changes_since_last_save:(%d+)'))"
        return self.valkey.command("EVAL", find, "0")

    async def make_fresh(self) -> str:
        self.valkey.command("SCRIPT", "FLUSH")
        return f"{self.valkey.url.removesuffix('/0')}/{next(self.databases)}?durable=true"

    async def make_newer(self, namespace: str) -> None:
        self.valkey.command("HSET", f"pyworkflow:{{{namespace}}}:meta", "format", "99")
