"""Serves ``memory://`` (a private store each time) and ``memory://NAME`` (one per process)."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pyworkflow.errors import ConfigurationError
from pyworkflow.spi import StorageBackend, hookimpl

if TYPE_CHECKING:
    from pyworkflow._memory import MemoryStorageBackend

_named: dict[tuple[str, str], MemoryStorageBackend] = {}
_lock = threading.Lock()


@hookimpl
def pyworkflow_make_storage(url: str, options: Mapping[str, str]) -> StorageBackend | None:
    """Make a memory backend; what it holds is gone with the process.

    Raises:
        ConfigurationError: An option in the URL; this backend has none.
    """
    scheme, _, rest = url.partition("?")[0].partition(":")
    if scheme.lower() != "memory":
        return None
    unknown = sorted(set(options) - {"namespace"})
    if unknown:
        raise ConfigurationError(
            f"memory URLs take no options: options={','.join(unknown)}; "
            "write memory:// or memory://NAME"
        )
    from pyworkflow._memory import MemoryStorageBackend

    namespace = options.get("namespace", "default")
    name = rest.strip("/")
    if not name:
        return MemoryStorageBackend(namespace=namespace)
    with _lock:
        first = _named.get((name, namespace))
        if first is None:
            first = _named[name, namespace] = MemoryStorageBackend(namespace=namespace)
    # An object belongs to the loop that first uses it: everybody gets one of their own.
    return first.clone()
