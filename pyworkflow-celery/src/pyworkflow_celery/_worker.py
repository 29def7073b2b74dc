"""The part of a Celery worker that is ours: its checks at start, its sweeper, and its end."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
from collections.abc import Callable, Coroutine
from functools import partial
from multiprocessing.process import AuthenticationString  # type: ignore[attr-defined]  # untyped
from typing import Any

from pyworkflow.errors import (
    ConfigurationError,
    PluginNotFound,
    StorageError,
    StorageUnavailable,
)
from pyworkflow.spi import Runtime, StorageInfo
from pyworkflow.worker import (
    create_runtime,
    import_modules,
    provisional_settings,
    settings,
    tell_started,
    tell_stopping,
    workflow_names,
)
from pyworkflow_celery import _celery
from pyworkflow_celery._arrival import wake
from pyworkflow_celery._config import DEFAULT_QUEUE, check_app, queue_of, served_queues
from pyworkflow_celery._health import heartbeat
from pyworkflow_celery._process import Host, end_host, host, standing_host
from pyworkflow_celery._publish import HANDLE, publisher_for
from pyworkflow_celery._shutdown import shutdown
from pyworkflow_celery._sweeper import sweep_for_ever
from pyworkflow_celery._tasks import keep_settings

__all__ = ["WorkflowStep", "begin_child", "prepare_worker", "process_host"]

_log = logging.getLogger("pyworkflow.celery")
_OPENS = 15.0
"""Seconds that the store has to answer before the worker starts without."""

_NEVER = 10**8
"""Seconds: Celery's time limits are not for doorbells."""


_AGAIN = 2.0
_EXITS = 0.05


class _Prepared:
    def __init__(self) -> None:
        self.runtime: Runtime | None = None
        """That of the main process: made before the pool forks, opened after."""


_prepared = _Prepared()


def process_host(app: Any) -> Host:
    """The runtime of this process, made at the first call."""
    standing = standing_host()
    return standing if standing is not None else host(lambda: _make_host(app))


def _make_host(app: Any) -> Host:
    prepared, _prepared.runtime = _prepared.runtime, None
    if prepared is not None and not shutdown.in_child:
        return Host(lambda: prepared, settings().drain.total_seconds())
    # A child that was started afresh, and not forked, has imported nothing yet.
    import_modules(settings().modules)
    made = Host(
        lambda: _runtime(app, end_process=made.end_process if shutdown.in_child else None),
        settings().drain.total_seconds(),
    )
    shutdown.watch(made)
    return made


def _runtime(app: Any, end_process: Callable[[], None] | None = None) -> Runtime:
    notify = publisher_for(app).notify
    serves = served_queues(app) or None
    return create_runtime(spread=True, notify=notify, end_process=end_process, serves=serves)


def prepare_worker(worker: Any) -> None:
    """Import workflows and check what the worker is given, before its pool starts.

    Raises:
        SystemExit: with one line that tells what is wrong; a traceback through Celery would not.
    """
    try:
        _prepare(worker)
    except (ConfigurationError, PluginNotFound, StorageError) as exc:
        raise SystemExit(f"pyworkflow: {exc}") from exc


def _prepare(worker: Any) -> None:
    app = worker.app
    import_modules(provisional_settings().modules)  # they may call configure()
    check_app(app)
    pool = _pool_of(worker)
    if pool in ("gevent", "eventlet"):
        raise ConfigurationError(
            f"workflows cannot run in this pool: pool={pool}: it replaces threads and sockets, "
            "which an event loop for storage and async steps needs; use -P prefork, threads or solo"
        )
    start = app.conf.get("worker_pool_start_method", "fork") if hasattr(os, "fork") else "spawn"
    if pool == "prefork" and start != "fork":
        # A child that starts afresh gets a copy of the application without what is ours.
        raise ConfigurationError(
            f"pool children that are not forked know no workflows: worker_pool_start_method={start}"
            "; set it to fork where there is one, or use -P threads"
        )
    config = settings()
    import_modules(config.modules)
    runtime = _runtime(app)  # loads plugins, and the modules that they name
    info = runtime.info()
    if not info.capabilities.multi_process:
        raise ConfigurationError(
            f"the store exists in one process only: storage={info.location}; a worker would never "
            "see a run that was started elsewhere: set PYWORKFLOW_STORAGE to postgresql://…, "
            "redis://…, or on one machine sqlite:////PATH or file:///PATH"
        )
    _check_content(app)
    asyncio.run(_open_once(app))
    keep_settings(app)
    shutdown.prepare(forks=pool == "prefork")
    _prepared.runtime = runtime


