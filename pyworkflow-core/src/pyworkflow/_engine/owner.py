"""Who holds a lease: the identity of a worker process, whether it is gone, and what it held."""

from __future__ import annotations

import logging
import os
import socket
from functools import lru_cache
from itertools import count
from pathlib import Path

from pyworkflow.spi.storage import StorageBackend

__all__ = ["free_gone", "free_process", "is_gone", "new_owner", "owner_of"]

_log = logging.getLogger("pyworkflow.engine")

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


async def free_gone(storage: StorageBackend) -> int:
    """Free at once what processes of this machine held that are gone; how many items."""
    freed = 0
    for owner in await storage.holders():
        if is_gone(owner):
            count = await storage.free(owner)
            freed += count
            _log.info("freed what a process that is gone held: owner=%s items=%d", owner, count)
    return freed


async def free_process(storage: StorageBackend, pid: int) -> int:
    """Free what a process of this machine held, which has died or is about to end; how many."""
    prefix = owner_of(pid).rpartition("/")[0] + "/"
    freed = 0
    for owner in await storage.holders():
        if owner.startswith(prefix):
            freed += await storage.free(owner)
    if freed:
        what = "this process" if pid == os.getpid() else "a dead process"
        _log.info("freed what %s held: pid=%d items=%d", what, pid, freed)
    return freed
