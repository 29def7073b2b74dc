"""Messages as they reach a worker: what is taken, what is dropped with one line, and never a crash."""

from __future__ import annotations

import json
import logging
import os
from types import SimpleNamespace

import pytest
from redis.exceptions import DataError

from pyworkflow.errors import StorageUnavailable
from pyworkflow.spi import Outcome
from pyworkflow.worker import OutageLog
from pyworkflow_celery import _arrival, _tasks, _worker
from pyworkflow_celery._arrival import DoorbellRequest, doorbell_strategy

GOOD = [[], {"run_id": "r", "item_id": "turn", "v": 1}, {"chain": None}]


def message(body, content_type="application/json"):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers, properties = {"id": "1", "task": _arrival.HANDLE}, {}
    return SimpleNamespace(
        body=raw, content_type=content_type, headers=headers, properties=properties
    )


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
        (message([["r"], {"run_id": "r", "item_id": "t"}, {}]), "not that of a Celery task"),
        (message([[], {"run_id": "r", "item_id": "t"}, None]), "not that of a Celery task"),
        (message([[], {"run_id": "r"}, {}]), "no work item"),
        (message([[], {"run_id": "", "item_id": "t"}, {}]), "no work item"),
        (message([[], {"run_id": "r\0", "item_id": "t"}, {}]), "no work item"),
        (message([[], {"run_id": "r", "item_id": "\udfff"}, {}]), "no work item"),
        (message([[], {"run_id": "r", "item_id": "t" * 3000}, {}]), "no work item"),
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


BAD_HEADERS = {
    "eta": "garbage",
    "expires": [],
    "retries": "x",
    "timelimit": "x",
    "group": {},
    "stamped_headers": ["a"],
    "stamps": 5,
    "shadow": {"a": 1},
    "id": [],
    "task": "os.system",
    "root_id": {},
    "argsrepr": 5,
    "origin": {},
    "ignore_result": "no",
    "pyworkflow_hops": -100,
    "pyworkflow_headers": [1],
}


@pytest.mark.parametrize("headers", [{key: value} for key, value in BAD_HEADERS.items()])
def test_headers_that_celery_raises_for_do_not_reach_it(arrive, headers):
    bad = message(GOOD)
    bad.headers = {"traceparent": "00-1", **bad.headers, **headers}
    bad.properties = {"correlation_id": {}, "reply_to": []}
    (taken,) = arrive(bad).delivered
    assert taken.headers["task"] == _arrival.HANDLE
    assert taken.headers["traceparent"] == "00-1"
    assert isinstance(taken.headers["id"], str)
    for key, value in headers.items():
        assert taken.headers.get(key) != value
    assert taken.headers["pyworkflow_hops"] == 0
    assert taken.properties == {"correlation_id": None, "reply_to": None}


def test_a_name_is_one_line(arrive):
    bad = message(GOOD)
    bad.headers["shadow"] = "a\nERROR fake"
    (taken,) = arrive(bad).delivered
    assert taken.headers["shadow"] == "a\ufffdERROR fake"


def test_what_celery_raises_for_all_the_same_is_acknowledged_and_dropped(monkeypatch, caplog):
    acknowledged = []

    def deliver(*_, **__):
        raise AttributeError("a new check")

    monkeypatch.setattr(_arrival._celery, "default_strategy", lambda *_: deliver)
    take = doorbell_strategy(None, None, SimpleNamespace(connection_errors=(ConnectionError,)))
    take(message(GOOD), None, lambda *_: acknowledged.append(True), None, None)
    assert acknowledged == [True]
    assert "a new check" in caplog.text


def test_a_connection_that_breaks_is_left_to_celery(monkeypatch):
    def deliver(*_, **__):
        raise ConnectionResetError

    monkeypatch.setattr(_arrival._celery, "default_strategy", lambda *_: deliver)
    take = doorbell_strategy(None, None, SimpleNamespace(connection_errors=(ConnectionError,)))
    with pytest.raises(ConnectionResetError):
        take(message(GOOD), None, None, None, None)


def test_what_was_taken_before_it_raised_does_not_stay_unacknowledged():
    rejected = []
    qos = SimpleNamespace(_delivered={"old": 1})
    channel = SimpleNamespace(qos=qos, basic_reject=lambda tag, requeue: rejected.append(tag))

    def read():
        qos._delivered["new"] = 2
        raise AttributeError

    assert _arrival._guarded(read, channel)() is True
    assert rejected == ["new"]


def test_a_worker_that_ends_takes_nothing_more(monkeypatch):
    state = SimpleNamespace(told=False)
    monkeypatch.setattr(_arrival, "shutdown", state)
    qos = SimpleNamespace(can_consume=lambda: True)
    _arrival._stop_when_told(qos)
    assert qos.can_consume()
    state.told = True
    assert not qos.can_consume()


