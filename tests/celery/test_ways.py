"""Other ways to have a worker: a namespace, the command of the core, an application of one's own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pyworkflow._plugins import make_storage
from pyworkflow.runs import Run
from tests.celery import _program
from tests.celery._harness import PATIENCE, Fleet, new_tag

MINE = """
import os
from celery import Celery
from pyworkflow.celery import attach

app = Celery("mine", broker=os.environ["MY_BROKER"])
app.conf.task_default_queue = "mine"
attach(app)


@app.task
def nothing():
    print("a task of mine", flush=True)
"""


@pytest.mark.long
def test_a_namespace_has_queues_of_its_own(fleet: Fleet) -> None:
    other = {"PYWORKFLOW_NAMESPACE": "other"}
    fleet.worker(pool="threads")
    tag = new_tag()
    done = subprocess.run(
        [sys.executable, "-c", f"from {_program.__name__} import client; client()"],
        env=fleet.environment(**other),
        cwd=fleet.path,
        input=json.dumps(["routed", [tag], {}]) + "\n",
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE,
    )
    run_id = json.loads(done.stdout)[0]
    assert fleet.waiting("other.pyworkflow") == 1
    assert fleet.result(fleet.start(_program.ten)) == 10
    assert fleet.executions(tag) == {}
    fleet.worker(pool="threads", queues="other.pyworkflow,other.gpu", **other)

    def ended() -> Run | None:
        async def look() -> Run | None:
            async with make_storage(fleet.storage_url, "other") as storage:
                return await storage.get_run(run_id)

        run = fleet.ask(lambda _: look())
        return run if run is not None and run.status.is_terminal else None

    assert fleet.eventually(ended, "the run ends").status == "completed"
    assert fleet.executions(tag) == {"here": 1, "gpu": 1}


def test_the_command_of_the_core_is_a_celery_worker(fleet: Fleet) -> None:
    command = [sys.executable, "-m", "pyworkflow.cli", "worker", _program.__name__]
    command += ["--executor", "celery://"]
    worker = fleet._begin(command, "worker-cli.log", {})
    run_id = fleet.start(_program.mixed)
    assert len(fleet.result(run_id)) == 5
    fleet.check(run_id)
    worker.signal(15)
    assert worker.wait() == 0


def test_an_application_of_ones_own_works_on_runs_and_on_its_own_tasks(fleet: Fleet) -> None:
    (fleet.path / "my_app.py").write_text(MINE, "ascii")
    worker = fleet.worker(pool="prefork", app="my_app", queues="mine", MY_BROKER=fleet.broker.url)
    run_id = fleet.start_silently(_program.mixed)
    assert len(fleet.result(run_id)) == 5
    subprocess.run(
        [sys.executable, "-c", "import my_app; my_app.nothing.delay()"],
        env=fleet.environment(MY_BROKER=fleet.broker.url),
        cwd=fleet.path,
        check=True,
        timeout=PATIENCE,
    )
    fleet.eventually(lambda: "a task of mine" in worker.log, "its own task")
