"""Doorbells of Celery that die with the process that rings or takes them."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.celery import _program
from tests.celery._harness import Fleet, fleet_on, new_tag

# A client that is killed when its run is durable and no worker was notified.
CLIENT = """
import os, signal, sys
from pyworkflow_celery._executor import CeleryExecutor

async def notify(self, bells):
    os.kill(os.getpid(), signal.SIGKILL)

CeleryExecutor.notify = notify
from tests.celery import _program
_program.ten.options(idempotency_key=sys.argv[1]).start(sys.argv[1])
"""

# A worker that is killed when it has taken a message from the list, and before kombu wrote down
# that it did: the message is nowhere.
LOSSY = """
import os, signal
from kombu.transport.redis import QoS

def append(self, message, delivery_tag):
    print("a message is lost", flush=True)
    os.killpg(os.getpid(), signal.SIGKILL)

QoS.append = append
"""

# Fast cousins of both are in tests/celery/test_faults.py.
pytestmark = pytest.mark.long


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with fleet_on(tmp_path) as made:
        yield made


def test_f01_a_client_killed_between_its_commit_and_its_doorbell_has_started_its_run(
    fleet: Fleet,
) -> None:
    fleet.worker(pool="threads")
    tag = new_tag()
    died = subprocess.run(
        [sys.executable, "-c", CLIENT, tag],
        env=fleet.environment(),
        cwd=fleet.path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert died.returncode == -signal.SIGKILL, died.stderr
    run_id = fleet.ask(lambda storage: storage.find_run(tag))
    assert run_id is not None
    assert fleet.result(run_id) == 10
    assert set(fleet.executions(tag).values()) == {1}
    fleet.check(run_id)


def test_f03_a_doorbell_that_dies_with_the_worker_that_took_it_is_rung_again(fleet: Fleet) -> None:
    (fleet.path / "lossy.py").write_text(LOSSY)
    tag = new_tag()
    modules = f"{_program.__name__},lossy"
    lossy = fleet.begin(pool="solo", PYWORKFLOW_MODULES=modules, PYWORKFLOW_MUTE="60s")
    run_id = fleet.start(_program.ten, tag=tag)
    assert lossy.wait() == -signal.SIGKILL
    assert "a message is lost" in lossy.log
    with fleet.redis() as client:
        assert not client.exists("unacked")
    assert fleet.waiting() == 0
    assert fleet.executions(tag) == {}
    fleet.worker(pool="threads")
    assert fleet.result(run_id) == 10
    assert set(fleet.executions(tag).values()) == {1}
    fleet.check(run_id)
