"""A process beside a worker that renews its leases while the worker's own threads are starved.

A step that keeps the interpreter's lock for long, in a library's C code for example, starves every
thread of its process, the one that renews leases included. This process reads the worker's claims
from shared memory and renews those that the worker is late with. It stops when the worker's loop
has not answered for a lease, and ends with the worker, however that one ends.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from datetime import timedelta
from random import Random
from time import monotonic
from typing import TYPE_CHECKING, Any

from pyworkflow._engine.lease_table import LeaseTable, shared_memory
from pyworkflow._engine.outages import Backoff
from pyworkflow.storekit.failpoints import VARIABLE

if TYPE_CHECKING:
    from pyworkflow._config import Settings
    from pyworkflow.spi.storage import StorageBackend

__all__ = ["RenewalProcess", "main"]

_log = logging.getLogger("pyworkflow.engine")

_PROGRAM = (
    "import json, sys; given = json.loads(sys.stdin.buffer.readline()); sys.path[:] = given['path']"
    "; from pyworkflow._engine.renewals import main; main(given)"
)
_ENDS_S = 1.0
_OTHER_STORE = 3
LONGEST_TICK_S = 0.5


class RenewalProcess:
    """The process, as its worker has it."""

    def __init__(self, process: subprocess.Popen[bytes], table: LeaseTable) -> None:
        self._process = process
        self.table = table

    @classmethod
    def start(cls, settings: Settings, storage: StorageBackend) -> RenewalProcess | None:
        """Start one; None where that is not possible.

        It needs a store that several processes can use and that the settings name by its URL.
        """
        info = storage.info()
        if (
            not info.capabilities.multi_process
            or not isinstance(settings.storage, str)
            or os.name != "posix"
            or getattr(sys, "frozen", False)
            or not os.path.basename(sys.executable or "").startswith(("python", "pypy"))  # noqa: PTH119 - pathlib is not needed otherwise
        ):
            return None
        fd = shared_memory()
        try:
            table = LeaseTable(fd)
            given: dict[str, Any] = {
                "path": [os.path.abspath(part) for part in sys.path],  # noqa: PTH100 - as sys.path has it
                "url": settings.storage,
                "namespace": info.namespace,
                "location": info.location,
                "lease": settings.lease.total_seconds(),
                "every": settings.renew_every.total_seconds(),
                "parent": os.getpid(),
                "table": fd,
            }
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", _PROGRAM],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                env={k: v for k, v in os.environ.items() if k != VARIABLE},
                pass_fds=(fd,),
            )
        finally:
            os.close(fd)
        made = cls(process, table)
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(given).encode() + b"\n")
            process.stdin.flush()  # the pipe stays open: its end is the process's
        except OSError:
            made.close()
            return None
        return made

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        """Whether it is gone."""
        return self._process.poll() is not None

    def close(self) -> None:
        """End it."""
        process = self._process
        if process.stdin is not None:
            try:
                process.stdin.close()
            except OSError:
                pass  # it has ended
        try:
            process.wait(_ENDS_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def leave_to_parent(self) -> None:
        """In a forked child: let go of the pipe, which must end with the parent."""
        process = self._process
        if process.stdin is not None:
            try:
                process.stdin.close()
            except OSError:
                pass  # it has ended
        process.returncode = 0  # it is no child of this process


def main(given: Mapping[str, Any]) -> None:
    """The process's own work."""
    # The worker decides when this ends: it drains after such a signal, and needs its leases.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    asyncio.run(_renew_until_end(given))


async def _renew_until_end(given: Mapping[str, Any]) -> None:
    from pyworkflow._plugins import make_storage

    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(0, ended.set)  # nothing more is sent: it is the end
    storage = make_storage(given["url"], given["namespace"])
    if storage.info().location != given["location"]:
        sys.exit(_OTHER_STORE)  # the worker was given another store than the settings name
    table = LeaseTable(given["table"])
    lease = timedelta(seconds=given["lease"])
    tick = min(given["every"] / 2, LONGEST_TICK_S)
    backoff = Backoff(Random())
    try:
        while not ended.is_set() and os.getppid() == given["parent"]:
            pause = tick
            try:
                await storage.open()
                await _renew_if_late(storage, table, lease, given["every"])
            except Exception as exc:  # noqa: BLE001 - it tries again, and the worker reports outages
                _log.debug("leases could not be renewed from outside: %r", exc)
                pause = max(tick, backoff.seconds(exc))
            else:
                backoff.reset()
            try:
                async with asyncio.timeout(pause):
                    await ended.wait()
            except TimeoutError:
                continue
    finally:
        await storage.close()


async def _renew_if_late(
    storage: StorageBackend, table: LeaseTable, lease: timedelta, every: float
) -> None:
    """Renew what the worker itself has not renewed for ``every`` seconds."""
    now = monotonic()
    if now - table.beat_at > lease.total_seconds():
        return  # its loop hangs: another worker is better off
    if now - max(table.renewed_at, table.outside_at) < every:
        return
    if not (refs := table.claims(now - every / 3)):
        return
    await storage.renew(refs, lease)
    table.renewed_outside(now)
