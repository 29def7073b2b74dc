"""Names: the keys of a namespace, and where a server is, said without credentials."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from pyworkflow.spi import ConfigurationError

__all__ = ["FORMAT", "OPTIONS", "Address", "parse_url", "prefix_of"]

#: Version of the key layout that this code writes; ``docs/reference/keys-redis.md`` describes it.
FORMAT = 2
#: What may stand behind the ``?`` of a URL.
OPTIONS = ("namespace", "timeout", "durable", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile")


def prefix_of(namespace: str) -> str:
    """What every key of the namespace begins with; the braces put all of them in one hash slot."""
    # Empty braces would put each key in a slot of its own; no other namespace is quoted as %.
    return "pyworkflow:{" + (quote(namespace, safe="") or "%") + "}:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """A server and how to sign in."""

    scheme: str
    host: str
    port: int
    db: int
    username: str | None
    password: str | None = field(repr=False)
    options: Mapping[str, str]

    @property
    def location(self) -> str:
        """The URL without credentials and options."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}/{self.db}"

    def __repr__(self) -> str:
        return f"Address({self.location})"

    def arguments(self) -> dict[str, Any]:
        """Arguments for a connection of redis-py."""
        arguments: dict[str, Any] = {
            "host": self.host,
            "port": self.port,
            "db": self.db,
            "username": self.username,
            "password": self.password,
        }
        return arguments | {k: v for k, v in self.options.items() if k.startswith("ssl_")}


def parse_url(url: str) -> Address:
    """The address that a URL names.

    Raises:
        ConfigurationError: It names none; the message repeats no part that may be secret.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ConfigurationError(
            "the Redis URL cannot be read; write redis://host:port/0, and escape special "
            "characters of user and password (%40 for @)"
        ) from None
    if parts.scheme not in {"redis", "rediss"}:
        raise ConfigurationError(
            f"not a Redis URL: scheme={parts.scheme}; write redis://host:port/0 or rediss:// for TLS"
        )
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise ConfigurationError(
            f"Redis URLs have no such options: options={','.join(unknown)}; "
            f"there are {', '.join(OPTIONS)}"
        )
    if parts.scheme == "redis" and any(name.startswith("ssl_") for name in options):
        raise ConfigurationError("ssl options need TLS: scheme=redis; write rediss://")
    database = unquote(parts.path).strip("/") or "0"
    if not (database.isascii() and database.isdigit()):
        raise ConfigurationError(
            "the path of a Redis URL is the number of a database; write redis://host:port/0"
        )
    return Address(
        scheme=parts.scheme,
        host=unquote(parts.hostname or "localhost"),
        port=port or 6379,
        db=int(database),
        username=unquote(parts.username) if parts.username else None,
        password=unquote(parts.password) if parts.password else None,
        options=options,
    )
