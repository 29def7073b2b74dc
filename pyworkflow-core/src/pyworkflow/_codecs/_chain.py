"""The codecs of this process at work: wrapping by the settings, unwrapping by what is stored."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import parse_qsl

from pyworkflow._codecs._form import (
    CODEC_NAME,
    Applied,
    Wrapped,
    context,
    parse,
)
from pyworkflow._codecs._offload import ASIDE
from pyworkflow._config import Settings, settings
from pyworkflow._plugins import make_codec
from pyworkflow._serialization import (
    is_wrapped,
    payload_size,
    set_unwrapper,
    unwrapped,
    unwrapped_error,
)
from pyworkflow.errors import (
    ConfigurationError,
    PayloadTooLarge,
    PayloadUnreadable,
    SerializationError,
    StorageFull,
    StorageUnavailable,
    WorkflowError,
)
from pyworkflow.runs import ErrorInfo, Run

if TYPE_CHECKING:
    from pyworkflow.events import Event, Json
    from pyworkflow.spi import Codec
    from pyworkflow.spi.storage import Change

__all__ = [
    "Writer",
    "describe",
    "opened_events",
    "opened_run",
    "opened_text",
    "writer_for",
]

#: Fields of an event or of a work item's payload that are payload texts.
_TEXTS = ("args", "result", "salt")
#: Fields that hold such fields in turn: what a ``deliver`` item carries.
_INNER = ("data", "run", "started")
#: With nothing else to it, such an error is only the reason of a cancellation: kept readable.
_CANCELLED = "pyworkflow.errors:RunCancelled"
_HIDDEN = "(wrapped by a codec)"
#: Codecs whose only purpose is a shorter text.
_SHORTEN = frozenset({"zlib", "zstd"})
#: What is added to a text that gets no shorter: base64, and around it the names of the codecs.
_GROWTH, _FRAME = (4, 3), 1024
#: Of what a codec raises, what tells what to do; the rest it raises again for the same value.
_SPOKEN = (
    ConfigurationError,
    PayloadTooLarge,
    SerializationError,
    StorageFull,
    StorageUnavailable,
)

Wraps = Mapping[str, str]
"""Plain text to stored text."""


class Writer:
    """How new payloads are written; one for all threads of a process."""

    def __init__(self, config: Settings) -> None:
        self._codecs = [_made(spec, config) for spec in config.codecs]
        for _, codec in self._codecs:
            check: Any = getattr(codec, "check_writable", None)
            if check is not None:
                check()
        self.max_size = config.codec_max_size
        self.secret = any(getattr(codec, "secret", False) for _, codec in self._codecs)
        """Whether errors, too, are wrapped, and digests keyed."""
        self.offloads = any(name == "offload" for name, _ in self._codecs)
        """Whether the size of a value does not count for the store."""
        self._blocking = any(getattr(codec, "blocking", True) for _, codec in self._codecs)

    def wrap(self, text: str) -> str:
        """The text to store for a payload; a text that is wrapped stays as it is.

        Raises:
            PayloadTooLarge: It has more than ``codec_max_size`` bytes.
            SerializationError: A codec cannot do its work.
            StorageUnavailable, StorageFull: It cannot do it now.
        """
        if is_wrapped(text):
            return text
        data = text.encode()
        if len(data) > self.max_size:
            raise PayloadTooLarge(
                "a payload, before codecs (codec_max_size)", len(data), self.max_size
            )
        applied: list[Applied] = []
        for name, codec in self._codecs:
            try:
                made = codec.encode(data, context(applied))
            except _SPOKEN:
                raise
            except Exception as error:
                # Its message may repeat what it was given.
                raise SerializationError(
                    f"a codec failed: codec={name} error={type(error).__name__}; nothing was "
                    "written. Repair the codec or its settings"
                ) from error
            if made is not None:
                data, params = made
                applied.append((name, dict(params)))
        if not applied:
            return text
        stored = Wrapped(applied, data).text()
        if len(stored) >= payload_size(text) and _SHORTEN.issuperset(name for name, _ in applied):
            return text  # what was gained is less than base64 costs
        return stored

    def most_arguments(self, limit: int) -> int:
        """Bytes that arguments may have before codecs, to be at most ``limit`` as stored."""
        return max(limit * _GROWTH[1] // _GROWTH[0] - _FRAME, 1)

    async def wrap_text(self, text: str) -> str:
        """``wrap``, beside the event loop when it may take long."""
        if self._blocking or len(text) > ASIDE:
            return await asyncio.to_thread(self.wrap, text)
        return self.wrap(text)

    async def wrap_change(self, change: Change, limit: int) -> Change:
        """The change as it is stored. ``limit`` bounds each text in bytes.

        Arguments are as long as the workflow passed them: what fits before codecs fits behind.

        Raises:
            PayloadTooLarge: A stored text would be longer.
            SerializationError: A codec cannot do its work.
            StorageUnavailable, StorageFull: It cannot do it now.
        """
        texts, errors, arguments = _texts_of(change, self.secret)
        if not texts and not errors:
            return change
        found = dict.fromkeys([*texts, *errors])
        if self._blocking or sum(map(len, found)) > ASIDE:
            wraps = await asyncio.to_thread(self._wrap_all, found)
        else:
            wraps = self._wrap_all(found)
        for plain in texts:  # errors are bounded where they are made
            size = payload_size(wraps[plain])
            if size > limit and not (plain in arguments and payload_size(plain) <= limit):
                what = f"a payload of run {change.run_id!r} (bytes={payload_size(plain)} unwrapped)"
                raise PayloadTooLarge(what, size, limit)
        if all(map(str.__eq__, wraps.keys(), wraps.values())):
            return change  # all of it is too small for these codecs
        return _replaced(change, wraps)

    def _wrap_all(self, texts: Iterable[str]) -> dict[str, str]:
        return {text: self.wrap(text) for text in texts}


def writer_for(config: Settings) -> Writer | None:
    """How these settings write payloads; None when nothing is done to them.

    Raises:
        ConfigurationError: A codec, its library, a key or a directory is missing.
    """
    global _writer
    if not config.codecs:
        return None
    standing = _writer
    if standing is None or standing[0] is not config:
        standing = _writer = config, Writer(config)
    return standing[1]


_writer: tuple[Settings, Writer] | None = None


# --- what of a change is wrapped ----------------------------------------------------------------


def _texts_of(change: Change, secret: bool) -> tuple[list[str], list[str], set[str]]:
    """The plain payload texts, the JSON of errors when those are hidden, which are arguments."""
    texts: dict[str, list[str]] = {name: [] for name in _TEXTS}
    errors: list[str] = []
    for event in change.events:
        _gather(event.data, texts, errors)
    for put in change.put:
        _gather(put.payload, texts, errors)
    if change.settle is not None and change.settle.payload is not None:
        _gather(change.settle.payload, texts, errors)
    if change.create is not None:
        _gather({"args": change.create.args}, texts, errors)
    update = change.update
    if update is not None:
        _gather({"result": update.result}, texts, errors)
        if update.error is not None:
            _gather({"error": update.error.to_json()}, texts, errors)
    found = [text for of_name in texts.values() for text in of_name]
    return found, errors if secret else [], set(texts["args"])


def _gather(data: Mapping[str, Json], texts: Mapping[str, list[str]], errors: list[str]) -> None:
    for name in _TEXTS:
        value = data.get(name)
        if isinstance(value, str) and not is_wrapped(value):
            texts[name].append(value)
    error = data.get("error")
    if isinstance(error, dict) and _hides(error):
        errors.append(_error_text(error))
    for name in _INNER:
        inner = data.get(name)
        if isinstance(inner, dict):
            _gather(inner, texts, errors)


def _hides(error: Mapping[str, Json]) -> bool:
    details = error.get("details")
    if isinstance(details, dict) and "codec" in details:
        return False
    # One that code raised has a traceback and what it was made of, and may quote anything.
    return bool(error.get("type") != _CANCELLED or details or error.get("traceback"))


def _error_text(error: Mapping[str, Json]) -> str:
    return json.dumps(error, separators=(",", ":"))


def _replaced(change: Change, wraps: Wraps) -> Change:
    settle, create, update = change.settle, change.create, change.update
    if settle is not None and settle.payload is not None:
        settle = dataclasses.replace(settle, payload=_exchange(settle.payload, wraps))
    if create is not None:
        create = dataclasses.replace(create, args=wraps.get(create.args, create.args))
    if update is not None:
        fields: Mapping[str, Json] = {
            "result": update.result,
            "error": None if update.error is None else update.error.to_json(),
        }
        fields = _exchange(fields, wraps)
        error = fields["error"]
        update = dataclasses.replace(
            update,
            result=cast("str | None", fields["result"]),
            error=ErrorInfo.from_json(error) if isinstance(error, dict) else None,
        )
    return dataclasses.replace(
        change,
        events=[event._replace(data=_exchange(event.data, wraps)) for event in change.events],
        put=[dataclasses.replace(put, payload=_exchange(put.payload, wraps)) for put in change.put],
        settle=settle,
        create=create,
        update=update,
    )


def _exchange(data: Mapping[str, Json], wraps: Wraps) -> Mapping[str, Json]:
    """The object with its payload texts and its error exchanged; itself when it has none."""
    new: dict[str, Json] = {}
    for name in _TEXTS:
        value = data.get(name)
        if isinstance(value, str) and value in wraps:
            new[name] = wraps[value]
    error = data.get("error")
    if isinstance(error, dict) and _hides(error):
        text = wraps.get(_error_text(error))
        if text is not None and is_wrapped(text):
            new["error"] = {
                "type": error.get("type"),
                "message": _HIDDEN,
                "traceback": "",
                "portable": error.get("portable"),
                "details": {"codec": text},
            }
    for name in _INNER:
        inner = data.get(name)
        if isinstance(inner, dict):
            new[name] = cast("Json", _exchange(inner, wraps))
    return {**data, **new} if new else data


# --- reading --------------------------------------------------------------------------------------


def _unwrap(text: str) -> str:
    """The plain text, by what is stored. ``PayloadUnreadable``."""
    wrapped = parse(text)
    data, limit = wrapped.data, _reader.config().codec_max_size
    for at in range(len(wrapped.codecs) - 1, -1, -1):
        name, params = wrapped.codecs[at]
        codec = _reader.codec(name)
        try:
            data = codec.decode(data, context(wrapped.codecs[:at]), params)
        except PayloadUnreadable:
            raise
        except Exception as error:
            what = str(error) if isinstance(error, WorkflowError) else type(error).__name__
            raise PayloadUnreadable(
                name, f"the codec failed: {what}", "repair the codec or its settings"
            ) from error
        if len(data) > limit:
            raise PayloadUnreadable(
                name,
                f"it unwraps to more than codec_max_size={limit} bytes",
                "raise the setting codec_max_size if it is yours",
            )
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise PayloadUnreadable(
            wrapped.codecs[0][0], "it unwraps to no text", "repair the codec"
        ) from None


class _Reader:
    """The codecs that stored payloads name, made at first need from the process's settings."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._config: Settings | None = None
        self._codecs: dict[str, Codec] = {}

    def config(self) -> Settings:
        """The settings of this process."""
        try:
            return settings()
        except ConfigurationError as error:
            raise PayloadUnreadable("(settings)", str(error), "repair the setting") from error

    def codec(self, name: str) -> Codec:
        """The codec of this name. ``PayloadUnreadable``."""
        config = self.config()
        with self._lock:
            if self._config is not config:
                self._config, self._codecs = config, {}
            found = self._codecs.get(name)
            if found is None:
                spec = next((s for s in config.codecs if s.partition("?")[0] == name), name)
                try:
                    _, found = _made(spec, config)
                except ConfigurationError as error:
                    what, _, remedy = str(error).partition("; ")
                    raise PayloadUnreadable(name, what, remedy or "install it") from error
                self._codecs[name] = found
            return found


