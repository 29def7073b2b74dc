"""The objects of this process, by store: they tell each other news, and stand still for a fork.

Locks of files, connections and threads do not come through a fork: each ``Forkable`` closes what
may not be open across one before it, or lets go of it in the child.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Hashable, Iterable
from typing import Protocol

from pyworkflow.storekit.embedded._operations import News

__all__ = ["Forkable", "Listener", "add_forkable", "forks", "join", "leave", "neighbours"]


class Listener(Protocol):
    """Wants to hear of what others in this process write."""

    def hear(self, news: News) -> None:
        """From any thread."""
        ...


class Forkable(Protocol):
    """Has something that does not come through a fork. Subclasses inherit what does nothing."""

    def before_fork(self) -> None:
        """Close what may not be open across a fork, and let nobody open it."""
        return

    def after_fork(self) -> None:
        """In the parent: go on."""
        return

    def abandon(self) -> None:
        """In the child: let go of the parent's things without disturbing it; never come back.

        Whoever held a lock does not exist here: take none.
        """
        ...


_lock = threading.Lock()
_listeners: dict[Hashable, weakref.WeakSet[Listener]] = {}
_forkables: weakref.WeakSet[Forkable] = weakref.WeakSet()
_stopped: list[Forkable] = []
_forks = 0


def join(place: Hashable, listener: Listener) -> None:
    """Hear of news until the listener is gone."""
    with _lock:
        _listeners.setdefault(place, weakref.WeakSet()).add(listener)


def leave(place: Hashable, listener: Listener) -> None:
    """Hear of nothing any more."""
    with _lock:
        standing = _listeners.get(place)
        if standing is not None:
            standing.discard(listener)
            if not standing:
                del _listeners[place]


def neighbours(place: Hashable) -> Iterable[Listener]:
    """Who listens at the store."""
    standing = _listeners.get(place)
    if standing is None or len(standing) < 2:
        return ()
    with _lock:
        return list(standing)


def add_forkable(forkable: Forkable) -> None:
    """Have it told of forks. It is held weakly."""
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
