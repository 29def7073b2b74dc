"""What executor plugins call to make this process work, and where they find its settings."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import cast

from pyworkflow import _plugins
from pyworkflow._config import Settings, provisional_settings, settings
from pyworkflow._definitions import workflow_names
from pyworkflow._engine.outages import Backoff, OutageLog, Outages
from pyworkflow._engine.serve import serve_here
from pyworkflow._engine.worker import Worker
from pyworkflow._local import configured_storage
from pyworkflow._logging import replay_filter
from pyworkflow._routing import Importing
from pyworkflow.errors import ConfigurationError
from pyworkflow.spi._contract import check_storage_contract
from pyworkflow.spi.executor import Doorbell, Runtime
from pyworkflow.spi.storage import StorageBackend

__all__ = [
    "Backoff",
    "OutageLog",
    "Outages",
    "Settings",
    "create_runtime",
    "import_modules",
    "provisional_settings",
    "replay_filter",
    "serve_here",
    "settings",
    "tell_started",
    "tell_stopping",
    "workflow_names",
]


def create_runtime(
    *,
    storage: StorageBackend | None = None,
    config: Settings | None = None,
    queues: Sequence[str] | None = None,
    spread: bool = False,
    notify: Callable[[Sequence[Doorbell]], None] | None = None,
    end_process: Callable[[], None] | None = None,
    serves: Collection[str] | None = None,
) -> Runtime:
    """The worker of this process, on the configured store or on one that the caller closes.

    Plugins are loaded and told the settings, and the modules that they name are imported; those of
    the setting ``modules`` are the caller's to import. No I/O happens before ``open``.

    Args:
        storage: The store; None makes the configured one, which ``close`` closes.
        config: The settings; None means those of the process.
        queues: What ``next_due`` and claims without a doorbell look at; None means every queue.
        serves: The queues whose work is for this process; None means ``queues``.
        spread: Parallel branches are given to other workers, by doorbells.
        notify: Sends doorbells for items that are due. Called in the runtime's loop after commits: it
            hands over and returns. Without it no worker is notified, and workers poll.
        end_process: Ends this process soon, for a pool to make another: called in the runtime's
            loop when a step outlived its hard timeout. Without it such a step's next try waits
            until its thread has ended, as after any timeout.

    Raises:
        ConfigurationError: a setting or a module cannot be used.
        PluginNotFound: the store's URL has no plugin.
    """
    config = config or settings()
    if storage is not None:
        check_storage_contract(storage)
    _load_plugins(config)
    return Worker(
        storage if storage is not None else configured_storage(config),
        config,
        queues=queues,
        spread=spread,
        notify=notify,
        end_process=end_process,
        owns_storage=storage is None,
        serves=serves,
    )


def tell_started(runtime: Runtime, queues: Sequence[str] = ()) -> None:
    """Tell plugins that a worker which gets doorbells takes work from now on: once per worker.

    With several processes under one worker, its main process tells; ``queues`` are those that it
    was told to take, none means the executor's default.
    """
    _plugins.observe(
        "pyworkflow_worker_started", worker=cast("Worker", runtime).owner, queues=sorted(queues)
    )


def tell_stopping(runtime: Runtime) -> None:
    """Tell plugins that the worker takes no more work and drains."""
    _plugins.observe("pyworkflow_worker_stopping", worker=cast("Worker", runtime).owner)


class _Modules:
    """The registry that plugins name their workflow modules to."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def add_module(self, module: str) -> None:
        self.names.append(module)


def _load_plugins(config: Settings) -> None:
    """Load every plugin, tell it the settings, and import the modules that it names."""
    _plugins.load_all()
    _plugins.tell_settings(config)
    modules = _Modules()
    _plugins.observe("pyworkflow_register", registry=modules)
    import_modules(modules.names)


def import_modules(names: Iterable[str]) -> None:
    """Import workflow modules by dotted name or ``path/file.py``; the current directory counts.

    Raises:
        ConfigurationError: one cannot be imported; the message names it and the cause.
    """
    if "" not in sys.path and os.getcwd() not in sys.path:  # noqa: PTH109 - as sys.path has it
        sys.path.insert(0, os.getcwd())  # noqa: PTH109 - as above
    for name in names:
        try:
            with Importing(name):
                _import_one(name)
        except ConfigurationError:
            raise
        except Exception as exc:
            raise ConfigurationError(
                f"the workflow module cannot be imported: module={name}: {_why(name, exc)}"
            ) from exc


def _why(name: str, exc: Exception) -> str:
    """What went wrong in an import, where, and what to do."""
    said = f"{type(exc).__name__}: {exc}"
    missing = exc.name if isinstance(exc, ModuleNotFoundError) else None
    if missing is not None and (name == missing or name.startswith(missing + ".")):
        path, colon, _ = name.partition(":")
        if colon:
            return f"{said}; leave out what follows the colon: {path}"
        return f"{said}; name it as Python imports it, or as path/file.py"
    where = ""
    for frame, line in traceback.walk_tb(exc.__traceback__):
        file = frame.f_code.co_filename
        if not file.startswith("<") and file != __file__:
            where = f" (file={file} line={line})"
    if missing is not None:
        return f"{said}{where}; install the package that it needs"
    return f"{said}{where}; correct the module"


def _import_one(name: str) -> object:
    if not name.endswith(".py"):
        return importlib.import_module(name)
    path = os.path.abspath(name)  # noqa: PTH100 - no resolving of links
    if not os.path.isfile(path):  # noqa: PTH113 - as above
        raise ConfigurationError(f"no such file: {name}; give the path of a workflow module")
    stem = os.path.splitext(os.path.basename(path))[0]  # noqa: PTH119, PTH122 - as above
    standing = sys.modules.get(stem)
    if standing is not None:
        if getattr(standing, "__file__", None) == path:
            return standing
        raise ConfigurationError(
            f"another module has this name already: file={name} module={stem}; rename the file, "
            "or name it as Python imports it"
        )
    spec = importlib.util.spec_from_file_location(stem, path)
    if spec is None or spec.loader is None:
        raise ConfigurationError(f"not a Python file: {name}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[stem] = module
    # Files beside it import as they do when it runs as a script.
    sys.path.insert(0, os.path.dirname(path))  # noqa: PTH120 - as above
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(stem, None)
        raise
    return module
