"""Messages as they reach a worker: what is taken, what is dropped with one line, and never a crash."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from pyworkflow.errors import StorageUnavailable
from pyworkflow.spi import Outcome
from pyworkflow_celery import _arrival, _shutdown, _tasks, _worker
from pyworkflow_celery._arrival import DoorbellRequest, doorbell_strategy

GOOD = [[], {"run_id": "r", "item_id": "turn", "v": 1}, {"chain": None}]


def message(body, content_type="application/json"):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return SimpleNamespace(body=raw, content_type=content_type)


@pytest.fixture
def arrive(monkeypatch):
    """Hands a message to the strategy; what was delivered, and what was acknowledged."""
    seen = SimpleNamespace(delivered=[], acknowledged=0)

    def ack(*_):
        seen.acknowledged += 1

    monkeypatch.setattr(
        _arrival._celery,
        "default_strategy",
        lambda *_: lambda message, *args, **kwargs: seen.delivered.append(message),
    )
    on_message = doorbell_strategy(None, None, SimpleNamespace(connection_errors=()))

    def give(what):
        on_message(what, None, ack, None, None)
        return seen

    return give


@pytest.mark.parametrize("body", [GOOD, [[], {"run_id": "r", "item_id": "turn"}, {}]])
def test_a_doorbell_is_delivered(arrive, body):
    seen = arrive(message(body))
    assert len(seen.delivered) == 1
    assert seen.acknowledged == 0


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (message(GOOD, "application/x-python-serialize"), "content_type="),
        (message(GOOD, None), "content_type="),
        (message(b"\x80\x04."), "not JSON"),
        (message(b"[" * 10_000), "not JSON"),
        (message(b"x" * 20_000), "at most"),
        (SimpleNamespace(body=None, content_type="application/json"), "at most"),
        (message({"run_id": "r"}), "not that of a Celery task"),
        (message([[], None, {}]), "not that of a Celery task"),
        (message([[], {"run_id": "r", "item_id": "t", "v": 2}, {}]), "version=2"),
        (message([[], {"run_id": "r", "item_id": "t", "v": "9" * 999}, {}]), "version="),
        (message([[], {"run_id": "r"}, {}]), "no work item"),
        (message([[], {"run_id": 1, "item_id": "t"}, {}]), "no work item"),
        (message([[], {"run_id": "r", "item_id": "t", "eval": "1"}, {}]), "no work item"),
    ],
)
def test_an_unreadable_message_is_acknowledged_dropped_and_told_once(arrive, caplog, bad, said):
    seen = arrive(bad)
    assert seen.delivered == []
    assert seen.acknowledged == 1
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert said in record.getMessage()
    assert len(record.getMessage()) < 300


@pytest.mark.parametrize("problem", [ValueError("x" * 999), KeyError("properties"), TypeError("t")])
def test_rubbish_in_a_redis_list_does_not_end_the_worker(caplog, problem):
    def read():
        raise problem

    assert _arrival._guarded(read)() is True
    assert "is no message and was dropped" in caplog.text
    assert len(caplog.records[0].getMessage()) < 300


def test_other_errors_of_the_connection_are_left_to_celery():
    def read():
        raise ConnectionError

    with pytest.raises(ConnectionError):
        _arrival._guarded(read)()


def test_a_cold_shutdown_leaves_what_runs_to_the_drain_and_a_second_signal_kills(monkeypatch):
    state = _shutdown.Shutdown()
    monkeypatch.setattr(_arrival, "shutdown", state)
    killed = []
    monkeypatch.setattr(_arrival._celery.TaskRequest, "cancel", lambda self, *a: killed.append(a))
    request = DoorbellRequest.__new__(DoorbellRequest)
    state.told = state._first = True
    request.cancel("pool")
    assert killed == []
    state._first = False
    request.cancel("pool")
    assert killed == [("pool", None, True)]


# --- what the task does -------------------------------------------------------------------------


class Host:
    def __init__(self, outcome):
        self.outcome = outcome
        self.draining = False
        self.handled = []
        self.waited = []

    def handle(self, bell):
        self.handled.append(bell)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def later(self, seconds, what):
        self.waited.append(seconds)
        what()


class Publisher:
    def __init__(self):
        self.passed = []

    def pass_on(self, bell, queue, priority, hops):
        self.passed.append((bell, queue, priority, hops))

    def flush(self, timeout=0):
        return True


@pytest.fixture
def ring(monkeypatch):
    """Runs the task's body on a host with this outcome; the answer, the host, what was passed on."""

    def run(outcome, draining=False, **request):
        host, publisher = Host(outcome), Publisher()
        host.draining = draining
        monkeypatch.setattr(_worker, "process_host", lambda app: host)
        monkeypatch.setattr(_tasks, "publisher_for", lambda app: publisher)
        monkeypatch.setattr(_arrival, "publisher_for", lambda app: publisher)
        monkeypatch.setattr(_tasks, "_LAST", 0)
        asked = SimpleNamespace(
            delivery_info={"routing_key": "gpu", "priority": 4}, shadow="orders", **request
        )
        answer = _tasks._handle(object(), asked, _tasks.Doorbell("r", "turn"))
        return SimpleNamespace(answer=answer, host=host, passed=publisher.passed)

    return run


