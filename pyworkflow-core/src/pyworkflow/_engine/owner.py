"""Who holds a lease: the identity of a worker process, and whether that process is gone."""

from __future__ import annotations

import os
import socket
from functools import lru_cache
from itertools import count
from pathlib import Path

__all__ = ["is_gone", "new_owner", "owner_of"]

_numbers = count(1)


@lru_cache(maxsize=1)
def _machine() -> str:
    """Host, boot and process namespace: process ids mean nothing beyond them."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()[:8]
    except OSError:
        boot = "-"
    try:
        # Containers may share a host's name and boot, and never its process ids.
        namespace = Path("/proc/self/ns/pid").readlink().name.strip("pid:[]")
    except OSError:
        namespace = "-"
    return f"{socket.gethostname()}/{boot}.{namespace}"


def _started(pid: int) -> str:
    """When the process began, so that a reused id is not mistaken.

    ``""`` when it is not to be seen, ``dead`` when it waits to be reaped.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()
    return "dead" if fields[0] in ("Z", "X") else fields[19]


def owner_of(pid: int) -> str:
    """The part of an owner's name that stands for a process: ``host/boot/pid/start``."""
    return f"{_machine()}/{pid}/{_started(pid) or '-'}"


def new_owner() -> str:
    """A name for one worker of this process."""
    return f"{owner_of(os.getpid())}/{next(_numbers)}"


def is_gone(owner: str) -> bool:
    """True when ``owner`` was a process of this machine, and that process has ended."""
    parts = owner.split("/")
    if len(parts) != 5 or "/".join(parts[:2]) != _machine():
        return False
    _, boot, pid, started, _ = parts
    if (
        boot.startswith("-")
        or boot.endswith("-")
        or started == "-"
        or not pid.isdigit()
        or not Path("/proc/self").is_dir()
    ):
        return False
    now = _started(int(pid))
    return now != started and (now != "" or not _exists(int(pid)))


def _exists(pid: int) -> bool:
    """Whether a process has this id, be it one that ``/proc`` does not show to us."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
