"""Storage and executor URLs: taking them apart, making their paths absolute, hiding credentials."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, unquote

from pyworkflow.errors import ConfigurationError

__all__ = ["ParsedUrl", "parse_url", "redact_url", "resolve_url"]

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_FORMS = "file:DIRECTORY, sqlite:///FILE, postgresql://USER@HOST/DB, redis://HOST:6379/0, memory://"
_EXECUTOR_FORMS = "local://, celery://"
_SECRET_NAME = re.compile(r"pass|pwd|secret|token|credential|auth|key$", re.IGNORECASE)
#: Schemes whose rest is a path: an ``@`` in it separates no credentials.
_PATHS = frozenset({"file", "sqlite", "memory", "local"})


@dataclass(frozen=True, slots=True)
class ParsedUrl:
    """A URL as plugins get it."""

    scheme: str
    """Lower case."""
    url: str
    """As given."""
    options: dict[str, str]
    """The query, decoded."""


def parse_url(url: object, kind: str = "storage") -> ParsedUrl:
    """Take a URL apart as far as choosing a plugin needs it.

    Raises:
        ConfigurationError: Not text, empty, without a scheme, or an option is given twice. What
            the options mean is the plugin's affair.
    """
    forms = _FORMS if kind == "storage" else _EXECUTOR_FORMS
    if not isinstance(url, str):
        raise ConfigurationError(
            f"the {kind} URL is not text: type={type(url).__name__}; give a URL like {forms}"
        )
    shown = redact_url(url)
    if not url.strip():
        raise ConfigurationError(f"the {kind} URL is empty: {kind}={shown!r}; give one of {forms}")
    if url != url.strip() or any(ord(c) < 0x20 or ord(c) == 0x7F for c in url):
        raise ConfigurationError(
            f"the {kind} URL has blanks at its ends or control characters: {kind}={shown!r}; "
            "remove them"
        )
    match = _SCHEME.match(url)
    if match is None:
        hint = f", for a path file:{shown}" if kind == "storage" else ""
        raise ConfigurationError(
            f"the {kind} URL has no scheme: {kind}={shown!r}; give one of {forms}{hint}"
        )
    scheme = match[1].lower()
    if len(scheme) == 1:
        raise ConfigurationError(
            f"the {kind} URL looks like a path with a drive letter: {kind}={shown!r}; "
            "write file:PATH"
        )
    options: dict[str, str] = {}
    for name, value in parse_qsl(_query(url), keep_blank_values=True):
        if name in options:
            raise ConfigurationError(
                f"the {kind} URL gives an option twice: option={name} {kind}={shown!r}; keep one"
            )
        options[name] = value
    return ParsedUrl(scheme, url, options)


def redact_url(url: str) -> str:
    """The URL without passwords and other secrets, for logs and messages.

    In doubt it hides too much: a password may hold ``/``, ``?`` and ``@`` as typed.
    """
    match = _SCHEME.match(url)
    if match is None:
        return re.sub(r".*@", "***@", url, flags=re.DOTALL)
    if match[1].lower() not in _PATHS:
        head, rest = url[: match.end()], url[match.end() :]
        if rest.startswith("//"):
            user = re.match(r"//([^/?#@:]*):.*@", rest, re.DOTALL)
            if user is not None:
                rest = f"//{user[1]}:***@{rest[user.end() :]}"
        elif "@" in rest:
            rest = "***@" + rest.rpartition("@")[2]
        url = head + rest
    base, mark, query = url.partition("?")
    if not mark:
        return url
    pairs = (pair.partition("=") for pair in query.split("&"))
    return f"{base}?" + "&".join(
        f"{name}=***" if eq and _SECRET_NAME.search(unquote(name)) else name + eq + value
        for name, eq, value in pairs
    )


def resolve_url(url: str, base: Path) -> str:
    """Make a relative path of a ``file:`` or ``sqlite:`` URL absolute, from ``base`` on.

    ``file:data`` becomes ``file:///base/data``, ``sqlite:///a.db`` ``sqlite:////base/a.db``;
    every other URL stays as it is. Paths in URLs are percent-encoded where they hold ``%``, ``?``
    or ``#``; plugins decode them.

    Raises:
        ConfigurationError: The path starts with ``~``, or the current directory is gone.
    """
    match = _SCHEME.match(url)
    if match is None:
        return url
    scheme = match[1].lower()
    path, mark, query = url[match.end() :].partition("?")
    if scheme == "file" and path and not path.startswith("/"):
        prefix = "file://"
    elif scheme == "sqlite" and re.match(r"///[^/:]", path):
        prefix, path = "sqlite:///", path[3:]
    else:
        return url
    if path == "~" or path.startswith("~/"):
        raise ConfigurationError(
            f"the storage URL starts with ~, which only a shell expands: storage={url!r}; "
            "write the path out"
        )
    try:
        folder = base.absolute().as_posix()
    except OSError as error:
        raise ConfigurationError(
            "the current directory does not exist any more, and the storage path is relative: "
            f"storage={url!r}; give an absolute one, file:///DIRECTORY"
        ) from error
    for char, code in (("%", "%25"), ("?", "%3F"), ("#", "%23")):
        folder = folder.replace(char, code)
    parts = [part for part in path.split("/") if part not in {"", "."}]
    while parts and parts[0] == ".." and folder.strip("/"):
        parts.pop(0)
        folder = folder.rpartition("/")[0]
    return f"{prefix}{'/'.join([folder.rstrip('/'), *parts])}{mark}{query}"


def _query(url: str) -> str:
    return url.partition("#")[0].partition("?")[2]
