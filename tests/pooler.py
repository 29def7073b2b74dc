"""A pooler in transaction mode before PostgreSQL: few server connections, shuffled among clients.

What a session of the server remembers, it remembers of somebody else: no client gets the same one
twice on purpose, and each has settings that no client of ours would choose.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import struct
import threading
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit, urlunsplit

__all__ = ["FOREIGN", "Pooler"]

T = TypeVar("T")

#: Settings of the server's sessions, as a role or an earlier client may leave them behind.
FOREIGN = {
    "default_transaction_isolation": "serializable",
    "timezone": "Asia/Kolkata",
    "datestyle": "German",
    "intervalstyle": "sql_standard",
    "bytea_output": "escape",
    "extra_float_digits": "0",
    "search_path": "pg_temp",
    "synchronous_commit": "off",
}
#: What poolers accept at the start of a connection; they refuse others.
ACCEPTED = {"user", "database", "client_encoding", "application_name", "options"}


class _Server:
    """A connection to the server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer


class Pooler:
    """Stands before the server of a URL; ``pooler.url`` is the same URL through it.

    The server must trust its clients, and they all use the URL's user and database.
    """

    def __init__(
        self, url: str, *, servers: int = 2, settings: Mapping[str, str] = FOREIGN
    ) -> None:
        self._settings = settings
        self._parts = urlsplit(url)
        self._size = servers
        self._free: list[_Server] = []
        self._clients: set[asyncio.StreamWriter] = set()
        # asyncio knows its tasks weakly, and a connection its reader: who waits for an answer
        # while its client is gone would be collected, and the server's connection be lost.
        self._tasks: set[asyncio.Task[Any]] = set()
        self._greeting = b""
        self._turn = asyncio.Condition()
        self._random = random.Random(1)
        #: How often another server than the last was taken, and requests that name a statement.
        self.switches = self.named = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="pooler")
        self._thread.start()
        self._listener, self.port = self._call(self._open)

    @property
    def url(self) -> str:
        """The server's URL through the pooler."""
        user, at, _ = self._parts.netloc.rpartition("@")
        return urlunsplit(self._parts._replace(netloc=f"{user}{at}127.0.0.1:{self.port}"))

    def close(self) -> None:
        """End every connection and the pooler."""
        self._call(self._close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _call(self, work: Callable[[], Awaitable[T]]) -> T:
        async def run() -> T:
            return await work()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(60)

    async def _open(self) -> tuple[asyncio.Server, int]:
        for _ in range(self._size):
            self._free.append(await self._connect())
        listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return listener, listener.sockets[0].getsockname()[1]

    async def _connect(self) -> _Server:
        host = self._parts.hostname or "127.0.0.1"
        reader, writer = await asyncio.open_connection(host, self._parts.port)
        options = {
            "user": self._parts.username or "postgres",
            "database": self._parts.path[1:],
            **self._settings,
        }
        body = b"".join(f"{name}\0{value}\0".encode() for name, value in options.items())
        writer.write(struct.pack("!ii", len(body) + 9, 196608) + body + b"\0")
        greeting = b""
        while True:
            kind, message = await _message(reader)
            assert kind != b"E", message
            greeting += message
            if kind == b"Z":
                self._greeting = greeting
                return _Server(reader, writer)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held: _Server | None = None
        last: _Server | None = None
        answers: asyncio.Task[None] | None = None
        self._clients.add(writer)
        self._keep(asyncio.current_task())
        try:
            if not await self._greet(reader, writer):
                return
            waiting = b""
            while True:
                kind, message = await _message(reader)
                if kind == b"X":
                    return
                waiting += message
                if kind == b"P":
                    self.named += message[5] != 0
                if kind not in b"QSH":
                    continue
                if answers is not None and answers.done():
                    answers.result()
                    held = None  # at rest since the last answer
                if held is None:
                    held = await self._take()
                    self.switches += held is not last
                    last = held
                    answers = self._keep(asyncio.create_task(self._answer(held, writer)))
                held.writer.write(waiting)
                waiting = b""
        except (OSError, asyncio.IncompleteReadError):
            pass  # either side went away
        finally:
            self._clients.discard(writer)
            writer.close()
            if held is not None and answers is not None and not answers.done():
                # In the middle of a transaction: it must end, and its connection with it.
                answers.cancel()
                held.writer.transport.abort()
                with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                    await self._give(await self._connect())

    def _keep(self, task: Any) -> Any:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _answer(self, server: _Server, writer: asyncio.StreamWriter) -> None:
        """Pass answers on until the server is out of any transaction."""
        while True:
            _, message = await _message(server.reader)
            if message[:1] + message[5:] == b"ZI":
                # In one step with the answer: who hears it may go on at once, with another.
                await self._give(server)
                writer.write(message)
                return
            writer.write(message)

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        while True:
            (size,) = struct.unpack("!i", await reader.readexactly(4))
            body = await reader.readexactly(size - 4)
            (code,) = struct.unpack("!i", body[:4])
            if code in {80877103, 80877104}:  # TLS or GSS, which there is none of
                writer.write(b"N")
                continue
            if code != 196608:
                return False
            names = body[4:].decode().split("\0")[:-2:2]
            foreign = set(names) - ACCEPTED
            if foreign:
                text = (
                    f"SFATAL\0C08P01\0Munsupported startup parameter: {min(foreign)}\0\0".encode()
                )
                writer.write(b"E" + struct.pack("!i", len(text) + 4) + text)
                return False
            writer.write(self._greeting)
            return True

    async def _take(self) -> _Server:
        async with self._turn:
            await self._turn.wait_for(lambda: self._free)
            return self._free.pop(self._random.randrange(len(self._free)))

    async def _give(self, server: _Server) -> None:
        async with self._turn:
            self._free.append(server)
            self._turn.notify()

    async def _close(self) -> None:
        self._listener.close()
        for writer in self._clients:
            writer.transport.abort()
        for server in self._free:
            server.writer.transport.abort()
        others: set[Any] = asyncio.all_tasks() - {asyncio.current_task()}
        if others:
            await asyncio.wait(others, timeout=10)  # each ends with its connection


async def _message(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """A message's kind, and all of it."""
    head = await reader.readexactly(5)
    (size,) = struct.unpack("!i", head[1:])
    return head[:1], head + await reader.readexactly(size - 4)
