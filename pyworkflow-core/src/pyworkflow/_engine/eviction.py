"""Closing coroutines that are put aside, on a thread of its own.

User code in ``finally`` runs while a coroutine is closed. On the worker's loop it could hold up
every session; here it holds up a thread, which is counted and left behind when it does not end.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from time import monotonic

from pyworkflow._replay.replay import Replay

__all__ = ["Evictor"]

_log = logging.getLogger("pyworkflow.engine")

PATIENCE = 2.0
"""Seconds that closing one coroutine may take."""
_IDLE = 5.0


class Evictor:
    """Closes replays one after the other."""

    def __init__(self) -> None:
        self._waiting: deque[Replay] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._since: float | None = None
        self._closing: Replay | None = None
        self.stubborn: list[Replay] = []
        """What refused to be closed."""

    def close(self, replay: Replay) -> None:
        """Have a coroutine closed soon; at once when nothing of it is left to close."""
        if replay.is_closed:
            return
        with self._changed:
            self._waiting.append(replay)
            if self._since is not None and monotonic() - self._since > PATIENCE:
                self._leave_behind()
            if self._thread is None and not self._begin():
                self._waiting.remove(replay)
            else:
                self._changed.notify_all()
                return
        replay.close()

    def _begin(self) -> bool:
        """Start the thread; False at the end of the process, when no thread can start."""
        thread = threading.Thread(target=self._run, name="pyworkflow-evictor", daemon=True)
        self._thread = thread
        try:
            thread.start()
        except RuntimeError:
            self._thread = None
            return False
        return True

    def flush(self, timeout: float = PATIENCE) -> None:
        """Wait until everything is closed, or for ``timeout`` seconds."""
        with self._changed:
            if not self._changed.wait_for(
                lambda: not self._waiting and self._closing is None, timeout
            ):
                self._leave_behind()

    def stop(self) -> None:
        """Close what waits, and end the thread."""
        self.flush()
        with self._changed:
            thread, self._thread = self._thread, None
            self._changed.notify_all()
        if thread is not None:
            thread.join(PATIENCE)

    def _keep(self, replay: Replay) -> None:
        self.stubborn.append(replay)

    def _leave_behind(self) -> None:
        replay, self._closing, self._since, self._thread = self._closing, None, None, None
        if replay is not None:
            self._keep(replay)
            _log.warning(
                "workflow code blocks while it is put aside: run_id=%s; do nothing in `finally` "
                "that takes time, effects belong in steps",
                replay.run_id,
            )

    def _run(self) -> None:
        me = threading.current_thread()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting) or self._thread is not me, _IDLE)
                if self._thread is not me or not self._waiting:
                    if self._thread is me:
                        self._thread = None
                    return
                replay = self._closing = self._waiting.popleft()
                self._since = monotonic()
            refused = replay.close()
            with self._changed:
                if self._thread is not me:
                    return  # given up meanwhile: another thread goes on
                self._closing = self._since = None
                if refused:
                    self._keep(replay)
                    _log.warning(
                        "workflow code refuses to be closed: tasks=%s run_id=%s; do not await in "
                        "`finally`, and let GeneratorExit pass",
                        ", ".join(refused),
                        replay.run_id,
                    )
                self._changed.notify_all()
