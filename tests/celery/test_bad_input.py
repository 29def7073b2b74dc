"""What is wrong is told in a line, and nothing is lost by it."""

from __future__ import annotations

import base64
import json
from datetime import timedelta
from urllib.parse import urlsplit

import pytest

from tests.celery import _program
from tests.celery._harness import TERM, Fleet, new_tag
from tests.servers import PostgresServer


def test_a_worker_waits_for_a_broker_that_is_not_there_yet(fleet: Fleet) -> None:
    fleet.broker.kill()
    worker = fleet.begin(pool="threads")
    fleet.eventually(lambda: "Cannot connect to" in worker.log, "it says so")
    run_id = fleet.start_silently(_program.ten)
    fleet.broker.start()
    assert fleet.result(run_id) == 10


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"PYWORKFLOW_BROKER_URL": "http://user:hidden@nowhere/"}, "scheme=http"),
        ({"PYWORKFLOW_BROKER_URL": "redis://user:hidden@nowhere:x/0"}, "no proper "),
        ({"PYWORKFLOW_BROKER_URL": "memory://"}, "reaches no worker"),
        ({"PYWORKFLOW_STORAGE": "memory://"}, "the store exists in one process only"),
        ({"PYWORKFLOW_STORAGE": "nosuch://user:hidden@host/x"}, "nosuch"),
        ({"PYWORKFLOW_MODULES": "no_such_module"}, "no_such_module"),
        ({"PYWORKFLOW_LEASE": "soon"}, "PYWORKFLOW_LEASE"),
    ],
)
def test_a_worker_that_cannot_work_ends_with_one_line(
    fleet: Fleet, env: dict[str, str], said: str
) -> None:
    worker = fleet.begin(pool="threads", **env)
    assert worker.wait() != 0
    assert said in worker.log
    assert "hidden" not in worker.log
    assert "Traceback" not in worker.log, worker.log


def test_a_worker_that_its_store_refuses_ends_with_one_line(
    fleet: Fleet, postgres: PostgresServer
) -> None:
    # It would be free all the time, and take the doorbells of the others.
    address = urlsplit(postgres.url)
    place = f"{address.hostname}:{address.port}"
    urls = {
        f"postgresql://postgres:hidden@{place}/no_such_database": "no_such_database",
        f"postgresql://nobody_here:hidden@{place}/postgres": "sqlstate=28000",
    }
    for url, said in urls.items():
        worker = fleet.begin(pool="prefork", PYWORKFLOW_STORAGE=url)
        assert worker.wait() != 0
        assert said in worker.log
        assert "hidden" not in worker.log
        assert "Traceback" not in worker.log, worker.log
        assert " ready." not in worker.log


@pytest.mark.parametrize("url", ["http://user:hidden@nowhere/", "redis://user:hidden@nowhere:x/0"])
def test_a_client_with_a_wrong_broker_gets_an_error_that_says_so(fleet: Fleet, url: str) -> None:
    fleet.client_broker = url
    answer = fleet.request(_program.ten.name, new_tag())
    assert answer["error"] == "ConfigurationError"
    assert "PYWORKFLOW_BROKER_URL" in answer["message"] or "HOST:PORT" in answer["message"]
    assert "hidden" not in str(answer)


def test_unreadable_messages_are_told_and_stop_nobody(fleet: Fleet) -> None:
    worker = fleet.worker()
    gone = fleet.start(_program.ten)
    assert fleet.result(gone) == 10
    before = fleet.ask(lambda storage: storage.now()) + timedelta(seconds=1)
    assert fleet.ask(lambda storage: storage.purge(before=before)) == 1
    ids = {"run_id": "run_none", "item_id": "turn"}
    fleet.ring(gone)  # of a run that was purged
    fleet.send({**ids, "v": 1})  # of one that never was
    fleet.send({**ids, "v": 99})
    fleet.send({"something": "else"})
    fleet.send({**ids, "v": 1}, serializer="pickle")
    fleet.send({**ids, "v": 1, "more": "x" * 100_000})
    with fleet.redis() as client:
        client.lpush("pyworkflow", "no message at all", b"\xff\x00", "{}", "[]", '{"body": 1}')
    fleet.eventually(lambda: fleet.waiting() == 0, "all are taken")
    assert fleet.result(fleet.start(_program.ten)) == 10
    assert worker.process.poll() is None
    assert "version=99, this worker knows version=1" in worker.log
    assert "it names no work item" in worker.log
    assert "python-serialize" in worker.log
    assert "is no message and was dropped" in worker.log
    assert "Traceback" not in worker.log, worker.log


