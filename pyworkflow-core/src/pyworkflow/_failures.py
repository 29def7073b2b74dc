"""Exceptions as stored data, and back.

Whether a type comes back as itself (*portable*) is decided once, where it was raised, by what is
equal on all workers; otherwise it is a ``StepError`` from the first execution on. What happens to
be imported decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict, cast

from pyworkflow._portable import is_portable, portable_name, resolve_type
from pyworkflow._restore import from_text, restore
from pyworkflow._tagged import MARKED, Refused, storable, text_of, walk
from pyworkflow.errors import SerializationError, StepError

__all__ = ["EncodedError", "decode_error", "encode_error"]

TRACEBACK = 16_384
"""Characters of a stored traceback."""
MESSAGE = 8_192
"""Characters of a stored message."""
DETAILS = 65_536
"""Characters of stored arguments, or of stored attributes; beyond it they are cut or left out."""
_GROUPS = 20
"""Levels of exception groups; deeper ones come back as a ``StepError``."""


class EncodedError(TypedDict):
    """An exception as a JSON object; the shape of ``runs.ErrorInfo.to_json()``."""

    type: str
    message: str
    traceback: str
    portable: bool
    details: dict[str, Any]
    """``args``, ``init``, ``attrs`` (JSON text each), ``notes``, ``cause``, ``exceptions``."""


def encode_error(exc: BaseException) -> EncodedError:
    """The exception as a JSON object. Never raises: what cannot be stored is kept as its repr."""
    return _encode(exc, 0)


def decode_error(info: Mapping[str, Any]) -> BaseException:
    """The exception to raise in the workflow: the portable type itself, or a ``StepError``.

    Raises:
        SerializationError: the portable type cannot be found here; this stalls the run.
    """
    details = cast("Mapping[str, Any]", info.get("details") or {})
    if not info["portable"]:
        made: BaseException = StepError(info["type"], info["message"], info["traceback"])
    else:
        kind = resolve_type(info["type"])
        if not issubclass(kind, Exception):
            raise SerializationError(f"not an exception: type={info['type']!r}")
        try:
            made = _rebuild(kind, details)
        except SerializationError:
            raise
        except Exception as failed:
            raise SerializationError(
                f"a stored exception cannot be made again: type={info['type']!r}: "
                f"{type(failed).__name__}: {failed}; its class must take what it took before"
            ) from failed
    for note in details.get("notes", ()):
        made.add_note(note)
    cause = details.get("cause")
    if cause:
        made.__cause__ = StepError(cause["type"], cause["message"])
    return made


def _encode(exc: BaseException, level: int) -> EncodedError:
    kind, name = type(exc), portable_name(type(exc))
    details: dict[str, Any] = {}
    portable = _comes_back(kind)
    if portable and issubclass(kind, BaseExceptionGroup):
        group: Any = exc
        portable = level < _GROUPS
        if portable:
            details["message"] = _clean(group.message, MESSAGE)
            details["exceptions"] = [
                _encode(member, level + 1) for member in group.exceptions[:100]
            ]
    elif portable:
        details["args"] = _texts(exc.args)
        init = _reduced(exc)[0]
        if init is not exc.args:
            details["init"] = _texts(init)
    if portable:
        kept = storable(_reduced(exc)[1], 2)
        attributes = text_of(kept) if kept else ""
        if 0 < len(attributes) <= DETAILS:
            details["attrs"] = attributes
    notes = getattr(exc, "__notes__", None)
    if isinstance(notes, list) and notes:
        details["notes"] = [
            _clean(_safe(str, note), MESSAGE) for note in cast("list[object]", notes)[:20]
        ]
    cause = exc.__cause__ or (None if exc.__suppress_context__ else exc.__context__)
    if cause is not None:
        message = _clean(_safe(str, cause), MESSAGE)
        details["cause"] = {"type": portable_name(type(cause)), "message": message}
    return {
        "type": _clean(name, MESSAGE),
        "message": _clean(_safe(str, exc), MESSAGE),
        "traceback": _traceback(exc) if not level else "",
        "portable": portable,
        "details": details,
    }


def _comes_back(kind: type[BaseException]) -> bool:
    # Only Exceptions: a SystemExit or CancelledError of a step must not end or cancel the run, and
    # coroutines and generators take StopIteration for their own.
    if not issubclass(kind, Exception) or issubclass(kind, (StopIteration, StopAsyncIteration)):
        return False
    if not is_portable(kind.__module__):
        return False
    try:
        return resolve_type(portable_name(kind)) is kind
    except SerializationError:
        return False  # a class of a function's body


def _reduced(exc: BaseException) -> tuple[tuple[object, ...], Mapping[str, object]]:
    """What the constructor wants and the attributes, as the type itself says (OSError: filename)."""
    attributes: Mapping[str, object] = getattr(exc, "__dict__", {})
    try:
        reduced: Any = exc.__reduce__()
        if reduced[0] is type(exc) and isinstance(reduced[1], tuple):
            state = reduced[2] if len(reduced) > 2 else None
            if isinstance(state, dict):
                attributes = cast("dict[str, object]", state)
            return cast("tuple[object, ...]", reduced[1]), attributes
    except Exception:  # noqa: BLE001 # user code; args and __dict__ remain
        return exc.args, attributes
    return exc.args, attributes


def _texts(values: tuple[object, ...]) -> str:
    trees: list[Any] = []
    for value in values:
        try:
            trees.append(walk(value, 2))
        except Refused:
            trees.append(_clean(_safe(repr, value), MESSAGE))
    text = text_of(trees)
    if len(text) > DETAILS:
        return text_of(
            [_clean(v if isinstance(v, str) else _safe(repr, v), MESSAGE) for v in values[:20]]
        )
    return text


def _traceback(exc: BaseException) -> str:
    import traceback

    try:
        text = "".join(traceback.format_exception(exc))
    except Exception as failed:  # noqa: BLE001 # a __str__ or __repr__ of the user's
        text = f"(no traceback: {type(failed).__name__})"
    return _clean(text, TRACEBACK)


def _clean(text: str, limit: int) -> str:
    if not text.isascii():
        text = text.encode("utf-8", "backslashreplace").decode()
    if len(text) <= limit:
        return text
    half = limit // 2 - 20
    return f"{text[:half]}\n… (cut) …\n{text[-half:]}"


def _safe(show: type[str] | Any, value: object) -> str:
    try:
        return str(show(value))
    except Exception as failed:  # noqa: BLE001 # a __str__ or __repr__ of the user's
        return f"<{type(value).__name__}: {type(failed).__name__} when shown>"


def _rebuild(kind: type[Exception], details: Mapping[str, Any]) -> BaseException:
    if "exceptions" in details:
        return _rebuild_group(kind, details)
    args = _values(details.get("args"))
    made = _construct(kind, _values(details["init"]) if "init" in details else args)
    if made is None:
        made = kind.__new__(kind, *args)
    if made.args != args:
        # A constructor that makes its own message from what it gets.
        made.args = args
    for name, value in _attributes(details.get("attrs")).items():
        _set(made, name, value)
    return made


def _rebuild_group(kind: Any, details: Mapping[str, Any]) -> BaseException:
    members = [decode_error(member) for member in details["exceptions"]]
    made = _construct(kind, (details["message"], members))
    if made is None:
        base: Any = ExceptionGroup
        made = cast("Exception", base.__new__(kind, details["message"], members))
    for name, value in _attributes(details.get("attrs")).items():
        _set(made, name, value)
    return made


def _construct(kind: type[Exception], args: tuple[Any, ...]) -> Exception | None:
    try:
        made = kind(*args)
    except Exception:  # noqa: BLE001 # the constructor wants other arguments
        return None
    return made if type(made) is kind else None


def _values(text: str | None) -> tuple[Any, ...]:
    return tuple(cast("list[Any]", _decoded(text))) if text else ()


def _attributes(text: str | None) -> dict[str, Any]:
    return cast("dict[str, Any]", _decoded(text)) if text else {}


def _decoded(text: str) -> object:
    tree = from_text(text)
    return restore(tree) if MARKED in text else tree


def _set(made: BaseException, name: str, value: object) -> None:
    try:
        setattr(made, name, value)
    except Exception:  # noqa: BLE001 # a property without setter: its args speak for it
        return
