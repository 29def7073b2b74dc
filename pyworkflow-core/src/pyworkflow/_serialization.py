"""Payloads: arguments, results and errors as JSON text, and back with equal value and type.

The text is opaque to everything else. What the tags mean is in ``_tagged.py`` and ``_restore.py``, which types a
history may name in ``_portable.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, cast

from pydantic_core import from_json, to_json

from pyworkflow import _failures
from pyworkflow._failures import encode_error
from pyworkflow._least_size import SCALARS, least_size
from pyworkflow._portable import is_portable, portable_name, register_portable, resolve_type
from pyworkflow._restore import StoredArgumentInvalid, StoredValueInvalid, from_text, restore
from pyworkflow._shapes import STATE
from pyworkflow._tagged import FLAT, MARK, MARKED, NotSerializable, Refused, text_of, walk
from pyworkflow.errors import PayloadTooLarge, SerializationError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

__all__ = [
    "WRAPPED",
    "NotSerializable",
    "StoredArgumentInvalid",
    "StoredValueInvalid",
    "adapter_for",
    "canonical",
    "decode",
    "decode_arguments",
    "decode_error",
    "digest",
    "digest_arguments",
    "digest_tree",
    "encode",
    "encode_arguments",
    "encode_error",
    "is_portable",
    "is_wrapped",
    "payload_size",
    "portable_name",
    "register_portable",
    "resolve_type",
    "set_unwrapper",
    "unwrapped",
    "unwrapped_error",
]

#: Adapters of a call's arguments, by position or by name.
Adapters = Mapping[int | str, "TypeAdapter[Any]"]

_Get = Callable[[int | str], "TypeAdapter[Any] | None"]

WRAPPED = f'{{"{MARK}":"codec"'
"""How a payload begins that codecs wrapped; the text of a user value never does."""

_STATEFUL = f'{STATE}","'
"""What the text of a value with a tag of that kind contains."""
_SMALL = 1 << 63
_NO_ARGUMENTS = '{"args":[]}'


def encode(
    value: object, adapter: TypeAdapter[Any] | None = None, *, root: str = "result", limit: int = 0
) -> str:
    """The value as compact JSON text. ``root`` is what an error calls the value.

    With a ``limit`` in bytes, what is sure to be larger is refused before its text is made.

    With ``adapter`` (see ``adapter_for``), a value that holds types without an exact form of their
    own is written as pydantic dumps it, if it comes back equal; ``decode`` then needs an adapter.

    Raises:
        SerializationError: something in it cannot be stored; the message leads to it.
        PayloadTooLarge: it is larger than ``limit``; the size is the least that it can have.
    """
    whole = not limit or type(value) in SCALARS or _fits(value, root, limit)
    plain = _plain(value)
    if plain is not None:
        return plain
    try:
        tree = walk(value)
        if not whole:
            _fits(tree, root, limit)
        text = text_of(tree)
        if '"$py":"model' in text or '"$py":"pydantic_dataclass' in text or _STATEFUL in text:
            _check_validation(value, text)
    except Refused as refused:
        if adapter is None or not refused.by_type:
            raise refused.error(root) from refused.__cause__
        return _encode_typed(value, adapter, root, refused)
    except RecursionError:
        raise Refused(value, "it is nested too deeply for this stack", FLAT).error(root) from None
    return text


def decode(text: str, adapter: TypeAdapter[Any] | None = None) -> Any:
    """The value of a text that ``encode`` made: equal, and of equal type.

    Raises:
        SerializationError: the text, or a type that it names, cannot be read here;
            ``StoredValueInvalid`` when the type has changed. Either stalls the run.
    """
    if text.startswith(WRAPPED):
        text = unwrapped(text)
    tree = from_text(text)
    if MARKED not in text:
        return tree
    return _decode_tree(tree, adapter)


def adapter_for(annotation: object) -> TypeAdapter[Any] | None:
    """The pydantic adapter of an annotation, built once; None when the annotation says nothing.

    Building takes from 6 µs to milliseconds and loads pydantic: call it at first use, not when
    something is defined.
    """
    try:
        return _adapters[annotation]
    except KeyError:
        adapter = _adapters[annotation] = _build(annotation)
        return adapter
    except TypeError:  # Annotated[...] with unhashable metadata
        return _build(annotation)


def canonical(value: object, *, root: str = "value") -> str:
    """The text on which digests rest: equal values give equal text, in whatever order they are.

    Raises:
        SerializationError: as ``encode``.
    """
    return _canonical(encode(value, root=root))


def payload_size(text: str) -> int:
    """Bytes of a payload in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def is_wrapped(text: str) -> bool:
    """Whether codecs wrapped this payload."""
    return text.startswith(WRAPPED)


