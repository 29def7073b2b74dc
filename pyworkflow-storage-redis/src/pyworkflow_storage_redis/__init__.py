"""Storage on Redis and Valkey: one Lua script per contract method, a namespace in one hash slot."""

from pyworkflow_storage_redis._backend import RedisStorageBackend
from pyworkflow_storage_redis._errors import LostWrites

__all__ = ["LostWrites", "RedisStorageBackend"]
__version__ = "0.1.0"
