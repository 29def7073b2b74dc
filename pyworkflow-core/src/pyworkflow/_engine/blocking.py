"""Noticing an async step that blocks its worker's event loop.

The watchdog's thread samples: a step costs nothing for it. A step is in the stack of the loop's
thread only while it computes or blocks; then the loop is asked for a sign of life, and a loop that
gives none for ``LIMIT`` seconds is blocked by the step that is in the stack.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, cast

from pyworkflow._engine.steps import StepRunner, StepTry

__all__ = ["LIMIT", "LoopWatch"]

_log = logging.getLogger("pyworkflow.engine")

LIMIT = 1.0
"""Seconds without a turn of the loop after which its step is named."""


class LoopWatch:
    """The running event loop and its thread, watched for steps that block it."""

    def __init__(self, is_busy: Callable[[], bool]) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self.is_busy = is_busy
        """Whether an async step is in progress in this loop."""
        self._asked: float | None = None
        self._named: StepTry | None = None

    def look(self, now: float) -> None:
        """Called a few times a second by the watchdog's thread."""
        if self._asked is not None and now - self._asked <= LIMIT:
            return
        found = self._running_step() if self.is_busy() else None
        if found is None:
            self._asked = None
            return
        if self._asked is None:
            self._asked = now  # before: the answer may come at once
            try:
                self._loop.call_soon_threadsafe(self._beat)
            except RuntimeError:
                self._asked = None  # the loop is closed
            return
        what, where = found
        if what is not self._named:
            self._named = what
            _log.warning(
                "step %s blocks the event loop of its worker: for=%.1fs at=%s run_id=%s; other "
                "steps, timers and the renewal of leases wait for it; make it a sync step (def, it "
                "runs in a thread), or put what blocks into asyncio.to_thread",
                what.step.name,
                now - self._asked,
                where,
                what.run_id,
            )

    def _beat(self) -> None:
        self._asked = None

    def _running_step(self) -> tuple[StepTry, str] | None:
        """The step that the loop's thread executes now, and the line that it is at."""
        frame: FrameType | None = sys._current_frames().get(self._thread)
        inner = frame
        while frame is not None:
            if frame.f_code is _RUN:
                what = cast("StepTry", frame.f_locals["what"])
                return what, _line_of(inner, what)
            frame = frame.f_back
        return None


_RUN: Any = StepRunner.run.__code__


def _line_of(frame: FrameType | None, what: StepTry) -> str:
    """The line of the step's own function; of what it calls, when that is not found."""
    code, innermost = getattr(what.step.fn, "__code__", None), frame
    while frame is not None and frame.f_code is not _RUN:
        if frame.f_code is code:
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    assert innermost is not None
    return f"{innermost.f_code.co_filename}:{innermost.f_lineno}"
