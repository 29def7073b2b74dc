"""A damaged answer of the server is an outage, not a traceback (found.md L5)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from urllib.parse import urlsplit
from uuid import uuid4

import pytest

from pyworkflow.errors import StorageUnavailable
from pyworkflow_storage_redis import LostWrites, RedisStorageBackend
from tests.servers import ValkeyServer

Damage = Callable[[bytes], bytes]
DAMAGES: dict[str, Damage] = {
    "no JSON": lambda data: data.replace(b"[", b"x"),
    "no text": lambda data: data.replace(b"[", b"\xff"),
    "another value": lambda _: b"$4\r\nnull\r\n",
    "a number": lambda _: b":1\r\n",
    "no length": lambda _: b"$12z\r\nrubbish\r\n",
    "no answer": lambda _: b"\x00\x01\x02\r\n",
}


class Damager:
    """A proxy that damages the server's answers while it is told to."""

    def __init__(self) -> None:
        self.damage: Damage | None = None
        self.times = 0
        self.port = 0
        self.tasks = set[asyncio.Task[object]]()

    async def accept(
        self, host: str, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Carry one connection."""
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        try:
            there, back = await asyncio.open_connection(host, port)
        except BaseException:  # the test is over
            writer.close()
            raise
        try:
            with suppress(asyncio.CancelledError):  # the test is over
                await asyncio.gather(
                    self.carry(reader, back, False), self.carry(there, writer, True)
                )
        finally:
            back.close()
            writer.close()

    async def carry(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, answers: bool
    ) -> None:
        """Carry one direction."""
        try:
            while data := await source.read(65_536):
                if answers and self.damage is not None and self.times > 0:
                    self.times -= 1
                    data = self.damage(data)
                target.write(data)
                await target.drain()
        except OSError:
            pass
        finally:
            target.close()


@asynccontextmanager
async def damaged(url: str) -> AsyncIterator[tuple[Damager, str]]:
    """The proxy, and the URL of the server behind it."""
    parts, damager = urlsplit(url), Damager()
    assert parts.hostname is not None
    host, port = parts.hostname, parts.port or 6379
    server = await asyncio.start_server(
        lambda reader, writer: damager.accept(host, port, reader, writer), "127.0.0.1", 0
    )
    damager.port = server.sockets[0].getsockname()[1]
    try:
        yield damager, url.replace(f"{host}:{port}", f"127.0.0.1:{damager.port}")
    finally:
        server.close()
        for task in damager.tasks:
            task.cancel()
        await asyncio.gather(*damager.tasks, return_exceptions=True)
        await asyncio.sleep(0)  # for the ends of their connections


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("kind", DAMAGES)
def test_l05_a_damaged_answer_is_an_outage(valkey: ValkeyServer, kind: str, times: int) -> None:
    async def main() -> None:
        async with (
            damaged(valkey.url) as (damager, url),
            RedisStorageBackend(url, namespace=uuid4().hex, timeout=5) as store,
        ):
            assert await store.get_run("none") is None
            damager.damage, damager.times = DAMAGES[kind], times
            with suppress(StorageUnavailable):  # after the second damaged answer
                assert await store.holders() == []
            assert damager.times == 0 or times == 2
            damager.damage = None
            assert await store.holders() == []

    asyncio.run(main())


def test_l03_lost_writes_say_what_to_do() -> None:
    said = str(LostWrites("redis://server/0", 7, "this client was told of later writes"))
    assert "restart every worker" in said
    assert "restore a copy" in said
