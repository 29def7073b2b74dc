"""Settings: ``configure(x=)``, then ``PYWORKFLOW_X``, then ``[tool.pyworkflow]``, then the default.

Nothing is read before first use; from then on the settings of a process stand. What a URL means is
for ``_plugins.py`` and the plugins; making objects from settings is for the client and the workers.
"""

from __future__ import annotations

import os
import re
import threading
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, cast

from pyworkflow._urls import parse_url, redact_url, resolve_url
from pyworkflow.errors import ConfigurationError

if TYPE_CHECKING:
    from pyworkflow.spi import Executor, StorageBackend

__all__ = [
    "CodecKeys",
    "Settings",
    "check_namespace",
    "configure",
    "parse_codec_keys",
    "provisional_settings",
    "read_codec_keys",
    "settings",
]

_NAMESPACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KEY_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KEY_BYTES = 32
_SIZE = re.compile(r"(\d+)\s*(KiB|MiB|GiB)?", re.IGNORECASE)
_HERE = Path()
_UNITS = {"": 1, "kib": 1024, "mib": 1024**2, "gib": 1024**3}


class CodecKeys:
    """Keys by their id, in order. Nothing that shows it shows a key."""

    __slots__ = ("_keys",)

    def __init__(self, keys: Iterable[tuple[str, bytes]]) -> None:
        self._keys = tuple(keys)

    def text(self) -> str:
        """The keys as the setting has them. Secret."""
        return ",".join(f"{key_id}:{b64encode(key).decode()}" for key_id, key in self._keys)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CodecKeys) and self._keys == other._keys

    def __hash__(self) -> int:
        return hash(self._keys)

    def __repr__(self) -> str:
        return f"<keys {', '.join(key_id for key_id, _ in self._keys) or 'none'}>"


