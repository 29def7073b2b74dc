"""The local executor: a worker embedded in the caller's process, or ``pyworkflow worker``."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import importlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from pyworkflow._config import Settings, settings
from pyworkflow._duration import format_duration
from pyworkflow._engine.serve import serve_here
from pyworkflow._engine.worker import Worker
from pyworkflow._plugins import load_observers, make_executor, make_storage
from pyworkflow.errors import ConfigurationError, StorageError
from pyworkflow.runs import Run, RunStatus
from pyworkflow.spi.capabilities import ExecutorCapabilities
from pyworkflow.spi.executor import Doorbell, Executor, Runtime
from pyworkflow.spi.storage import StorageBackend

__all__ = [
    "EmbeddedHost",
    "LocalExecutor",
    "check_shared",
    "configured_executor",
    "configured_storage",
    "host",
    "host_is_here",
    "reset_host",
    "running_host",
]

T = TypeVar("T")
_log = logging.getLogger("pyworkflow.worker")
_DEFAULT_THREADS = 4
_CLOSES_S = 5.0
"""Seconds for the end of the host's worker and store, at the end of the process."""
_HALF_SECOND = timedelta(milliseconds=500)


class LocalExecutor:
    """Runs everything on this machine; doorbells stay in the process."""

    name = "local"
    capabilities = ExecutorCapabilities(contract_version=2, graceful_drain=True)

    async def open(self, config: Mapping[str, str]) -> None:
        """Nothing to connect to."""

    async def notify(self, bells: Sequence[Doorbell]) -> None:
        """Workers of this machine look for themselves."""

    def serve(self, runtime: Runtime, queues: Sequence[str]) -> None:
        """Work until SIGTERM or SIGINT, then drain."""
        serve_here(runtime)

    async def close(self) -> None:
        """Nothing to let go of."""


def configured_storage(config: Settings) -> StorageBackend:
    """The store that the settings name."""
    if isinstance(config.storage, str):
        return make_storage(config.storage, config.namespace)
    return config.storage


def configured_executor(config: Settings) -> Executor:
    """The executor that the settings name."""
    if isinstance(config.executor, str):
        return make_executor(config.executor, {"broker_url": config.broker_url})
    return config.executor


def check_shared(storage: StorageBackend, executor: Executor, *, is_default: bool) -> None:
    """Refuse a store that the workers of other processes can never see.

    Warns of the default one, which they see only when they run in the same directory.

    Raises:
        ConfigurationError: the store exists in this process only.
    """
    info = storage.info()
    if not info.capabilities.multi_process:
        raise ConfigurationError(
            f"the store exists in this process only: storage={info.location} "
            f"executor={executor.name}; workers of other processes would never see a run: set "
            "PYWORKFLOW_STORAGE to postgresql://…, redis://…, or on one machine "
            "sqlite:////PATH or file:///PATH"
        )
    if is_default:
        _log.warning(
            "no storage is set, so runs are kept here: storage=%s; workers of %s elsewhere, or in "
            "another directory, do not see them: set PYWORKFLOW_STORAGE for both",
            info.location,
            executor.name,
        )


