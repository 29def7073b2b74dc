"""Serves ``sqlite:``, ``postgresql:`` and ``postgres:`` URLs; each driver loads when it is needed."""

from __future__ import annotations

from collections.abc import Mapping

from pyworkflow.spi import StorageBackend, hookimpl

__all__ = ["pyworkflow_make_storage"]


@hookimpl
def pyworkflow_make_storage(url: str, options: Mapping[str, str]) -> StorageBackend | None:
    """Make the backend for an SQLite or PostgreSQL URL; None for other schemes. Does no I/O.

    Raises:
        ConfigurationError: The URL or an option is wrong, or the driver is not installed.
    """
    scheme = url.partition(":")[0].lower()
    if scheme == "sqlite":
        from pyworkflow_storage_sql.sqlite._url import make

        return make(url, options)
    if scheme in {"postgresql", "postgres"}:
        from pyworkflow_storage_sql.postgres._url import make

        return make(url, options)
    return None
