"""The application's configuration: broker, queues, priorities, refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from celery import Celery

from pyworkflow._config import Settings
from pyworkflow.errors import ConfigurationError
from pyworkflow.spi import Executor
from pyworkflow_celery import _config
from pyworkflow_celery._config import app_conf, check_app, check_broker_url, priority_of, queue_of
from pyworkflow_celery._executor import check_executor_url
from pyworkflow_celery._plugin import pyworkflow_make_executor
from tests.devops.processes import Program, environment, run


@pytest.mark.parametrize(
    ("url", "as_kombu_has_it"),
    [
        ("redis://host:6379/0", "redis://host:6379/0"),
        ("REDISS://u:p@host/1?ssl_cert_reqs=none", "rediss://u:p@host/1?ssl_cert_reqs=none"),
        ("valkey://host/0", "redis://host/0"),
        ("valkeys://host/0", "rediss://host/0?ssl_cert_reqs=required"),
        ("rediss://host?ssl_ca_certs=/a", "rediss://host?ssl_ca_certs=/a&ssl_cert_reqs=required"),
        ("redis://host", "redis://host"),
        ("redis://host/", "redis://host/"),
        ("redis://host//", "redis://host//"),
        ("amqp://guest@host//", "amqp://guest@host//"),
        ("amqps://host/v", "amqps://host/v"),
        ("pyamqp://host/v", "amqp://host/v"),
    ],
)
def test_brokers_that_are_supported(url, as_kombu_has_it):
    assert check_broker_url(url) == as_kombu_has_it


@pytest.mark.parametrize(
    "url",
    [
        "mysql://user:hidden@host/db",
        "memory://hidden",
        "host:6379/hidden",
        "redis://user:hidden@host:port/0",
        "redis://:hidden@host:6379/abc",
        "rediss://:hidden@host/1/2",
        "valkey://:hidden@host/-1?ssl_cert_reqs=none",
        "redis://:12/hidden@host:6379/0",
        "redis://:12?hidden@host:6379/0",
        "redis://:12#hidden@host:6379/0",
        "amqp://user:12/hidden@host//",
        "redis://host/0?password=hidden",
        "amqp://host//?Password=hidden",
        "redis://host/0?ssl_cert_reqs=none&virtual_host=hidden",
        "redis:hidden",
        "",
    ],
)
def test_another_broker_is_refused_with_a_remedy_and_without_its_secrets(url):
    with pytest.raises(ConfigurationError) as refused:
        check_broker_url(url)
    assert "hidden" not in str(refused.value)
    assert "://" in str(refused.value)


def own(**settings):
    app = Celery("x", set_as_current=False)
    app.conf.update(app_conf(Settings(**settings)))
    return app


def test_messages_are_json_acknowledged_early_and_keep_no_results():
    conf = own().conf
    assert conf.task_serializer == "json"
    assert conf.accept_content == ["json"]
    assert conf.task_acks_late is False
    assert conf.task_ignore_result is True
    assert conf.worker_prefetch_multiplier == 1
    assert conf.beat_schedule["pyworkflow-sweep"]["task"] == "pyworkflow.sweep"


def test_workers_try_for_as_long_as_it_takes_to_reach_the_broker():
    conf = own().conf
    assert conf.broker_connection_retry_on_startup is True
    assert conf.broker_connection_max_retries is None


def test_a_client_library_that_is_missing_is_named_with_its_remedy(monkeypatch):
    app = own(broker_url="valkey://:hidden@host/0")
    check_app(app)
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(ConfigurationError, match=r"redis is not installed.*pip install") as refused:
        check_app(app)
    assert "hidden" not in str(refused.value)
    check_app(own(broker_url="amqp://host//"))


def test_our_setting_of_the_broker_beats_that_of_celery(monkeypatch):
    monkeypatch.setenv("CELERY_BROKER_URL", "redis://elsewhere/0")
    app = own(broker_url="redis://here:6380/2")
    for connection in (app.connection_for_write(), app.connection_for_read(), app.connection()):
        assert (connection.hostname, connection.port) == ("here", 6380)


def test_a_password_is_masked_where_celery_shows_the_broker():
    app = own(broker_url="redis://:hidden@here:6380/2")
    assert "hidden" not in app.connection().as_uri()
    assert "hidden" not in repr(app.connection())


@pytest.mark.parametrize(
    ("priority", "redis", "amqp"),
    [(0, 9, 0), (1, 8, 1), (5, 4, 5), (9, 0, 9), (1000, 0, 9), (-3, 9, 0)],
)
def test_priorities_larger_is_sooner_whatever_the_broker_counts(priority, redis, amqp):
    assert priority_of(own(broker_url="redis://h/0"), priority) == redis
    assert priority_of(own(broker_url="amqp://h//"), priority) == amqp


def test_every_priority_has_a_list_of_its_own_in_redis():
    conf = own(broker_url="redis://h/0").conf
    assert conf.broker_transport_options["priority_steps"] == list(range(10))
    assert own(broker_url="amqp://h//").conf.task_queue_max_priority == 10


def test_the_default_queue_is_the_applications_and_others_keep_their_names(monkeypatch):
    app = own()
    monkeypatch.setattr(_config, "settings", Settings)
    assert queue_of(app, "default") == "pyworkflow"
    assert queue_of(app, "gpu") == "gpu"


def test_a_namespace_keeps_its_queues_apart(monkeypatch):
    app = own(namespace="blue")
    monkeypatch.setattr(_config, "settings", lambda: Settings(namespace="blue"))
    assert queue_of(app, "default") == "blue.pyworkflow"
    assert queue_of(app, "gpu") == "blue.gpu"


def test_an_attached_applications_default_queue_stands(monkeypatch):
    app = Celery("theirs", set_as_current=False)
    app.conf.task_default_queue = "work"
    monkeypatch.setattr(_config, "settings", Settings)
    assert queue_of(app, "default") == "work"


def test_an_eager_application_is_refused():
    app = Celery("x", set_as_current=False)
    app.conf.task_always_eager = True
    with pytest.raises(ConfigurationError, match=r"task_always_eager=True.*local://"):
        check_app(app)


@pytest.mark.parametrize("url", ["celery://redis:hidden@host", "celery://host", "celery:x"])
def test_an_executor_url_that_names_a_place_is_refused(url):
    with pytest.raises(ConfigurationError, match="PYWORKFLOW_BROKER_URL") as refused:
        check_executor_url(url)
    assert "hidden" not in str(refused.value)


def test_an_executor_url_has_no_options():
    with pytest.raises(ConfigurationError, match="option=broker;"):
        check_executor_url("celery://?broker=redis://:hidden@h")


def test_the_plugin_makes_the_executor_and_leaves_other_urls_alone():
    made: Executor | None = pyworkflow_make_executor("celery://", {"broker_url": "redis://h/0"})
    assert made is not None
    assert made.name == "celery"
    assert made.capabilities.distributed
    assert pyworkflow_make_executor("local://", {}) is None


def python(code: str, **env: str) -> str:
    """What a fresh interpreter prints."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("PYWORKFLOW_", "CELERY_"))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=plain | env,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_choosing_the_executor_imports_no_celery():
    code = (
        "import sys; from pyworkflow_celery._plugin import pyworkflow_make_executor as make;"
        "assert make('celery://', {}).name == 'celery'; print('celery' in sys.modules)"
    )
    assert python(code).strip() == "False"


