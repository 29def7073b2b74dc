"""What plugins hear of a Celery worker."""

from __future__ import annotations

import os
import signal

import pytest

from tests.celery import _program
from tests.celery._harness import TERM, Fleet, new_tag

PLUGIN = """
import os
from pyworkflow.spi import hookimpl

def note(what):
    with open(os.environ["STEP_LOG"], "a") as log:
        log.write(f"hook {what} {os.getpid()}\\n")

@hookimpl
def pyworkflow_worker_started(worker, queues):
    note("started:" + ",".join(queues))

@hookimpl
def pyworkflow_worker_stopping(worker):
    note("stopping")
"""


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_plugins_hear_once_of_a_worker_that_starts_and_ends(fleet: Fleet, pool: str) -> None:
    (fleet.path / "heard.py").write_text(PLUGIN)
    info = fleet.path / "heard-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: heard\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[pyworkflow]\nheard = heard\n")
    worker = fleet.worker(pool=pool, queues="pyworkflow,gpu")
    fleet.begun("hook", "started:default,gpu")
    tag = new_tag()
    run_id = fleet.start(_program.waiting, tag=tag)
    child = fleet.begun(tag, "gated")
    if pool == "prefork":
        os.kill(child, signal.SIGKILL)  # another takes its place, which is no other worker
        fleet.begun(tag, "gated", 2)
    worker.signal(TERM)
    # Before the drain, not after it.
    assert fleet.begun("hook", "stopping") == worker.pid
    fleet.open_gate(tag)
    worker.wait()
    heard = [("started:default,gpu", worker.pid), ("stopping", worker.pid)]
    assert fleet.lines("hook") == heard
    fleet.worker(pool=pool)
    assert fleet.result(run_id) == "gated"
