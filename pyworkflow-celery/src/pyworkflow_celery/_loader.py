"""Imports the modules of ``-I`` as ``pyworkflow worker`` does, and fails in one line."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from pyworkflow.errors import ConfigurationError
from pyworkflow.worker import import_modules

__all__ = ["WorkflowLoader"]

_AppLoader: Any = import_module("celery.loaders.app").AppLoader


class WorkflowLoader(_AppLoader):  # type: ignore[misc]  # Celery has no types
    """Starting a run while a module is imported is refused; ``path/file.py`` is a module, too."""

    def import_task_module(self, module: str) -> Any:
        """Import a module that was named to the worker."""
        self.task_modules.add(module)
        try:
            import_modules([module])
        except ConfigurationError as exc:
            raise SystemExit(f"pyworkflow: {exc}") from exc
        return sys.modules.get(module)
