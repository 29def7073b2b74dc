"""The Celery executor: doorbells travel as Celery messages, and Celery workers answer them.

``attach`` is for people who have a Celery application already; ``pyworkflow_celery.app`` is the
application for those who have none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyworkflow_celery._attach import attach

__all__ = ["attach"]

__version__ = "0.2.0.dev0"


def __getattr__(name: str) -> object:
    # Celery is a quarter of a second of imports: only who needs it pays for it.
    if name == "attach":
        from pyworkflow_celery._attach import attach

        return attach
    if name == "celery":  # what `celery -A pyworkflow.celery` looks for
        from pyworkflow_celery.app import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