_reader = _Reader()
set_unwrapper(_unwrap)


def _reset_for_tests() -> None:  # pyright: ignore[reportUnusedFunction] - by tests
    global _reader, _writer
    _reader, _writer = _Reader(), None


def _made(spec: str, config: Settings) -> tuple[str, Codec]:
    name, _, query = spec.partition("?")
    if not CODEC_NAME.fullmatch(name):
        raise ConfigurationError(
            f"a codec has no proper name: codec={name:.40}; write small letters, digits, '_', '-'"
        )
    given = dict(parse_qsl(query, keep_blank_values=True))
    unknown = sorted(given.keys() - _OPTIONS[name]) if name in _OPTIONS else []
    if unknown:
        raise ConfigurationError(
            f"the codec has no such options: codec={name} options={','.join(unknown):.80}; there "
            f"are {', '.join(sorted(_OPTIONS[name])) or 'none: its settings have a name each'}"
        )
    options = {
        "max_size": str(config.codec_max_size),
        "compress_threshold": str(config.codec_compress_threshold),
        "offload_dir": str(config.codec_offload_dir or ""),
        "offload_threshold": str(config.codec_offload_threshold),
        **given,
    }
    if name == "aesgcm":
        options["keys"] = config.codec_keys.text()
        options["keys_file"] = str(config.codec_keys_file or "")
    return name, make_codec(name, options)


