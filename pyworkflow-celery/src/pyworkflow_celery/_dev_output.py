"""What ``pyworkflow dev`` shows: the lines of all processes in one stream, each with its origin."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import IO

__all__ = ["Output"]

_COLOURS = (36, 33, 32, 35, 34, 96, 93, 92, 95, 94)


class Output:
    """Prefixed lines on one stream, from any thread, whole lines only."""

    def __init__(
        self, stream: IO[str], names: Sequence[str], on_closed: Callable[[], object]
    ) -> None:
        """``on_closed`` is called once, when nobody reads any more: the terminal is gone."""
        self._stream = stream
        self._width = max(len(name) for name in names)
        self._paint = stream.isatty() and not os.environ.get("NO_COLOR")
        self._colours = {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(names)}
        self._on_closed = on_closed
        self._lock = threading.Lock()
        self._closed = False

    def line(self, name: str, text: str) -> None:
        """Show one line of the process ``name``."""
        prefix = f"{name:<{self._width}} |"
        if self._paint:
            prefix = f"\033[{self._colours[name]}m{prefix}\033[0m"
        with self._lock:
            if self._closed:
                return
            try:
                self._stream.write(f"{prefix} {text}\n")
                self._stream.flush()
            except (OSError, ValueError):
                self._closed = True
            else:
                return
        self._on_closed()

    def drain(self, name: str, pipe: IO[bytes], seen: Callable[[str], bool]) -> None:
        """Show what comes through a pipe until its end, but lines of which ``seen`` says no."""
        with pipe:
            for raw in pipe:
                text = raw.decode(errors="replace").rstrip("\r\n")
                if seen(text) and text:
                    self.line(name, text)