def set_unwrapper(unwrap: Callable[[str], str]) -> None:
    """Say how wrapped payloads are read; called by the package that does."""
    global _unwrap
    _unwrap = unwrap


def unwrapped(text: str) -> str:
    """The text that the serializer made, whatever codecs did to it.

    Raises:
        SerializationError: A key, a file or a library is missing here, or the text is damaged.
    """
    if not text.startswith(WRAPPED):
        return text
    if _unwrap is None:
        raise SerializationError(
            "a stored payload is wrapped; import pyworkflow._codecs to read it"
        )
    return _unwrap(text)


def unwrapped_error(info: Mapping[str, Any]) -> Mapping[str, Any]:
    """The error that ``encode_error`` made, whatever codecs did to it. Raises as ``unwrapped``."""
    text = cast("Mapping[str, Any]", info.get("details") or {}).get("codec")
    return info if text is None else cast("dict[str, Any]", from_text(unwrapped(text)))


def decode_error(info: Mapping[str, Any], *, exact: bool = True) -> BaseException:
    """The exception to raise in the workflow: the portable type itself, or a ``StepError``.

    With ``exact`` off, for a caller outside of workflows, a type that is not here is a
    ``StepError``, too.

    Raises:
        SerializationError: the portable type cannot be found here (``exact``), or the error is
            wrapped and cannot be unwrapped; this stalls the run.
    """
    return _failures.decode_error(unwrapped_error(info), exact=exact)


def digest(text: str, key: bytes = b"") -> str:
    """Sixteen hexadecimal digits that stand for a canonical text.

    With a secret ``key`` they do not tell which of a few possible texts it is.
    """
    return blake2b(text.encode(), digest_size=8, key=key).hexdigest()


def digest_arguments(arguments: str, key: bytes = b"") -> str:
    """The digest of what ``encode_arguments`` made, free of the order of sets, dicts, keywords."""
    return digest(_canonical(unwrapped(arguments)), key)


def digest_tree(tree: Mapping[str, Any], key: bytes = b"") -> str:
    """As ``digest_arguments``, of the tree of a call's arguments."""
    return digest(text_of(_ordered(tree)), key)


def encode_arguments(
    args: tuple[object, ...], kwargs: Mapping[str, object], adapters: Adapters | None = None
) -> str:
    """The arguments of a call as JSON text ``{"args": [...], "kwargs": {...}}``.

    Raises:
        SerializationError: an argument cannot be stored; the message says which.
    """
    if not args and not kwargs:
        return _NO_ARGUMENTS
    get: _Get = adapters.get if adapters else _no_adapter
    texts = [
        _plain(item) or encode(item, get(at), root=f"args[{at}]") for at, item in enumerate(args)
    ]
    text = f'{{"args":[{",".join(texts)}]'
    if kwargs:
        texts = [
            f"{text_of(name)}:{encode(item, get(name), root=f'argument {name!r}')}"
            for name, item in kwargs.items()
        ]
        text += f',"kwargs":{{{",".join(texts)}}}'
    return text + "}"


