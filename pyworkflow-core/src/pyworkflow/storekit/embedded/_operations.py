"""What passes between the dispatcher and a backend's writer, and what the writer must be able to.

``B`` is whatever the backend's operations work on: a transaction, its clock, what it notes.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from pyworkflow.storekit.embedded._pace import Pace

__all__ = ["Answers", "News", "Operation", "Upkeep", "Writer", "copy_error"]

B = TypeVar("B")

#: The runs that changed, by id: last seq, whether ended. And a count of news for workers, which
#: only grows.
News = tuple[dict[str, tuple[int, bool]], int]


class Operation(Generic[B]):
    """One call of the contract on its way to the store. Compared by identity."""

    __slots__ = ("future", "run", "undo", "writes")

    def __init__(
        self,
        run: Callable[[B], object],
        future: asyncio.Future[Any],
        writes: bool,
        undo: Callable[[Any], None] | None,
    ) -> None:
        self.run = run
        """Does it; what it raises is this caller's answer."""
        self.future = future
        """Done already when the caller is gone: then it need not be run. Else leave it alone."""
        self.writes = writes
        self.undo = undo


#: Of each operation: what it returned, or what it raised.
Answers = list[tuple[Operation[B], object, BaseException | None]]


class Writer(Protocol[B]):
    """The store, opened for writing. Its methods may block.

    They are called by the dispatcher's thread, or by the loop, with ``mutex`` held.
    """

    @property
    def mutex(self) -> threading.Lock:
        """Held by whoever calls a method."""
        ...

    @property
    def is_open(self) -> bool:
        """``take`` has nothing long to do before its batch. False at first and after ``close``."""
        ...

    @property
    def pace(self) -> Pace:
        """Told of each flush, by the writer."""
        ...

    def take(self, waiting: list[Operation[B]], answers: Answers[B], *, wait: bool) -> bool:
        """Do the operations as one durable batch, and append their answers.

        The first call opens the store. A batch that grows too large ends early: cut off of
        ``waiting`` what was not done, at least one is. An operation that raises leaves nothing
        behind and the others their effects; a failure of the store itself is every operation's
        answer. Raises nothing but what a signal's handler throws in.

        Without ``wait``, False, and nothing has happened, when it would take longer than a few
        operations and a flush: somebody else has the lock, say.
        """
        ...

    def take_news(self) -> News:
        """What changed since the last call, by whomever as far as the batches read it."""
        ...

    def recover(self) -> None:
        """A batch was left by an exception from outside: hold nothing, believe nothing."""
        ...

    def close(self) -> None:
        """Close the store. Idempotent."""
        ...


class Upkeep(Protocol):
    """What a writer does now and then, after a batch was answered."""

    @property
    def wants_upkeep(self) -> bool:
        """Asked after each batch."""
        ...

    def upkeep(self) -> None:
        """Called by the thread, with ``mutex`` held. Raises nothing."""
        ...


def copy_error(error: BaseException) -> BaseException:
    """The same error for another caller, since raising one adds to its traceback."""
    try:
        copy = type(error)(*error.args)
    except Exception:  # noqa: BLE001  an error with a constructor of its own
        return error
    copy.__cause__ = error.__cause__
    return copy
