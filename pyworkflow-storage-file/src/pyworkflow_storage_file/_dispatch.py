"""The way of operations from the event loop to the files, and of their answers back.

Theory of operation. The loop queues operations; a thread takes everything that waits and does it as
one batch, and the loop never waits for a disk. A lone operation does not gain by that: waking the
thread and being woken costs more than a fast disk does. So the loop does it itself, with the same
routine, if all of this holds: it is the first of this turn of the loop (others that come in the
same turn wait for the next one, and go to the thread when they are several), nothing is at the
thread, it is small, flushes are fast, and the store's lock is free with nothing new behind it.
Otherwise it goes to the thread, as does all that takes long: opening, repair, a new segment, a
rewrite, a clock that was set.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping
from queue import Empty, SimpleQueue
from typing import Any, Final

from pyworkflow.spi import StorageError, StorageUnavailable
from pyworkflow_storage_file._watchers import Watchers
from pyworkflow_storage_file._writer import Answers, Batch, Operation, Writer

__all__ = ["Dispatcher", "nothing"]

#: The runs that changed, and whether there may be work.
News = tuple[dict[str, tuple[int, bool]], bool]
#: A batch ends at this many operations, so that the first do not wait for the last.
_BATCH_OPERATIONS: Final = 1000


class Dispatcher:
    """The queue between a loop and a writer, and the thread at its end."""

    def __init__(
        self, writer: Writer, loop: asyncio.AbstractEventLoop, *, lock_timeout: float
    ) -> None:
        self._writer = writer
        self._loop = loop
        self._lock_timeout = lock_timeout
        self._inbox: SimpleQueue[Operation | None] = SimpleQueue()
        self._stopping = False
        # The rest belongs to the loop.
        self.watchers = Watchers(loop, self._look)
        self._pending: set[Operation] = set()
        """Not answered yet."""
        self._handed_over = 0
        """How many the thread has, answered or not: with none, it leaves the mutex alone."""
        self._gathered: list[Operation] = []
        """What waits for the next turn of the loop."""
        self._turn_is_used = False
        """The loop has done an operation by itself in this turn."""
        self._crowded = False
        """Several operations came in one turn lately: see who else comes before one is done."""
        self._stuck_timer: asyncio.TimerHandle | None = None
        self._thread = threading.Thread(
            target=self._main, name="pyworkflow-storage-file", daemon=True
        )
        self._thread.start()

    # --- on the loop --------------------------------------------------------------------------

    def submit(
        self,
        run: Callable[[Batch], Any],
        *,
        writes: bool,
        small: bool = False,
        undo: Callable[[Any], None] | None = None,
    ) -> asyncio.Future[Any]:
        """Have an operation done; the future may be done on return.

        ``small`` ones take the time of a few changes at most. ``undo`` gets the answer when the
        caller was cancelled meanwhile.
        """
        operation = Operation(run, self._loop.create_future(), writes, undo)
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
        return operation.future

    def stop(self) -> None:
        """End the thread when it has done what it was handed. Idempotent, from any thread."""
        self._stopping = True
        self._inbox.put(None)

    async def close(self) -> None:
        """Finish what was begun, end the thread.

        Does not wait for ever: another process may hold the lock.
        """
        on_loop = asyncio.get_running_loop() is self._loop
        if on_loop:
            self._hand_over_gathered()
        self.stop()
        thread = self._thread
        deadline = time.monotonic() + self._lock_timeout
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
        self._pending.clear()

    def _look(self) -> asyncio.Future[Any]:
        return self.submit(nothing, writes=False, small=True)

    def _may_do(self, operation: Operation) -> bool:
        """Whether the loop may do this by itself, as far as is known without trying."""
        writer = self._writer
        return (
            not self._stopping
            and writer.is_open
            and (not operation.writes or writer.pace.is_fast)
            and not writer.mutex.locked()
        )

    def _do(self, operation: Operation) -> bool:
        """Do it here and now; False, and nothing has happened, when that would take long.

        Nothing is at the thread, so the mutex is free, but for a rewrite.
        """
        writer = self._writer
        if not self._turn_is_used:
            self._turn_is_used = True
            self._loop.call_soon(self._next_turn)
        answers: Answers = []
        with writer.mutex:
            try:
                if not writer.take([operation], answers, wait=False):
                    return False
                touched, work = writer.take_news()
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
        self._answer(answers, touched, work)
        if writer.wants_rewrite:
            self._hand_over(Operation(nothing, self._loop.create_future(), False, None))
        return True

    def _gather(self, operation: Operation) -> None:
        self._pending.add(operation)
        self._gathered.append(operation)

    def _next_turn(self) -> None:
        self._turn_is_used = False
        gathered = self._gathered
        if len(gathered) == 1 and not self._handed_over and self._may_do(gathered[0]):
            self._crowded = False
            self._gathered = []
            if self._do(gathered[0]):
                return
            self._gathered = gathered
        elif gathered:
            self._crowded = len(gathered) > 1
        self._hand_over_gathered()

    def _hand_over_gathered(self) -> None:
        gathered, self._gathered = self._gathered, []
        for operation in gathered:
            self._hand_over(operation)

    def _hand_over(self, operation: Operation) -> None:
        self._pending.add(operation)
        self._handed_over += 1
        self._inbox.put(operation)
        if self._stuck_timer is None:
            self._stuck_timer = self._loop.call_later(1.0, self._look_if_stuck)

    def _taken(self, count: int, answers: Answers, news: News) -> None:
        """The thread is done with so many of the operations that it was handed."""
        self._handed_over -= count
        self._answer(answers, *news)

    def _answer(
        self, answers: Answers, touched: Mapping[str, tuple[int, bool]], work: bool
    ) -> None:
        for operation, result, error in answers:
            self._pending.discard(operation)
            future = operation.future
            if not future.done():
                if error is None:
                    future.set_result(result)
                else:
                    future.set_exception(error)
            elif operation.undo is not None and error is None:
                operation.undo(result)
        self.watchers.tell(touched, work)

    def _look_if_stuck(self) -> None:
        """Fail what waits when another process has held the lock for too long."""
        self._stuck_timer = None
        if not self._pending:
            return
        lock = self._writer.lock
        since = lock.waiting_since
        if since is not None and time.monotonic() - since > self._lock_timeout:
            for operation in self._pending:
                if not operation.future.done():
                    operation.future.set_exception(
                        StorageUnavailable(
                            f"another process holds the store's lock: "
                            f"path={lock.path} seconds={self._lock_timeout:g}; "
                            "is one of its processes stopped? Try again"
                        )
                    )
            self._pending.clear()
        self._stuck_timer = self._loop.call_later(1.0, self._look_if_stuck)

    # --- on the thread ------------------------------------------------------------------------

    def _main(self) -> None:
        inbox, writer = self._inbox, self._writer
        waiting: list[Operation] = []
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

    def _take(self, waiting: list[Operation]) -> int:
        """Do as many of the operations as fit into one batch, and answer them."""
        writer = self._writer
        answers: Answers = []
        with writer.mutex:
            taken = writer.take(waiting, answers, wait=True)
            news = writer.take_news()
            if writer.wants_rewrite:
                self._tell(taken, answers, news)
                writer.rewrite()
                return taken
        # After the mutex was given back: who gets the answer may come with the next one at once.
        self._tell(taken, answers, news)
        return taken

    def _tell(self, count: int, answers: Answers, news: News) -> None:
        try:
            self._loop.call_soon_threadsafe(self._taken, count, answers, news)
        except RuntimeError:
            pass  # the loop was closed: nobody waits any more


def nothing(_: Batch) -> None:
    """The batch itself opens the store, and reads what others wrote."""
