"""Who waits in ``watch``: one connection that is subscribed to what they wait for."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Any

from redis.exceptions import RedisError

from pyworkflow_storage_redis._connection import RedisConnection

__all__ = ["News", "Waiter"]

#: Channels that nobody waits at any more are given up together: a command for each costs more.
_IDLE = 256


class Waiter:
    """Somebody in ``watch``, at one channel."""

    def __init__(self, channel: bytes, after: int) -> None:
        self.channel = channel
        self.after = after
        self.woken = asyncio.Event()
        self.told = False
        """A message said what is waited for; else look for yourself."""

    def tell(self, message: bytes) -> None:
        """``seq`` of the run's last event, with ``end`` behind it when it ended; or nothing."""
        seq, _, end = message.partition(b" ")
        if end or not seq or int(seq) > self.after:
            self.told = True
            self.woken.set()


class News:
    """Wakes waiters by channel. A lost connection wakes everybody: news may be lost with it."""

    def __init__(self, connect: Callable[[], Awaitable[RedisConnection]]) -> None:
        self._connect = connect
        self._connection: RedisConnection | None = None
        self._reader: asyncio.Task[None] | None = None
        self._sender: asyncio.Task[None] | None = None
        self._waiters: dict[bytes, set[Waiter]] = {}
        self._ready: dict[bytes, asyncio.Future[None]] = {}
        """By channel: whether the server has confirmed the subscription."""
        self._wanted: list[bytes] = []
        self._idle: dict[bytes, None] = {}

    async def add(self, waiter: Waiter) -> None:
        """From its return on, what is published on the waiter's channel is told to it.

        Raises:
            RedisError, OSError: The server does not answer, or does not allow it.
        """
        channel = waiter.channel
        self._waiters.setdefault(channel, set()).add(waiter)
        self._idle.pop(channel, None)
        ready = self._ready.get(channel)
        if ready is None:
            ready = self._ready[channel] = asyncio.get_running_loop().create_future()
            self._wanted.append(channel)
            self._start()
        try:
            await asyncio.shield(ready)
        except BaseException:
            self.drop(waiter)
            raise

    def drop(self, waiter: Waiter) -> None:
        """Tell it nothing more."""
        waiters = self._waiters.get(waiter.channel)
        if waiters is None:
            return
        waiters.discard(waiter)
        if not waiters:
            del self._waiters[waiter.channel]
            if waiter.channel in self._ready:
                self._idle[waiter.channel] = None
            if len(self._idle) >= _IDLE:
                self._start()

    async def close(self) -> None:
        """Let go of the connection, and wake everybody."""
        tasks = [task for task in (self._sender, self._reader) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._lost(ConnectionError("the storage was closed"))

    def _start(self) -> None:
        if self._sender is None:
            self._sender = asyncio.get_running_loop().create_task(self._send())

    async def _send(self) -> None:
        try:
            while self._wanted or len(self._idle) >= _IDLE:
                connection = self._connection
                if connection is None:
                    connection = self._connection = await self._connect()
                    self._reader = asyncio.get_running_loop().create_task(self._read(connection))
                wanted, self._wanted = self._wanted, []
                if wanted:
                    packed = connection.pack_command(b"SUBSCRIBE", *wanted)
                    await connection.send_packed_command(packed, check_health=False)
                if len(self._idle) >= _IDLE:
                    idle, self._idle = self._idle, {}
                    for channel in idle:
                        self._ready.pop(channel, None)
                    packed = connection.pack_command(b"UNSUBSCRIBE", *idle)
                    await connection.send_packed_command(packed, check_health=False)
        except (RedisError, OSError, TimeoutError) as error:
            self._lost(error)
        finally:
            self._sender = None

    async def _read(self, connection: RedisConnection) -> None:
        failure: Exception = ConnectionError("the storage was closed")
        try:
            while True:
                message: Any = await connection.read_response(
                    disable_decoding=True, timeout=math.inf, disconnect_on_error=False
                )
                kind, channel = message[0], message[1]
                if kind == b"message":
                    for waiter in self._waiters.get(channel, ()):
                        waiter.tell(message[2])
                elif kind == b"subscribe":
                    ready = self._ready.get(channel)
                    if ready is not None and not ready.done():
                        ready.set_result(None)
        except (RedisError, OSError, EOFError) as error:
            failure = error
        finally:
            if self._connection is connection:
                self._connection = None
                self._lost(failure)
            await connection.disconnect(nowait=True)

    def _lost(self, failure: Exception) -> None:
        """Everybody looks for himself, and the next one connects again."""
        ready, self._ready = self._ready, {}
        self._wanted, self._idle = [], {}
        for future in ready.values():
            if not future.done():
                future.set_exception(failure)
                future.exception()  # perhaps nobody waits for it any more
        for waiters in self._waiters.values():
            for waiter in waiters:
                waiter.woken.set()
