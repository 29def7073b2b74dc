"""A schema per namespace, brought forward by numbered migrations: forward only, one transaction each.

Processes that race wait for each other by an advisory lock that ends with its transaction; one that
is killed midway leaves whole migrations behind, and the next goes on after them.
"""

from __future__ import annotations

import logging
import re
from functools import cache
from hashlib import sha256
from importlib.resources import files
from typing import Any

import asyncpg  # type: ignore[import-untyped]  # it has no types

from pyworkflow.spi import ConfigurationError, SchemaTooNew
from pyworkflow.storekit import failpoints
from pyworkflow_storage_sql.postgres._connections import Connections
from pyworkflow_storage_sql.postgres._errors import translate

__all__ = ["Schema", "migrations", "schema_name"]

_log = logging.getLogger("pyworkflow.storage.postgresql")

failpoints.register(
    __name__,
    OSError,
    {"postgres.migrating": "a step of the schema's migration is done, and not committed"},
)

_PLAIN = re.compile(r"[a-z0-9_]+")
_LONGEST = 63


@cache
def migrations() -> tuple[tuple[int, str, str], ...]:
    """Number, name and text of each, in order."""
    found = [
        (int(path.name[:4]), path.name, path.read_text(encoding="utf-8"))
        for path in files("pyworkflow_storage_sql.postgres").joinpath("migrations").iterdir()
        if path.name.endswith(".sql")
    ]
    return tuple(sorted(found))


def schema_name(schema: str, namespace: str) -> str:
    """The schema that holds a namespace; different for different namespaces."""
    if namespace == "default":
        return schema
    name = f"{schema}_{namespace}"
    if _PLAIN.fullmatch(namespace) and len(name.encode()) <= _LONGEST:
        return name
    # A hyphen, which plain names do not have, keeps these apart from them.
    digest = sha256(namespace.encode()).hexdigest()[:20]
    slug = re.sub(r"[^a-z0-9_]+", "_", namespace.lower())
    room = _LONGEST - len(f"{schema}_-{digest}".encode())
    return f"{schema}_{slug[: max(0, room)]}-{digest}"


class Schema:
    """One namespace's schema."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.quoted = '"' + name.replace('"', '""') + '"'

    def fill(self, text: str) -> str:
        """The text of a migration or statement, for this schema."""
        # In literals ('{schema}.clock') an apostrophe would end them: the name has none.
        return text.replace("{schema}", self.quoted)

    async def version(self, connections: Connections) -> int:
        """The number of the last migration; 0 for none. One round trip when there is any.

        Raises:
            SchemaTooNew: A newer version wrote it.
            ConfigurationError: The database cannot hold Unicode.
        """
        connection = await connections.borrow()
        broken = True
        try:
            found = await self._read(connection)
            broken = False
        except asyncpg.PostgresError as exc:
            broken = False
            raise translate(exc, connections.settings.where) from exc
        except Exception as exc:
            raise translate(exc, connections.settings.where) from exc
        finally:
            connections.give(connection, broken=broken)
        return self._supported(found, connections)

    def _supported(self, found: tuple[int, str, bool, bool], connections: Connections) -> int:
        number, encoding, durable, plain = found
        if encoding != "UTF8":
            raise ConfigurationError(
                f"the database's encoding is not UTF8: encoding={encoding} "
                f"storage={connections.settings.where}; create one WITH ENCODING 'UTF8'"
            )
        latest = migrations()[-1][0]
        if number > latest:
            raise SchemaTooNew(f"schema {self.name}", number, latest)
        if connections.durable and not durable:
            _log.warning(
                "PostgreSQL may lose what it acknowledged: storage=%s; "
                "fsync or full_page_writes is off",
                connections.settings.where,
            )
        connections.durable = durable
        connections.plain = connections.plain or plain
        return number

    async def _read(self, connection: Any) -> tuple[int, str, bool, bool]:
        # A transaction even for one statement: see Connections.call.
        async with connection.transaction():
            facts = await connection.fetchrow(
                "SELECT to_regclass($1) IS NOT NULL AS there, "
                "current_setting('server_encoding') AS encoding, "
                "current_setting('fsync')::bool AND current_setting('full_page_writes')::bool "
                "AS durable, "
                "current_setting('default_transaction_isolation') = 'read committed' "
                "AND current_setting('synchronous_commit') <> 'off' AS plain",
                f"{self.quoted}.migrations",
            )
            number = (
                await connection.fetchval(
                    self.fill("SELECT coalesce(max(number), 0) FROM {schema}.migrations")
                )
                if facts["there"]
                else 0
            )
            return number, facts["encoding"], facts["durable"], facts["plain"]

    async def migrate(self, connections: Connections) -> None:
        """Apply what is missing."""
        version = await self.version(connections)
        for number, name, text in migrations():
            if number > version:
                await self._apply(connections, number, name, text)

    async def _apply(self, connections: Connections, number: int, name: str, text: str) -> None:
        connection = await connections.borrow()
        broken = True
        try:
            # What others did is seen once their lock is gone, whatever the role's default is.
            async with connection.transaction(isolation="read_committed"):
                key = int.from_bytes(sha256(self.name.encode()).digest()[:8], signed=True)
                await connection.execute(f"SELECT pg_advisory_xact_lock({key})")
                # A session takes notice of what others made when it opens a table, not while it
                # waits: without this, IF NOT EXISTS goes by what it knew before.
                await connection.execute("SELECT count(*) FROM pg_catalog.pg_namespace")
                await connection.execute(
                    f"CREATE SCHEMA IF NOT EXISTS {self.quoted};"
                    f"CREATE TABLE IF NOT EXISTS {self.quoted}.migrations ("
                    "number int PRIMARY KEY, name text NOT NULL,"
                    "applied_at timestamptz NOT NULL DEFAULT clock_timestamp())"
                )
                last = await connection.fetchval(
                    self.fill("SELECT coalesce(max(number), 0) FROM {schema}.migrations")
                )
                if last < number:
                    await connection.execute(self.fill(text))
                    if failpoints.active:
                        failpoints.hit("postgres.migrating")
                    await connection.execute(
                        self.fill("INSERT INTO {schema}.migrations VALUES ($1, $2)"), number, name
                    )
            broken = False
        except asyncpg.PostgresError as exc:
            broken = False
            raise translate(exc, connections.settings.where) from exc
        except Exception as exc:
            raise translate(exc, connections.settings.where) from exc
        finally:
            connections.give(connection, broken=broken)
