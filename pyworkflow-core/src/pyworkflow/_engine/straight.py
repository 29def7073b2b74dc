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

__all__ = ["Roads", "Straight"]

#: An answer that is left to the session, with the events of its change; or None.
_Left = tuple[Committed, list[Event]] | None


class Roads:
    """The steps that run on the plain roads of a worker: one timer, since only the oldest counts."""

    def __init__(self) -> None:
        self._since: dict[Straight, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def begun(self, road: Straight, since: float) -> None:
        """A step runs there since then (``monotonic``)."""
        self._since[road] = since
        if self._timer is None:
            self._arm(road.flush)

    def ended(self, road: Straight) -> None:
        """None runs there any more."""
        self._since.pop(road, None)

    def _arm(self, seconds: float) -> None:
        # In no run's context: whose step it will find is not known yet.
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(seconds, self._look, context=contextvars.Context())

    def _look(self) -> None:
        self._timer = None
        now = monotonic()
        while self._since:
            road, since = next(iter(self._since.items()))
            left = since + road.flush - now
            if left > 0:
                self._arm(left)
                return
            del self._since[road]
            road.leave()


class Straight(Turn):
    """A turn that can be on the plain road."""

    __slots__ = (
        "_leaving", "_road", "_timer", "_within", "flush",
    )  # fmt: skip

    def __init__(self, worker: Worker, live: LiveRun, run: Run, item: WorkItem) -> None:
        super().__init__(worker, live, run, item)
        self._road: asyncio.Future[_Left] | None = None
        self._within: contextvars.Context | None = None
        self.flush = 0.0
        """Seconds that a step may run in place."""
        self._timer: asyncio.TimerHandle | None = None
        self._leaving = False

    def _is_straight(self, flush: float) -> bool:
        """Whether one step runs in place, not for long, and nothing else is owed or waited for.

        ``flush`` is how long a step may run in place.
        """
        self.flush = flush
        return (
            len(self._running) == 1
            and not (self._ended or self._handing or self._puts or self._drops or self._careful)
            and self._replay.is_plain
            and self._worker.codecs is None
            and not self._over
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
        roads = self._worker.roads
        (place,) = self._running.values()
        roads.begun(self, place.since)
        if self._replay.next_timer() is not None:
            self._timer = loop.call_later(self._left(), self._look)
        try:
            return await road
        finally:
            self._road = self._within = None
            roads.ended(self)
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def _left(self) -> float:
        """Seconds until the step has run long enough, or the deadline is due."""
        left = self.flush
        for place in self._running.values():
            left += place.since - monotonic()
        until = self._replay.next_timer()
        if until is not None:
            left = min(left, (until - self._worker.clock.micros()) / 1_000_000)
        return left

    def leave(self, left: _Left = None) -> None:
        """Give the turn back to the session, with an answer that it has to deliver."""
        road = self._road
        if road is not None and not road.done():
            road.set_result(left)

    def _look(self) -> None:
        """Leave when the deadline is due; a commit that is under way ends before."""
        road = self._road
        if road is None or road.done():
            return
        left = self._left()
        if left <= 0 and self._running:
            self.leave()
        elif left <= 0:
            self._leaving = True
        else:
            self._timer = self._loop.call_later(left, self._look)

    def _step_ended(self, road: asyncio.Future[_Left]) -> None:
        """Record the end, and send it along."""
        self._worker.roads.ended(self)
        (place,) = self._ended
        if self._leaving or place.end is None or place.end.error is not None:
            self.leave()
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
        if answer.paused or len(answer.unseen_events) > SLICE:
            self.leave((answer, events))
            return
        worker = self._worker
        worker.guard.feed(self._replay, self._to_feed(answer, events), worker.settings.watchdog)
        self._fed(answer)
        if self._leaving or self._over or worker.is_stopping:
            self.leave()
            return
        command = self._replay.take_step()
        if command is None:
            self.leave()
            return
        what = self._try_of(command)
        if what.step.is_queued:
            self._dispatch(what)
            self.leave()
        else:
            self._start(what)
            worker.roads.begun(self, monotonic())
