"""The one event loop, and the one process, that a storage object belongs to."""

from __future__ import annotations

import asyncio
import os
import weakref
from typing import Generic, TypeVar

from pyworkflow.errors import StorageError
from pyworkflow.spi.storage import StorageBackend

__all__ = ["LoopBound"]

T = TypeVar("T")

_forks = 0
#: What forked children have of their parents: kept, since collecting it could close their sockets.
_inherited: list[object] = []


def _forked() -> None:
    global _forks
    _forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


class LoopBound(Generic[T]):
    """What a storage object opens for the event loop that first uses it: connections, a thread.

    Each call of the contract begins with ``get``. Where it returns None, make the thing, without
    waiting for anything, and ``put`` it. A forked child starts with None and makes its own; what it
    has of its parent is never used there, nor collected, which could disturb the parent.

    With ``self._bound = LoopBound[Pool](self)`` in ``__init__`` a call uses
    ``self._bound.get() or self._bound.put(Pool(self.address))``.

    Args:
        storage: The object that it belongs to, for the location in messages. The reference is weak.
    """

    __slots__ = ("_closed", "_forks", "_loop", "_storage", "_value")

    def __init__(self, storage: StorageBackend) -> None:
        self._storage = weakref.ref(storage)
        self._value: T | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._forks = 0
        self._closed = False

    def get(self) -> T | None:
        """What this process has put, or None. To be called in a running event loop.

        Raises:
            StorageError: The object was closed, or belongs to another event loop.
        """
        if self._value is not None and self._forks == _forks:
            if self._loop is asyncio.get_running_loop():
                return self._value
            raise StorageError(
                f"the storage object belongs to another event loop: location={self._location()}; "
                "use clone() to make one for this loop"
            )
        if self._closed:
            raise StorageError(
                f"the storage was closed: location={self._location()}; make another object for it"
            )
        return None

    def _location(self) -> str:
        storage = self._storage()
        return "unknown" if storage is None else storage.info().location

    def put(self, value: T) -> T:
        """Return the value, which belongs to this process and the running event loop from now on."""
        if self._value is not None:
            _inherited.append(self._value)
        self._value, self._loop, self._forks = value, asyncio.get_running_loop(), _forks
        return value

    def close(self) -> T | None:
        """What is to be closed now, in this process; None the second time. ``get`` raises after it."""
        self._closed = True
        value, self._value = self._value, None
        if self._forks == _forks:
            return value
        _inherited.append(value)
        return None
