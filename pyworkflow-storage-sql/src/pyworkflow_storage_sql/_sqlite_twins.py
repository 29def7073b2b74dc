"""The objects of this process, by store: they tell each other news, and stand still for a fork.

SQLite's locks are lost in a forked child while its bookkeeping believes in them, so that no
connection may be open across a fork: all are closed before, and opened again when they are needed.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable
from typing import Protocol

__all__ = ["Forkable", "Listener", "add_forkable", "forks", "join", "leave", "neighbours"]

#: Path and namespace.
Place = tuple[str, str]


class Listener(Protocol):
    """Wants to hear of what others in this process write."""

    def hear(self, news: tuple[dict[str, tuple[int, bool]], int]) -> None:
        """From any thread."""
        ...


class Forkable(Protocol):
    """Has a connection to be closed before a fork."""

    def before_fork(self) -> None:
        """Close the connection, and let nobody open one."""
        ...

    def after_fork(self) -> None:
        """In the parent: go on."""
        ...

    def abandon(self) -> None:
        """In the child: never come back."""
        ...


_lock = threading.Lock()
_listeners: dict[Place, weakref.WeakSet[Listener]] = {}
_forkables: weakref.WeakSet[Forkable] = weakref.WeakSet()
_stopped: list[Forkable] = []
_forks = 0


def join(place: Place, listener: Listener) -> None:
    """Hear of news until the listener is gone."""
    with _lock:
        _listeners.setdefault(place, weakref.WeakSet()).add(listener)


def leave(place: Place, listener: Listener) -> None:
    """Hear of nothing any more."""
    with _lock:
        standing = _listeners.get(place)
        if standing is not None:
            standing.discard(listener)
            if not standing:
                del _listeners[place]


def neighbours(place: Place) -> Iterable[Listener]:
    """Who listens at the store."""
    standing = _listeners.get(place)
    if standing is None or len(standing) < 2:
        return ()
    with _lock:
        return list(standing)


def add_forkable(forkable: Forkable) -> None:
    """Have it told of forks."""
    with _lock:
        _forkables.add(forkable)


def forks() -> int:
    """How often this process, or one before it, was forked off: objects compare it with theirs."""
    return _forks


def _before_fork() -> None:
    _lock.acquire()
    for forkable in list(_forkables):
        forkable.before_fork()
        _stopped.append(forkable)


def _after_fork() -> None:
    while _stopped:
        _stopped.pop().after_fork()
    _lock.release()


def _in_child() -> None:
    global _forks
    _forks += 1
    while _stopped:
        _stopped.pop().abandon()
    _forkables.clear()
    _listeners.clear()
    _lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_child)