def _default_threads() -> int:
    return min(32, (os.cpu_count() or 1) + 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The parsed settings of this process."""

    storage: str | StorageBackend = field(default="file:.pyworkflow", repr=False)
    """URL with an absolute path, or the object that ``configure`` was given."""
    storage_is_default: bool = False
    """Nobody said where runs are kept. No setting of its own."""
    executor: str | Executor = field(default="local://", repr=False)
    """URL, or the object that ``configure`` was given."""
    namespace: str = "default"
    modules: tuple[str, ...] = ()
    """Modules that define workflows; workers import them."""
    portable_modules: tuple[str, ...] = ()
    """Modules whose exceptions arrive in workflows as themselves; workers import them."""
    disable_plugins: tuple[str, ...] = ()
    """Names of plugins, or of their distributions, that are not loaded."""
    broker_url: str = field(default="redis://localhost:6379/0", repr=False)
    lease: timedelta = timedelta(seconds=60)
    """How long a claim holds without renewal."""
    renew_every: timedelta = timedelta(seconds=20)
    """A third of ``lease`` when only that is set. Shorter than ``lease``."""
    mute: timedelta = timedelta(seconds=30)
    """How long a sweep keeps quiet about an item that was rung for."""
    worker: bool = True
    """Whether ``start``, ``run``, ``result`` and ``Client`` have a worker in this process."""
    queues: tuple[str, ...] = ()
    """The queues that such a worker takes from; empty means every queue."""
    version_grace: timedelta = timedelta(seconds=20)
    """How long a worker leaves a run that newer code recorded to others before it stalls."""
    stalled_after: timedelta = timedelta(seconds=10)
    """How long a run is stalled before ``result`` raises ``RunStalled``."""
    drain: timedelta = timedelta(seconds=10)
    """How long a worker that is told to stop lets what it began go on."""
    watchdog: timedelta | None = None
    """How long workflow code may compute without waiting before it is interrupted: 2 s if unset."""
    max_payload: int = 2 * 1024 * 1024
    """Bytes of one encoded value."""
    max_history: int = 51_200
    """Events; a longer run fails."""
    concurrency: int = 100
    """Async steps that run at once in a worker process."""
    threads: int = field(default_factory=_default_threads)
    """Sync steps that run at once: ``concurrency`` when that is set. No setting of its own."""
    sessions: int = 10_000
    """Coroutines kept between turns."""
    key_retention: timedelta = timedelta(days=30)
    """How long the idempotency key of a purged run stays taken."""
    codecs: tuple[str, ...] = ()
    """How new payloads are written: names of codecs, in the order in which they are applied."""
    codec_keys: CodecKeys = field(default_factory=lambda: CodecKeys(()), repr=False)
    """Keys of the codec ``aesgcm``; the first is used for writing."""
    codec_keys_file: Path | None = None
    """A file of such keys, one ``ID:BASE64`` a line; looked at again for an unknown id."""
    codec_compress_threshold: int = 1024
    """Bytes; smaller payloads are not compressed."""
    codec_offload_dir: Path | None = None
    """The directory of the codec ``offload``, shared by all workers."""
    codec_offload_threshold: int = 128 * 1024
    """Bytes; smaller payloads stay in the store."""
    codec_max_size: int = 256 * 1024 * 1024
    """Bytes that a payload may have before it is wrapped, and after it is unwrapped."""


def configure(
    *,
    storage: str | StorageBackend | None = None,
    executor: str | Executor | None = None,
    namespace: str | None = None,
    modules: Sequence[str] | None = None,
    **settings: object,
) -> None:
    """Set settings of this process, before their first use. None leaves a setting alone.

    Calls before the first use add up; the later value wins. A relative path is relative to the
    current directory of this call.

    Raises:
        ConfigurationError: An unknown setting, a value of the wrong form (nothing is set then), or
            a value other than the one already in use.
    """
    given: dict[str, object] = {
        "storage": storage,
        "executor": executor,
        "namespace": namespace,
        "modules": modules,
        **settings,
    }
    parsed = {
        name: _parse(name, value, f"configure({name}=...)", _HERE)
        for name, value in given.items()
        if value is not None or name not in _PARSERS
    }
    with _state.lock:
        current = _state.settings
        if current is not None:
            for name, value in parsed.items():
                standing: object = getattr(current, name)
                if standing is not value and standing != value:
                    raise ConfigurationError(
                        f"the settings are already in use: setting={name} "
                        f"standing={_shown(name, standing)} asked={_shown(name, value)}; "
                        "call configure() before the first start, run, Client or worker"
                    )
            return
        candidate = {**_state.configured, **parsed}
        _check_together(candidate)
        _state.configured = candidate


def settings() -> Settings:
    """The settings of this process, read at the first call and the same ever after.

    Raises:
        ConfigurationError: A value of the wrong form, naming the setting and where it was found;
            an unknown setting in ``[tool.pyworkflow]``; an unreadable ``pyproject.toml``. The next
            call reads again.
    """
    current = _state.settings
    if current is not None:
        return current
    with _state.lock:
        if _state.settings is None:
            _state.settings = _read(_state.configured, os.environ)
        return _state.settings


def provisional_settings() -> Settings:
    """What ``settings`` would be now, without making it final: ``configure`` may still be called.

    For what has to exist before the workflow modules are imported. Raises as ``settings`` does.
    """
    with _state.lock:
        return _state.settings or _read(_state.configured, os.environ)


def check_namespace(value: object, source: str = "namespace") -> str:
    """The namespace, when it is one that every backend can hold.

    Raises:
        ConfigurationError: Other characters, or a wrong length.
    """
    if isinstance(value, str) and _NAMESPACE.fullmatch(value):
        return value
    raise _bad("namespace", value, source, "1 to 64 letters, digits, '.', '_', '-', no '.' first")


def parse_codec_keys(text: str, source: str) -> list[tuple[str, bytes]]:
    """Keys from ``ID:BASE64,ID:BASE64`` (or a line each), in order.

    Raises:
        ConfigurationError: Something else; the message repeats nothing of it but the id.
    """
    keys: dict[str, bytes] = {}
    for number, part in enumerate(re.split(r"[,\n]", text), 1):
        entry = part.strip()
        if not entry or entry.startswith("#"):
            continue
        key_id, colon, encoded = entry.partition(":")
        where = f"source={source} entry={number}"
        if not colon or not _KEY_ID.fullmatch(key_id):  # without a colon it may be the key itself
            raise ConfigurationError(
                f"a codec key has no proper id: {where}; write ID:BASE64, with an id of letters, "
                "digits, '.', '_', '-'"
            )
        try:
            key = b64decode(encoded.strip(), validate=True)
        except ValueError:
            key = b""
        if len(key) != _KEY_BYTES:
            raise ConfigurationError(
                f"a codec key is not {_KEY_BYTES} bytes in base64: key_id={key_id} {where}; "
                "make one with `openssl rand -base64 32`"
            )
        if key_id in keys:
            raise ConfigurationError(
                f"two codec keys have one id: key_id={key_id} {where}; give each its own"
            )
        keys[key_id] = key
    return list(keys.items())


def read_codec_keys(path: Path) -> list[tuple[str, bytes]]:
    """Keys from a file, one a line. ``ConfigurationError``."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"the file of codec keys cannot be read: setting=codec_keys_file file={path}: "
            f"{type(error).__name__}; see to its path and permissions"
        ) from error
    return parse_codec_keys(text, str(path))


