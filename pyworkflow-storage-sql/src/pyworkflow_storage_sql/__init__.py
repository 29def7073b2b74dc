"""Stores in SQLite and PostgreSQL. Each needs its driver: the extra ``sqlite`` or ``postgres``."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyworkflow_storage_sql.postgres._backend import PostgresStorageBackend
    from pyworkflow_storage_sql.sqlite._backend import SQLiteStorageBackend

__version__ = "0.2.0.dev0"
__all__ = ["PostgresStorageBackend", "SQLiteStorageBackend"]

_MODULES = {
    "PostgresStorageBackend": "postgres._backend",
    "SQLiteStorageBackend": "sqlite._backend",
}


def __getattr__(name: str) -> object:
    # One driver is enough: the other backend's module must not be imported beside it.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
