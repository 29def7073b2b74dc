"""Outages of the store or broker: how long each loop pauses, and what the log says.

Every loop backs off exponentially to 5 s. Meanwhile one cheap call a second or so asks the store:
when it is answered again, all loops try at once. The log has the first failure of each operation,
then one line a minute with a count, and one line at recovery.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from math import inf
from random import Random
from time import monotonic
from typing import ParamSpec, TypeVar

from pyworkflow.errors import (
    ConfigurationError,
    StorageError,
    StorageUnavailable,
    WorkflowError,
)

__all__ = ["Backoff", "OutageLog", "Outages"]

P = ParamSpec("P")
T = TypeVar("T")

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
    failed: float = 0.0
    failures: int = 0
    is_over: bool = False
    is_shown: bool = False
    """It was logged since the last line about recovery."""


class OutageLog:
    """What the log says of failures. Its methods may be called by any thread.

    An operation has at most one warning a minute, also when it fails and works in turn.

    Args:
        subject: What fails, for the line at recovery.
        log: The logger.
        expected: Errors without a traceback in the log.
    """

    def __init__(
        self,
        subject: str,
        log: logging.Logger,
        expected: tuple[type[Exception], ...] = (StorageError, ConfigurationError),
    ) -> None:
        self._subject = subject
        self._log = log
        self._expected = expected
        self._lock = threading.Lock()
        self._outages: dict[str, _Outage] = {}
        self._failing = 0
        """Operations whose outage is not over."""

    def failed(
        self,
        operation: str,
        message: str,
        problem: BaseException,
        *,
        level: int = logging.WARNING,
    ) -> None:
        """An operation failed. ``message`` is logged unless it was within the last minute."""
        now = monotonic()
        with self._lock:
            outage = self._outages.get(operation)
            if outage is None or outage.is_over:
                self._failing += 1
            if outage is None or (outage.is_over and now - outage.failed > LOG_EVERY_S):
                outage = self._outages[operation] = _Outage(now, -inf)
            outage.failed, outage.is_over = now, False
            outage.failures += 1
            if now - outage.logged < LOG_EVERY_S:
                return
            outage.logged, outage.is_shown = now, True
            failures, seconds = outage.failures, now - outage.since
        text = _text(problem)
        traceback = None if isinstance(problem, self._expected) else problem
        if failures == 1:
            self._log.log(level, "%s: %s", message, text, exc_info=traceback)
        else:
            self._log.log(
                level,
                "%s: still failing: failures=%d seconds=%.0f: %s",
                message,
                failures,
                seconds,
                text,
                exc_info=traceback,
            )

    def worked(self, operation: str) -> None:
        """An operation succeeded: its outage, if there was one, is over."""
        if not self._failing:
            return
        with self._lock:
            outage = self._outages.get(operation)
            if outage is None or outage.is_over:
                return
            self._failing -= 1
            outage.is_over = True
            shown, outage.is_shown = outage.is_shown, False
        if shown:
            self._log.info(
                "%s works again: operation=%s failures=%d seconds=%.1f",
                self._subject,
                operation,
                outage.failures,
                monotonic() - outage.since,
            )


class Outages(OutageLog):
    """The failures of one worker's store, and the pauses of its loops.

    Args:
        probe: A cheap read of the store, called in the loop that ``pause`` is awaited in.
        seed: Of the jitter; workers have different ones.
    """

    def __init__(
        self,
        probe: Callable[[], Awaitable[object]],
        seed: str,
        log: logging.Logger = logging.getLogger("pyworkflow.engine"),  # noqa: B008 - one for all
    ) -> None:
        super().__init__("the storage", log)
        self._probe = probe
        self.jitter = Random(seed)
        self._waiting: set[asyncio.Future[None]] = set()
        self._prober: asyncio.Task[None] | None = None

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

    async def answered(
        self,
        patience: timedelta,
        ask: Callable[P, Awaitable[T]],
        *args: P.args,
        **named: P.kwargs,
    ) -> T:
        """The storage's answer; while it is unavailable it is asked again, for so long.

        A claim whose worker gives up runs out only when its lease does.
        """
        end = monotonic() + patience.total_seconds()
        backoff: Backoff | None = None
        while True:
            try:
                answer = await ask(*args, **named)
            except StorageUnavailable as exc:
                self.failed("read", "a run cannot be read", exc)
                backoff = backoff or Backoff(self.jitter)
                pause = backoff.seconds(exc)
                if monotonic() + pause > end:
                    raise
            else:
                self.worked("read")
                return answer
            await self.pause(pause)

    async def _probe_while_waiting(self) -> None:
        was_down = False
        idle_since: float | None = None
        # A loop that was woken and failed again waits again soon: what is known is kept for it.
        while idle_since is None or monotonic() - idle_since < LONGEST_PAUSE_S:
            await asyncio.sleep(PROBE_EVERY_S * self.jitter.uniform(0.8, 1.2))
            idle_since = None if self._waiting else idle_since or monotonic()
            if not self._waiting:
                continue
            asked = monotonic()
            try:
                async with asyncio.timeout(_PROBE_TIMEOUT_S):
                    await self._probe()
            except Exception:  # noqa: BLE001 - whatever it is, the store is not back
                was_down = True
                continue
            # A server that stood still answers late what it was asked meanwhile.
            if was_down or monotonic() - asked > PROBE_EVERY_S:
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
    if isinstance(problem, WorkflowError):
        return str(problem)
    return f"{type(problem).__name__}: {problem}".removesuffix(": ")
