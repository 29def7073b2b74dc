"""What the Celery application is told: broker, queues, priorities. Does no I/O."""

from __future__ import annotations

import re
import socket
from importlib.util import find_spec
from typing import Any, cast

from pyworkflow.errors import ConfigurationError
from pyworkflow.worker import Settings, provisional_settings, settings

__all__ = [
    "DEFAULT_QUEUE",
    "app_conf",
    "check_app",
    "check_broker_url",
    "is_redis",
    "priority_of",
    "provide",
    "queue_of",
]

DEFAULT_QUEUE = "pyworkflow"
"""The Celery queue of PyWorkflow's queue ``default``."""
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
#: Valkey speaks Redis' protocol; kombu knows it by that name only.
_SPELLINGS = {
    "redis": "redis",
    "rediss": "rediss",
    "valkey": "redis",
    "valkeys": "rediss",
    "amqp": "amqp",
    "amqps": "amqps",
    "pyamqp": "amqp",
}
_PRIORITIES = 10
_ANSWERS = 5.0
"""Seconds for Redis to answer. Who waits for messages waits for the socket, and not for this."""
_KEPT_ALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
"""Where the system has them; its own are hours."""
#: The path of a Redis URL: none, or a number.
_DATABASE = re.compile(r"/{0,2}|/\d+", re.ASCII)
#: kombu takes options from the query under any name, and fails when it has had them before.
_NOT_OPTIONS = frozenset({"hostname", "password", "port", "transport", "userid", "virtual_host"})


def check_broker_url(url: str) -> str:
    """The broker's URL as kombu spells it.

    Raises:
        ConfigurationError: Another kind of broker. Nothing of the URL but its scheme is repeated.
    """
    found = _SCHEME.match(url)
    scheme = found[1].lower() if found else ""
    if found is None or scheme not in _SPELLINGS:
        why = (
            "it lives in one process and reaches no worker"
            if scheme == "memory"
            else "it is not supported"
        )
        raise ConfigurationError(
            f"the broker cannot be used: scheme={scheme or '(none)'}: {why}; set "
            "PYWORKFLOW_BROKER_URL to redis://HOST:6379/0, rediss://…, valkey://…, amqp://HOST or "
            "amqps://…, or attach() a Celery application that has its own broker"
        )
    spelled, rest = _SPELLINGS[scheme], url[found.end() :]
    options = _check_place(scheme, rest, redis=is_redis(spelled))
    if spelled == "rediss" and "ssl_cert_reqs" not in options:
        # kombu would take any certificate, and warn of that at every connection.
        rest, hash_, fragment = rest.partition("#")
        rest += f"{'&' if '?' in rest else '?'}ssl_cert_reqs=required{hash_}{fragment}"
    return f"{spelled}://{rest}"


def _check_place(scheme: str, rest: str, *, redis: bool) -> set[str]:
    """The names of options in the query."""
    from urllib.parse import parse_qsl, urlsplit

    try:
        parts = urlsplit(f"//{rest}")
        _ = parts.port  # raises when it is no number
    except ValueError:
        parts = None
    # A password with a `/` in it makes the rest of it, and the host, a path that would be shown.
    if parts is None or "@" in rest[len(parts.netloc) :]:
        raise ConfigurationError(
            f"the broker's URL has no proper host and port: scheme={scheme}; write "
            f"{scheme}://HOST:PORT/…, with special characters of a password percent-encoded"
        )
    if redis and not _DATABASE.fullmatch(parts.path):
        raise ConfigurationError(
            f"the broker's URL does not name the database by its number: scheme={scheme}; write "
            f"{scheme}://HOST:PORT/0"
        )
    named = {name.lower() for name, _ in parse_qsl(parts.query, keep_blank_values=True)}
    if wrong := sorted(named & _NOT_OPTIONS):
        raise ConfigurationError(
            f"the broker's URL says this before its question mark: option={wrong[0]}; write "
            f"{scheme}://USER:PASSWORD@HOST:PORT/…"
        )
    return named


def is_redis(url: str) -> bool:
    """Whether the broker is Redis, where 0 is the first priority and not the last."""
    return url.partition(":")[0].partition("+")[0] in ("redis", "rediss", "sentinel")


