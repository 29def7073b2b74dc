"""The plugin that serves ``local://``."""

from __future__ import annotations

from pyworkflow.spi import Executor, hookimpl


@hookimpl
def pyworkflow_make_executor(url: str) -> Executor | None:
    """The executor of this machine; it has no options."""
    from pyworkflow._local import LocalExecutor

    return LocalExecutor() if url.startswith("local:") else None