# --- reading ----------------------------------------------------------------------------------


class _State:
    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.configured: dict[str, object] = {}
        self.settings: Settings | None = None


_state = _State()


def _reset_for_tests() -> None:  # pyright: ignore[reportUnusedFunction] - by tests
    with _state.lock:
        _state.configured = {}
        _state.settings = None


def _read(configured: Mapping[str, object], environ: Mapping[str, str]) -> Settings:
    values: dict[str, object] = {}
    path, table = _project_table()
    if path is not None:
        unknown = [name for name in table if name not in _PARSERS]
        if unknown:
            raise _unknown(unknown[0], f"[tool.pyworkflow] of {path}")
        for name, value in table.items():
            source = f"{name} in [tool.pyworkflow] of {path}"
            values[name] = _parse(name, value, source, path.parent)
    if "broker_url" not in values and environ.get("CELERY_BROKER_URL"):
        values["broker_url"] = _parse(
            "broker_url", environ["CELERY_BROKER_URL"], "CELERY_BROKER_URL", _HERE
        )
    for variable, value in environ.items():
        if not variable.startswith("PYWORKFLOW_"):
            continue
        name = variable.removeprefix("PYWORKFLOW_").lower()
        if name in _PARSERS:
            values[name] = _parse(name, value, variable, _HERE)
        elif name in _MEANT or _close(name, cutoff=0.85):
            # Other tools may own variables with this prefix; a misspelt setting is no such thing,
            # and overlooking it could mean another store.
            raise _unknown(name, f"the environment ({variable})")
    values.update(configured)
    if "storage" not in values:
        values["storage"] = _parse("storage", "file:.pyworkflow", "the default", _HERE)
        values["storage_is_default"] = True
    _check_together(values)
    if "lease" in values and "renew_every" not in values:
        values["renew_every"] = cast("timedelta", values["lease"]) / 3
    if "concurrency" in values:
        values["threads"] = values["concurrency"]
    return Settings(**values)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType] - each value came from the parser of its field


def _project_table() -> tuple[Path | None, Mapping[str, object]]:
    """``[tool.pyworkflow]`` of the nearest ``pyproject.toml`` upwards, and that file."""
    try:
        here = Path.cwd()
    except OSError:
        return None, {}  # the current directory was removed: no project to look in
    for folder in (here, *here.parents):
        path = folder / "pyproject.toml"
        if not path.is_file():
            continue
        import tomllib

        try:
            document = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"the project file cannot be read: file={path}: {error}; repair it"
            ) from error
        tool = cast("Mapping[str, object]", document.get("tool", {}))
        table = tool.get("pyworkflow", {})
        if not isinstance(table, dict):
            raise ConfigurationError(f"[tool.pyworkflow] is not a table: file={path}; make it one")
        return path, cast("dict[str, object]", table)
    return None, {}


