"""The storage objects of this process, by store: notifications among them, and fork handling.

File locks, connections and threads do not survive a fork: each ``Forkable`` closes them before
the fork, or detaches from them in the child.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Hashable
from typing import Protocol

from pyworkflow.storekit.embedded._operations import News

__all__ = ["Forkable", "Listener", "add_forkable", "join", "leave", "listeners_of"]


class Listener(Protocol):
    """Is notified of what other objects in this process write."""

    def notify(self, news: News) -> None:
        """From any thread."""
        ...


class Forkable(Protocol):
    """Owns something that does not survive a fork. Subclasses inherit methods that do nothing."""

    def before_fork(self) -> None:
        """Close what must not be open across a fork, and keep it closed until ``after_fork``."""
        return

    def after_fork(self) -> None:
        """In the parent: resume."""
        return

    def after_fork_in_child(self) -> None:
        """In the child: detach from the parent's resources without disturbing it, for good.

        Take no lock: the thread that has it does not exist here.
        """
        ...


_lock = threading.Lock()
_listeners: dict[Hashable, tuple[weakref.ref[Listener], ...]] = {}
"""Tuples, which are replaced: each write reads one, without the lock."""
_forkables: weakref.WeakSet[Forkable] = weakref.WeakSet()
_stopped: list[Forkable] = []


def join(place: Hashable, listener: Listener) -> None:
    """Subscribe until the listener is garbage-collected."""
    with _lock:
        _listeners[place] = (*_others(place, listener), weakref.ref(listener))


def leave(place: Hashable, listener: Listener) -> None:
    """Unsubscribe."""
    with _lock:
        others = _others(place, listener)
        if others:
            _listeners[place] = others
        else:
            _listeners.pop(place, None)


def _others(place: Hashable, listener: Listener) -> tuple[weakref.ref[Listener], ...]:
    present = _listeners.get(place, ())
    return tuple(one for one in present if (alive := one()) is not None and alive is not listener)


def listeners_of(place: Hashable) -> tuple[weakref.ref[Listener], ...]:
    """The listeners at the store; some may be garbage-collected."""
    return _listeners.get(place, ())


def add_forkable(forkable: Forkable) -> None:
    """Call its methods around forks. The reference is weak."""
    with _lock:
        _forkables.add(forkable)


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
    while _stopped:
        _stopped.pop().after_fork_in_child()
    _forkables.clear()
    _listeners.clear()
    _lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_child)
