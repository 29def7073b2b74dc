"""Serves ``lmdb:///absolute/directory``. Only checks the URL; the backend loads when it is used."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import unquote, urlsplit

from pyworkflow.spi import ConfigurationError, StorageBackend, hookimpl

#: Bytes of the smallest ``max_size``: what is mapped at first.
LEAST_SIZE = 1 << 20


@hookimpl
def pyworkflow_make_storage(url: str, options: Mapping[str, str]) -> StorageBackend | None:
    """Make the backend for an ``lmdb:`` URL; None for other schemes. Does no I/O.

    Options: ``max_size``, the largest size of the file in bytes.

    Raises:
        ConfigurationError: The URL or an option is wrong.
    """
    parts = urlsplit(url)
    if parts.scheme != "lmdb":
        return None
    path = unquote(parts.path)
    if parts.netloc or not path.startswith("/") or not path.strip("/"):
        # The host may be a user's mistake with a password in it: it is not repeated.
        raise ConfigurationError("an lmdb URL has an absolute path alone: lmdb:///var/lib/app")
    unknown = sorted(set(options) - {"namespace", "max_size"})
    if unknown:
        raise ConfigurationError(
            f"lmdb URLs have no such options: options={','.join(unknown)}; there is max_size"
        )
    text = options.get("max_size", "0")
    if not (text.isascii() and text.isdigit()):
        raise ConfigurationError(f"not a number of bytes: max_size={text!r}; write 1000000000")
    if 0 < int(text) < LEAST_SIZE:
        raise ConfigurationError(f"too small for a store: max_size={text}; give {LEAST_SIZE}")
    from pyworkflow_storage_lmdb._backend import LmdbStorageBackend

    return LmdbStorageBackend(path, namespace=options["namespace"], max_size=int(text) or None)