def _check_together(values: Mapping[str, object]) -> None:
    lease, renew = values.get("lease"), values.get("renew_every")
    if renew is None:
        return
    bound = lease if lease is not None else timedelta(seconds=60)
    if cast("timedelta", renew) >= cast("timedelta", bound):
        raise ConfigurationError(
            f"a lease ends before it is renewed: renew_every={renew} lease={bound}; "
            "set renew_every to a third of lease"
        )


# --- parsing ----------------------------------------------------------------------------------


def _parse(name: str, value: object, source: str, base: Path) -> object:
    if name not in _PARSERS:
        raise _unknown(name, "configure()")
    if isinstance(value, str) and not value.strip() and name not in _MAY_BE_EMPTY:
        raise ConfigurationError(
            f"a setting is empty: setting={name} source={source}; give a value or remove it"
        )
    return _PARSERS[name](name, value, source, base)


def _url(name: str, value: object, source: str, base: Path) -> object:
    if not isinstance(value, str):
        methods = {"storage": "commit", "executor": "notify"}
        if name in methods and callable(getattr(value, methods[name], None)):
            _check_contract(name, value)
            return value
        raise _bad(name, value, source, f"a URL, or an object that is a {name} backend")
    try:
        parse_url(value, "executor" if name == "executor" else "storage")
    except ConfigurationError as error:
        raise ConfigurationError(f"{error} (setting={name} source={source})") from error
    return resolve_url(value, base) if name == "storage" else value


def _check_contract(name: str, value: object) -> None:
    from pyworkflow.spi._contract import check_executor_contract, check_storage_contract

    if name == "storage":
        check_storage_contract(cast("StorageBackend", value))
    else:
        check_executor_contract(cast("Executor", value))