async def _open_once(app: Any) -> None:
    """Open the store, and close it again before the pool forks.

    A worker whose store refuses it would be free all the time, and take doorbells from the others.
    """
    probe = _runtime(app)
    try:
        async with asyncio.timeout(_OPENS):
            await probe.open()
    except (StorageUnavailable, TimeoutError) as exc:
        _log.warning("the storage does not answer yet; the worker starts all the same: %s", exc)
    finally:
        await probe.close()


def _check_content(app: Any) -> None:
    accepted = [str(each) for each in app.conf.accept_content or ()]
    if not {"json", "application/json"} & set(accepted):
        raise ConfigurationError(
            "the Celery application takes no JSON, which is what doorbells are: "
            f"accept_content={accepted}; add 'json'"
        )


def _pool_of(worker: Any) -> str:
    """``prefork``, ``threads``, ``solo``, or the name of another pool."""
    found = worker.pool_cls
    module = found if isinstance(found, str) else str(getattr(found, "__module__", found))
    name = module.rpartition(".")[2].partition(":")[0]
    return {"thread": "threads", "processes": "prefork"}.get(name, name)


def begin_child(own: bool) -> None:
    """In a pool child, after the fork."""
    if not shutdown.in_child:
        return  # the solo pool says of the main process that it is a child
    _allow_processes()
    if own:
        import gc

        # Kept coroutines are many objects that stay, and what was imported stays as well: looking
        # at them again and again takes a tenth of a busy worker's time. In an application of
        # somebody else's, this is theirs to decide.
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000, 10, 10)


def _allow_processes() -> None:
    """Let steps have processes, as they may in every other pool.

    The pool calls its children daemons, which may have none of their own, and gives them a key that
    cannot be handed to a process that is started afresh.
    """
    config = getattr(multiprocessing.current_process(), "_config", {})
    config["daemon"] = False
    if "authkey" in config:
        config["authkey"] = AuthenticationString(bytes(config["authkey"]))


class WorkflowStep(_celery.StartStopStep):  # type: ignore[misc]  # Celery has no types
    """Starts after the pool, in the main process: says what there is, sweeps, and ends."""

    name = "pyworkflow"
    label = "PyWorkflow"
    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **kwargs: Any) -> None:
        self._ended = False
        if worker.time_limit or worker.soft_time_limit:
            # They would kill a step in the middle, which counts as a lost worker.
            task = worker.app.tasks[HANDLE]
            task.time_limit = task.soft_time_limit = _NEVER

    def include_if(self, worker: Any) -> bool:
        """Always."""
        return True

    def create(self, worker: Any) -> Any:
        """Nothing is made before the pool has forked."""
        return None

    def start(self, worker: Any) -> None:
        """After the pool has started."""
        runtime = _prepared.runtime
        if runtime is not None:
            _say_what_there_is(worker, runtime.info())
        shutdown.obey(lambda: _pids(worker))
        standing = process_host(worker.app)
        if shutdown.forks:
            _watch_children(worker)
            _notice_exits(worker)
        if runtime is not None:
            # In the loop, as hooks of all workers are; in the main process alone.
            queues = served_queues(worker.app)
            standing.loop.call_soon_threadsafe(tell_started, runtime, queues)
            shutdown.on_told = partial(tell_stopping, runtime)
        standing.spawn(sweep_for_ever(standing))
        heartbeat(standing)

    def register_with_event_loop(self, worker: Any, hub: Any) -> None:
        """When the consumer's loop begins, and again after a reconnection."""
        if shutdown.forks:
            # Not now: the pool, which comes after us, is about to set its own callback.
            hub.call_soon(_watch_children, worker)
        elif _pool_of(worker) == "threads":
            wake.register(hub)

    def close(self, worker: Any) -> None:
        """The first thing of an orderly end, however it was asked for."""
        if not shutdown.told:
            shutdown.tell()

    def stop(self, worker: Any) -> None:
        """After the consumer has stopped: end the pool, give back what it left, end the sweeper."""
        if self._ended:
            return
        self._ended = True
        if not shutdown.told:
            shutdown.tell()
        if shutdown.forks and worker.pool is not None:
            pids = _pids(worker)
            if shutdown.insisted:
                shutdown.kill_children()  # some may be new
            worker.pool.stop()  # waits for the children, which have been told
            standing = standing_host()
            if standing is not None:
                for pid in pids:
                    _died(standing, pid)
        end_host(last=not shutdown.forks)
        publisher_for(worker.app).flush()

    def terminate(self, worker: Any) -> None:
        """A cold shutdown: the children have been told as well."""
        self.stop(worker)


