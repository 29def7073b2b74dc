"""Who waits for news on the event loop, and the polls for what other processes wrote."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

__all__ = ["Watchers"]

#: Polls of the store for what other processes wrote, in seconds.
_POLL_FIRST, _POLL_LAST = 0.02, 0.1
#: Key of those who wait for work.
_WORK: Final = None


class Watchers:
    """Futures by what they wait for. Used by the loop alone.

    ``look`` reads what other processes wrote; what it finds comes back through ``tell``.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, look: Callable[[], asyncio.Future[Any]]
    ) -> None:
        self._loop = loop
        self._look = look
        # By run, what waits for an event after a seq, or for the end; None: what waits for work.
        self._futures: dict[str | None, dict[asyncio.Future[bool], int]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._pause = _POLL_FIRST
        self._looked_at = 0.0
        self._looking: asyncio.Future[Any] | None = None
        self._work_news = 0
        self._work_known = 0

    @property
    def is_awaited(self) -> bool:
        """Whether anybody waits. From any thread."""
        return bool(self._futures)

    @property
    def runs(self) -> list[str]:
        """The runs that somebody waits for."""
        return [run_id for run_id in self._futures if run_id is not None]

    def add(self, run_id: str | None, after: int, future: asyncio.Future[bool]) -> None:
        """Have ``future`` True when the run has an event after ``after``, or ends.

        With None, when there may be work. False: the store has to be asked.
        """
        self._futures.setdefault(run_id, {})[future] = after
        self._pause = _POLL_FIRST
        if self._timer is None:
            self._timer = self._loop.call_later(_POLL_FIRST, self._poll)

    def drop(self, run_id: str | None, future: asyncio.Future[bool]) -> None:
        """Take a future back."""
        futures = self._futures.get(run_id)
        if futures is not None:
            futures.pop(future, None)
            if not futures:
                del self._futures[run_id]

    def tell(
        self, touched: Mapping[str, tuple[int, bool]], work: int, *, looked: bool = False
    ) -> None:
        """What is new: runs with their last seq and whether they ended, and the count of work.

        ``looked``: that is all that others wrote, too, so that the next poll can wait.
        """
        fresh = work > self._work_news
        if fresh:
            self._work_news = work
        if not self._futures:
            return
        if looked:
            self._looked_at = self._loop.time()
        if fresh:
            self._wake(self._futures.get(_WORK, ()))
        for run_id, (seq, ended) in touched.items():
            futures = self._futures.get(run_id)
            if futures is not None:
                self._wake([f for f, after in futures.items() if ended or seq > after])

    def take_work_news(self) -> bool:
        """Whether there may be work that was not there at the last claim or call."""
        fresh = self._work_news != self._work_known
        self._work_known = self._work_news
        return fresh

    def close(self) -> None:
        """End the polls."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._looking is not None:
            self._looking.cancel()

    def _poll(self) -> None:
        self._timer = None
        if not self._futures or self._looking is not None:
            return
        # Whoever commits all the time may have read what others wrote each time.
        due = self._looked_at + self._pause
        if due > self._loop.time():
            self._timer = self._loop.call_at(due, self._poll)
        else:
            self._looking = self._look()
            self._looking.add_done_callback(self._polled)

    def _polled(self, look: asyncio.Future[Any]) -> None:
        self._looking = None
        if look.cancelled():
            return
        if look.exception() is not None:
            for futures in self._futures.values():  # who waits shall ask, and learn of the error
                self._wake(futures, told=False)
        if self._futures and self._timer is None:
            self._timer = self._loop.call_later(self._pause, self._poll)
            self._pause = min(self._pause * 1.5, _POLL_LAST)

    def _wake(self, futures: Iterable[asyncio.Future[bool]], *, told: bool = True) -> None:
        for future in futures:
            if not future.done():
                future.set_result(told)
                self._pause = _POLL_FIRST
