"""Has a worker of ``pyworkflow dev`` say that it is ready, whatever becomes of its log.

Named to the worker as a module to import: workflows may set up logging in another format, or for
warnings only, and Celery's own line is not to be relied on.
"""

from __future__ import annotations

import os
from typing import Any

from pyworkflow_celery._celery import signals

__all__ = ["READY"]

READY = "pyworkflow dev: the worker is ready"


def _say(**given: Any) -> None:
    del given
    # Celery puts a logger in the place of both streams.
    os.write(2, f"{READY}\n".encode())


signals.worker_ready.connect(_say, weak=False)
