"""The plugin that serves ``celery://``."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

from pyworkflow.spi import CliGroup, Executor, hookimpl


@hookimpl
def pyworkflow_make_executor(url: str, options: Mapping[str, str]) -> Executor | None:
    """The executor; no I/O, and no import of Celery.

    Raises:
        ConfigurationError: The URL names a host, or has an option that is not known.
    """
    if url.partition(":")[0].lower() != "celery":
        return None
    from pyworkflow_celery._executor import CeleryExecutor, check_executor_url

    check_executor_url(url)
    return CeleryExecutor()


@hookimpl
def pyworkflow_cli(group: CliGroup) -> None:
    """Add ``pyworkflow dev``."""
    try:
        module = import_module("pyworkflow_celery._dev")
    except ModuleNotFoundError as error:
        if error.name != "click":
            raise
        return  # the extra `cli` is not there, and neither is the command line
    group.add_command(module.command, "dev")
