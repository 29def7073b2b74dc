"""Storage on Redis and Valkey: one Lua script per contract method, a namespace in one hash slot."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyworkflow_storage_redis._backend import RedisStorageBackend
    from pyworkflow_storage_redis._errors import LostWrites

__version__ = "0.2.0.dev0"
__all__ = ["LostWrites", "RedisStorageBackend"]

_MODULES = {"LostWrites": "_errors", "RedisStorageBackend": "_backend"}


def __getattr__(name: str) -> object:
    # The plugin must load without its driver, to say that it is missing.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
