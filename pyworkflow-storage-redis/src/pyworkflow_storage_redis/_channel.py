"""One connection for all calls of a storage object, which may overlap.

Commands go out as they come, answers come back in order, and a caller that is cancelled disturbs
nobody.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Coroutine, Generator
from typing import Any

from redis.exceptions import ConnectionError as Disconnected
from redis.exceptions import InvalidResponse, RedisError, ResponseError

from pyworkflow_storage_redis._connection import RedisConnection

__all__ = ["Channel"]

Answer = asyncio.Future[Any]


class _Begun:
    """A coroutine that has run up to its first wait already."""

    def __init__(self, coroutine: Coroutine[Any, Any, None], first: object) -> None:
        self._coroutine = coroutine
        self._first = first

    def __await__(self) -> Generator[Any, Any, None]:
        value = self._first
        while True:
            try:
                try:
                    sent = yield value
                except BaseException as error:  # noqa: BLE001 - it is the coroutine's to handle
                    value = self._coroutine.throw(error)
                else:
                    value = self._coroutine.send(sent)
            except StopIteration:
                return


class Channel:
    """Calls over one connection, which must not be used by anybody else."""

    def __init__(self, connection: RedisConnection, *, timeout: float) -> None:
        self._connection = connection
        self._timeout = timeout
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[Answer, float]] = deque()
        self._outbox: list[bytes] = []
        self._sender: asyncio.Task[None] | None = None
        self._reader: asyncio.Task[None] | None = None
        self._watch: asyncio.TimerHandle | None = None
        self.alive = False

    async def connect(self) -> None:
        """Connect and sign in."""
        async with asyncio.timeout(self._timeout):
            await self._connection.connect()
        self.alive = True
        self._reader = self._loop.create_task(self._read())

    def call(self, *command: bytes | str) -> Answer:
        """Send a command; its answer comes in the future, also as one of redis-py's exceptions."""
        answer: Answer = self._loop.create_future()
        if not self.alive:
            answer.set_exception(Disconnected("the connection is closed"))
            return answer
        self._waiting.append((answer, self._loop.time()))
        self._outbox += self._connection.pack_command(*command)
        if self._sender is None:
            if len(self._waiting) == 1:
                self._send_now()
            else:
                # What other callers send in this turn of the loop goes out with it.
                self._sender = self._loop.create_task(self._send())
        if self._watch is None:
            self._watch = self._loop.call_later(self._timeout, self._look)
        return answer

    async def close(self) -> None:
        """Let go of the connection. Answers that are still awaited fail."""
        self._fail(Disconnected("the storage was closed"))
        tasks = [task for task in (self._reader, self._sender) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._connection.disconnect(nowait=True)

    def _send_now(self) -> None:
        """Write without a task of its own, which would cost a lone caller a turn of the loop."""
        data, self._outbox = self._outbox, []
        sending = self._connection.send_packed_command(data, check_health=False)
        try:
            first = sending.send(None)
        except StopIteration:
            return
        except (RedisError, OSError) as error:
            self._fail(error)
            return
        self._sender = self._loop.create_task(self._send(_Begun(sending, first)))

    async def _send(self, begun: Awaitable[None] | None = None) -> None:
        try:
            if begun is not None:
                await begun
            while self._outbox:
                data, self._outbox = self._outbox, []
                # Joined by the transport; with no socket timeout this is write and drain.
                await self._connection.send_packed_command(data, check_health=False)
        except (RedisError, OSError) as error:
            self._fail(error)
        finally:
            self._sender = None

    async def _read(self) -> None:
        connection, waiting = self._connection, self._waiting
        try:
            while True:
                try:
                    value = await connection.read_response(
                        disable_decoding=True, timeout=math.inf, disconnect_on_error=False
                    )
                except ResponseError as refused:
                    value = refused
                if not waiting:
                    raise Disconnected("an answer that nobody asked for")
                answer, _ = waiting.popleft()
                if answer.done():
                    continue  # its caller was cancelled
                if isinstance(value, Exception):
                    answer.set_exception(value)
                    answer.exception()  # as in ``_fail``
                else:
                    answer.set_result(value)
        except (RedisError, OSError, EOFError) as error:
            self._fail(error)
        except Exception as error:  # noqa: BLE001 - bytes that are no answer end in any of them
            self._fail(InvalidResponse(f"the answer is damaged: {type(error).__name__}"))
        finally:
            self.alive = False
            await connection.disconnect(nowait=True)

    def _look(self) -> None:
        """A server that is silent for too long is taken for gone: its answers are unknown."""
        self._watch = None
        if not self._waiting:
            return
        age = self._loop.time() - self._waiting[0][1]
        if age < self._timeout:
            self._watch = self._loop.call_later(self._timeout - age, self._look)
            return
        self._fail(Disconnected("no answer in time"))
        if self._reader is not None:
            # The answers that may still come belong to nobody.
            self._reader.cancel()

    def _fail(self, error: Exception) -> None:
        self.alive = False
        self._outbox.clear()
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        while self._waiting:
            answer, _ = self._waiting.popleft()
            if not answer.done():
                answer.set_exception(error)
                answer.exception()  # perhaps its caller is cancelled in this turn of the loop
