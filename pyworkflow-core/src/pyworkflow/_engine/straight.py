"""The plain road: one short step after the other, without waking the session's task in between.

Most turns are on it most of the time: one step runs in place, its end is the only thing to record,
and the next step the only thing that the code asks for then. The step's own task sends the change
along, and the pipeline's calls deliver the answer and begin the next step: one task and one turn
of the loop for each step. Whatever is not plain is left to the session, which finds everything
where it would have put it itself.
"""

from __future__ import annotations

import asyncio
import contextvars
from time import monotonic
from typing import TYPE_CHECKING

from pyworkflow._engine.turn import SLICE, Turn
from pyworkflow.events import Event
from pyworkflow.runs import Run, WorkItem
from pyworkflow.spi.storage import Answer, Committed

if TYPE_CHECKING:
    from pyworkflow._engine.live import LiveRun
    from pyworkflow._engine.worker import Worker

__all__ = ["Straight"]

#: An answer that is left to the session, with the events of its change; or None.
_Left = tuple[Committed, list[Event]] | None


class Straight(Turn):
    """A turn that can be on the plain road."""

    def __init__(self, worker: Worker, live: LiveRun, run: Run, item: WorkItem) -> None:
        super().__init__(worker, live, run, item)
        self._road: asyncio.Future[_Left] | None = None
        self._within: contextvars.Context | None = None
        self._flush = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._leaving = False

    def _is_straight(self, flush: float) -> bool:
        """Whether one step runs in place, not for long, and nothing else is owed or waited for.

        ``flush`` is how long a step may run in place.
        """
        self._flush = flush
        return (
            len(self._running) == 1
            and not (self._ended or self._handing or self._puts or self._drops or self._careful)
            and self._replay.is_plain
            and self._worker.codecs is None
            and self._left() > 0
        )

    async def _go_straight(self) -> _Left:
        """Until something is not plain; an answer, when it is for the session to deliver."""
        loop = self._loop
        road: asyncio.Future[_Left] = loop.create_future()
        self._road = road
        # Workflow code and steps begin in the context that the session would give them.
        self._within = contextvars.copy_context()
        self._leaving = False
        self._timer = loop.call_later(self._left(), self._look)
        try:
            return await road
        finally:
            self._road = self._within = None
            self._timer.cancel()

    def _left(self) -> float:
        """Seconds until the step has run long enough, or the deadline is due."""
        left = self._flush
        for place in self._running.values():
            left += place.since - monotonic()
        until = self._replay.next_timer()
        if until is not None:
            left = min(left, (until - self._worker.clock.micros()) / 1_000_000)
        return left

    def _leave(self, left: _Left = None) -> None:
        road = self._road
        if road is not None and not road.done():
            road.set_result(left)

    def _look(self) -> None:
        """Leave when the step takes long or the deadline is due; a commit under way ends before."""
        road = self._road
        if road is None or road.done():
            return
        left = self._left()
        if left <= 0 and self._running:
            self._leave()
        elif left <= 0:
            self._leaving = True
        else:
            self._timer = self._loop.call_later(left, self._look)

    def _step_ended(self, road: asyncio.Future[_Left]) -> None:
        """Record the end, and send it along."""
        (place,) = self._ended
        if self._leaving or place.end is None or place.end.error is not None:
            self._leave()
            return
        try:
            self._ended.clear()
            self._running.clear()
            self._record_end(place)
            change = self._change(self._events)
        except BaseException as exc:  # noqa: BLE001 - it is the session's, as if it had done this
            road.set_exception(exc)
        else:
            self._worker.pipeline.submit(change, self._answered)

    def _answered(self, answer: Answer | Exception) -> None:
        """What came of the change; called by the pipeline."""
        road, within = self._road, self._within
        if road is None or within is None or road.done():
            return  # the session was cancelled meanwhile
        if not isinstance(answer, Committed):
            road.set_exception(answer)
            return
        try:
            within.run(self._go_on, answer)
        except BaseException as exc:
            if road.done():
                raise  # the session was cancelled by what ran here
            road.set_exception(exc)

    def _go_on(self, answer: Committed) -> None:
        """Deliver what is durable, and begin the step that the code asks for then."""
        events = self._events
        self._taken(events, answer)
        if answer.paused or len(answer.others) > SLICE:
            self._leave((answer, events))
            return
        worker = self._worker
        worker.guard.feed(self._replay, self._to_feed(answer, events))
        self._fed(answer)
        if self._leaving or worker.is_stopping:
            self._leave()
            return
        command = self._replay.take_step()
        if command is None:
            self._leave()
            return
        what = self._try_of(command)
        if what.step.is_queued:
            self._dispatch(what)
            self._leave()
        else:
            self._start(what)
