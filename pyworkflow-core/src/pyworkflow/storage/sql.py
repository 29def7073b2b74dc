"""Door to the SQLite and PostgreSQL backends; each loads, with its driver, on first use."""

from typing import TYPE_CHECKING

try:
    from pyworkflow_storage_sql import __getattr__ as __getattr__  # noqa: PLC0414 - type checkers: re-exported
except ModuleNotFoundError as error:
    if error.name != "pyworkflow_storage_sql":
        raise  # the plugin is there and broken: its own error says more
    raise ModuleNotFoundError(
        "the SQL backends are not installed: distribution=pyworkflow-storage-sql; run "
        "`pip install pyworkflow-storage-sql[sqlite]`, or `[postgres]`, as you need",
        name=error.name,
    ) from None
if TYPE_CHECKING:
    from pyworkflow_storage_sql import PostgresStorageBackend, SQLiteStorageBackend

__all__ = ["PostgresStorageBackend", "SQLiteStorageBackend"]
