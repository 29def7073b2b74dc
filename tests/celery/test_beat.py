"""Beat is an optional second sweeper."""

from __future__ import annotations

from tests.celery import _program
from tests.celery._harness import Fleet, new_tag

NO_SWEEPER = """
from pyworkflow.celery.app import app
from pyworkflow_celery import _worker


async def never(standing):
    pass


_worker.sweep_for_ever = never
"""


def test_beat_alone_wakes_a_sleeper(fleet: Fleet) -> None:
    """The workers' own sweepers are taken away, so that nothing else could."""
    (fleet.path / "sweeperless.py").write_text(NO_SWEEPER, "ascii")
    worker = fleet.worker(pool="threads", app="sweeperless")
    tag = new_tag()
    run_id = fleet.start(_program.napper, 1, tag=tag)
    fleet.eventually(lambda: fleet.status(run_id) == "suspended", "it sleeps")
    # Nobody wakes it: a long moment after its time it sleeps still.
    due = fleet.ask(lambda storage: storage.now())

    def later() -> bool:
        now = fleet.ask(lambda storage: storage.now())
        return (now - due).total_seconds() > 2

    fleet.eventually(later, "its time has passed")
    assert fleet.executions(tag) == {"before": 1}
    fleet.beat()
    assert fleet.result(run_id) == "after"
    assert fleet.executions(tag) == {"before": 1, "after": 1}
    assert worker.process.poll() is None