@pytest.mark.parametrize("outcome", [Outcome.HANDLED, Outcome.BUSY, Outcome.GONE])
def test_nothing_is_rung_again_for_what_is_as_it_should_be(ring, caplog, outcome):
    done = ring(outcome)
    assert done.answer == outcome
    assert done.passed == []
    assert caplog.records == []


def test_a_purged_run_is_a_line_for_debugging_only(ring, caplog):
    with caplog.at_level("DEBUG", "pyworkflow.celery"):
        ring(Outcome.GONE)
    assert "gone run_id=r" in caplog.text


def test_headers_of_plugins_reach_the_runtime(ring):
    done = ring(Outcome.HANDLED, pyworkflow_headers={"traceparent": "00-1"})
    assert done.host.handled[0].headers == {"traceparent": "00-1"}


@pytest.mark.parametrize("sent", ["x", None, 3])
def test_headers_of_another_form_are_overlooked(ring, sent):
    assert ring(Outcome.HANDLED, pyworkflow_headers=sent).answer == "handled"


def test_a_doorbell_for_a_workflow_that_is_elsewhere_goes_round_with_a_pause(ring):
    done = ring(Outcome.UNKNOWN_WORKFLOW, pyworkflow_hops=1)
    ((bell, queue, priority, hops),) = done.passed
    assert (bell.run_id, bell.item_id, bell.name) == ("r", "turn", "orders")
    assert (queue, priority, hops) == ("gpu", 4, 2)
    assert 0.05 <= done.host.waited[0] <= 0.5


def test_after_three_rounds_it_is_left_to_the_sweeps(ring, caplog):
    done = ring(Outcome.UNKNOWN_WORKFLOW, pyworkflow_hops=3)
    assert done.passed == []
    assert "no worker seems to have the workflow" in caplog.text
    assert "PYWORKFLOW_MODULES" in caplog.text


def test_a_process_that_ends_passes_doorbells_on_at_once(ring):
    done = ring(Outcome.HANDLED, draining=True)
    assert done.answer == "passed on"
    assert done.host.handled == []
    assert done.passed[0][1:] == ("gpu", 4, 0)


def test_a_store_that_does_not_answer_fails_no_task(ring, caplog):
    done = ring(StorageUnavailable("away"))
    assert done.answer == "storage unavailable"
    assert "a sweep rings again" in caplog.text


@pytest.mark.parametrize(("sent", "again"), [(None, 1), (2, 3), (3, None)])
def test_the_doorbell_of_a_child_that_died_is_rung_again_a_few_times(
    monkeypatch, caplog, sent, again
):
    publisher = Publisher()
    monkeypatch.setattr(_arrival, "publisher_for", lambda app: publisher)
    monkeypatch.setattr(_arrival._celery, "task_ready", lambda request: None)

    found = {
        "request_dict": {"pyworkflow_hops": sent},
        "kwargs": {"run_id": "r", "item_id": "turn"},
        "delivery_info": {"routing_key": "gpu", "priority": 4},
        "name": "orders",
        "_app": None,
        "__init__": lambda self: None,
    }
    request = type("Request", (DoorbellRequest,), found)()
    lost = _arrival._celery.WorkerLostError("Worker exited prematurely: signal 9 (SIGKILL)")
    request.on_failure(SimpleNamespace(exception=SimpleNamespace(exc=lost)))
    assert [(b.run_id, b.name, q, p, h) for b, q, p, h in publisher.passed] == (
        [("r", "orders", "gpu", 4, again)] if again else []
    )
    (record,) = caplog.records
    assert "a pool child died at work" in record.getMessage()
    assert record.exc_info is None
