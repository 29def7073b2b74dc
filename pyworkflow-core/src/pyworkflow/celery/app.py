"""Door to the Celery application, closed until the plugin is built."""

raise ModuleNotFoundError(
    "the Celery executor is not built yet: distribution=pyworkflow-celery; "
    "use executor='local://' and `pyworkflow worker` until it is",
    name=__name__,
)
