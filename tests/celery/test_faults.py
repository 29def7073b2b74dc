"""Messages that are lost, doubled, late or unreadable, and brokers that are gone."""

from __future__ import annotations

import re
from collections.abc import Callable
from time import monotonic

import pytest

from tests.celery import _program
from tests.celery._harness import KILL, TERM, Fleet, new_tag
from tests.proxy import Proxy

FOREIGN_APP = """
from celery import Celery
from pyworkflow.celery import attach

app = Celery("mine", broker=__import__("os").environ["PYWORKFLOW_BROKER_URL"])
app.conf.update({options})
attach(app)
"""


def test_f01_a_run_whose_client_died_before_it_rang_is_found(fleet: Fleet) -> None:
    fleet.worker(pool="threads")
    assert fleet.result(fleet.start_silently(_program.ten)) == 10


def test_f03_doorbells_that_were_lost_are_rung_again(fleet: Fleet) -> None:
    tags = [new_tag() for _ in range(5)]
    ids = [fleet.start(_program.ten, tag=tag) for tag in tags]
    fleet.eventually(lambda: fleet.waiting() == 5, "five messages")
    with fleet.redis() as client:
        client.flushdb()  # as if a worker had popped them and died before it noted them
    fleet.worker(pool="threads")
    assert [fleet.result(run_id) for run_id in ids] == [10] * 5
    assert all(sum(fleet.executions(tag).values()) == 10 for tag in tags)


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_f04_a_doorbell_rung_a_hundred_times_does_its_work_once(fleet: Fleet, pool: str) -> None:
    tag = new_tag()
    run_id = fleet.start(_program.ten, tag=tag)
    fleet.ring(run_id, times=100)
    fleet.worker(pool=pool, concurrency=4)
    assert fleet.result(run_id) == 10
    fleet.eventually(lambda: fleet.waiting() == 0, "all messages are taken")
    assert set(fleet.executions(tag).values()) == {1}
    fleet.check(run_id)


def test_f05_late_acknowledgement_and_redelivery_run_nothing_twice(fleet: Fleet) -> None:
    options = (
        "task_acks_late=True, broker_transport_options={'visibility_timeout': 1, "
        "'unacked_restore_interval': 1, 'unacked_restore_throttle': 1}"
    )
    # By force, and late: a worker takes back what an application says of our tasks.
    app = FOREIGN_APP.format(options=options) + (
        "from celery.signals import celeryd_after_setup\n"
        "@celeryd_after_setup.connect\n"
        "def late(**_):\n"
        "    app.tasks['pyworkflow.handle'].acks_late = True\n"
    )
    (fleet.path / "late.py").write_text(app)
    tag = new_tag()
    for _ in range(2):
        fleet.worker(app="late", queues="celery")
    run_id = fleet.start_silently(_program.waiting, tag=tag)
    fleet.begun(tag, "gated")
    fleet.eventually(lambda: delivered_again(fleet), "a second delivery of one message")
    fleet.open_gate(tag)
    assert fleet.result(run_id) == "gated"
    assert fleet.executions(tag) == {"gated": 1, "gated-end": 1}


def delivered_again(fleet: Fleet) -> bool:
    """Whether a message was received twice."""
    received = re.findall(r"Task celery_gated\[(\S+)\] received", fleet.logs())
    return len(received) > len(set(received))


def test_f17_a_broker_that_forgot_everything_holds_up_no_run(fleet: Fleet) -> None:
    tag = new_tag()
    ids = [fleet.start(_program.ten) for _ in range(5)]
    fleet.eventually(lambda: fleet.waiting() == 5, "five messages")
    fleet.broker.kill()
    fleet.broker.start()
    worker = fleet.worker()
    assert [fleet.result(run_id) for run_id in ids] == [10] * 5
    # Once more, under a worker that is connected and busy.
    ids = [fleet.start(_program.waiting, tag=tag), fleet.start(_program.napper, 2.0)]
    fleet.begun(tag, "gated")
    fleet.broker.kill()
    fleet.open_gate(tag)
    fleet.broker.start()
    ids += [fleet.start(_program.fan, 3)]
    for run_id in ids:
        fleet.result(run_id)
    assert fleet.executions(tag) == {"gated": 1, "gated-end": 1}
    assert worker.process.poll() is None


def test_f18_a_broker_that_evicts_its_queue_holds_up_no_run(fleet: Fleet) -> None:
    ids = [fleet.start(_program.ten) for _ in range(3)]
    fleet.eventually(lambda: fleet.waiting() == 3, "three messages")
    with fleet.redis() as client:
        used = int(client.info("memory")["used_memory"])
        client.config_set("maxmemory-policy", "allkeys-lru")
        client.config_set("maxmemory", used + 300_000)
        for n in range(2_000):
            client.set(f"ballast-{n}", "x" * 1_000)
            if not client.exists("pyworkflow\x06\x169"):
                break
        assert fleet.waiting() == 0
        client.config_set("maxmemory", 0)
    fleet.worker(pool="threads")
    assert [fleet.result(run_id) for run_id in ids] == [10] * 3


def test_f19_a_broker_without_memory_costs_no_start(fleet: Fleet) -> None:
    with fleet.redis() as client:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", 1)
        run_id = fleet.start(_program.ten)
        client.config_set("maxmemory", 0)
    fleet.worker(pool="threads")
    assert fleet.result(run_id) == 10


def test_f21_a_start_without_broker_returns_and_the_run_follows(fleet: Fleet) -> None:
    fleet.broker.kill()
    run_id = fleet.start(_program.ten)
    assert fleet.status(run_id) == "pending"
    fleet.broker.start()
    fleet.worker(pool="threads")
    assert fleet.result(run_id) == 10