def decode_arguments(
    text: str, adapters: Adapters | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inverse of ``encode_arguments``.

    Raises:
        SerializationError: as ``decode``.
    """
    if text.startswith(WRAPPED):
        text = unwrapped(text)
    if text == _NO_ARGUMENTS:
        return (), {}
    tree = from_text(text)
    args, kwargs = tree["args"], tree.get("kwargs", {})
    if MARKED in text:
        get: _Get = adapters.get if adapters else _no_adapter
        args = [_decode_tree(item, get(at)) for at, item in enumerate(args)]
        kwargs = {name: _decode_tree(item, get(name)) for name, item in kwargs.items()}
    return tuple(args), kwargs


def _fits(value: object, root: str, limit: int) -> bool:
    """Refuse what is sure to be too large; False when types of their own were not looked into."""
    size, whole = least_size(value, limit)
    if size > limit:
        raise PayloadTooLarge(f"the {root}", size, limit)
    return whole


def _plain(value: object) -> str | None:
    """The text of what needs no tag and no check, or None."""
    if value is None:
        return "null"
    kind = type(value)
    known: Any = value
    if kind is int and -_SMALL < known < _SMALL:
        return str(known)
    if kind is str and known.isascii():
        return to_json(known).decode()
    if kind is bool:
        return "true" if value else "false"
    return None


def _no_adapter(_key: int | str) -> TypeAdapter[Any] | None:
    return None


def _decode_tree(tree: Any, adapter: TypeAdapter[Any] | None) -> object:
    if isinstance(tree, dict) and cast("dict[str, Any]", tree).get(MARK) == "typed":
        return _decode_typed(tree["v"], adapter)
    return restore(tree)


def _check_validation(value: object, text: str) -> None:
    """Validators are user code: what does not come back as it went must not be stored."""
    try:
        again = text_of(walk(restore(from_text(text))))
    except (SerializationError, Refused) as failed:
        raise Refused(
            value,
            f"a type in it does not accept what was stored of it ({failed})",
            "make its validators accept the values that they return",
            by_type=True,
        ) from failed
    if again != text:
        raise Refused(
            value,
            "a type in it is changed when it is validated again",
            "make its validators leave alone the values that they return",
            by_type=True,
        )


def _encode_typed(value: object, adapter: TypeAdapter[Any], root: str, refused: Refused) -> str:
    from pyworkflow._same import same

    try:
        text = adapter.dump_json(value, round_trip=True, warnings="error").decode()
        again = adapter.validate_json(text)
        if not same(value, again):
            refused.why += " (dumped by its annotation it comes back different)"
            raise refused.error(root)
        tree = from_json(text)
    except SerializationError:
        raise
    except Exception as failed:  # validators and serializers are user code
        refused.why += f" ({type(failed).__name__} when dumped by its annotation)"
        raise refused.error(root) from failed
    return text_of({MARK: "typed", "v": tree})


def _decode_typed(tree: Any, adapter: TypeAdapter[Any] | None) -> object:
    if adapter is None:
        raise StoredValueInvalid(
            "(annotation)", "it was stored by an annotation that is not there any more"
        )
    try:
        return adapter.validate_json(to_json(tree))
    except Exception as failed:
        raise StoredValueInvalid(str(adapter), f"{type(failed).__name__}: {failed}") from failed


_unwrap: Callable[[str], str] | None = None
_adapters: dict[object, TypeAdapter[Any] | None] = {}


def _build(annotation: object) -> TypeAdapter[Any] | None:
    if annotation is Any or annotation is object or isinstance(annotation, str):
        return None
    if getattr(annotation, "__name__", "") == "_empty":  # inspect's "no annotation"
        return None
    from pydantic import ConfigDict, PydanticUserError, TypeAdapter
    from pydantic.errors import PydanticUndefinedAnnotation

    from pyworkflow._annotations import supported

    exact = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")
    form: Any = supported(annotation)
    for config in (exact, None):  # types with a config of their own take none from outside
        try:
            return TypeAdapter(form, config=config)
        except (PydanticUserError, PydanticUndefinedAnnotation, TypeError, NameError):
            continue
    return None


def _canonical(text: str) -> str:
    if "{" not in text[1:] and not text.startswith('{"$py'):
        return text
    return text_of(_ordered(from_text(text)))


def _ordered(tree: Any) -> Any:
    kind = cast("object", type(tree))
    if kind is list:
        return [_ordered(item) for item in tree]
    if kind is not dict:
        return tree
    done: dict[str, Any] = {key: _ordered(tree[key]) for key in sorted(tree)}
    tag: object = done.get(MARK)
    if tag in ("set", "frozenset", "dict"):
        done["v"].sort(key=to_json)
    elif isinstance(tag, str) and tag.endswith(STATE):
        # Fields alone, as before there was more: what a property has kept is no other argument.
        done[MARK] = tag.removesuffix(STATE)
        done.pop("a", None)
    return done