#: What may be said in ``codecs`` for one of the core's; keys are settings, which are not shown.
_OPTIONS = {
    "zlib": {"compress_threshold", "max_size"},
    "zstd": {"compress_threshold", "max_size"},
    "aesgcm": set[str](),
    "offload": {"offload_dir", "offload_threshold", "max_size"},
}
_NAMES = re.compile(r'\["([a-z][a-z0-9_-]*)",\{')
#: Events that are looked through beside the event loop.
_MANY = 200
_QUICK = frozenset({"aesgcm", "zlib", "zstd"})


def _takes_long(text: str) -> bool:
    return len(text) > ASIDE or not _QUICK.issuperset(_NAMES.findall(text, 0, 1024))


async def opened_text(text: str) -> str:
    """``unwrapped(text)``, beside the event loop when it may take long. ``PayloadUnreadable``."""
    if not is_wrapped(text):
        return text
    if _takes_long(text):
        return await asyncio.to_thread(unwrapped, text)
    return unwrapped(text)


async def opened_events(events: Sequence[Event], *, every: bool = False) -> list[Event]:
    """The events with plain texts where unwrapping may take long (or ``every`` one of them).

    What cannot be unwrapped stays as it is stored: who reads it is told why.
    """
    if every and len(events) > _MANY:
        return await asyncio.to_thread(_opened_events, events, every)
    if not any(_wrapped_in(event.data, every) for event in events):
        return list(events)
    return await asyncio.to_thread(_opened_events, events, every)