def test_messages_with_headers_that_nobody_can_read_stop_nobody(fleet: Fleet) -> None:
    worker = fleet.worker(concurrency=1)
    for tag in (new_tag(), new_tag()):
        fleet.start(_program.ten, tag=tag)
        fleet.eventually(lambda tag=tag: sum(fleet.executions(tag).values()) == 10, "it ran")
    body = base64.b64encode(b'[[], {"run_id": "r", "item_id": "turn", "v": 1}, {}]').decode()
    bad: list[dict[str, object]] = [
        {"task": "pyworkflow.handle", "id": "1", "expires": []},
        {"task": "pyworkflow.handle", "id": "2", "timelimit": "x"},
        {"task": "pyworkflow.handle", "id": ["3"], "eta": 5, "retries": "x"},
        {"task": ["pyworkflow.handle"], "id": "4"},
        {"task": "celery.map", "id": {}, "expires": []},
    ]
    with fleet.redis() as client:
        for number, headers in enumerate(bad):
            properties = {
                "correlation_id": {},
                "delivery_info": {"exchange": "", "routing_key": "pyworkflow"},
                "delivery_tag": f"bad{number}" if number else None,
                "body_encoding": "base64",
            }
            message = {
                "body": body,
                "content-encoding": "utf-8",
                "content-type": "application/json",
                "headers": headers,
                "properties": properties,
            }
            client.lpush("pyworkflow", json.dumps(message))
        client.lpush("pyworkflow", "[" * 200_000)
        fleet.eventually(lambda: fleet.waiting() == 0, "all are taken")
        # More of them than the worker takes at once.
        assert fleet.result(fleet.start(_program.ten)) == 10
        fleet.eventually(lambda: not client.hlen("unacked"), "none comes back")
    assert worker.process.poll() is None


def test_a_worker_without_modules_says_so(fleet: Fleet) -> None:
    worker = fleet.worker(pool="solo", PYWORKFLOW_MODULES="")
    assert "the worker has no workflow" in worker.log
    assert "-I MODULE" in worker.log
    worker.signal(TERM)
    assert worker.wait() == 0


def test_a_worker_on_a_store_of_this_machine_says_so(fleet: Fleet) -> None:
    worker = fleet.worker(pool="solo", PYWORKFLOW_STORAGE="file:store")
    assert "the store is on this machine only" in worker.log


def test_the_body_of_a_message_has_ids_only(fleet: Fleet) -> None:
    secret = "secret-argument"
    run_id = fleet.start(_program.ten, tag=secret)
    fleet.eventually(lambda: fleet.waiting() == 1, "the message is there")
    with fleet.redis() as client:
        (raw,) = client.lrange("pyworkflow\x06\x169", 0, -1)
    message = json.loads(raw)
    args, kwargs, _ = json.loads(base64.b64decode(message["body"]))
    assert (args, kwargs) == ([], {"run_id": run_id, "item_id": "turn", "v": 1})
    assert message["headers"]["shadow"] == _program.ten.name
    assert secret not in raw.decode()
    assert secret not in base64.b64decode(message["body"]).decode()


def test_a_priority_reaches_the_broker(fleet: Fleet) -> None:
    ids = [fleet.start(_program.ten), fleet.start(_program.urgent)]
    fleet.eventually(lambda: fleet.waiting() == 2, "two messages")
    with fleet.redis() as client:
        assert client.llen("pyworkflow") == 1  # the list of what is most urgent
        assert client.llen("pyworkflow\x06\x169") == 1
    fleet.worker(pool="threads")
    for run_id in ids:
        fleet.result(run_id)
