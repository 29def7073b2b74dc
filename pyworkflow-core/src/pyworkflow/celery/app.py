"""Door to the Celery application: ``celery -A pyworkflow.celery.app worker``."""

try:
    from pyworkflow_celery.app import app
except ModuleNotFoundError as error:
    if error.name not in ("pyworkflow_celery", "celery"):
        raise  # the plugin is there and broken: its own error says more
    raise ModuleNotFoundError(
        "the Celery executor is not installed: distribution=pyworkflow-celery; "
        "pip install 'pyworkflow-celery', from a clone './pyworkflow-celery'",
        name=error.name,
    ) from None

__all__ = ["app"]
