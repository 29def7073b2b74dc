"""Doors to the Celery plugin; ``pyworkflow.celery.app`` is what `celery -A` names."""
