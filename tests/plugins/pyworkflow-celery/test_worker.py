"""A worker before and around its pool: checks at start, its loop, forks. No worker is started."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from types import SimpleNamespace

import pytest
from celery import Celery

from pyworkflow._config import Settings
from pyworkflow.errors import StorageUnavailable
from pyworkflow.spi import Doorbell, Outcome
from pyworkflow.worker import Outages
from pyworkflow_celery import _process, _shutdown, _sweeper, _worker
from pyworkflow_celery._attach import equip
from pyworkflow_celery._process import Host
from tests.servers import until

FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
# From 3.12 on, Python warns of a fork beside threads: what makes it safe is the subject here.
MAY_FORK = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


class Runtime:
    """A runtime that does as it is told."""

    def __init__(self, outcome=Outcome.HANDLED, opens=True):
        self.outcome, self.opens = outcome, opens
        self.opened = self.swept = self.closed = 0
        self.drained = []
        self.freed = []
        self.rang = []
        self.left = None
        self.asked = 0
        self.waited = []
        self.go_on = asyncio.Event()

    async def open(self):
        self.opened += 1
        if not self.opens:
            raise StorageUnavailable("away")

    async def handle(self, bell):
        if bell.item_id == "wait":
            await self.go_on.wait()
        return self.outcome

    async def sweep(self, limit):
        self.swept += 1
        return self.rang.pop(0) if self.rang else 0

    async def seconds_until_due(self):
        self.asked += 1
        return self.left

    async def wait_for_news(self, timeout):
        self.waited.append(timeout)
        await asyncio.sleep(0.001)
        return False

    async def drain(self, grace):
        self.drained.append(grace)
        self.go_on.set()

    async def close(self):
        self.closed += 1

    async def free_gone(self):
        return 0

    def free(self, pid):
        self.freed.append(pid)


@pytest.fixture
def host_on():
    made = []

    def make(runtime, grace=1.0):
        made.append(Host(lambda: runtime, grace))
        return made[-1]

    yield make
    for host in made:
        host.close()


def test_the_runtime_opens_with_the_first_doorbell(host_on):
    runtime = Runtime()
    host = host_on(runtime)
    assert runtime.opened == 0
    assert host.handle(Doorbell("r", "turn")) is Outcome.HANDLED
    assert host.handle(Doorbell("r", "turn")) is Outcome.HANDLED
    assert runtime.opened == 1


def test_opening_is_tried_again_after_a_failure(host_on):
    runtime = Runtime(opens=False)
    host = host_on(runtime)
    with pytest.raises(StorageUnavailable):
        host.handle(Doorbell("r", "turn"))
    runtime.opens = True
    assert host.handle(Doorbell("r", "turn")) is Outcome.HANDLED
    assert runtime.opened == 2


def test_several_threads_handle_doorbells_at_once_and_a_drain_ends_them(host_on):
    runtime = Runtime()
    host = host_on(runtime, grace=3.0)
    threads = [
        threading.Thread(target=host.handle, args=(Doorbell("r", "wait"),)) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    until(lambda: host.busy == 3, "three doorbells at work")
    host.begin_drain()
    host.begin_drain()
    assert host.drained.wait(10)
    for thread in threads:
        thread.join(10)
    assert host.busy == 0
    assert runtime.drained == [3.0]


def test_a_host_that_did_nothing_is_drained_at_once(host_on):
    runtime = Runtime()
    host = host_on(runtime)
    host.begin_drain()
    assert host.drained.wait(10)
    assert runtime.opened == 0


def test_closing_drains_and_closes_the_store(host_on):
    runtime = Runtime()
    host = host_on(runtime)
    host.handle(Doorbell("r", "turn"))
    host.close()
    assert (runtime.drained, runtime.closed) == ([1.0], 1)
    assert runtime.freed == []
    assert not host.thread.is_alive()


def test_the_last_thing_of_a_process_is_to_give_back_what_no_drain_can_stop(host_on):
    runtime = Runtime()
    host = host_on(runtime)
    host.handle(Doorbell("r", "turn"))
    host.close(last=True)
    assert runtime.freed == [os.getpid()]
    assert runtime.closed == 1


@FORKS
@MAY_FORK
def test_a_fork_waits_for_the_loop_and_the_child_has_nothing_of_it(host_on, monkeypatch):
    monkeypatch.setattr(_process, "_standing", _process._Standing())
    runtime = Runtime()
    host = _process.host(lambda: host_on(runtime))
    host.handle(Doorbell("r", "turn"))
    child = os.fork()
    if child == 0:
        mine = _process.standing_host() is None and _process._inherited[-1].host is host
        os._exit(0 if mine else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    # The parent's loop still wakes up.
    assert _process.standing_host() is host
    assert host.handle(Doorbell("r", "turn")) is Outcome.HANDLED


# --- sweeping -----------------------------------------------------------------------------------


async def opened(runtime):
    return runtime


def sweep_once(runtime, looks=0):
    host = SimpleNamespace(runtime=lambda: opened(runtime))
    return asyncio.run(_sweeper._sweep_once(host, looks))


def test_a_sweeper_sleeps_until_the_next_item_is_due():
    runtime = Runtime()
    runtime.left = 1.25
    sweep_once(runtime)
    assert runtime.waited == [1.25]


def test_a_sweeper_looks_now_and_then_when_nothing_is_owed():
    runtime = Runtime()
    sweep_once(runtime)
    assert runtime.waited == [5.0]


def test_a_sweeper_looks_soon_and_then_more_seldom_at_what_was_rung_for(monkeypatch):
    runtime = Runtime()
    runtime.left = -3.0
    slept = []

    async def sleep(seconds):
        slept.append(seconds)

    monkeypatch.setattr(_sweeper.asyncio, "sleep", sleep)
    host = SimpleNamespace(runtime=lambda: opened(runtime))
    looks = 0
    for _ in range(10):
        looks = asyncio.run(_sweeper._sweep_once(host, looks))
    assert slept[0] <= 0.06
    assert 0.4 <= slept[-1] <= 0.6
    assert (runtime.swept, runtime.asked) == (10, 6)
    runtime.rang = [1]
    asyncio.run(_sweeper._sweep_once(host, looks))
    assert slept[-1] <= 0.06
    assert (runtime.swept, runtime.asked) == (11, 6)
    assert runtime.waited == []  # news may come all the time, and mean what is rung for already


def test_a_full_sweep_is_followed_by_the_next():
    runtime = Runtime()
    runtime.rang = [100]
    sweep_once(runtime)
    assert runtime.waited == []


def test_a_sweeper_outlives_a_store_that_does_not_answer(caplog):
    runtime = Runtime()
    host = SimpleNamespace(draining=False, calls=0)

    async def opened():
        host.calls += 1
        if host.calls == 3:
            host.draining = True
        if host.calls < 3:
            raise StorageUnavailable("away")
        return runtime

    host.runtime = opened
    host.outages = Outages(opened, "me", logging.getLogger("pyworkflow.celery"))
    caplog.set_level(logging.INFO, "pyworkflow.celery")
    asyncio.run(_sweeper.sweep_for_ever(host))
    assert runtime.swept == 1
    first, last = (record.getMessage() for record in caplog.records)
    assert first == "no sweep, the storage does not answer: away"
    assert last.startswith("the storage works again: operation=sweep failures=2 ")


def test_found_m02_doorbells_dropped_in_an_outage_are_one_line(host_on, monkeypatch, caplog):
    host = host_on(Runtime(opens=False))
    monkeypatch.setattr(_worker, "process_host", lambda app: host)
    app = Celery("x", set_as_current=False)
    equip(app)
    task = app.tasks["pyworkflow.handle"]
    answers = {task(run_id=f"r{number}", item_id="turn") for number in range(50)}
    assert answers == {f"turn of r{number}: storage unavailable" for number in range(50)}
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == "doorbells are dropped, sweeps ring again: away"


# --- checks before the pool starts --------------------------------------------------------------


def worker_with(monkeypatch, pool="celery.concurrency.prefork", **settings):
    config = Settings(**{"storage": "file:///tmp/nowhere", **settings})
    monkeypatch.setattr(_worker, "settings", lambda: config)
    app = Celery("x", set_as_current=False)
    equip(app)
    return SimpleNamespace(app=app, pool_cls=SimpleNamespace(__module__=pool))


@pytest.mark.parametrize("pool", ["gevent", "eventlet"])
def test_pools_that_replace_threads_are_refused(monkeypatch, pool):
    worker = worker_with(monkeypatch, pool=f"celery.concurrency.{pool}")
    with pytest.raises(SystemExit, match=rf"pool={pool}.*-P prefork, threads or solo"):
        _worker.prepare_worker(worker)


def test_a_pool_that_does_not_fork_is_refused(monkeypatch):
    worker = worker_with(monkeypatch)
    worker.app.conf.worker_pool_start_method = "spawn"
    with pytest.raises(SystemExit, match=r"worker_pool_start_method=spawn.*-P threads"):
        _worker.prepare_worker(worker)


def test_a_module_that_does_not_import_ends_the_worker_with_one_line(monkeypatch):
    worker = worker_with(monkeypatch, modules=("no_such_module_here",))
    with pytest.raises(SystemExit) as ended:
        _worker.prepare_worker(worker)
    assert "module=no_such_module_here" in str(ended.value)
    assert "\n" not in str(ended.value)


def test_an_eager_application_gets_no_worker(monkeypatch):
    worker = worker_with(monkeypatch)
    worker.app.conf.task_always_eager = True
    with pytest.raises(SystemExit, match="task_always_eager=True"):
        _worker.prepare_worker(worker)


def test_an_application_that_takes_no_json_gets_no_worker(monkeypatch):
    worker = worker_with(monkeypatch)
    worker.app.conf.accept_content = ["pickle"]
    with pytest.raises(SystemExit, match=r"accept_content=\['pickle'\]; add 'json'"):
        _worker.prepare_worker(worker)


def test_what_an_application_says_of_its_own_tasks_is_not_said_of_doorbells(monkeypatch):
    worker = worker_with(monkeypatch)
    said = {"rate_limit": "1/m", "acks_late": True, "time_limit": 1, "ignore_result": False}
    worker.app.conf.task_annotations = {"*": said}
    worker.app.conf.task_default_rate_limit = "2/m"
    worker.app.finalize()
    assert worker.app.tasks["pyworkflow.handle"].rate_limit == "1/m"
    _worker.prepare_worker(worker)
    for name in ("pyworkflow.handle", "pyworkflow.sweep"):
        task = worker.app.tasks[name]
        assert (task.rate_limit, task.acks_late, task.time_limit) == ("", False, None)
        assert task.ignore_result


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("celery.concurrency.prefork", "prefork"),
        ("celery.concurrency.thread", "threads"),
        ("celery.concurrency.solo", "solo"),
        ("my.pool", "pool"),
    ],
)
def test_the_pool_is_known_by_its_module(module, name):
    assert _worker._pool_of(SimpleNamespace(pool_cls=SimpleNamespace(__module__=module))) == name


# --- children of the pool -----------------------------------------------------------------------


def test_a_child_whose_end_is_told_a_moment_too_early_is_looked_for_again():
    later, looks = [], []
    child, other = object(), object()
    hub = SimpleNamespace(call_later=lambda seconds, call, *args: later.append((call, args)))

    def maintain_pool():
        looks.append(1)
        if len(looks) == 2:
            pool._pool.remove(child)

    pool = SimpleNamespace(_pool=[child, other], maintain_pool=maintain_pool)
    pool._event_process_exit = lambda hub, process: looks.clear()
    _worker._notice_exits(SimpleNamespace(pool=SimpleNamespace(_pool=pool)))
    pool._event_process_exit(hub, child)
    while later:
        call, args = later.pop()
        call(*args)
    assert len(looks) == 2


def test_a_pool_of_another_kind_is_left_alone():
    _worker._notice_exits(SimpleNamespace(pool=SimpleNamespace(_pool=None)))
    _worker._notice_exits(SimpleNamespace(pool=object()))


# --- the end ------------------------------------------------------------------------------------


@FORKS
@MAY_FORK
def test_children_see_the_end_of_the_main_process_in_a_pipe():
    state = _shutdown.Shutdown()
    state.prepare(forks=True)
    child = os.fork()
    if child == 0:
        state.after_fork()
        os._exit(0 if os.read(state._read, 1) == b"" else 1)
    assert not state.in_child
    state.tell()
    state.tell()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.close(state._read)


def test_a_worker_without_processes_drains_its_own_loop(host_on, monkeypatch):
    monkeypatch.setattr(_process, "_standing", _process._Standing())
    host = _process.host(lambda: host_on(Runtime()))
    state = _shutdown.Shutdown()
    state.prepare(forks=False)
    state.tell()
    assert host.drained.wait(10)


@pytest.fixture
def signalled(host_on, monkeypatch):
    """A worker without processes that obeys signals, and what Celery's handler has seen."""
    monkeypatch.setattr(_process, "_standing", _process._Standing())
    host = _process.host(lambda: host_on(Runtime()))
    seen, ended = [], threading.Event()
    monkeypatch.setattr(_shutdown.os, "_exit", lambda status: ended.set())
    numbers = [signal.SIGQUIT, signal.SIGTERM, signal.SIGINT]
    before = {each: signal.getsignal(each) for each in numbers}
    for each in numbers:
        signal.signal(each, lambda *_: seen.append(host.drained.is_set()))
    state = _shutdown.Shutdown()
    state.prepare(forks=False)
    fd = signal.set_wakeup_fd(-1)
    state.obey()
    read, write = state._heard
    try:
        yield SimpleNamespace(state=state, seen=seen, ended=ended)
    finally:
        signal.set_wakeup_fd(fd)
        for each, handler in before.items():
            signal.signal(each, handler)
        os.write(write, b"\0")
        until(lambda: "pyworkflow-signals" not in {t.name for t in threading.enumerate()}, "an end")
        os.close(read)
        os.close(write)


def test_a_signal_tells_before_celery_acts_on_it(signalled):
    signal.raise_signal(signal.SIGQUIT)
    assert signalled.seen == [True]


def test_a_signal_that_comes_twice_at_once_does_not_insist(signalled, monkeypatch):
    monkeypatch.setattr(_shutdown, "_AS_ONE", 60.0)
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGTERM)
    assert signalled.seen == [True, True]
    assert not signalled.state.insisted
    signal.raise_signal(signal.SIGINT)
    assert signalled.ended.wait(10)


def test_the_second_signal_insists_whatever_handlers_there_are(signalled, monkeypatch):
    monkeypatch.setattr(_shutdown, "_AS_ONE", -1.0)
    signal.raise_signal(signal.SIGTERM)
    assert not signalled.state.insisted
    signal.signal(signal.SIGQUIT, lambda *_: None)
    signal.raise_signal(signal.SIGQUIT)
    assert signalled.ended.wait(10)
    assert signalled.state.insisted
