"""The way to one namespace: its schema, connections, and the loop and process they belong to."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from pyworkflow.spi import Claimed, ClaimRequest, Run, StorageBackend
from pyworkflow.storekit import LoopBound
from pyworkflow_storage_sql.postgres._answers import Decoder
from pyworkflow_storage_sql.postgres._batches import Batches
from pyworkflow_storage_sql.postgres._changes import Encoder
from pyworkflow_storage_sql.postgres._connections import Connections, Settings
from pyworkflow_storage_sql.postgres._names import Names
from pyworkflow_storage_sql.postgres._schema import Schema, migrations
from pyworkflow_storage_sql.postgres._watch import News

__all__ = ["Link", "StoreHandle"]


@dataclass(slots=True, kw_only=True)
class Link:
    """What belongs to one event loop."""

    connections: Connections
    news: News
    claims: Batches[ClaimRequest, Claimed]
    reads: Batches[str, Run | None]
    opening: asyncio.Lock = field(default_factory=asyncio.Lock)
    opened: bool = False


class StoreHandle:
    """Opens a namespace for the event loop that first uses it, and calls the server's functions.

    Args:
        storage: The object that it is part of.
        settings: How to connect.
        schema: The namespace's.
        claims: Sends claims that came together.
        reads: Asks for runs that were asked for together.
        unwanted: Releases what was claimed for a caller that was cancelled.
    """

    def __init__(
        self,
        storage: StorageBackend,
        settings: Settings,
        schema: Schema,
        *,
        claims: Callable[[Sequence[ClaimRequest]], Awaitable[list[Claimed]]],
        reads: Callable[[Sequence[str]], Awaitable[list[Run | None]]],
        unwanted: Callable[[Claimed], Awaitable[None]],
    ) -> None:
        self.settings = settings
        self.schema = schema
        self._names = Names()
        self._encoder = Encoder(self._names)
        self.decoder = Decoder(self._names)
        """Reads what the server's functions answer."""
        self._bound = LoopBound[Link](storage)
        self._claims, self._reads, self._unwanted = claims, reads, unwanted
        self._link: Link | None = None

    @property
    def durable(self) -> bool:
        """Whether the server keeps what it acknowledges, as far as it was asked."""
        return self._link is None or self._link.connections.durable

    @property
    def news(self) -> News:
        """Who waits here, and what the others are told; there once something was called."""
        assert self._link is not None
        return self._link.news

    async def use(self) -> Link:
        """What belongs to this loop; connects and brings the schema forward at the first use.

        Raises:
            StorageError: The object was closed, or belongs to another loop.
        """
        link = self._bound.get()
        if link is not None and link.opened:
            return link
        link = link or self._begin()
        async with link.opening:
            if not link.opened:
                try:
                    await self.schema.migrate(link.connections)
                    names = self.schema.fill("SELECT short, name FROM {schema}.names")
                    self._names.learn(await link.connections.call(names))
                except BaseException:
                    # A caller that cannot open the store has nothing to close.
                    await link.connections.let_go()
                    raise
                link.opened = True
        return link

    def _begin(self) -> Link:
        """At the first use, and at the first one in a forked child."""
        connections = Connections(self.settings)
        digest = sha256(self.schema.name.encode()).hexdigest()[:24]
        self._link = Link(
            connections=connections,
            news=News(connections, f"pyworkflow_{digest}"),
            claims=Batches(self._claims, 1, self._unwanted),
            reads=Batches(self._reads, 1),
        )
        return self._bound.put(self._link)

    async def close(self) -> None:
        """Close the connections. Idempotent."""
        link = self._bound.close()
        if link is not None:
            await link.news.close()
            await link.connections.close()

    async def migrate(self) -> None:
        """Bring the schema forward."""
        await self.schema.migrate((self._bound.get() or self._begin()).connections)

    async def pending_migrations(self) -> list[str]:
        """Names of the migrations that ``migrate`` would apply; writes nothing."""
        link = self._bound.get() or self._begin()
        version = await self.schema.version(link.connections)
        return [name for number, name, _ in migrations() if number > version]

    async def encoder(self) -> Encoder:
        """Writes arguments; the store is open, so that its names are known."""
        await self.use()
        return self._encoder

    async def call(self, query: str, *args: object) -> list[Any]:
        """The rows of one statement; ``{schema}`` stands for the namespace's."""
        link = await self.use()
        return await link.connections.call(self.schema.fill(query), *args)

    async def ask(self, expression: str, *args: object) -> Any:
        """The single value of a function or expression."""
        rows = await self.call(f"SELECT {expression} AS v", *args)
        return rows[0]["v"]
