"""Door to the Redis backend, closed until the plugin is built."""

raise ModuleNotFoundError(
    "Redis storage is not built yet: distribution=pyworkflow-storage-redis; "
    "use storage='file:.pyworkflow' until it is",
    name=__name__,
)