def test_a_thread_that_is_done_turns_the_loop_of_the_consumer(monkeypatch):
    wake, readers = _arrival.Wake(), {}
    wake()  # a pool of processes has no use for it
    hub = SimpleNamespace(add_reader=lambda fd, read, *args: readers.update({fd: (read, args)}))
    wake.register(hub)
    wake.register(hub)
    monkeypatch.setattr(_arrival, "wake", wake)
    found = {"on_success": lambda self, answer: answer, "__init__": lambda self: None}
    request = type("Request", (DoorbellRequest,), found)()
    assert request.on_success("answer") == "answer"
    ((fd, (read, args)),) = readers.items()
    read(*args)
    with pytest.raises(BlockingIOError):
        os.read(fd, 1)
    read(*args)
    for each in wake._pipe:
        os.close(each)


@pytest.mark.parametrize(
    "problem",
    [
        ValueError("x" * 999),
        KeyError("properties"),
        TypeError("t"),
        RecursionError("[[["),
        DataError("'hset' with no key value pairs"),
    ],
)
def test_rubbish_in_a_redis_list_does_not_end_the_worker(caplog, problem):
    def read():
        raise problem

    assert _arrival._guarded(read, None)() is True
    assert "is no message and was dropped" in caplog.text
    assert len(caplog.records[0].getMessage()) < 300


def test_other_errors_of_the_connection_are_left_to_celery():
    def read():
        raise ConnectionError

    with pytest.raises(ConnectionError):
        _arrival._guarded(read, None)()


def test_a_cold_shutdown_leaves_what_runs_to_the_drain(monkeypatch):
    killed = []
    monkeypatch.setattr(_arrival._celery.TaskRequest, "cancel", lambda self, *a: killed.append(a))
    DoorbellRequest.__new__(DoorbellRequest).cancel("pool")
    assert killed == []


# --- what the task does -------------------------------------------------------------------------


def application():
    """One with two queues."""
    queues = {"main": None, "gpu": None}
    conf = SimpleNamespace(task_default_queue="main")
    return SimpleNamespace(amqp=SimpleNamespace(queues=queues), conf=conf)


class Host:
    def __init__(self, outcome):
        self.outcome = outcome
        self.draining = False
        self.handled = []
        self.waited = []
        self.outages = OutageLog("the storage", logging.getLogger("pyworkflow.celery"))

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
        sent = {
            "delivery_info": {"routing_key": "task.#", "priority": 4},
            "shadow": "orders",
            "pyworkflow_queue": "gpu",
        }
        asked = SimpleNamespace(**(sent | request))
        answer = _tasks._handle(application(), asked, _tasks.Doorbell("r", "turn"))
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


@pytest.mark.parametrize(("key", "queue"), [("gpu", "gpu"), ("task.#", "main"), (None, "main")])
def test_an_older_message_that_has_no_queue_goes_to_one_that_there_is(ring, key, queue):
    done = ring(
        Outcome.UNKNOWN_WORKFLOW,
        pyworkflow_queue=None,
        delivery_info={"routing_key": key, "priority": {}},
    )
    assert done.passed[0][1:] == (queue, None, 1)


def test_after_three_rounds_it_is_left_to_the_sweeps(ring, caplog):
    done = ring(Outcome.UNKNOWN_WORKFLOW, pyworkflow_hops=3)
    assert done.passed == []
    assert "no worker seems to have the workflow" in caplog.text
    assert "name=orders" in caplog.text
    assert "PYWORKFLOW_MODULES" in caplog.text


def test_a_process_that_ends_passes_doorbells_on_at_once(ring):
    done = ring(Outcome.HANDLED, draining=True)
    assert done.answer == "passed on"
    assert done.host.handled == []
    assert done.passed[0][1:] == ("gpu", 4, 0)


def test_a_store_that_does_not_answer_fails_no_task(ring, caplog):
    done = ring(StorageUnavailable("away"))
    assert done.answer == "storage unavailable"
    assert "sweeps ring again: away" in caplog.text


@pytest.mark.parametrize(("sent", "again"), [(None, 1), (2, 3), (3, None)])
def test_the_doorbell_of_a_child_that_died_is_rung_again_a_few_times(
    monkeypatch, caplog, sent, again
):
    publisher = Publisher()
    monkeypatch.setattr(_arrival, "publisher_for", lambda app: publisher)
    monkeypatch.setattr(_arrival._celery, "task_ready", lambda request: None)

    found = {
        "request_dict": {
            "pyworkflow_hops": sent,
            "pyworkflow_queue": "gpu",
            "delivery_info": {"routing_key": "task.#", "priority": 4},
        },
        "kwargs": {"run_id": "r", "item_id": "turn"},
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
