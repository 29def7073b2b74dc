"""Signals that this process was started to ignore, and its children shall not."""

from __future__ import annotations

import signal
import threading

__all__ = ["children_take_signals"]


def children_take_signals() -> None:
    """Let children begin with the default for signals that this process ignores from its start.

    A background job ignores SIGINT and SIGQUIT, ``nohup`` SIGHUP, and what is ignored is inherited.
    A handler is not: this process goes on ignoring them, and a new program has the default.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, _ignore)


def _ignore(_number: int, _frame: object) -> None:
    """Do nothing: unlike ``SIG_IGN``, this is not inherited by another program."""