class EmbeddedHost:
    """A daemon thread with an event loop, the configured store, and a worker when local."""

    def __init__(self) -> None:
        self.config = settings()
        self.pid = os.getpid()
        self.storage = configured_storage(self.config)
        self.executor = configured_executor(self.config)
        self.worker: Worker | None = None
        self.started: set[str] = set()
        """Runs that this process started: the exit waits for them."""
        self.loop = asyncio.new_event_loop()
        ready: concurrent.futures.Future[None] = concurrent.futures.Future()
        self.thread = threading.Thread(
            target=self._main, args=(ready,), name="pyworkflow-worker", daemon=True
        )
        self.thread.start()
        ready.result()
        _at_exit(self.finish)

    def _main(self, ready: concurrent.futures.Future[None]) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_until_complete(self._open())
        except BaseException as exc:  # noqa: BLE001 - handed to the thread that waits
            with contextlib.suppress(Exception):
                self.loop.run_until_complete(self.storage.close())
            self.loop.close()
            ready.set_exception(exc)
            return
        ready.set_result(None)
        while True:
            try:
                self.loop.run_forever()
            except BaseException:  # noqa: BLE001 - a KeyboardInterrupt that somebody raised
                # Whoever waits for an answer of this loop would wait for ever.
                _log.exception("the embedded worker was interrupted; it goes on")
            else:
                return

    async def _open(self) -> None:
        await self.storage.open()
        load_observers()
        is_distributed = self.executor.capabilities.distributed
        if is_distributed or not self.config.worker:
            if is_distributed or isinstance(self.config.storage, str):
                is_default = is_distributed and self.config.storage_is_default
                check_shared(self.storage, self.executor, is_default=is_default)
            await self.executor.open({})
            return
        self.worker = Worker(self.storage, self.config, queues=self.config.queues or None)
        # From 3.12 on no thread can start once the script has ended, while runs may still go on:
        # those that sync steps and asyncio.to_thread() need start now.
        self.worker.runner.begin_threads()
        self.worker.runner.resources.begin_threads()
        self.worker.guard.begin()
        default = concurrent.futures.ThreadPoolExecutor(_DEFAULT_THREADS)
        barrier = threading.Barrier(_DEFAULT_THREADS)
        for _ in range(_DEFAULT_THREADS):
            default.submit(barrier.wait, 10.0)
        self.loop.set_default_executor(default)
        self.worker.on_run_started = self.started.add
        self.worker.on_run_ended = self.started.discard
        await self.worker.open()
        self.worker.serve()

    @property
    def is_here(self) -> bool:
        """Whether the caller is in the host's own thread: waiting for it would never end."""
        return threading.current_thread() is self.thread

    def submit(self, coro: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Run a coroutine on the host's loop."""
        return asyncio.run_coroutine_threadsafe(coro, self.loop)

    def call(self, coro: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the host's loop and wait for it."""
        future = self.submit(coro)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    # --- the end of the process -----------------------------------------------------------------

    def finish(self) -> None:
        """Wait until each run started here has ended or sleeps; then say what still waits."""
        if self.pid != os.getpid() or self.loop.is_closed() or not self.thread.is_alive():
            return
        interrupted = False
        try:
            waiting = self._wait_at_the_end() if self.started else []
        except KeyboardInterrupt:
            interrupted = True
            _tell("left: the runs are durable; `pyworkflow worker MODULE` goes on with them")
            waiting = []
        except StorageError as exc:
            _tell(str(exc))
            waiting = []
        if waiting:
            _tell(_farewell(waiting))
        try:
            # A step may block the loop: whoever interrupted waits for it no longer.
            self.submit(self._close()).result(timeout=1.0 if interrupted else _CLOSES_S)
        except KeyboardInterrupt:
            interrupted = True
        except (TimeoutError, concurrent.futures.CancelledError):
            pass
        self.loop.call_soon_threadsafe(self.loop.stop)
        if not interrupted:
            self.thread.join(timeout=2)

    def _wait_at_the_end(self) -> list[tuple[Run, float]]:
        future = self.submit(self._wait_for_started())
        try:
            return future.result(timeout=1.0)
        except TimeoutError:
            _tell("waiting for runs that this script started to end or sleep; Ctrl-C leaves them")
        return future.result()

    async def _wait_for_started(self) -> list[tuple[Run, float]]:
        if self.worker is None:
            return []
        waiting: list[tuple[Run, float]] = []
        for run_id in sorted(self.started):
            while True:
                run = await self.storage.get_run(run_id)
                if run is None or run.status.is_terminal:
                    break
                if run.status not in (RunStatus.PENDING, RunStatus.RUNNING):
                    due = [i.due_at for i in await self.storage.list_work(run_id)]
                    left = (min(due) - await self.storage.now()).total_seconds() if due else -1.0
                    waiting.append((run, left))
                    break
                # A commit wakes it; the bound covers what ends without an event.
                await self.storage.watch(run_id, after=run.history_length, timeout=_HALF_SECOND)
        return waiting

    async def _close(self) -> None:
        if self.worker is not None:
            await self.worker.drain(0)
            await self.worker.close()
        await self.executor.close()
        await self.storage.close()


def _tell(text: str) -> None:
    """Say something to the person at the terminal, at the end of a script."""
    for line in text.splitlines():
        sys.stderr.write(f"pyworkflow: {line}\n")


def _farewell(waiting: list[tuple[Run, float]]) -> str:
    lefts = [left for _, left in waiting if left >= 0]
    first = waiting[0][0]
    when = ""
    if lefts:
        soon = timedelta(seconds=max(1, round(min(lefts))))
        when = f", the next for another {format_duration(soon)}"
    stalled = sum(run.status == RunStatus.STALLED for run, _ in waiting)
    if stalled:
        when += f" ({stalled} stalled: `pyworkflow runs show {first.run_id}` tells why)"
    modules = sorted({_module_of(run.workflow) for run, _ in waiting})
    count = f"{len(waiting)} run{'s' if len(waiting) > 1 else ''}"
    verb = "waits" if len(waiting) == 1 else "wait"
    return (
        f"{count} still {verb}{when}: {first.run_id}"
        f"{' …' if len(waiting) > 1 else ''}\n"
        f"`pyworkflow worker {' '.join(modules)}` goes on with what this process "
        "started"
    )


def _module_of(workflow: str) -> str:
    from pyworkflow._definitions import find_workflow

    found = find_workflow(workflow)
    if found is None:
        return "MODULE"
    module = found.fn.__module__
    if module == "__main__":
        # By now the interpreter has taken ``__file__`` away from ``__main__``.
        return os.path.relpath(found.fn.__code__.co_filename)
    return module


def _at_exit(callback: Callable[[], None]) -> None:
    """Call back at the end of the script, while threads can still be used.

    ``atexit`` comes too late: by then no thread pool takes work, and sync steps could not run.
    """
    # The pool's own function must be registered first: they are called last to first.
    importlib.import_module("concurrent.futures.thread")
    register = getattr(threading, "_register_atexit", None)
    if register is None:
        import atexit

        register = atexit.register
    register(callback)


_host: EmbeddedHost | None = None
_host_lock = threading.Lock()


def host() -> EmbeddedHost:
    """The process's host; begun by the first call that needs it."""
    global _host
    with _host_lock:
        if _host is None or _host.pid != os.getpid() or not _host.thread.is_alive():
            _host = EmbeddedHost()
        return _host


def reset_host() -> None:
    """Stop the host at once, for tests: the next call begins another."""
    global _host
    with _host_lock:
        standing, _host = _host, None
    if standing is not None:
        standing.started.clear()
        standing.finish()
        if not standing.thread.is_alive():
            standing.loop.close()


def running_host() -> EmbeddedHost | None:
    """The process's host, if it runs already. Takes no lock."""
    found = _host
    if found is None or found.pid != os.getpid() or not found.thread.is_alive():
        return None
    return found


def host_is_here() -> bool:
    """Whether the caller is in the thread of the process's host."""
    return _host is not None and _host.is_here