def test_the_door_gives_the_application_with_both_tasks():
    code = (
        "from pyworkflow.celery.app import app; import json;"
        "print(json.dumps([app.main, app.conf.task_default_queue, app.conf.broker_write_url,"
        "sorted(t for t in app.tasks if t.startswith('pyworkflow.'))]))"
    )
    assert json.loads(python(code, CELERY_BROKER_URL="valkey://h:1/0")) == [
        "pyworkflow",
        "pyworkflow",
        "redis://h:1/0",
        ["pyworkflow.handle", "pyworkflow.sweep"],
    ]


def test_the_application_of_a_program_stays_its_current_one():
    code = (
        "from celery import Celery, current_app; mine = Celery('mine');"
        "from pyworkflow.celery.app import app; print(current_app.main)"
    )
    assert python(code).strip() == "mine"


def test_what_is_configured_after_the_door_was_opened_counts_beside_what_a_program_set():
    code = """
from pyworkflow.celery.app import app
from pyworkflow import configure
app.conf.worker_log_format = "mine"
list(app.amqp.queues)
configure(broker_url="amqp://h//", namespace="shop")
from pyworkflow_celery._config import check_app
for again in range(2):
    check_app(app)
    conf = app.conf
    print(conf.worker_log_format, conf.broker_write_url, conf.task_default_queue,
          conf.broker_transport_options, conf.task_queue_max_priority)
    print(list(app.amqp.queues))
    conf.worker_log_format, conf.broker_transport_options = "theirs", {"confirm_publish": False}
try:
    configure(namespace="other")
except Exception as exc:
    print(type(exc).__name__)
"""
    assert python(code).splitlines() == [
        "mine amqp://h// shop.pyworkflow {} 10",
        "['shop.pyworkflow']",
        "theirs amqp://h// shop.pyworkflow {'confirm_publish': False} 10",
        "['shop.pyworkflow']",
        "ConfigurationError",
    ]


