"""What backends with a dispatcher share: whose the object is, and the calls that need the loop."""

from __future__ import annotations

import asyncio
import weakref
from abc import abstractmethod
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Final, Generic, TypeVar

from pyworkflow.spi.storage import Claimed, ClaimRef, StorageBackend
from pyworkflow.storekit._loop_bound import LoopBound
from pyworkflow.storekit.embedded._dispatch import Dispatcher

__all__ = ["FEW", "EmbeddedBackend"]

B = TypeVar("B")
T = TypeVar("T")

#: So many changes or leases are ``small``: the loop may handle them by itself.
FEW: Final = 8


class EmbeddedBackend(StorageBackend, Generic[B]):
    """A storage object with a dispatcher of its own.

    It belongs to the event loop that first used it, and after a fork it begins anew in the child.
    A subclass writes ``_begin``, and each call of the contract as ``_read`` or ``_write`` of a
    function of its batch; what it writes itself of ``close`` calls this one, too.
    """

    def __init__(self) -> None:
        self._bound = LoopBound[Dispatcher[B]](self)

    @abstractmethod
    def _begin(self, loop: asyncio.AbstractEventLoop) -> Dispatcher[B]:
        """A dispatcher for this loop: at the first use, and at the first one in a forked child."""

    def _started(self) -> Dispatcher[B]:
        """The dispatcher, for a caller on its loop.

        Raises:
            StorageError: The object was closed, or belongs to another loop.
        """
        dispatcher = self._bound.get()
        if dispatcher is None:
            dispatcher = self._bound.put(self._begin(asyncio.get_running_loop()))
            # Nobody may have closed it: its thread must not outlive it.
            weakref.finalize(self, dispatcher.stop).atexit = False
        return dispatcher

    def _read(self, run: Callable[[B], T], *, small: bool = False) -> asyncio.Future[T]:
        """Have an operation done that changes nothing."""
        return self._started().submit(run, writes=False, small=small)

    def _write(self, run: Callable[[B], T], *, small: bool = False) -> asyncio.Future[T]:
        """Have an operation done; ``small`` ones take the time of a few changes at most."""
        return self._started().submit(run, writes=True, small=small)

    async def _claim(
        self,
        claim: Callable[[B], Claimed],
        release: Callable[[ClaimRef, B], object],
        *,
        small: bool,
    ) -> Claimed:
        """Have a claim done; ``release`` gives back what a cancelled caller will never hear of."""
        dispatcher = self._started()
        dispatcher.watchers.take_work_news()

        def give_back(claimed: Claimed) -> None:
            for each in claimed.claims:
                released = dispatcher.submit(partial(release, each.ref), writes=True, small=True)
                released.add_done_callback(_forget)

        answer = dispatcher.submit(claim, writes=True, small=small, undo=give_back)
        try:
            return await answer
        except asyncio.CancelledError:
            # The answer may have come just before: nobody will ever see it.
            if answer.done() and not answer.cancelled() and answer.exception() is None:
                give_back(answer.result())
            raise

    async def close(self) -> None:
        """Finish what was begun and end the thread. Idempotent."""
        dispatcher = self._bound.close()
        if dispatcher is not None:
            await dispatcher.close()

    async def watch(self, run_id: str | None, *, after: int, timeout: timedelta) -> bool:
        """Wait for news: of this object at once, and of those with its dispatcher's ``place``.

        Of all others within 0.1 s.
        """
        watchers = self._started().watchers
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout.total_seconds()
        while True:
            news: asyncio.Future[bool] = loop.create_future()
            # Before the check, or news in between are missed.
            watchers.add(run_id, after, news)
            try:
                if run_id is None:
                    await self.open()
                    if watchers.take_work_news():
                        return True
                else:
                    run = await self.get_run(run_id)
                    if run is not None and (run.history_length > after or run.status.is_terminal):
                        return True
                left = end - loop.time()
                if left <= 0:
                    return False
                await asyncio.wait([news], timeout=left)
                if run_id is not None and news.done() and news.result():
                    return True  # told, and not only to be asked for
            finally:
                watchers.drop(run_id, news)


def _forget(answer: asyncio.Future[object]) -> None:
    # What could not be given back comes free when its lease ends.
    if not answer.cancelled():
        answer.exception()
