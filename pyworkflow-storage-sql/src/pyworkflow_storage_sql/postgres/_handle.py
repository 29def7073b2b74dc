"""The part of the PostgreSQL backend that connects: to whom it belongs, opening, one call.

A method is a call of a function that lives in the server; names that are too long for its indexes
are spelled out in a table, which is asked for those that nobody here has met.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any, Self

from pyworkflow.spi import (
    Capabilities,
    Claimed,
    ClaimRequest,
    ConfigurationError,
    Run,
    StorageBackend,
    StorageError,
    StorageInfo,
)
from pyworkflow_storage_sql.postgres._answers import Reader
from pyworkflow_storage_sql.postgres._batches import Batches
from pyworkflow_storage_sql.postgres._changes import Request
from pyworkflow_storage_sql.postgres._connections import Connections, Settings, location
from pyworkflow_storage_sql.postgres._names import Names
from pyworkflow_storage_sql.postgres._schema import Schema, migrations, schema_name
from pyworkflow_storage_sql.postgres._watch import News

__all__ = ["INFO", "PostgresBase"]

_CAPABILITIES = Capabilities(
    durable=True,
    multi_process=True,
    multi_host=True,
    server_clock=True,
    watch=True,
    batched=True,
    indexed_filters=True,
    purge_by_age=True,
    large_history=True,
)
#: What every object of this kind declares.
INFO = StorageInfo(
    contract_version=2, name="postgresql", location="", capabilities=_CAPABILITIES, batches=2
)


class PostgresBase(StorageBackend):
    """Connections of one process and loop to one schema."""

    def __init__(
        self,
        dsn: str,
        *,
        namespace: str = "default",
        schema: str = "pyworkflow",
        connections: int = 2,
        pooled: bool | None = None,
        timeout: float = 30,
    ) -> None:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,30}", schema) or schema.startswith("pg_"):
            raise ConfigurationError(
                f"not a name for a schema: schema={schema!r}; "
                "take letters, digits and underscores, at most 31, and not pg_"
            )
        if connections < 1:
            raise ConfigurationError(
                f"there must be a connection: connections={connections}; 2 is right mostly"
            )
        where, port = location(dsn)
        self._settings = Settings(
            dsn,
            where,
            connections,
            # Where poolers usually listen; whoever runs PostgreSQL itself there says so.
            port in {6432, 6543} if pooled is None else pooled,
            timeout,
        )
        self._namespace = namespace
        self._base = schema
        self._schema = Schema(schema_name(schema, namespace))
        self._connections: Connections | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._opening: asyncio.Lock | None = None
        self._opened = False
        self._closed = False
        self._names = Names()
        self._reader = Reader(self._names)
        self._news: News
        self._claims: Batches[ClaimRequest, Claimed]
        self._reads: Batches[str, Run | None]
        fill = self._schema.fill
        self._commit_sql = fill("SELECT * FROM {schema}.commit_many($1::jsonb)")
        self._claim_sql = fill("SELECT * FROM {schema}.claim_many($1::jsonb)")
        self._run_sql = fill(
            "SELECT {schema}.show_run(run_id, {schema}.instant()) AS run "
            "FROM unnest($1::text[]) AS run_id"
        )

    def clone(self) -> Self:
        """Another object on the same schema."""
        settings = self._settings
        return type(self)(
            settings.dsn,
            namespace=self._namespace,
            schema=self._base,
            connections=settings.connections,
            pooled=settings.pooled,
            timeout=settings.timeout,
        )

    def info(self) -> StorageInfo:
        """Name, location and capabilities.

        ``durable`` is what the server said when it was opened: not with ``fsync`` or
        ``full_page_writes`` off.
        """
        connections = self._connections
        durable = connections is None or connections.durable
        capabilities = replace(_CAPABILITIES, durable=durable)
        if self._settings.pooled:
            capabilities = replace(capabilities, watch=False)
        return replace(
            INFO,
            location=f"postgresql://{self._settings.where}?schema={self._schema.name}",
            namespace=self._namespace,
            capabilities=capabilities,
        )

    async def open(self) -> None:
        """Connect, and bring the schema forward."""
        await self._use()

    async def close(self) -> None:
        """Let go of the connections."""
        self._closed = True
        connections, self._connections = self._connections, None
        if connections is None:
            return
        if connections.pid != os.getpid():
            connections.leave_to_parent()
            return
        await self._news.close()
        await connections.close()

    async def _use(self) -> Connections:
        connections = self._connections
        if (
            self._opened
            and connections is not None
            and self._loop is asyncio.get_running_loop()
            and connections.pid == os.getpid()
        ):
            return connections
        connections = self._mine()
        assert self._opening is not None
        async with self._opening:
            if not self._opened:
                try:
                    await self._schema.migrate(connections)
                except BaseException:
                    # Who could not open it has nothing to close.
                    await connections.let_go()
                    raise
                self._opened = True
        return connections

    def _mine(self) -> Connections:
        """The connections of this process and loop, not necessarily opened."""
        if self._closed:
            raise StorageError(
                f"the storage was closed: storage={self._settings.where}; "
                "make another object for it"
            )
        loop = asyncio.get_running_loop()
        connections = self._connections
        if connections is not None and connections.pid != os.getpid():
            connections.leave_to_parent()
            connections = None
        if connections is None:
            connections = self._connections = Connections(self._settings)
            digest = sha256(self._schema.name.encode()).hexdigest()[:24]
            self._news = News(connections, f"pyworkflow_{digest}")
            self._claims = Batches(self._send_claims, 1, self._give_back)
            self._reads = Batches(self._send_reads, 1)
            self._opening = asyncio.Lock()
            self._opened = False
            self._loop = loop
        elif self._loop is not loop:
            raise StorageError(
                f"the storage object belongs to another event loop: "
                f"storage={self._settings.where}; use clone() to make one for this loop"
            )
        return connections

    async def migrate(self) -> None:
        """Bring the schema forward."""
        await self._schema.migrate(self._mine())

    async def pending_migrations(self) -> list[str]:
        """Names of the migrations that ``migrate`` would apply; writes nothing."""
        version = await self._schema.version(self._mine())
        return [name for number, name, _ in migrations() if number > version]

    async def _call(self, query: str, *args: object) -> list[Any]:
        rows = await (await self._use()).call(query, *args)
        await self._learn(rows)
        return rows

    async def _ask(self, function: str, *args: object) -> Any:
        """The single value of a function or expression; ``{schema}`` stands for ours."""
        rows = await self._call(self._schema.fill(f"SELECT {function} AS v"), *args)
        return rows[0]["v"]

    async def _learn(self, rows: list[Any]) -> None:
        unknown = self._names.unknown(value for row in rows for value in row.values())
        if unknown:
            found = await (await self._use()).call(
                self._schema.fill("SELECT short, name FROM {schema}.names WHERE short = ANY ($1)"),
                list(unknown),
            )
            self._names.learn({row["short"]: row["name"] for row in found})

    async def _meet(self, request: Request) -> None:
        """Long names are there before anything that uses them: they name the same for ever."""
        if request.met:
            await (await self._use()).call(
                self._schema.fill(
                    "INSERT INTO {schema}.names (short, name) SELECT * "
                    "FROM unnest($1::text[], $2::text[]) ORDER BY 1 ON CONFLICT DO NOTHING"
                ),
                list(request.met),
                list(request.met.values()),
            )
            self._names.learn(request.met)

    def _name(self, name: str) -> str:
        return self._names.short(name, {})

    async def _send_claims(self, requests: Sequence[ClaimRequest]) -> list[Claimed]:
        raise NotImplementedError

    async def _send_reads(self, run_ids: Sequence[str]) -> list[Run | None]:
        raise NotImplementedError

    async def _give_back(self, claimed: Claimed) -> None:
        raise NotImplementedError
