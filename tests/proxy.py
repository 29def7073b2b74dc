"""A network that fails: a proxy on the loopback before a server, told what to do to connections."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Awaitable, Callable
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit, urlunsplit

__all__ = ["Proxy"]

T = TypeVar("T")

#: With it, closing sends a reset instead of a polite end.
RESET = struct.pack("ii", 1, 0)


class _Link:
    """One client's connection and the server's behind it."""

    def __init__(
        self, client: asyncio.StreamWriter, server: asyncio.StreamWriter, tasks: list[Any]
    ) -> None:
        self.client, self.server, self.tasks = client, server, tasks


class Proxy:
    """Stands before the server of a URL; ``proxy.url`` is the same URL through the proxy.

    It runs in a thread of its own; each method returns when its effect is there.
    """

    def __init__(self, url: str) -> None:
        self._parts = urlsplit(url)
        assert self._parts.port is not None
        #: Connections accepted so far.
        self.count = 0
        #: Seconds by which every piece of data is late, in both directions.
        self.delay = 0.0
        self._links: set[_Link] = set()
        self._flow = asyncio.Event()
        self._refusing = False
        self._after_request: int | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy")
        self._thread.start()
        self._listener, self.port = self._call(self._open)

    @property
    def url(self) -> str:
        """The server's URL through the proxy."""
        user, at, _ = self._parts.netloc.rpartition("@")
        return urlunsplit(self._parts._replace(netloc=f"{user}{at}127.0.0.1:{self.port}"))

    @property
    def connections(self) -> int:
        """Connections that stand now."""
        return len(self._links)

    def drop(self) -> None:
        """Reset every connection; new ones are served."""
        self._call(self._drop)

    def refuse(self) -> None:
        """Reset every connection, and each new one at once, until ``heal``."""
        self._refusing = True
        self.drop()

    def blackhole(self) -> None:
        """Keep connections open and let nothing through, in both directions, until ``heal``.

        What was sent meanwhile arrives then, as in a network that repeats.
        """
        self._soon(self._flow.clear)

    def half_close(self) -> None:
        """End the server's side: the client reads an end, though it may still write."""
        self._call(self._half_close)

    def drop_before_answer(self, number: int = 1) -> None:
        """Pass the next request on and reset its connection when the answer comes.

        The server has done the work, and the client cannot know: so for ``number`` answers.
        """
        self._after_request = number

    @property
    def armed(self) -> int:
        """Answers that ``drop_before_answer`` will still swallow."""
        return self._after_request or 0

    def heal(self) -> None:
        """Serve again as if nothing had been."""
        self._refusing = False
        self._after_request = None
        self.delay = 0.0
        self._soon(self._flow.set)

    def close(self) -> None:
        """End every connection and the proxy."""
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

    def _soon(self, work: Callable[[], None]) -> None:
        async def run() -> None:
            work()

        self._call(run)

    async def _open(self) -> tuple[asyncio.Server, int]:
        self._flow.set()
        listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return listener, listener.sockets[0].getsockname()[1]

    async def _accept(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        self.count += 1
        try:
            if self._refusing:
                raise ConnectionRefusedError
            host = self._parts.hostname or "127.0.0.1"
            answers, server = await asyncio.open_connection(host, self._parts.port)
        except OSError:
            _reset(client)
            return
        if self._refusing:  # closed or refusing since: nobody would end this link
            _reset(client)
            _reset(server)
            return
        link = _Link(client, server, [])
        self._links.add(link)
        link.tasks += [
            asyncio.ensure_future(self._pump(link, reader, server, answer=False)),
            asyncio.ensure_future(self._pump(link, answers, client, answer=True)),
        ]
        await asyncio.wait(link.tasks)
        self._end(link)

    async def _pump(
        self,
        link: _Link,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        answer: bool,
    ) -> None:
        try:
            while data := await reader.read(65536):
                if self.delay:
                    await asyncio.sleep(self.delay)
                await self._flow.wait()
                if answer and self._after_request:
                    self._after_request -= 1
                    self._end(link)
                    return
                writer.write(data)
                await writer.drain()
            await self._flow.wait()  # an end is as invisible as data in a blackhole
            writer.write_eof()
        except OSError:
            self._end(link)

    def _end(self, link: _Link) -> None:
        if link in self._links:
            self._links.discard(link)
            _reset(link.client)
            _reset(link.server)
            for task in link.tasks:
                if task is not asyncio.current_task():
                    task.cancel()

    async def _drop(self) -> None:
        for link in list(self._links):
            self._end(link)

    async def _half_close(self) -> None:
        for link in list(self._links):
            link.client.write_eof()

    async def _close(self) -> None:
        self._refusing = True
        self._listener.close()
        await self._drop()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:
            _, late = await asyncio.wait(others, timeout=10)  # each ends with its link
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        await asyncio.sleep(0)  # transports let go of their sockets in the next turn of the loop


def _reset(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    if connection is not None and not writer.transport.is_closing():
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    writer.transport.abort()
