"""Answers for its URL schemes until the plugin exists: a refusal that names what works today."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

from pyworkflow.errors import ConfigurationError
from pyworkflow.spi import hookimpl


@hookimpl
def pyworkflow_make_storage(url: str, options: Mapping[str, str]) -> NoReturn:
    """Refuse the URL.

    Raises:
        ConfigurationError: Always, because this plugin is not built yet.
    """
    # The URL may carry credentials and options may too: only the scheme is repeated.
    scheme = url.partition(":")[0]
    raise ConfigurationError(
        f"SQLite and PostgreSQL storage is not built yet: scheme={scheme} distribution=pyworkflow-storage-sql; "
        "use storage='file:.pyworkflow' until it is"
    )
