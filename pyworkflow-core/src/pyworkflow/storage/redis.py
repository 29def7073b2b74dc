"""Door to the Redis backend: the import path stays, whichever distribution holds the code."""

try:
    from pyworkflow_storage_redis import RedisStorageBackend
except ModuleNotFoundError as error:
    if error.name != "pyworkflow_storage_redis":
        raise  # the plugin is there and broken: its own error says more
    raise ModuleNotFoundError(
        "the Redis backend is not installed: distribution=pyworkflow-storage-redis; "
        "pip install 'pyworkflow-storage-redis', from a clone './pyworkflow-storage-redis'",
        name=error.name,
    ) from None

__all__ = ["RedisStorageBackend"]