def app_conf(config: Settings) -> dict[str, Any]:
    """The configuration of our own application. ``ConfigurationError``."""
    url = check_broker_url(config.broker_url)
    redis = is_redis(url)
    return {
        # All three: Celery prefers CELERY_BROKER_URL to the first one, and we do not.
        "broker_url": url,
        "broker_read_url": url,
        "broker_write_url": url,
        "broker_connection_retry_on_startup": True,
        # For ever: after a hundred tries, in less than an hour, Celery would end the worker.
        "broker_connection_max_retries": None,
        "task_default_queue": _prefix(config) + DEFAULT_QUEUE,
        "task_create_missing_queues": True,
        "task_serializer": "json",
        "result_serializer": "json",
        "accept_content": ["json"],
        "task_ignore_result": True,
        # Early: a redelivered doorbell protects nothing, leases do, and a lost one is rung again.
        "task_acks_late": False,
        "worker_prefetch_multiplier": 1,
        # `worker_soft_shutdown_timeout` stays off: it sleeps to its end even when all is done. The
        # drain that our boot step begins has the same purpose and ends as soon as it can.
        "beat_schedule": {
            "pyworkflow-sweep": {
                "task": "pyworkflow.sweep",
                "schedule": 5.0,
                # Nobody needs yesterday's: without workers they would pile up.
                "options": {"expires": 15.0, "ignore_result": True},
            }
        },
        # What has been rung for is in storage; a schedule file would need a writable directory.
        "beat_scheduler": "celery.beat:Scheduler",
        "broker_transport_options": _redis_options() if redis else {},
        # On Redis, a doorbell fetched ahead would wait behind a long step while others are idle.
        "worker_disable_prefetch": redis,
        "task_queue_max_priority": None if redis else _PRIORITIES,
    }


def _redis_options() -> dict[str, Any]:
    kept = {
        name: seconds
        for option, seconds in _KEPT_ALIVE.items()
        if (name := getattr(socket, option, None)) is not None
    }
    return {
        # Ten lists a queue instead of four. The order of lists is by priority first, then by
        # queue, round robin: `queue_order_strategy=priority` would let the first queue of -Q
        # starve the others, and adds nothing to priorities.
        "priority_steps": list(range(_PRIORITIES)),
        # A broker that hangs, or that a firewall has forgotten the connection to, is noticed by
        # whoever asks it something, and by the system for whoever waits to be told.
        "socket_timeout": _ANSWERS,
        "socket_connect_timeout": _ANSWERS,
        "health_check_interval": 10,
        "socket_keepalive": True,
        "socket_keepalive_options": kept,
    }


def _prefix(config: Settings) -> str:
    return "" if config.namespace == "default" else f"{config.namespace}."


def queue_of(app: Any, queue: str) -> str:
    """The Celery queue of one of ours.

    ``default`` is the application's default queue; with a namespace other than ``default`` all
    others begin with the namespace, so that namespaces may share a broker.
    """
    if queue == "default":
        return str(app.conf.task_default_queue)
    return _prefix(settings()) + queue


def served_queues(app: Any) -> list[str]:
    """Our names of the queues that a worker of this application takes from."""
    default, prefix = queue_of(app, "default"), _prefix(settings())
    taken = app.amqp.queues.consume_from
    return ["default" if name == default else name.removeprefix(prefix) for name in taken]


def priority_of(app: Any, priority: int) -> int | None:
    """The broker's word for a priority: ours are 0 to 9, larger is sooner."""
    level = min(max(priority, 0), _PRIORITIES - 1)
    url = str(app.conf.broker_write_url or "")
    if is_redis(url):
        return _PRIORITIES - 1 - level
    if url.startswith(("amqp", "pyamqp")):
        return level
    return None


_provided: dict[int, Settings | None] = {}
"""Our own applications, and the settings that their configuration was made from."""


def provide(app: Any) -> None:
    """Configure our own application, from settings that modules may still change.

    What is wrong with them is raised by ``check_app``: where it can be told in one line, by a
    worker, beat or client that begins. Here the command line of Celery would make a page of it.
    """
    _provided[id(app)] = None
    try:
        config = provisional_settings()
        app.conf.update(app_conf(config))
    except ConfigurationError:
        return
    _provided[id(app)] = config


def _settle(app: Any) -> None:
    """Take what has changed since; what a program has set in the application stays."""
    config, before = settings(), _provided[id(app)]
    if before is config:
        return
    was = {} if before is None else app_conf(before)
    now = app_conf(config)
    changed = {name: value for name, value in now.items() if was.get(name, app) != value}
    if changed:
        app.conf.update(changed)
        made = cast("dict[str, object]", vars(app))
        made.pop("amqp", None)  # since its first use it has the queues of before
    _provided[id(app)] = config


def check_app(app: Any) -> None:
    """Refuse what cannot work. From now on the settings are final.

    Raises:
        ConfigurationError: A setting is wrong, tasks are run by their caller, or the broker's
            client library is missing.
    """
    if id(app) in _provided:
        _settle(app)
    if app.conf.task_always_eager:
        raise ConfigurationError(
            "the Celery application runs tasks in their caller: task_always_eager=True; nothing "
            "would be distributed: unset it, or set executor='local://' (in tests, use "
            "pyworkflow.testing)"
        )
    if is_redis(str(app.conf.broker_write_url or "")) and find_spec("redis") is None:
        raise ConfigurationError(
            "the broker cannot be used: the package redis is not installed; "
            "pip install 'celery[redis]'"
        )
