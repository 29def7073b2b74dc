"""Outages of the store: how long each loop of a worker pauses, and what the log says.

Every loop backs off exponentially to 5 s. Meanwhile one cheap call a second or so asks for the
store's clock: when it is answered again, all loops try at once. The log has the first failure of
each operation, then one line a minute with a count, and one line at recovery.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from random import Random
from time import monotonic

from pyworkflow.errors import StorageError, StorageUnavailable

__all__ = ["Backoff", "Outages"]

_log = logging.getLogger("pyworkflow.engine")

FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 5.0
LONGEST_UNPROBED_PAUSE_S = 1.0
"""Of a store that answers and refuses, for want of space for example: no probe shows its end."""
LOG_EVERY_S = 60.0
PROBE_EVERY_S = 0.7
_PROBE_TIMEOUT_S = 5.0


@dataclass(slots=True)
class _Outage:
    since: float
    logged: float
    failures: int = 0


class Outages:
    """The failures of one worker's store. ``failed`` and ``worked`` may be called by any thread.

    Args:
        probe: A cheap read of the store, called in the loop that ``pause`` is awaited in.
        seed: Of the jitter; workers have different ones.
    """

    def __init__(self, probe: Callable[[], Awaitable[object]], seed: str) -> None:
        self._probe = probe
        self.jitter = Random(seed)
        self._lock = threading.Lock()
        self._outages: dict[str, _Outage] = {}
        self._waiting: set[asyncio.Future[None]] = set()
        self._prober: asyncio.Task[None] | None = None

    def failed(self, operation: str, message: str, problem: BaseException) -> None:
        """An operation failed. ``message`` is logged unless it was within the last minute."""
        now = monotonic()
        with self._lock:
            outage = self._outages.get(operation)
            if outage is None:
                outage = self._outages[operation] = _Outage(now, now)
            elif now - outage.logged < LOG_EVERY_S:
                outage.failures += 1
                return
            outage.logged = now
            outage.failures += 1
            failures, seconds = outage.failures, now - outage.since
        unexpected = None if isinstance(problem, StorageError) else problem
        if failures == 1:
            _log.warning("%s: %s", message, _text(problem), exc_info=unexpected)
        else:
            _log.warning(
                "%s: still failing: failures=%d seconds=%.0f: %s",
                message,
                failures,
                seconds,
                _text(problem),
                exc_info=unexpected,
            )

    def worked(self, operation: str) -> None:
        """An operation succeeded: its outage, if there was one, is over."""
        if not self._outages:
            return
        with self._lock:
            outage = self._outages.pop(operation, None)
        if outage is not None:
            _log.info(
                "the storage works again: operation=%s failures=%d seconds=%.1f",
                operation,
                outage.failures,
                monotonic() - outage.since,
            )

    async def pause(self, seconds: float) -> None:
        """Wait for so long, or until a probe is answered after one that was not."""
        loop = asyncio.get_running_loop()
        back: asyncio.Future[None] = loop.create_future()
        self._waiting.add(back)
        if self._prober is None or self._prober.done():
            self._prober = loop.create_task(self._probe_while_waiting())
        try:
            await asyncio.wait({back}, timeout=seconds)
        finally:
            self._waiting.discard(back)
            back.cancel()

    async def _probe_while_waiting(self) -> None:
        was_down = False
        idle_since: float | None = None
        # A loop that was woken and failed again waits again soon: what is known is kept for it.
        while idle_since is None or monotonic() - idle_since < LONGEST_PAUSE_S:
            await asyncio.sleep(PROBE_EVERY_S * self.jitter.uniform(0.8, 1.2))
            idle_since = None if self._waiting else idle_since or monotonic()
            if not self._waiting:
                continue
            try:
                async with asyncio.timeout(_PROBE_TIMEOUT_S):
                    await self._probe()
            except Exception:  # noqa: BLE001 - whatever it is, the store is not back
                was_down = True
                continue
            if was_down:
                was_down = False
                self.hurry()

    def hurry(self) -> None:
        """End all pauses."""
        for back in self._waiting:
            if not back.done():
                back.set_result(None)

    def close(self) -> None:
        """End the probe."""
        if self._prober is not None:
            self._prober.cancel()


class Backoff:
    """The pauses of one loop: doubled with each failure, with jitter."""

    def __init__(self, jitter: Random, longest: float = LONGEST_PAUSE_S) -> None:
        self._jitter = jitter
        self._longest = longest
        self._next = FIRST_PAUSE_S

    def seconds(self, problem: BaseException | None = None) -> float:
        """The next pause."""
        longest = self._longest
        if problem is not None and not isinstance(problem, StorageUnavailable | TimeoutError):
            longest = min(longest, LONGEST_UNPROBED_PAUSE_S)
        pause = min(self._next, longest)
        self._next = min(self._next * 2, LONGEST_PAUSE_S)
        return pause * self._jitter.uniform(0.75, 1.0)

    def reset(self) -> None:
        """It worked: begin with the shortest pause again."""
        self._next = FIRST_PAUSE_S


def _text(problem: BaseException) -> str:
    return str(problem) if isinstance(problem, StorageError) else repr(problem)
