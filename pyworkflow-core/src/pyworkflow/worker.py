"""What executor plugins call to make this process work: ``create_runtime`` and ``serve_here``."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Sequence

from pyworkflow import _plugins
from pyworkflow._client import Importing
from pyworkflow._config import Settings, settings
from pyworkflow._engine.serve import serve_here
from pyworkflow._engine.worker import Worker
from pyworkflow._local import configured_storage
from pyworkflow.errors import ConfigurationError
from pyworkflow.spi.executor import Doorbell, Runtime
from pyworkflow.spi.storage import StorageBackend

__all__ = ["create_runtime", "import_modules", "serve_here"]


def create_runtime(
    *,
    storage: StorageBackend | None = None,
    config: Settings | None = None,
    queues: Sequence[str] | None = None,
    spread: bool = False,
    ring: Callable[[Sequence[Doorbell]], None] | None = None,
) -> Runtime:
    """The worker of this process on the configured store. Does no I/O before it is opened."""
    config = config or settings()
    _load_plugins(config)
    return Worker(
        storage if storage is not None else configured_storage(config),
        config,
        queues=queues,
        spread=spread,
        ring=ring,
    )


class _Modules:
    """The registry that plugins name their workflow modules to."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def add_module(self, module: str) -> None:
        self.names.append(module)


def _load_plugins(config: Settings) -> None:
    """Load every plugin, tell it the settings, and import the modules that it names."""
    _plugins.load_all()
    hidden = ("storage", "executor", "broker_url")  # they may carry credentials
    shown = {
        field.name: str(getattr(config, field.name))
        for field in dataclasses.fields(config)
        if field.name not in hidden
    }
    _plugins.observe("pyworkflow_configure", config=shown)
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
                f"the workflow module cannot be imported: module={name}: "
                f"{type(exc).__name__}: {exc}; name it as Python imports it, or as path/file.py"
            ) from exc


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
