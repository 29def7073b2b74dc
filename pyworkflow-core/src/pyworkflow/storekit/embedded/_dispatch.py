"""The way of operations from the event loop to the store, and of their answers back.

Theory of operation. The loop queues operations; a thread takes everything that waits and does it as
one batch, and the loop never waits for a disk. A lone operation does not gain by that: waking the
thread and being woken costs more than a fast disk does. So the loop does it itself, with the same
routine, if all of this holds: it is the first of this turn of the loop (others that come in the
same turn wait for the next one, and go to the thread when they are several), nothing is at the
thread, it is small, flushes are fast, and the writer finds nothing that takes long: a lock that
somebody has, a repair, a store that is not open yet.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Hashable
from queue import Empty, SimpleQueue
from typing import Any, Final, Generic, TypeVar

from pyworkflow.errors import StorageError, StorageUnavailable
from pyworkflow.storekit.embedded._clones import join, leave, listeners_of
from pyworkflow.storekit.embedded._operations import (
    Answers,
    News,
    Operation,
    Upkeep,
    Writer,
    copy_error,
)
from pyworkflow.storekit.embedded._watchers import Watchers

__all__ = ["Dispatcher", "nothing"]

B = TypeVar("B")
T = TypeVar("T")

#: A batch ends at this many operations, so that the first do not wait for the last.
_BATCH_OPERATIONS: Final = 1000


class Dispatcher(Generic[B]):
    """The queue between a loop and a writer, and the thread at its end.

    Args:
        writer: Used by this dispatcher alone.
        loop: Whose callers it serves; all but ``stop`` and ``notify`` is called on it.
        name: The thread's.
        close_timeout: So many seconds ``close`` waits for the thread, which another process's
            lock may hold up.
        look: Reads what other processes wrote and tells the watchers, without the writer. None:
            each batch reads all that others wrote, so that an empty one is the look.
        place: Dispatchers of equal place work on the same store: each tells the others of this
            process its news at once. Then its writers' counts of work must be one count, kept by
            the store. None: they poll for it, as other processes do.
        upkeep: What to do now and then behind a batch; the writer itself, usually.
        stuck: Asked each second while somebody waits: an error when that must end, because
            another process has had the lock for too long. The operations may be done all the same.
    """

    def __init__(
        self,
        writer: Writer[B],
        loop: asyncio.AbstractEventLoop,
        *,
        name: str,
        close_timeout: float,
        look: Callable[[Watchers], Coroutine[Any, Any, None]] | None = None,
        place: Hashable = None,
        upkeep: Upkeep | None = None,
        stuck: Callable[[], StorageError | None] | None = None,
    ) -> None:
        self._writer = writer
        self._loop = loop
        self._place = place
        self._close_timeout = close_timeout
        self._look = look
        self._upkeep = upkeep
        self._stuck = stuck
        self._inbox: SimpleQueue[Operation[B] | None] = SimpleQueue()
        self._stopping = False
        # The rest belongs to the loop.
        self.watchers = Watchers(loop, self._begin_look)
        if place is not None:
            join(place, self)
        self._pending: set[Operation[B]] = set()
        """Not answered yet."""
        self._handed_over = 0
        """How many the thread has, answered or not: with none, it leaves the mutex alone."""
        self._gathered: list[Operation[B]] = []
        """What waits for the next turn of the loop."""
        self._turn_is_used = False
        """The loop has done an operation by itself in this turn."""
        self._crowded = False
        """Several operations came in one turn lately: see who else comes before one is done."""
        self._stuck_timer: asyncio.TimerHandle | None = None
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    # --- on the loop --------------------------------------------------------------------------

    def submit(
        self,
        run: Callable[[B], T],
        *,
        writes: bool,
        small: bool = False,
        undo: Callable[[T], None] | None = None,
    ) -> asyncio.Future[T]:
        """Have an operation done; the future may be done on return.

        ``small`` ones take the time of a few changes at most. ``undo`` gets the answer when the
        caller was cancelled meanwhile.
        """
        future: asyncio.Future[T] = self._loop.create_future()
        operation = Operation(run, future, writes, undo)
        if self._gathered:
            self._gather(operation)
        elif not small or self._handed_over or not self._may_do(operation):
            self._hand_over(operation)
        elif self._turn_is_used or self._crowded:
            self._gather(operation)
            if not self._turn_is_used:
                self._turn_is_used = True
                self._loop.call_soon(self._next_turn)
        elif not self._do(operation):
            self._hand_over(operation)
        return future

    def stop(self) -> None:
        """End the thread when it has done what it was handed. Idempotent, from any thread."""
        self._stopping = True
        self._inbox.put(None)

    async def close(self) -> None:
        """Finish what was begun, end the thread. From any loop.

        What is not done after ``close_timeout`` is answered with an error.
        """
        on_loop = asyncio.get_running_loop() is self._loop
        if on_loop:
            self._hand_over_gathered()
        self.stop()
        if self._place is not None:
            leave(self._place, self)
        thread = self._thread
        deadline = time.monotonic() + self._close_timeout
        pause = 0.0002
        while thread.is_alive() and time.monotonic() < deadline:
            await asyncio.sleep(pause)
            pause = min(pause * 2, 0.02)
        if not on_loop:
            return
        await asyncio.sleep(0)  # what the thread answered last is on its way
        self.watchers.close()
        if self._stuck_timer is not None:
            self._stuck_timer.cancel()
            self._stuck_timer = None
        for operation in self._pending:
            if not operation.future.done():
                operation.future.set_exception(StorageError("the storage was closed"))
                operation.future.exception()  # as in ``_answer``
        self._pending.clear()

    def _begin_look(self) -> asyncio.Future[Any]:
        if self._look is None:
            return self.submit(nothing, writes=False, small=True)
        return self._loop.create_task(self._look(self.watchers))

    def _may_do(self, operation: Operation[B]) -> bool:
        """Whether the loop may do this by itself, as far as is known without trying."""
        writer = self._writer
        return (
            not self._stopping
            and writer.is_open
            and (not operation.writes or writer.pace.is_fast)
            and not writer.mutex.locked()
        )

    def _do(self, operation: Operation[B]) -> bool:
        """Do it here and now; False, and nothing has happened, when that would take long.

        Nothing is at the thread, so the mutex is free, but for upkeep.
        """
        writer = self._writer
        if not self._turn_is_used:
            self._turn_is_used = True
            self._loop.call_soon(self._next_turn)
        answers: Answers[B] = []
        with writer.mutex:
            try:
                if not writer.take([operation], answers, wait=False):
                    return False
                news = writer.take_news()
            except BaseException as error:
                # A signal's handler raised: nobody can know how far the batch came.
                writer.recover()
                if operation in self._pending:  # else the caller itself gets what was raised
                    self._pending.discard(operation)
                    operation.future.set_exception(
                        StorageUnavailable(
                            "cannot tell whether a change was written, the handler of a signal "
                            f"came between: error={error!r}; send the same change again"
                        )
                    )
                raise
        self._answer(answers, news)
        if self._place is not None:
            self._tell_neighbours(news, self._place)
        if self._upkeep is not None and self._upkeep.wants_upkeep:
            self._hand_over(Operation(nothing, self._loop.create_future(), False, None))
        return True

    def _gather(self, operation: Operation[B]) -> None:
        self._pending.add(operation)
        self._gathered.append(operation)

    def _next_turn(self) -> None:
        self._turn_is_used = False
        gathered = self._gathered
        if not gathered:
            return
        if len(gathered) == 1 and not self._handed_over and self._may_do(gathered[0]):
            self._crowded = False
            self._gathered = []
            if self._do(gathered[0]):
                return
            self._gathered = gathered
        else:
            self._crowded = len(gathered) > 1
        self._hand_over_gathered()

    def _hand_over_gathered(self) -> None:
        gathered, self._gathered = self._gathered, []
        for operation in gathered:
            self._hand_over(operation)

    def _hand_over(self, operation: Operation[B]) -> None:
        self._pending.add(operation)
        self._handed_over += 1
        self._inbox.put(operation)
        if self._stuck is not None and self._stuck_timer is None:
            self._stuck_timer = self._loop.call_later(1.0, self._look_if_stuck, self._stuck)

    def _taken(self, count: int, answers: Answers[B], news: News) -> None:
        """The thread is done with so many of the operations that it was handed."""
        self._handed_over -= count
        self._answer(answers, news)

    def _answer(self, answers: Answers[B], news: News) -> None:
        for operation, result, error in answers:
            self._pending.discard(operation)
            future = operation.future
            if not future.done():
                if error is None:
                    future.set_result(result)
                else:
                    future.set_exception(error)
                    future.exception()  # its caller may be cancelled in this turn of the loop
            elif operation.undo is not None and error is None:
                operation.undo(result)
        self.watchers.tell(*news, looked=self._look is None)

    def _look_if_stuck(self, stuck: Callable[[], StorageError | None]) -> None:
        """Fail what waits when it waits in vain."""
        self._stuck_timer = None
        if not self._pending:
            return
        error = stuck()
        if error is not None:
            for operation in self._pending:
                if not operation.future.done():
                    operation.future.set_exception(copy_error(error))
                    operation.future.exception()  # as in ``_answer``
            self._pending.clear()
        self._stuck_timer = self._loop.call_later(1.0, self._look_if_stuck, stuck)

    # --- on the thread ------------------------------------------------------------------------

    def _main(self) -> None:
        inbox, writer = self._inbox, self._writer
        waiting: list[Operation[B]] = []
        stopping = False
        while not stopping or waiting:
            if not waiting:
                operation = inbox.get()
                if operation is None:
                    break
                waiting.append(operation)
            try:
                while len(waiting) < _BATCH_OPERATIONS:
                    operation = inbox.get_nowait()
                    if operation is None:
                        stopping = True
                    else:
                        waiting.append(operation)
            except Empty:
                pass
            del waiting[: self._take(waiting)]
        with writer.mutex:
            writer.close()

    def _take(self, waiting: list[Operation[B]]) -> int:
        """Do as many of the operations as fit into one batch, and answer them."""
        writer, upkeep = self._writer, self._upkeep
        batch = waiting.copy()
        answers: Answers[B] = []
        with writer.mutex:
            writer.take(batch, answers, wait=True)
            news = writer.take_news()
            if upkeep is not None and upkeep.wants_upkeep:
                self._tell(len(batch), answers, news)
                upkeep.upkeep()
                return len(batch)
        # After the mutex was given back: who gets the answer may come with the next one at once.
        self._tell(len(batch), answers, news)
        return len(batch)

    def _tell(self, count: int, answers: Answers[B], news: News) -> None:
        try:
            self._loop.call_soon_threadsafe(self._taken, count, answers, news)
        except RuntimeError:
            pass  # the loop was closed: nobody waits any more
        if self._place is not None:
            self._tell_neighbours(news, self._place)

    def _tell_neighbours(self, news: News, place: Hashable) -> None:
        """Objects of this process on the same store learn at once what others poll for."""
        for one in listeners_of(place):
            other = one()
            if other is not None and other is not self:
                other.notify(news)

    def notify(self, news: News) -> None:
        """From any thread: another object has written."""
        if self.watchers.is_awaited:
            try:
                self._loop.call_soon_threadsafe(self.watchers.tell, *news)
            except RuntimeError:
                pass  # its loop was closed


def nothing(_: object) -> None:
    """An operation that leaves it to the batch to open the store and to read what is new."""
