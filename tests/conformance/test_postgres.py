"""The PostgreSQL backend passes the suite, on a server that waits for the disk."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pyworkflow.spi import StorageBackend
from pyworkflow_conformance import StorageConformance
from pyworkflow_storage_sql import PostgresStorageBackend
from pyworkflow_storage_sql.postgres._schema import Schema, schema_name
from tests.conformance.sizes import MANY_RUNS
from tests.servers import PostgresServer


class TestPostgres(StorageConformance):
    capabilities = PostgresStorageBackend("postgresql://host/base").info().capabilities
    many_runs = MANY_RUNS
    postgres: PostgresServer

    # Not the shared one, which does not wait for the disk: some checks kill the server.
    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _postgres(cls) -> Iterator[None]:
        with PostgresServer() as cls.postgres:
            yield

    async def make(self, namespace: str) -> StorageBackend:
        return PostgresStorageBackend(self.postgres.url, namespace=namespace)

    def url(self, namespace: str) -> str:
        return self.postgres.url

    def server(self, namespace: str) -> PostgresServer:
        return self.postgres

    def writes(self, namespace: str) -> object:
        return self.postgres.sql("SELECT pg_current_wal_insert_lsn()")

    async def make_fresh(self) -> str:
        return self.postgres.database()

    async def make_newer(self, namespace: str) -> None:
        schema = Schema(schema_name("pyworkflow", namespace)).quoted
        self.postgres.sql(f"INSERT INTO {schema}.migrations VALUES (9999, 'of a newer version')")
