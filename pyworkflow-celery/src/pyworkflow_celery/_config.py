"""What the Celery application is told: broker, queues, priorities. Does no I/O."""

from __future__ import annotations

import re
from typing import Any

from pyworkflow.errors import ConfigurationError
from pyworkflow.worker import Settings, settings

__all__ = [
    "DEFAULT_QUEUE",
    "app_conf",
    "check_app",
    "check_broker_url",
    "is_redis",
    "postpone",
    "priority_of",
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
    rest = url[found.end() :]
    try:
        _port(rest)
    except ValueError:
        raise ConfigurationError(
            f"the broker's URL has no proper port: scheme={scheme}; write {scheme}://HOST:PORT/…, "
            "with special characters of a password percent-encoded"
        ) from None
    return f"{_SPELLINGS[scheme]}://{rest}"


def _port(rest: str) -> int | None:
    from urllib.parse import urlsplit

    return urlsplit(f"//{rest}").port


def is_redis(url: str) -> bool:
    """Whether the broker is Redis, where 0 is the first priority and not the last."""
    return url.partition(":")[0].partition("+")[0] in ("redis", "rediss", "sentinel")


def app_conf(config: Settings) -> dict[str, Any]:
    """The configuration of our own application. ``ConfigurationError``."""
    url = check_broker_url(config.broker_url)
    redis = is_redis(url)
    conf: dict[str, Any] = {
        # All three: Celery prefers CELERY_BROKER_URL to the first one, and we do not.
        "broker_url": url,
        "broker_read_url": url,
        "broker_write_url": url,
        "broker_connection_retry_on_startup": True,
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
    }
    if redis:
        # Ten lists a queue instead of four. The order of lists is by priority first, then by
        # queue, round robin: `queue_order_strategy=priority` would let the first queue of -Q
        # starve the others, and adds nothing to priorities.
        conf["broker_transport_options"] = {
            "priority_steps": list(range(_PRIORITIES)),
            "socket_keepalive": True,
        }
        # A doorbell fetched ahead would wait behind a long step while other workers are idle.
        conf["worker_disable_prefetch"] = True
    else:
        conf["task_queue_max_priority"] = _PRIORITIES
    return conf


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


def priority_of(app: Any, priority: int) -> int | None:
    """The broker's word for a priority: ours are 0 to 9, larger is sooner."""
    level = min(max(priority, 0), _PRIORITIES - 1)
    url = str(app.conf.broker_write_url or "")
    if is_redis(url):
        return _PRIORITIES - 1 - level
    if url.startswith(("amqp", "pyamqp")):
        return level
    return None


_problems: dict[int, ConfigurationError] = {}


def postpone(app: Any, problem: ConfigurationError) -> None:
    """Have ``check_app`` raise what making the application's configuration raised."""
    _problems[id(app)] = problem


def check_app(app: Any) -> None:
    """Refuse what cannot work.

    Raises:
        ConfigurationError: The configuration could not be made, or tasks are run by their caller.
    """
    problem = _problems.get(id(app))
    if problem is not None:
        raise ConfigurationError(*problem.args)
    if app.conf.task_always_eager:
        raise ConfigurationError(
            "the Celery application runs tasks in their caller: task_always_eager=True; nothing "
            "would be distributed: unset it, or set executor='local://' (in tests, use "
            "pyworkflow.testing)"
        )
