"""What the measured Celery workers run: PyWorkflow's application, and tasks that do next to nothing."""

from __future__ import annotations

import time
from pathlib import Path

from pyworkflow.celery.app import app

__all__ = ["app", "mark", "nothing"]


@app.task(name="benchmarks.nothing", ignore_result=True)
def nothing() -> None:
    """The least that a Celery task can cost."""


@app.task(name="benchmarks.mark", ignore_result=True)
def mark(path: str) -> None:
    """Write down when the last of many tasks was reached."""
    Path(path).write_text(str(time.time()), encoding="ascii")
