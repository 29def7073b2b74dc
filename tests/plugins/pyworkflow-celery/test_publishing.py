"""Doorbells on their way: what a message holds, and what a broker that is down costs."""

from __future__ import annotations

import base64
import json
import logging
import os
import socket
import threading
import time
from itertools import pairwise

import pytest
from celery import Celery

from pyworkflow._config import Settings
from pyworkflow.spi import Doorbell
from pyworkflow_celery._config import app_conf
from pyworkflow_celery._publish import Publisher, publisher_for
from tests.servers import until

FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
# From 3.12 on, Python warns of a fork beside threads: what makes it safe is the subject here.
MAY_FORK = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def app_on(url):
    app = Celery("x", set_as_current=False)
    app.conf.update(app_conf(Settings(broker_url=url)))
    return app


@pytest.fixture
def broker(make_valkey):
    return make_valkey()


@pytest.fixture
def publisher(broker):
    made = Publisher(app_on(broker.url))
    yield made
    made.close()


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"redis://:hidden@127.0.0.1:{probe.getsockname()[1]}/0"


def messages(broker, queue="pyworkflow", level=9):
    """The messages of a queue, first in first."""
    import redis

    with redis.Redis.from_url(broker.url) as client:
        key = f"{queue}\x06\x16{level}" if level else queue
        return [json.loads(raw) for raw in reversed(client.lrange(key, 0, -1))]


def body_of(message):
    return json.loads(base64.b64decode(message["body"]))


def test_a_message_holds_ids_only_and_names_what_it_is_for_in_a_header(broker, publisher):
    publisher.notify([Doorbell("run_1", "turn", name="orders", headers={"traceparent": "00-1"})])
    assert publisher.flush(10)
    (message,) = messages(broker)
    args, kwargs, embedded = body_of(message)
    assert args == []
    assert kwargs == {"run_id": "run_1", "item_id": "turn", "v": 1}
    assert not any(embedded.values())
    assert message["content-type"] == "application/json"
    headers = message["headers"]
    assert headers["task"] == "pyworkflow.handle"
    assert headers["shadow"] == "orders"
    assert headers["pyworkflow_headers"] == {"traceparent": "00-1"}
    assert headers["ignore_result"] is True
    assert headers["eta"] is None
    assert headers["expires"] is None
    assert "pyworkflow_hops" not in headers


def test_queues_and_priorities_pass_through(broker, publisher):
    publisher.notify(
        [
            Doorbell("r", "a", queue="gpu"),
            Doorbell("r", "b", priority=9),
            Doorbell("r", "c", priority=4, queue="gpu"),
        ]
    )
    assert publisher.flush(10)
    assert body_of(messages(broker, "gpu", 9)[0])[1]["item_id"] == "a"
    assert body_of(messages(broker, "pyworkflow", 0)[0])[1]["item_id"] == "b"
    assert body_of(messages(broker, "gpu", 5)[0])[1]["item_id"] == "c"


def test_one_that_is_passed_on_goes_back_to_where_it_came_from(broker, publisher):
    publisher.pass_on(Doorbell("r", "a", name="orders"), "theirs", 3, 2)
    assert publisher.flush(10)
    (message,) = messages(broker, "theirs", 3)
    assert message["headers"]["pyworkflow_hops"] == 2
    assert message["headers"]["shadow"] == "orders"


def test_doorbells_keep_their_order(broker, publisher):
    publisher.notify([Doorbell("r", str(n)) for n in range(50)])
    assert publisher.flush(20)
    sent = [body_of(message)[1]["item_id"] for message in messages(broker)]
    assert sent == [str(n) for n in range(50)]


def test_a_broker_that_is_down_is_told_once(caplog):
    publisher = Publisher(app_on(closed_port()))
    for n in range(200):
        publisher.notify([Doorbell("r", str(n))])
    until(lambda: caplog.records, "the warning")
    assert not publisher.flush(0.1)
    (record,) = caplog.records
    assert record.name == "pyworkflow.celery"
    assert "the broker does not take messages" in record.getMessage()
    assert "hidden" not in record.getMessage()
    publisher.close()


def test_what_could_not_be_sent_is_sent_when_the_broker_answers(broker, publisher, caplog):
    publisher.notify([Doorbell("r", "first")])
    assert publisher.flush(10)
    broker.kill()
    publisher.notify([Doorbell("r", "second")])
    until(lambda: caplog.records, "the warning")
    broker.start()
    until(
        lambda: [body_of(m)[1]["item_id"] for m in messages(broker)][-1:] == ["second"],
        "the second doorbell",
    )


