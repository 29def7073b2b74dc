"""Exceptions as stored data, and back.

Whether a type comes back as itself (*portable*) is decided once, where it was raised, and recorded.
Where a recorded type is not imported, the run stalls; otherwise workflow code would get another
exception on another worker.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypedDict, cast

from pyworkflow._least_size import SCALARS
from pyworkflow._portable import is_defining, is_portable, portable_name, resolve_type
from pyworkflow._restore import from_text, restore
from pyworkflow._tagged import MARKED, storable, text_of, walk
from pyworkflow.errors import SerializationError, StepError

__all__ = ["EncodedError", "decode_error", "encode_error", "part_of"]

TRACEBACK = 16_384
"""Characters of a stored traceback."""
MESSAGE = 8_192
"""Characters of a stored message."""
DETAILS = 65_536
"""Characters of stored arguments, or of stored attributes; beyond it they are cut or left out."""
WHOLE = 524_288
"""Characters of an error with its members and causes; what does not fit is named in a note."""
_LEVELS = 20
"""Levels of groups and causes; deeper ones come back as a ``StepError``."""
_OWN = frozenset({"builtins", "pyworkflow"})


class EncodedError(TypedDict):
    """An exception as a JSON object; the shape of ``runs.ErrorInfo.to_json()``."""

    type: str
    message: str
    traceback: str
    portable: bool
    details: dict[str, Any]
    """``args``, ``init``, ``attrs`` (JSON text each), ``texts`` (places of arguments that are stored
    as their text), ``lost`` (names of attributes that cannot be stored), ``notes``, ``cause`` or
    ``context``, ``exceptions``."""


def encode_error(exc: BaseException) -> EncodedError:
    """The exception as a JSON object. Never raises: what cannot be stored is kept as its repr."""
    return _Encoder().encode(exc, 0)


def decode_error(info: Mapping[str, Any], *, exact: bool = True) -> BaseException:
    """The exception to raise in the workflow: the portable type itself, or a ``StepError``.

    With ``exact`` off, a type that cannot be found or made here is a ``StepError``, too.

    Raises:
        SerializationError: the portable type cannot be found here; this stalls the run.
    """
    details = cast("Mapping[str, Any]", info.get("details") or {})
    try:
        made = _made(info, details, exact) if info.get("portable") else None
    except SerializationError:
        if exact:
            raise
        made = None
    if made is None:
        made = StepError(info["type"], info["message"], info.get("traceback", ""))
    notes: list[str] = [*details.get("notes", ())]
    if info.get("portable") and (changed := _changes(made, info, details)) and changed not in notes:
        notes.append(changed)
    try:
        for note in notes:
            made.add_note(note)
    except Exception:  # noqa: BLE001 # code of the user's
        pass  # the rest of the exception speaks for itself
    if cause := details.get("cause"):
        _set(made, "__cause__", decode_error(cause, exact=exact))
    elif context := details.get("context"):
        _set(made, "__context__", decode_error(context, exact=exact))
    return made


def part_of(exc: BaseException, name: str) -> Any:
    """``args``, ``__cause__``, ``__notes__`` … of any exception; what cannot be read is None.

    A class may have a property there, or a ``__getattr__`` that raises. What each exception keeps
    is read in spite of that.
    """
    try:
        return getattr(exc, name, None)
    except Exception:  # noqa: BLE001 # code of the user's
        kept = vars(BaseException).get(name)
        return None if kept is None else kept.__get__(exc)


def _made(info: Mapping[str, Any], details: Mapping[str, Any], exact: bool) -> BaseException:
    kind = resolve_type(info["type"])
    if not issubclass(kind, BaseException) or not _may_be_raised(kind):
        raise SerializationError(
            f"the history names a type that no step's error has: type={info['type']!r}; it was "
            "not written by a worker, restore the store"
        )
    try:
        made = _rebuild(cast("type[Exception]", kind), details, exact)
        if not _has_notes(made):
            # Recorded by 0.1.0, which did not look: whoever handles the exception reads its notes.
            _set(made, "__notes__", [])
            getattr(made, "__notes__", None)
        return made
    except SerializationError:
        raise
    except Exception as failed:
        raise SerializationError(
            f"a stored exception cannot be made again: type={info['type']!r}: "
            f"{type(failed).__name__}: {failed}; its class must take what it took before"
        ) from failed


def _changes(made: BaseException, info: Mapping[str, Any], details: Mapping[str, Any]) -> str:
    """A note on what is not as it was raised; stored with the exception when it is raised again."""
    parts: list[str] = []
    if texts := details.get("texts"):
        parts.append(f"stored as text: {', '.join(f'args[{place}]' for place in texts)}")
    if lost := details.get("lost"):
        parts.append(f"not stored: {', '.join(lost)}")
    text = str(info.get("message", ""))
    if parts and text != _clean(_safe(str, made), MESSAGE):
        parts.append(f"its message when it was raised: {_clean(text, MESSAGE // 8)}")
    return "; ".join(parts)


class _Encoder:
    """One error with its members and causes: what was seen, and how much room is left."""

    def __init__(self) -> None:
        self.room = WHOLE
        self.seen: set[int] = set()

    def encode(self, exc: BaseException, level: int) -> EncodedError:
        try:
            return self._encode(exc, level)
        except BaseException as failed:  # noqa: BLE001 # properties and __getattr__ are any code
            _pass_ctrl_c(failed)
            return {
                "type": _clean(_name(type(exc)), MESSAGE),
                "message": _clean(_safe(str, exc), MESSAGE),
                "traceback": _traceback(exc) if not level else "",
                "portable": False,
                "details": {},
            }

    def _encode(self, exc: BaseException, level: int) -> EncodedError:
        self.seen.add(id(exc))
        kind = type(exc)
        details: dict[str, Any] = {}
        portable = _comes_back(kind) and level < _LEVELS
        is_group = isinstance(exc, BaseExceptionGroup)
        left_out = 0
        if portable:
            if is_group:
                details["message"] = _clean(cast("Any", exc).message, MESSAGE)
            else:
                args = _args(exc)
                details["args"], texts = _texts(args)
                init = _reduced(exc, args)[0]
                if init is not args:
                    details["init"], _ = _texts(init)
                if texts:
                    details["texts"] = texts
            self._attributes(exc, details)
        encoded: EncodedError = {
            "type": _clean(_name(kind), MESSAGE),
            "message": _clean(_safe(str, exc), MESSAGE),
            "traceback": _traceback(exc) if not level else "",
            "portable": portable,
            "details": details,
        }
        notes = list(_notes(exc))
        self.room -= sum(map(len, notes)) + _size(encoded)
        if portable and is_group:
            members = cast("tuple[BaseException, ...]", cast("Any", exc).exceptions)
            details["exceptions"], left_out = self._members(members, level)
        if left_out:
            notes.append(f"{left_out} more exceptions of this group did not fit into the history")
        self._cause(exc, details, level)
        if notes:
            details["notes"] = notes
        if portable and not _makes(exc, encoded):
            encoded["portable"] = False
        return encoded

    def _members(
        self, members: tuple[BaseException, ...], level: int
    ) -> tuple[list[EncodedError], int]:
        """The members that fit, at least one, and the number of the others."""
        done: list[EncodedError] = []
        for member in members:
            if done and self.room <= 0:
                break
            before, room = set(self.seen), self.room
            encoded = self.encode(member, level + 1)
            if done and self.room < 0:
                self.seen, self.room = before, room
                break
            done.append(encoded)
        return done, len(members) - len(done)

    def _cause(self, exc: BaseException, details: dict[str, Any], level: int) -> None:
        cause, name = part_of(exc, "__cause__"), "cause"
        if cause is None and not part_of(exc, "__suppress_context__"):
            cause, name = part_of(exc, "__context__"), "context"
        if not isinstance(cause, BaseException) or id(cause) in self.seen:  # a loop of causes
            return
        if self.room <= 0 or level >= _LEVELS:
            message = _clean(_safe(str, cause), MESSAGE // 8)
            details[name] = {
                "type": _name(type(cause)),
                "message": message,
                "portable": False,
            }
            return
        details[name] = self.encode(cause, level + 1)

    def _attributes(self, exc: BaseException, details: dict[str, Any]) -> None:
        found = cast(
            "dict[object, object]", {**_slots(exc), **_reduced(exc, ())[1], **_looked_up(exc)}
        )
        given = {
            name: value
            for name, value in found.items()
            if isinstance(name, str) and name != "__notes__"
        }
        kept: dict[str, Any] = {}
        size = 0
        for name, tree in storable(given, 2).items():
            size += len(name) + len(text_of(tree)) + 4
            if size > DETAILS:
                break
            kept[name] = tree
        if kept:
            details["attrs"] = text_of(kept)
        if lost := [_clean(name, 200) for name in given if name not in kept][:100]:
            details["lost"] = lost


def _size(encoded: EncodedError) -> int:
    return 100 + len(encoded["message"]) + sum(len(str(v)) for v in encoded["details"].values())


def _notes(exc: BaseException) -> Iterator[str]:
    notes = part_of(exc, "__notes__")
    if not isinstance(notes, list):
        return
    given = cast("list[object]", notes)
    for note in given[:20]:
        yield _clean(_safe(str, note), MESSAGE)
    if len(given) > 20:
        yield f"{len(given) - 20} more notes did not fit into the history"


def _slots(exc: BaseException) -> dict[str, object]:
    """The attributes that classes keep in slots: no ``__dict__`` has them."""
    found: dict[str, object] = {}
    for kind in type(exc).__mro__:
        slots: Any = vars(kind).get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else tuple(slots):
            name = str(slot)
            if name.startswith("__") and not name.endswith("__"):
                name = f"_{kind.__name__.lstrip('_')}{name}"
            try:
                found.setdefault(name, getattr(exc, name))
            except Exception:  # noqa: BLE001 # not set, or code of the user's
                continue
    return found


def _looked_up(exc: BaseException) -> dict[str, object]:
    """What was looked up in vain, which ``__reduce__`` leaves out on some versions of Python.

    Of the object only a scalar: another may hold secrets that no argument or result has.
    """
    names: tuple[str, ...] = ("name",) if isinstance(exc, NameError) else ()
    if isinstance(exc, AttributeError):
        names = ("name", "obj")
    found = {name: part_of(exc, name) for name in names}
    if (obj := found.get("obj")) is not None and type(obj) not in (*SCALARS, str):
        found["obj"] = object()
    return {name: value for name, value in found.items() if value is not None}


def _may_be_raised(kind: type[BaseException]) -> bool:
    # Only Exceptions: a SystemExit or CancelledError of a step must not end or cancel the run, and
    # coroutines and generators take StopIteration for their own.
    return issubclass(kind, Exception) and not issubclass(kind, (StopIteration, StopAsyncIteration))


def _comes_back(kind: type[BaseException]) -> bool:
    if not _may_be_raised(kind):
        return False
    try:
        return is_portable(kind.__module__) and resolve_type(portable_name(kind)) is kind
    except Exception:  # noqa: BLE001 # a class of a function's body, or one without a module
        return False


def _makes(exc: BaseException, encoded: EncodedError) -> bool:
    """Whether the exception that is made from what is stored is of use: not every type's is.

    A class of the user's whose constructor refuses stalls the run, and can be corrected.
    """
    kind = type(exc)
    if kind.__module__.partition(".")[0] in _OWN:
        return True
    is_users = is_defining(kind.__module__)
    try:
        made = _rebuild(cast("type[Exception]", kind), encoded["details"], exact=False)
    except Exception:  # noqa: BLE001 # constructors are any code
        return is_users
    # Of a class of the user's, the type says more than a text that cannot be shown.
    return _has_notes(made) and (is_users or _shows(made) or not _shows(exc))


def _has_notes(exc: BaseException) -> bool:
    """Whether whoever handles the exception may look for notes, as ``traceback`` does."""
    try:
        getattr(exc, "__notes__", None)
    except Exception:  # noqa: BLE001 # a ``__getattr__`` of the user's
        return False
    return True


def _shows(exc: BaseException) -> bool:
    try:
        return bool((str(exc), repr(exc)))
    except Exception:  # noqa: BLE001 # a __str__ or __repr__ of the user's
        return False


def _name(kind: type[BaseException]) -> str:
    try:
        return portable_name(kind)
    except Exception:  # noqa: BLE001 # a metaclass of the user's
        return f"?:{type.__repr__(kind)}"


def _args(exc: BaseException) -> tuple[object, ...]:
    args = part_of(exc, "args")
    return cast("tuple[object, ...]", args) if isinstance(args, tuple) else ()


def _reduced(
    exc: BaseException, args: tuple[object, ...]
) -> tuple[tuple[object, ...], Mapping[str, object]]:
    """What the constructor wants and the attributes, as the type itself says (OSError: filename)."""
    found = part_of(exc, "__dict__")
    attributes = cast("Mapping[str, object]", found if isinstance(found, dict) else {})
    try:
        reduced: Any = exc.__reduce__()
        if reduced[0] is type(exc) and isinstance(reduced[1], tuple):
            state = reduced[2] if len(reduced) > 2 else None
            if isinstance(state, dict):
                attributes = cast("dict[str, object]", state)
            return cast("tuple[object, ...]", reduced[1]), attributes
    except Exception:  # noqa: BLE001 # user code; args and __dict__ remain
        return args, attributes
    return args, attributes


def _texts(values: tuple[object, ...]) -> tuple[str, list[int]]:
    """The arguments as JSON text, and the places of those that are not whole."""
    trees: list[Any] = []
    texts: list[int] = []
    for place, value in enumerate(values):
        try:
            trees.append(walk(value, 2))
        except Exception:  # noqa: BLE001 # refused, or code of the user's
            trees.append(_as_text(value))
            texts.append(place)
    text = text_of(trees)
    if len(text) > DETAILS:
        cut = [_as_text(value) for value in values[:20]]
        return text_of(cut), [
            place for place, value in enumerate(values) if place >= 20 or cut[place] != value
        ][:20]
    return text, texts[:20]


def _as_text(value: object) -> str:
    return _clean(value if isinstance(value, str) else _safe(repr, value), MESSAGE)


def _traceback(exc: BaseException) -> str:
    import traceback

    try:
        text = "".join(traceback.format_exception(exc))
    except BaseException as failed:  # noqa: BLE001 # a __str__ or __repr__ of the user's
        _pass_ctrl_c(failed)
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
    except BaseException as failed:  # noqa: BLE001 # a __str__ or __repr__ of the user's
        _pass_ctrl_c(failed)
        return f"<{type(value).__name__}: {type(failed).__name__} when shown>"


def _pass_ctrl_c(failed: BaseException) -> None:
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and isinstance(failed, KeyboardInterrupt):
        raise failed


def _rebuild(kind: type[Exception], details: Mapping[str, Any], exact: bool) -> BaseException:
    made: BaseException | None
    if "exceptions" in details:
        made = _rebuild_group(kind, details, exact)
    else:
        args = _values(details.get("args"))
        made = _construct(kind, _values(details["init"]) if "init" in details else args)
        if made is None:
            made = kind.__new__(kind, *args)
        if _args(made) != args:
            # A constructor that makes its own message from what it gets.
            made.args = args
    lost: Sequence[str] = details.get("lost", ())
    for name in lost:
        _unset(made, name)
    for name, value in _attributes(details.get("attrs")).items():
        _set(made, name, value)
    if lost and not _has_notes(made):
        # A ``__getattr__`` that asks what is lost: of None, it gets an AttributeError.
        for name in lost:
            _set(made, name, None)
    return made


def _rebuild_group(kind: Any, details: Mapping[str, Any], exact: bool) -> BaseException:
    members = [decode_error(member, exact=exact) for member in details["exceptions"]]
    made = _construct(kind, (details["message"], members))
    if made is None:
        base: Any = ExceptionGroup
        made = cast("Exception", base.__new__(kind, details["message"], members))
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


def _unset(made: BaseException, name: str) -> None:
    """Remove what the constructor made of other arguments: no value is better than a wrong one."""
    try:
        if getattr(made, name, None) is not None:
            delattr(made, name)
    except Exception:  # noqa: BLE001 # a property without deleter
        return
