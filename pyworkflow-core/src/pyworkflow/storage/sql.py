"""Door to the SQLite and PostgreSQL backends, closed until the plugin is built."""

raise ModuleNotFoundError(
    "SQLite and PostgreSQL storage is not built yet: distribution=pyworkflow-storage-sql; "
    "use storage='file:.pyworkflow' until it is",
    name=__name__,
)