def _say_what_there_is(worker: Any, info: StorageInfo) -> None:
    app, config = worker.app, settings()
    _log.info("the worker's store: storage=%s namespace=%s", info.location, info.namespace)
    names = sorted(workflow_names())
    if names:
        _log.info("the worker has workflows: %s", ", ".join(names))
    else:
        _log.warning(
            "the worker has no workflow, and can work on nothing: name the modules that define "
            "them with -I MODULE, or set PYWORKFLOW_MODULES"
        )
    if not info.capabilities.multi_host:
        _log.warning(
            "the store is on this machine only: storage=%s; workers and clients elsewhere do not "
            "see it%s",
            info.location,
            ": no storage is set" if config.storage_is_default else "",
        )
    executor = config.executor
    if isinstance(executor, str) and executor.partition(":")[0].lower() != "celery":
        _log.warning(
            "a run that is started in a step would stay in its process: executor=%s; set "
            "PYWORKFLOW_EXECUTOR=celery://",
            executor.partition(":")[0],
        )
    queues = set(app.amqp.queues.consume_from)
    default = queue_of(app, "default")
    if default not in queues and queues & {"default", DEFAULT_QUEUE}:
        _log.warning(
            "PyWorkflow's queue `default` is another one in Celery: queue=%s; write -Q %s",
            default,
            ",".join(sorted((queues - {"default", DEFAULT_QUEUE}) | {default})),
        )
    if worker.time_limit or worker.soft_time_limit:
        _log.info("Celery's time limits are not for steps; use @step(timeout=…)")


# --- children of the pool -----------------------------------------------------------------------


def _pids(worker: Any) -> list[int]:
    inner = getattr(worker.pool, "_pool", None)
    return [int(process.pid) for process in getattr(inner, "_pool", ()) if process.pid]


def _watch_children(worker: Any) -> None:
    """Learn at once of children that have died: what they held is due again."""
    inner = getattr(worker.pool, "_pool", None)
    before = getattr(inner, "on_process_down", None)
    if inner is None or getattr(before, "frees", False):
        return

    def on_process_down(process: Any) -> None:
        try:
            if before is not None:
                before(process)
        finally:
            standing = standing_host()
            if standing is not None:
                _died(standing, int(process.pid))

    on_process_down.frees = True  # type: ignore[attr-defined]  # a mark for the next look
    inner.on_process_down = on_process_down


def _notice_exits(worker: Any) -> None:
    """Have the pool look again for a child whose end it was told of a moment too early.

    It is told when the child's files are closed. The child can be waited for a little later, and
    the pool would not look before its next round, after five seconds.
    """
    inner = getattr(worker.pool, "_pool", None)
    before = getattr(inner, "_event_process_exit", None)
    if inner is None or before is None:
        return

    def look(hub: Any, process: Any, left: int) -> None:
        if left > 0 and process in inner._pool:
            inner.maintain_pool()
            hub.call_later(_EXITS, look, hub, process, left - 1)

    def exited(hub: Any, process: Any) -> None:
        before(hub, process)
        hub.call_later(_EXITS, look, hub, process, 40)

    inner._event_process_exit = exited


def _died(standing: Host, pid: int) -> None:
    async def free() -> None:
        (await standing.runtime()).free(pid)
        await asyncio.sleep(_AGAIN)
        # A claim that was on its way to the server may have been granted after the death.
        if not standing.draining:
            (await standing.runtime()).free(pid)

    standing.spawn(_quietly(free()))


async def _quietly(coro: Coroutine[Any, Any, None]) -> None:
    try:
        await coro
    except StorageError as exc:
        _log.warning("what a dead pool child held runs out with its lease: %s", exc)
