"""A file that a living worker touches, for probes that must not cost a Python start.

It tells of the worker's own event loop alone, and of nothing that the worker depends on: while a
broker or a store is away, every worker would be killed for it.
"""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

from pyworkflow_celery._process import Host

__all__ = ["heartbeat"]

_log = logging.getLogger("pyworkflow.celery")

_EVERY = 5.0


def heartbeat(standing: Host) -> None:
    """Touch the file that PYWORKFLOW_HEARTBEAT names, every 5 s, as long as the loop turns."""
    path = os.environ.get("PYWORKFLOW_HEARTBEAT")
    if path:
        standing.spawn(_beat(Path(path)))


async def _beat(path: Path) -> None:
    told = False
    while True:
        try:
            path.touch()  # noqa: ASYNC240 - one system call on a local file
        except OSError as exc:
            if not told:
                told = True
                _log.warning("the heartbeat file cannot be touched: file=%s: %s", path, exc)
        await asyncio.sleep(_EVERY)