def test_f22_a_start_before_a_silent_broker_returns_and_the_run_follows(
    fleet: Fleet, make_proxy: Callable[[str], Proxy]
) -> None:
    proxy = make_proxy(fleet.broker.url)
    fleet.client_broker = proxy.url
    first = fleet.start(_program.ten)
    fleet.eventually(lambda: fleet.waiting() == 1, "the message came through")
    proxy.blackhole()
    # Were it waited for, each of these would take the three seconds after which it is given up.
    began = monotonic()
    ids = [fleet.start(_program.ten) for _ in range(60)]
    assert monotonic() - began < 60
    fleet.worker(pool="threads")  # not through the proxy
    assert [fleet.result(run_id) for run_id in (first, *ids)] == [10] * 61
    proxy.heal()


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_f23_a_broker_that_cuts_connections_mid_step_runs_nothing_twice(
    fleet: Fleet, pool: str
) -> None:
    tag = new_tag()
    worker = fleet.worker(pool=pool)
    run_id = fleet.start(_program.waiting, tag=tag)
    fleet.begun(tag, "gated")
    with fleet.redis() as client:
        client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    fleet.eventually(lambda: "onnection to broker" in worker.log, "the worker lost its broker")
    fleet.open_gate(tag)
    assert fleet.result(run_id) == "gated"
    assert fleet.result(fleet.start(_program.ten)) == 10
    assert fleet.executions(tag) == {"gated": 1, "gated-end": 1}


def test_f35_five_sweepers_and_two_beats_have_one_effect(fleet: Fleet) -> None:
    tags = [new_tag() for _ in range(10)]
    workers = [fleet.begin(pool="solo") for _ in range(5)]
    beats = [fleet.beat() for _ in range(2)]
    fleet.eventually(lambda: all(worker.ready for worker in workers), "five workers")
    ids = [fleet.start(_program.napper, 1.0, tag=tag) for tag in tags]
    assert [fleet.result(run_id) for run_id in ids] == ["after"] * 10
    fleet.eventually(lambda: all("Sending due task" in beat.log for beat in beats), "beats sweep")
    assert all(fleet.executions(tag) == {"before": 1, "after": 1} for tag in tags)
    fleet.check(*ids)


def test_f41_f50_of_two_versions_of_the_code_the_old_one_ends_its_runs(fleet: Fleet) -> None:
    tag = new_tag()
    old = fleet.worker()
    run_id = fleet.start(_program.changing, tag=tag)
    fleet.begun(tag, "gated")
    old.signal_all(KILL)
    old.wait()
    new = fleet.worker(PROGRAM_VERSION="2")
    fleet.open_gate(tag)
    fleet.eventually(lambda: fleet.status(run_id) == "stalled", "the new code cannot go on")
    assert "quick" in str(fleet.run(run_id).stalled)
    assert fleet.result(fleet.start(_program.ten)) == 10  # all else goes on
    # Side by side, chance would decide who claims the turn, and each mistake doubles its pause.
    new.signal(TERM)
    assert new.wait() == 0
    fleet.worker()
    assert fleet.result(run_id) == "oldgated"
    assert "new" not in fleet.executions(tag)


def test_f42_a_worker_without_the_workflow_leaves_it_to_another(fleet: Fleet) -> None:
    without = fleet.worker(pool="threads", PYWORKFLOW_MODULES="")
    assert "has no workflow" in without.log
    run_id = fleet.start(_program.ten)
    fleet.eventually(lambda: "seems to have the workflow" in without.log, "it says so")
    assert fleet.status(run_id) not in ("failed", "stalled")
    fleet.worker(pool="threads")
    assert fleet.result(run_id) == 10
    # A mixed fleet goes on working.
    assert [fleet.result(fleet.start(_program.ten)) for _ in range(5)] == [10] * 5


def test_f47_short_steps_do_not_wait_behind_a_long_one(fleet: Fleet) -> None:
    tag = new_tag()
    workers = [fleet.begin(concurrency=1) for _ in range(2)]
    fleet.eventually(lambda: all(worker.ready for worker in workers), "two workers")
    long = fleet.start(_program.waiting, tag=tag)
    fleet.begun(tag, "gated")
    short = [fleet.start(_program.ten) for _ in range(100)]
    assert [fleet.result(run_id) for run_id in short] == [10] * 100
    assert fleet.status(long) == "running"
    fleet.open_gate(tag)
    assert fleet.result(long) == "gated"


def test_f49_a_plugin_that_raises_in_every_hook_changes_no_outcome(fleet: Fleet) -> None:
    (fleet.path / "hostile.py").write_text(HOSTILE)
    modules = f"{_program.__name__},hostile"
    worker = fleet.worker(PYWORKFLOW_MODULES=modules)
    run_id = fleet.start(_program.mixed)
    assert fleet.result(run_id)[-1] == "c"
    assert "hostile" in worker.log
    fleet.check(run_id)


HOSTILE = """
from pyworkflow._plugins import register
from pyworkflow.spi import hookimpl, hookspecs

LEFT_ALONE = {"make_storage", "make_executor", "make_codec", "register", "configure", "cli"}


def raising(specified):
    names = specified.__code__.co_varnames[: specified.__code__.co_argcount]
    space = {}
    exec(f"def hook(self, {', '.join(names)}): raise RuntimeError('hostile')", space)
    return hookimpl(space["hook"])


register(
    type(
        "Hostile",
        (),
        {
            name: raising(what)
            for name, what in vars(hookspecs).items()
            if name.startswith("pyworkflow_") and name.removeprefix("pyworkflow_") not in LEFT_ALONE
        },
    )()
)
"""
