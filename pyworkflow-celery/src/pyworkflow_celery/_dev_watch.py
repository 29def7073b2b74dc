"""The watchdog of ``pyworkflow dev``: ends what is left of the stack when the command is gone.

A process of its own, with the standard library alone. It reads ``+RANK PID`` and ``-PID`` from a
pipe; at the pipe's end, which also comes when the command was killed, it ends the processes that
are still noted, those of higher rank first, and removes the temporary folder.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

__all__ = ["LAUNCHER", "group_is_empty", "kill_group", "wait_until"]

LAUNCHER = 'printf "+%s %s\\n" "$0" "$$" >&0 && exec "$@" </dev/null'
"""For ``sh -c LAUNCHER RANK COMMAND…`` with the pipe as standard input: a process notes itself
before it becomes the program, so that there is no moment in which it runs unwatched."""


def wait_until(fact: Callable[[], bool], seconds: float) -> bool:
    """Whether it became true in time."""
    end = time.monotonic() + seconds
    while not fact():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def group_is_empty(group: int) -> bool:
    """Whether no process of the group lives; what waits to be collected does not."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False  # how some systems speak of processes that wait to be collected
    return _is_collected(group)


def _is_collected(group: int) -> bool:
    """Whether all that is left of the group waits to be collected; known on Linux only."""
    states: list[str] = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_bytes().rpartition(b")")[2].split()
        except OSError:
            continue
        # A process that ends at this moment may have nothing to show.
        if len(fields) > 2 and int(fields[2]) == group:
            states.append(fields[0].decode())
    return bool(states) and set(states) <= {"Z", "X"}


def kill_group(group: int, number: int) -> None:
    """Send a signal to a group that may be gone."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        pass  # all of it has ended


def _end(groups: Iterable[int], grace: float) -> None:
    """Each is told to end, has its time, and is ended."""
    left = list(groups)
    for pid in left:
        try:
            os.kill(pid, signal.SIGTERM)
        except (ProcessLookupError, PermissionError):
            pass  # its first process is gone; others of the group see to themselves, or are killed
    wait_until(lambda: all(group_is_empty(group) for group in left), grace)
    for group in left:
        if not group_is_empty(group):
            kill_group(group, signal.SIGKILL)


def main(folder: str, grace: float) -> None:
    """Watch the pipe that is the standard input."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    ranks: dict[int, int] = {}
    for line in sys.stdin:
        if line.startswith("+"):
            rank, pid = line[1:].split()
            ranks[int(pid)] = int(rank)
        else:
            ranks.pop(int(line[1:]), None)
    try:
        for rank in sorted(set(ranks.values()), reverse=True):
            _end([pid for pid, its in ranks.items() if its == rank], grace)
    except BaseException:
        for pid in ranks:  # whatever went wrong, nothing stays
            kill_group(pid, signal.SIGKILL)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