def test_found_m02_a_brokers_outage_is_backed_off_from_and_logged_once(broker, caplog):
    caplog.set_level(logging.INFO, "pyworkflow.celery")
    publisher = Publisher(app_on(broker.url))
    tries, pauses, send, wait = [], [], publisher._try, publisher._wait
    publisher._try = lambda message: tries.append(message) or send(message)
    publisher._wait = lambda pause: pauses.append(pause) or wait(min(pause, 0.01))
    broker.kill()
    publisher.notify([Doorbell("r", "only")])
    until(lambda: len(pauses) >= 9, "nine attempts")
    assert 0 < pauses[0] <= 0.05
    assert all(earlier < later for earlier, later in pairwise(pauses[:6]))
    assert all(3.75 <= pause <= 5.0 for pause in pauses[7:9])
    broker.start()
    until(lambda: publisher.flush(1), "the message is sent")
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2, lines
    assert lines[0].startswith("the broker does not take messages")
    assert lines[1].startswith(f"the broker works again: operation=send failures={len(tries) - 1}")
    publisher.close()


def test_found_m02_a_new_message_ends_a_long_pause_after_a_second():
    publisher = Publisher(app_on(closed_port()))
    began = time.monotonic()

    def put():
        with publisher._news:
            publisher._state.put += 1
            publisher._news.notify()

    timer = threading.Timer(0.1, put)
    timer.start()
    with publisher._news:
        publisher._wait(600.0)
    timer.join()
    assert 1.0 <= time.monotonic() - began < 60


def test_a_broker_that_does_not_answer_is_given_up_within_seconds(broker, make_proxy, caplog):
    proxy = make_proxy(broker.url)
    publisher = Publisher(app_on(proxy.url))
    publisher.notify([Doorbell("r", "first")])
    assert publisher.flush(10)
    proxy.blackhole()
    publisher.notify([Doorbell("r", "second")])
    until(lambda: caplog.records, "the warning", deadline=20)
    proxy.heal()
    until(lambda: messages(broker)[1:], "the second doorbell", deadline=30)
    publisher.close()


def test_more_than_can_wait_pushes_the_oldest_out(monkeypatch):
    monkeypatch.setattr("pyworkflow_celery._publish._MOST", 10)
    publisher = Publisher(app_on(closed_port()))
    publisher.notify([Doorbell("r", str(n)) for n in range(100)])
    waiting = publisher._state
    until(lambda: waiting.broken, "the broker to be found down")
    assert len(waiting.queue) <= 11
    assert waiting.dropped >= 89
    publisher.close()


def test_a_message_that_cannot_be_sent_does_not_hold_up_the_next(broker, publisher, caplog):
    publisher._app.conf.task_create_missing_queues = False
    publisher.notify([Doorbell("r", "a", queue="unknown"), Doorbell("r", "b")])
    assert publisher.flush(10)
    assert [body_of(m)[1]["item_id"] for m in messages(broker)] == ["b"]
    assert "dropped=1" in caplog.text


@FORKS
@MAY_FORK
def test_a_forked_process_has_a_publisher_and_a_connection_of_its_own(broker):
    app = app_on(broker.url)
    parents = publisher_for(app)
    parents.notify([Doorbell("r", "parent")])
    assert parents.flush(10)
    child = os.fork()
    if child == 0:
        try:
            own = publisher_for(app)
            own.notify([Doorbell("r", "child")])
            os._exit(0 if own is not parents and own.flush(10) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    parents.notify([Doorbell("r", "parent again")])
    assert parents.flush(10)
    assert [body_of(m)[1]["item_id"] for m in messages(broker)] == [
        "parent",
        "child",
        "parent again",
    ]
    parents.close()


def test_a_doorbell_is_of_the_second_protocol_whatever_the_application_sends(broker):
    app = app_on(broker.url)
    app.conf.task_protocol = 1
    publisher = Publisher(app)
    publisher.notify([Doorbell("run", "turn")])
    assert publisher.flush(10)
    publisher.close()
    (message,) = messages(broker)
    assert message["headers"]["task"] == "pyworkflow.handle"
    assert body_of(message)[1] == {"run_id": "run", "item_id": "turn", "v": 1}