def _broker(name: str, value: object, source: str, _base: Path) -> object:
    if isinstance(value, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", value):
        if "#" not in value:
            return value
        raise _bad(name, value, source, "a URL with %23 in the place of #, which would end it")
    raise _bad(name, value, source, "a URL like redis://HOST:6379/0")


def _name(name: str, value: object, source: str, _base: Path) -> object:
    del name
    return check_namespace(value, source)


def _list(name: str, value: object, source: str, _base: Path) -> object:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    given = value  # the type checkers narrow `value` to lists of unknown things
    names = tuple(cast("Sequence[object]", value)) if isinstance(value, list | tuple) else (None,)
    if not all(isinstance(part, str) and part.strip() for part in names):
        raise _bad(name, given, source, "names, as a list or separated by commas")
    return names


def _codecs(name: str, value: object, source: str, base: Path) -> object:
    names = cast("tuple[str, ...]", _list(name, value, source, base))
    plain = [given.partition("?")[0] for given in names]
    if len(set(plain)) < len(plain):
        raise _bad(name, ",".join(plain), source, "names that differ")
    if "offload" in plain[:-1]:
        # What comes later would hide the reference from whoever looks for files to remove.
        raise _bad(name, ",".join(plain), source, "a list with offload as its last")
    return names


def _keys(name: str, value: object, source: str, _base: Path) -> object:
    if isinstance(value, CodecKeys):
        return value
    if not isinstance(value, str):
        raise _bad(name, value, source, "text like ID:BASE64,ID2:BASE64")
    return CodecKeys(parse_codec_keys(value, source))


def _path(name: str, value: object, source: str, base: Path) -> object:
    if not isinstance(value, str | Path) or "\0" in str(value):
        raise _bad(name, value, source, "a path")
    return (base / Path(value).expanduser()).absolute()


def _duration(name: str, value: object, source: str, _base: Path) -> object:
    from pyworkflow._duration import parse_duration

    form = "a duration like '60s', '1h30m', seconds, or a timedelta, above zero"
    if isinstance(value, bool) or not isinstance(value, str | int | float | timedelta):
        raise _bad(name, value, source, form)
    try:
        parsed = parse_duration(value)
    except (ValueError, OverflowError) as error:
        raise _bad(name, value, source, form) from error
    if parsed <= timedelta(0) and name != "key_retention":
        raise _bad(name, value, source, form)
    return parsed


def _count(name: str, value: object, source: str, _base: Path) -> object:
    if isinstance(value, str) and re.fullmatch(r"[0-9][0-9_]{0,17}", value.strip()):
        value = int(value.strip().replace("_", ""))
    least = 0 if name == "sessions" else 1
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise _bad(name, value, source, f"a whole number, at least {least}")
    return value


def _bytes(name: str, value: object, source: str, _base: Path) -> object:
    if isinstance(value, str):
        match = _SIZE.fullmatch(value.strip().replace("_", ""))
        if match is not None and len(match[1]) < 19:
            value = int(match[1]) * _UNITS[(match[2] or "").lower()]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _bad(name, value, source, "a number of bytes above zero, or text like '2 MiB'")
    return value


def _flag(name: str, value: object, source: str, _base: Path) -> object:
    if isinstance(value, str):
        value = _FLAGS.get(value.strip().lower(), value)
    if isinstance(value, bool):
        return value
    if isinstance(value, int) and value in (0, 1):
        return bool(value)
    raise _bad(name, value, source, "true or false (1 or 0)")


_FLAGS = {
    **dict.fromkeys(("1", "true", "yes", "on"), True),
    **dict.fromkeys(("0", "false", "no", "off"), False),
}
_PARSERS: Mapping[str, Callable[[str, object, str, Path], object]] = {
    "storage": _url,
    "executor": _url,
    "namespace": _name,
    "modules": _list,
    "portable_modules": _list,
    "disable_plugins": _list,
    "broker_url": _broker,
    "lease": _duration,
    "renew_every": _duration,
    "mute": _duration,
    "worker": _flag,
    "queues": _list,
    "stalled_after": _duration,
    "version_grace": _duration,
    "drain": _duration,
    "watchdog": _duration,
    "max_payload": _bytes,
    "max_history": _count,
    "concurrency": _count,
    "sessions": _count,
    "key_retention": _duration,
    "codecs": _codecs,
    "codec_keys": _keys,
    "codec_keys_file": _path,
    "codec_compress_threshold": _bytes,
    "codec_offload_dir": _path,
    "codec_offload_threshold": _bytes,
    "codec_max_size": _bytes,
}
_MAY_BE_EMPTY = frozenset({"modules", "portable_modules", "disable_plugins", "codecs", "queues"})
assert set(_PARSERS) | {"storage_is_default", "threads"} == {f.name for f in fields(Settings)}


def _shown(name: str, value: object) -> str:
    if name == "codec_keys":
        return repr(value) if isinstance(value, CodecKeys) else "(hidden)"
    if isinstance(value, str) and (name.endswith("_url") or name in {"storage", "executor"}):
        return repr(redact_url(value))
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _bad(name: str, value: object, source: str, form: str) -> ConfigurationError:
    return ConfigurationError(
        f"a setting has a wrong value: setting={name} value={_shown(name, value)} "
        f"source={source}; it must be {form}"
    )


#: What people write instead of a setting's name, where the letters alone do not tell.
_MEANT = {
    "backend": "storage",
    "broker": "broker_url",
    "database_url": "storage",
    "executor_url": "executor",
    "storage_url": "storage",
    "store": "storage",
    "store_url": "storage",
}


def _close(name: str, *, cutoff: float = 0.6) -> list[str]:
    import difflib

    if name in _MEANT:
        return [_MEANT[name]]
    return difflib.get_close_matches(name, _PARSERS, n=3, cutoff=cutoff)


def _unknown(name: str, where: str) -> ConfigurationError:
    close = _close(name)
    meant = f"did you mean {' or '.join(close)}? " if close else ""
    return ConfigurationError(
        f"there is no such setting: setting={name} in {where}; {meant}"
        f"there are {', '.join(_PARSERS)}"
    )
