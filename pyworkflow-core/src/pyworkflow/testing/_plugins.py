"""Plugins for the length of a test."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import TypeVar

from pyworkflow._plugins import is_registered, register_plugin, unregister_plugin

__all__ = ["registered_plugin"]

T = TypeVar("T")


@contextmanager
def registered_plugin(plugin: T, name: str | None = None) -> Generator[T]:
    """Have the hooks of ``plugin`` called within the block; gives the plugin.

    A plugin that was registered before stays so afterwards. Raises as
    ``pyworkflow.register_plugin``.
    """
    was_there = is_registered(plugin)
    register_plugin(plugin, name)
    try:
        yield plugin
    finally:
        if not was_there:
            unregister_plugin(plugin)
