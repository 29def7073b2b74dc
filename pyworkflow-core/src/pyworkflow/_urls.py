"""Storage and executor URLs: taking them apart, making their paths absolute, hiding credentials."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl, unquote

from pyworkflow.errors import ConfigurationError

__all__ = ["ParsedUrl", "check_name", "parse_url", "redact_url", "resolve_url"]

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_FORMS = "file:DIRECTORY, sqlite:///FILE, postgresql://USER@HOST/DB, redis://HOST:6379/0, memory://"
_EXECUTOR_FORMS = "local://, celery://"
_SECRET_NAME = re.compile(r"pass|pwd|secret|token|credential|auth|key", re.IGNORECASE)
#: ``name=value`` in a query, after ``;``, or between blanks as libpq writes it, perhaps quoted.
_PAIR = re.compile(r"([\w.%-]+)(\s*=\s*)('(?:[^'\\]|\\.)*(?:'|$)|[^&;\s]*)", re.DOTALL)
#: Schemes whose rest is a path: an ``@`` in it separates no credentials.
_PATHS = frozenset({"file", "sqlite", "memory", "local"})
#: Schemes whose paths may have a ``#``: it is part of the name.
_FILES = frozenset({"file", "sqlite"})


@dataclass(frozen=True, slots=True)
class ParsedUrl:
    """A URL as plugins get it."""

    scheme: str
    """Lower case."""
    url: str = field(repr=False)
    """As given."""
    options: dict[str, str] = field(repr=False)
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
    for name, value in parse_qsl(_query(url, scheme), keep_blank_values=True):
        if name in options:
            raise ConfigurationError(
                f"the {kind} URL gives an option twice: option={name} {kind}={shown!r}; keep one"
            )
        options[name] = value
    return ParsedUrl(scheme, url, options)


def check_name(url: str, kind: str = "storage") -> None:
    """Refuse a URL of which a part would be ignored, so that two names meant one store.

    Raises:
        ConfigurationError: a ``#`` where it is no part of a path, a ``?`` without options, or
            escapes that are not UTF-8.
    """
    match = _SCHEME.match(url)
    scheme = "" if match is None else match[1].lower()
    if "#" in url and scheme not in _FILES:
        raise ConfigurationError(
            f"the {kind} URL has a #, which ends it: {kind}={redact_url(url)!r}; write %23 where "
            "it is part of a name or a password"
        )
    path, mark, query = url.partition("?")
    if scheme not in _FILES:
        return
    if mark and not all("=" in part for part in query.split("&")):
        raise ConfigurationError(
            f"the {kind} URL has a ? that begins no options: {kind}={redact_url(url)!r}; write "
            "%3F where it is part of a name"
        )
    try:
        unquote(path, errors="strict")
    except UnicodeDecodeError:
        raise ConfigurationError(
            f"the path in the {kind} URL is not UTF-8: {kind}={redact_url(url)!r}; write %25 for "
            "a percent sign in a name"
        ) from None


def redact_url(url: str) -> str:
    """The URL without passwords and other secrets, for logs and messages.

    In doubt it hides too much: a password may hold ``/``, ``?`` and ``@`` as typed. What libpq
    takes instead of a URL (``host=db password=…``) is a form of it, too.
    """
    match = _SCHEME.match(url)
    if match is None:
        return re.sub(r".*@", "***@", _PAIR.sub(_hidden, url), flags=re.DOTALL)
    head, rest = url[: match.end()], url[match.end() :]
    if match[1].lower() in _PATHS:
        place = rest[2:].partition("/")[0]
        if rest.startswith("//") and ("@" in place or ":" in place):
            # No store has a host here: what was meant as user and password, as far as it goes.
            return f"{head}//***"
        base, mark, query = rest.partition("?")
        return head + re.sub(r"(?<=;).*", _pairs, base) + mark + _pairs(query)
    return head + _PAIR.sub(_hidden, _without_password(rest))


def _without_password(rest: str) -> str:
    """What follows the scheme, without the password before the host, and without a fragment."""
    if not rest.startswith("//"):
        if "@" in rest:
            rest = "***@" + rest.rpartition("@")[2]
        elif ":" in rest:
            rest = f"{rest.partition(':')[0]}:***"
    elif (user := re.match(r"//([^/?#@:]*):.*@", rest, re.DOTALL)) is not None:
        rest = f"//{user[1]}:***@{rest[user.end() :]}"
    elif (user := re.match(r"//([^/?#@:\[]*):(?!\d*(?:[,/?#]|$))", rest)) is not None:
        rest = f"//{user[1]}:***"  # a password in the place of a port, and no host
    base, mark, _ = rest.partition("#")
    return f"{base}#***" if mark else base


def _pairs(text: str | re.Match[str]) -> str:
    return _PAIR.sub(_hidden, text if isinstance(text, str) else text[0])


def _hidden(pair: re.Match[str]) -> str:
    return f"{pair[1]}{pair[2]}***" if _SECRET_NAME.search(unquote(pair[1])) else pair[0]


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
            f"the storage URL starts with ~, which only a shell expands: storage={redact_url(url)!r}; "
            "write the path out"
        )
    try:
        folder = base.absolute().as_posix()
    except OSError as error:
        raise ConfigurationError(
            "the current directory does not exist any more, and the storage path is relative: "
            f"storage={redact_url(url)!r}; give an absolute one, file:///DIRECTORY"
        ) from error
    for char, code in (("%", "%25"), ("?", "%3F"), ("#", "%23")):
        folder = folder.replace(char, code)
    parts = [part for part in path.split("/") if part not in {"", "."}]
    while parts and parts[0] == ".." and folder.strip("/"):
        parts.pop(0)
        folder = folder.rpartition("/")[0]
    if scheme == "sqlite" and path.endswith("/"):
        parts.append("")  # no file has such a name: its plugin refuses it
    return f"{prefix}{'/'.join([folder.rstrip('/'), *parts])}{mark}{query}"


def _query(url: str, scheme: str) -> str:
    if scheme in _FILES:
        return url.partition("?")[2]
    return url.partition("#")[0].partition("?")[2]
