"""The plugin that serves ``local://``."""

from __future__ import annotations

from collections.abc import Mapping

from pyworkflow.spi import Executor, hookimpl


@hookimpl
def pyworkflow_make_executor(url: str, options: Mapping[str, str]) -> Executor | None:
    """The executor of this machine."""
    from pyworkflow._local import LocalExecutor

    return LocalExecutor() if url.startswith("local:") else None
