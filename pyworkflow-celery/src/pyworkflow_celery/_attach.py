"""Making a Celery application one that workflows run on; which application this process uses."""

from __future__ import annotations

import logging
from importlib import import_module
from typing import Any

from pyworkflow.errors import ConfigurationError
from pyworkflow.worker import replay_filter
from pyworkflow_celery import _celery
from pyworkflow_celery._arrival import ArrivalStep
from pyworkflow_celery._config import check_app
from pyworkflow_celery._publish import publisher_for
from pyworkflow_celery._tasks import register_tasks
from pyworkflow_celery._worker import WorkflowStep, begin_child, prepare_worker

__all__ = ["attach", "current_app", "equip"]


class _Apps:
    def __init__(self) -> None:
        self.attached: Any = None
        self.equipped: dict[int, Any] = {}
        self.working: Any = None
        """The application of the worker that this process is."""
        self.own: Any = None


_apps = _Apps()


def attach(app: Any) -> Any:
    """Run workflows on a Celery application that exists already; returns it.

    Its workers get the tasks ``pyworkflow.handle`` and ``pyworkflow.sweep`` and sweep the store;
    doorbells go to its broker, those of the queue ``default`` to its ``task_default_queue``. Its
    configuration is left as it is, and not read here.

    Raises:
        ConfigurationError: Another application is attached already.
    """
    if _apps.attached is not None and _apps.attached is not app:
        raise ConfigurationError(
            "another Celery application is attached already: "
            f"standing={_apps.attached.main!r} asked={app.main!r}; a process has one"
        )
    _apps.attached = app
    equip(app)
    return app


def equip(app: Any, *, own: bool = False) -> None:
    """Give an application our tasks, boot step and signal handlers; once."""
    if id(app) in _apps.equipped:
        return
    _apps.equipped[id(app)] = app
    if own:
        _apps.own = app
    register_tasks(app)
    app.steps["worker"].add(WorkflowStep)
    app.steps["consumer"].add(ArrivalStep)
    signals = _celery.signals
    for signal, handler in (
        (signals.after_setup_logger, _on_logging),
        (signals.beat_init, _on_beat_init),
        (signals.worker_init, _on_worker_init),
        (signals.worker_process_init, _on_child),
        (signals.worker_process_shutdown, _on_child_end),
        (signals.worker_shutting_down, _on_shutting_down),
    ):
        signal.connect(handler, weak=False, dispatch_uid=f"pyworkflow.{handler.__name__}")


def current_app() -> Any:
    """The application that doorbells go through: the attached one, or our own.

    Raises:
        ConfigurationError: Our own cannot be made: the broker's URL is wrong.
    """
    if _apps.attached is not None:
        return _apps.attached
    return import_module("pyworkflow_celery.app").app


# --- signals of Celery: global ones, so each asks whether it is meant ---------------------------


def _on_worker_init(sender: Any = None, **_: Any) -> None:
    app = getattr(sender, "app", None)
    if id(app) not in _apps.equipped:
        return
    _apps.working = app
    prepare_worker(sender)
    if any(type(h).__module__ == "pyworkflow._logging" for h in logging.getLogger().handlers):
        # configure_logging() was called: somebody wants its format, and Celery would throw its
        # handlers out. With a receiver of this signal it leaves logging alone.
        _celery.signals.setup_logging.connect(
            _leave_logging, weak=False, dispatch_uid="pyworkflow.logging"
        )


def _on_beat_init(sender: Any = None, **_: Any) -> None:
    app = getattr(sender, "app", None)
    if id(app) in _apps.equipped:
        try:
            check_app(app)
        except ConfigurationError as exc:
            raise SystemExit(f"pyworkflow: {exc}") from exc


def _on_logging(logger: Any = None, **_: Any) -> None:
    """Celery has installed its handlers: they know the run, and mute what replay repeats."""
    if _apps.working is not None:
        for handler in logger.handlers:
            handler.addFilter(replay_filter)


def _leave_logging(**_: Any) -> None:
    return


def _on_child(**_: Any) -> None:
    if _apps.working is not None:
        begin_child(_apps.working is _apps.own)


def _on_child_end(**_: Any) -> None:
    """A pool child ends of itself: it holds nothing, but may not have sent everything."""
    if _apps.working is not None:
        from pyworkflow_celery._process import end_host
        from pyworkflow_celery._shutdown import shutdown

        if shutdown.in_child and not shutdown.at_once:
            publisher_for(_apps.working).flush()
            end_host()


def _on_shutting_down(**_: Any) -> None:
    if _apps.working is not None:
        from pyworkflow_celery._shutdown import shutdown

        if not shutdown.told:
            shutdown.tell()
