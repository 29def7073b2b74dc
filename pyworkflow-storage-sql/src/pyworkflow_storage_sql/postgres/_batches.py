"""What waits together goes together: calls that come while others are under way form the next batch."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

__all__ = ["Batches"]

T = TypeVar("T")
A = TypeVar("A")

_LARGEST = 500


class Batches(Generic[T, A]):
    """Sends requests in batches, at most ``width`` at a time.

    A caller that gives up waiting leaves its request in the batch: it is answered to nobody,
    and ``unwanted`` may undo it before the next batch.
    """

    def __init__(
        self,
        send: Callable[[Sequence[T]], Awaitable[list[A]]],
        width: int,
        unwanted: Callable[[A], Awaitable[None]] | None = None,
    ) -> None:
        self._send = send
        self._unwanted = unwanted
        self._width = width
        self._waiting: deque[tuple[T, asyncio.Future[A]]] = deque()
        self._senders: set[asyncio.Task[None]] = set()

    async def add(self, request: T) -> A:
        """The answer to one request."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[A] = loop.create_future()
        self._waiting.append((request, answer))
        if len(self._senders) < self._width:
            sender = loop.create_task(self._run())
            self._senders.add(sender)
        return await answer

    async def _run(self) -> None:
        try:
            await self._send_all()
        finally:
            # Not in a callback: a request that came before it ran would wait for ever.
            task = asyncio.current_task()
            assert task is not None
            self._senders.discard(task)

    async def _send_all(self) -> None:
        while self._waiting:
            batch = [self._waiting.popleft() for _ in range(min(_LARGEST, len(self._waiting)))]
            batch = [entry for entry in batch if not entry[1].done()]
            if not batch:
                continue
            try:
                answers = await self._send([request for request, _ in batch])
            except Exception as exc:  # noqa: BLE001 - raised again for each caller
                if len(batch) > 1:
                    # One of them may be the cause: it must not take the others along.
                    for request, future in batch:
                        await self._alone(request, future)
                elif not batch[0][1].done():
                    _fail(batch[0][1], exc)
                continue
            for (_, future), answer in zip(batch, answers, strict=True):
                await self._deliver(future, answer)

    async def _deliver(self, future: asyncio.Future[A], answer: A) -> None:
        if not future.done():
            future.set_result(answer)
        elif self._unwanted is not None:
            await self._unwanted(answer)

    async def _alone(self, request: T, future: asyncio.Future[A]) -> None:
        try:
            answer = (await self._send([request]))[0]
        except Exception as exc:  # noqa: BLE001 - the caller's
            if not future.done():
                _fail(future, exc)
        else:
            await self._deliver(future, answer)


def _fail(future: asyncio.Future[A], problem: Exception) -> None:
    future.set_exception(problem)
    future.exception()  # its caller may be cancelled in this turn of the loop, and never ask
