"""``sqlite:`` URLs: ``sqlite:///relative.db`` and ``sqlite:////absolute.db``."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import unquote

from pyworkflow.spi import ConfigurationError, StorageBackend

__all__ = ["make"]


def make(url: str, options: Mapping[str, str]) -> StorageBackend:
    """Make the backend for a ``sqlite:`` URL. Does no I/O. The only option is ``namespace``.

    Raises:
        ConfigurationError: The URL or an option is wrong, or the driver is not installed.
    """
    unknown = sorted(set(options) - {"namespace"})
    if unknown:
        raise ConfigurationError(
            f"sqlite URLs have no such options: options={','.join(unknown)} url={url!r}; "
            "there is namespace"
        )
    rest = url.partition("?")[0].partition(":")[2]
    if not rest.startswith("//"):
        raise ConfigurationError(
            f"not a sqlite URL: url={url!r}; write sqlite:///relative.db or sqlite:////absolute.db"
        )
    host, _, path = rest[2:].partition("/")
    if host not in {"", "localhost"}:
        raise ConfigurationError(
            f"a sqlite URL names a host: host={host.rpartition('@')[2]!r} url={url!r}; "
            "write sqlite:///relative.db or sqlite:////absolute.db"
        )
    path = unquote(path)
    if not path.strip("/") or path == ":memory:" or path.endswith("/") or "\0" in path:
        raise ConfigurationError(
            f"a sqlite URL needs a file: url={url!r}; "
            "write sqlite:///relative.db or sqlite:////absolute.db, or memory:// for no file"
        )
    try:
        import aiosqlite
    except ImportError:
        raise ConfigurationError(
            "the driver aiosqlite is not installed: storage=sqlite; "
            "pip install 'pyworkflow-storage-sql[sqlite]', "
            "from a clone './pyworkflow-storage-sql[sqlite]'"
        ) from None
    del aiosqlite
    from pyworkflow_storage_sql.sqlite._backend import SQLiteStorageBackend

    return SQLiteStorageBackend(path, namespace=options.get("namespace", "default"))
