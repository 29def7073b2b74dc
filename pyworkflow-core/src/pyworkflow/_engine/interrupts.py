"""SIGTERM and SIGINT of a worker's own process: the first drains, the second ends it at once.

The second is noticed by a thread, through the descriptor that Python writes signals to: handlers
run in the main thread, which a step may block.
"""

from __future__ import annotations

import os
import selectors
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from time import monotonic

__all__ = ["may_be_ctrl_c", "obeyed"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_AS_ONE_S = 0.1
"""Seconds in which a second signal is the first one, sent twice: a terminal signals a whole group,
and a program in it may pass on the signal."""
_STOP = b"\0"


_obeying: set[object] = set()


def may_be_ctrl_c() -> bool:
    """Whether a KeyboardInterrupt in this thread may be the user's: else code raised it itself.

    A signal is heard in the main thread alone, and raises nothing while ``obeyed`` handles it.
    """
    return threading.current_thread() is threading.main_thread() and not _obeying


@contextmanager
def obeyed(on_first: Callable[[], object]) -> Generator[None]:
    """Call ``on_first`` when the first signal comes; end the process at the second.

    Does nothing outside of the main thread, where no handler can be set: the caller stops us.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    first: list[float] = []

    def handle(number: int, _frame: object) -> None:
        now = monotonic()
        if not first:
            first.append(now)
            on_first()
        elif now - first[0] > _AS_ONE_S:
            _end(number)

    for number in _SIGNALS:
        signal.signal(number, handle)
    _obeying.add(handle)
    read, write = os.pipe()
    os.set_blocking(write, False)
    fd_before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    listener = threading.Thread(
        target=_listen, args=(read,), name="pyworkflow-signals", daemon=True
    )
    listener.start()
    try:
        yield
    finally:
        _obeying.discard(handle)
        signal.set_wakeup_fd(fd_before)
        for number, handler in before.items():
            # None: it was not set by Python, and cannot be set again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        os.write(write, _STOP)
        listener.join(1.0)
        os.close(write)


def _listen(read: int) -> None:
    """In a thread: end the process at the second signal."""
    since: float | None = None
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(read, selectors.EVENT_READ)
            while selector.select():
                for number in os.read(read, 16) or _STOP:
                    if number == 0:
                        return
                    if number not in _SIGNALS:
                        continue
                    if since is None:
                        since = monotonic()
                    elif monotonic() - since > _AS_ONE_S:
                        _end(number)
    finally:
        os.close(read)


def _end(number: int) -> None:
    """End at once. Neither logging nor the interpreter's own end may wait for what blocks."""
    try:
        os.write(2, b"pyworkflow: the worker ends at once\n")
    except OSError:
        pass  # no terminal
    os._exit(128 + number)
