"""Doors to the Celery plugin; ``pyworkflow.celery.app`` is what `celery -A` names."""

try:
    from pyworkflow_celery import __getattr__ as __getattr__
except ModuleNotFoundError as error:
    if error.name != "pyworkflow_celery":
        raise  # the plugin is there and broken: its own error says more
    raise ModuleNotFoundError(
        "the Celery executor is not installed: distribution=pyworkflow-celery; "
        "pip install 'pyworkflow-celery', from a clone './pyworkflow-celery'",
        name=error.name,
    ) from None

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyworkflow_celery import attach

__all__ = ["attach"]
