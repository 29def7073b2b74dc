"""Serves ``file:relative/dir`` and ``file:///absolute/dir``."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import unquote

from pyworkflow.spi import ConfigurationError, StorageBackend, hookimpl

__all__ = ["pyworkflow_make_storage"]


@hookimpl
def pyworkflow_make_storage(url: str, options: Mapping[str, str]) -> StorageBackend | None:
    """Make the backend for a ``file:`` URL; None for other schemes. Does no I/O.

    Options: ``namespace``, and ``fsync`` (``true`` or ``false``).

    Raises:
        ConfigurationError: no path, a host, an unknown option, or a bad value.
    """
    scheme, _, rest = url.partition("?")[0].partition(":")
    if scheme.lower() != "file":
        return None
    unknown = sorted(set(options) - {"namespace", "fsync"})
    if unknown:
        raise ConfigurationError(
            f"file URLs have no such options: options={','.join(unknown)} url={url!r}; "
            "there are namespace and fsync"
        )
    fsync = options.get("fsync", "true").lower()
    if fsync not in {"true", "false"}:
        raise ConfigurationError(
            f"option fsync is neither true nor false: fsync={fsync!r} url={url!r}"
        )
    path = rest
    if rest.startswith("//"):
        host, slash, path = rest[2:].partition("/")
        if host not in {"", "localhost"}:
            raise ConfigurationError(
                f"a file URL names a host: host={host.rpartition('@')[2]!r} url={url!r}; "
                "write file:///absolute/dir or file:relative/dir"
            )
        path = slash + path
    path = unquote(path)
    if not path.strip("/") or "\0" in path:
        raise ConfigurationError(
            f"a file URL needs a directory: url={url!r}; "
            "write file:///absolute/dir or file:relative/dir"
        )
    from pyworkflow_storage_file._backend import FileStorageBackend

    return FileStorageBackend(
        path, namespace=options.get("namespace", "default"), fsync=fsync == "true"
    )