def test_a_connection_that_has_died_in_silence_is_not_waited_for():
    options = own(broker_url="redis://h/0").conf.broker_transport_options
    assert options["socket_timeout"] == options["socket_connect_timeout"] == 5
    assert options["health_check_interval"] == 10
    assert own(broker_url="amqp://h//").conf.broker_transport_options == {}


@pytest.mark.parametrize("by", ["-I", "PYWORKFLOW_MODULES"])
def test_a_module_with_workflows_may_configure_the_worker_that_imports_it(
    by, tmp_path, make_valkey
):
    given = {
        "executor": "celery://",
        "storage": f"sqlite:///{tmp_path}/runs.db",
        "broker_url": make_valkey({"appendonly": "no"}).url,
        "namespace": "shop",
        "lease": "15s",
    }
    (tmp_path / "orders.py").write_text(
        "from pyworkflow import configure, result, start, workflow\n"
        f"configure(**{given!r})\n"
        "@workflow()\n"
        "async def one(): return 1\n"
        "if __name__ == '__main__': print(result(start(one), timeout='50s'))\n",
        "utf-8",
    )
    command = [sys.executable, "-m", "celery", "-A", "pyworkflow.celery.app", "worker", "-c", "1"]
    env = environment(**({} if by == "-I" else {by: "orders"}))
    include = [by, "orders"] if by == "-I" else []
    with Program(
        [*command, "-l", "info", *include], env=env, cwd=tmp_path, log=tmp_path / "log"
    ) as worker:
        assert "key=shop.pyworkflow" in worker.wait_for(" ready.")
        done = run(sys.executable, "orders.py", env=environment(), cwd=tmp_path)
        assert (done.returncode, done.stdout.strip()) == (0, "1"), done.stderr + worker.said()
        assert worker.end() == 0


def test_attaching_leaves_the_configuration_of_an_application_unread_and_as_it_is():
    code = """
from celery import Celery
from pyworkflow.celery import attach
mine = Celery("mine")
assert attach(mine) is mine and attach(mine) is mine
print(mine.configured)
mine.conf.update(broker_url="amqp://h//", task_default_queue="work", accept_content=["json", "pickle"])
print(mine.conf.task_default_queue, mine.conf.accept_content, sorted(t for t in mine.tasks if "flow" in t))
from pyworkflow_celery._attach import current_app
print(current_app() is mine)
try:
    attach(Celery("other", set_as_current=False))
except Exception as exc:
    print(type(exc).__name__, exc)
"""
    lines = python(code).splitlines()
    assert lines[0] == "False"
    assert lines[1] == "work ['json', 'pickle'] ['pyworkflow.handle', 'pyworkflow.sweep']"
    assert lines[2] == "True"
    assert lines[3].startswith("ConfigurationError another Celery application is attached")


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"PYWORKFLOW_BROKER_URL": "mysql://u:hidden@h/d"}, "scheme=mysql"),
        ({"PYWORKFLOW_LEASE": "often"}, "setting=lease"),
    ],
)
def test_a_wrong_setting_is_told_when_the_application_is_used_and_not_by_its_import(env, said):
    code = """
import asyncio
from pyworkflow.celery.app import app
from pyworkflow_celery._executor import CeleryExecutor
from pyworkflow.errors import ConfigurationError
try:
    asyncio.run(CeleryExecutor().open({}))
except ConfigurationError as exc:
    print(exc)
"""
    printed = python(code, **env)
    assert said in printed
    assert "hidden" not in printed


def test_the_short_name_of_the_application_is_found():
    from celery.app.utils import find_app

    from pyworkflow_celery.app import app

    assert find_app("pyworkflow.celery") is app
    assert find_app("pyworkflow.celery.app") is app
