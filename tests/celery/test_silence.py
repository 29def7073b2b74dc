"""Connections to the broker that die without a word, as a firewall that forgets them has it."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.celery import _program
from tests.celery._harness import Fleet
from tests.devops.processes import Program, environment
from tests.proxy import Proxy
from tests.servers import until


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_f22_a_worker_notices_that_its_connections_are_dead_and_makes_others(
    pool: str, fleet: Fleet, make_proxy: Callable[[str], Proxy]
) -> None:
    proxy = make_proxy(fleet.broker.url)
    fleet.worker(pool=pool, PYWORKFLOW_BROKER_URL=proxy.url)
    assert fleet.result(fleet.start(_program.ten)) == 10
    # The worker's publisher has time-outs of its own, but nothing to publish now.
    before = proxy.count
    proxy.blackhole()
    until(lambda: proxy.count > before, "the worker waits for connections that are dead")
    proxy.drop()
    proxy.heal()
    assert fleet.result(fleet.start(_program.ten)) == 10


def test_a_broker_that_never_answers_is_told_of_and_lets_the_worker_end(tmp_path: Path) -> None:
    """As a plain port does to a client that begins TLS."""
    command = ["celery", "-A", "pyworkflow.celery.app", "worker", "-P", "threads"]
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen(50)
        env = environment(
            PYWORKFLOW_BROKER_URL=f"rediss://127.0.0.1:{mute.getsockname()[1]}/0",
            PYWORKFLOW_STORAGE=f"sqlite:///{tmp_path}/runs.db",
        )
        with Program(command, env=env, cwd=tmp_path, log=tmp_path / "log") as worker:
            assert "Cannot connect to rediss://" in worker.wait_for("Trying again in")
            assert "insecure" not in worker.said()
            worker.end(signal.SIGTERM, timeout=30)