def _opened_events(events: Sequence[Event], every: bool) -> list[Event]:
    return [
        _opened_event(event, names) if (names := _wrapped_in(event.data, every)) else event
        for event in events
    ]


def _wrapped_in(data: Mapping[str, Json], every: bool) -> list[str]:
    names = [
        name
        for name in _TEXTS
        if isinstance(text := data.get(name), str)
        and is_wrapped(text)
        and (every or _takes_long(text))
    ]
    error = data.get("error")
    if isinstance(error, dict) and isinstance(details := error.get("details"), dict):
        text = details.get("codec")
        if isinstance(text, str) and (every or _takes_long(text)):
            names.append("error")
    return names


def _opened_event(event: Event, names: list[str]) -> Event:
    new: dict[str, Json] = {}
    for name in names:
        value = event.data[name]
        try:
            if isinstance(value, dict):
                new[name] = dict(unwrapped_error(value))
            else:
                new[name] = unwrapped(str(value))
        except SerializationError:
            continue
    return event._replace(data={**event.data, **new}) if new else event


async def opened_run(run: Run) -> Run:
    """The run with plain texts; what cannot be unwrapped here stays as it is stored."""
    new: dict[str, Any] = {}
    for name in ("args_text", "result_text"):
        value: str | None = getattr(run, name)
        if value is not None and is_wrapped(value):
            try:
                new[name] = await opened_text(value)
            except SerializationError:
                continue
    if run.error is not None and "codec" in run.error.details:
        try:
            opened = await asyncio.to_thread(unwrapped_error, run.error.to_json())
            new["error"] = ErrorInfo.from_json(opened)
        except SerializationError:
            pass
    return dataclasses.replace(run, **new) if new else run


def describe(text: str) -> str:
    """A wrapped text in a few words, for people."""
    try:
        found = parse(text)
    except PayloadUnreadable as error:
        return f"({error.why})"
    names = ", ".join(
        f"{name} key_id={params['k']}" if "k" in params else name for name, params in found.codecs
    )
    return f"(wrapped by {names}: {len(text)} characters)"
