"""Door to the SQLite and PostgreSQL backends; each loads, with its driver, on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyworkflow_storage_sql import PostgresStorageBackend, SQLiteStorageBackend

__all__ = ["PostgresStorageBackend", "SQLiteStorageBackend"]

try:
    import pyworkflow_storage_sql as _plugin
except ModuleNotFoundError as error:
    if error.name != "pyworkflow_storage_sql":
        raise  # the plugin is there and broken: its own error says more
    raise ModuleNotFoundError(
        "the SQL backends are not installed: distribution=pyworkflow-storage-sql; "
        "run `pip install 'pyworkflow-storage-sql[sqlite]'` or "
        "`pip install 'pyworkflow-storage-sql[postgres]'`",
        name=error.name,
    ) from None


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(_plugin, name)
    return value
