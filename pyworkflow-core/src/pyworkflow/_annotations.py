"""What an annotation makes of a value: of one that a caller passes, and of one that was stored."""

from __future__ import annotations

import inspect
import sys
import types
import typing
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Union, cast, get_args, get_origin

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from pydantic_core import SchemaValidator

__all__ = ["Check", "NotValidatable", "check_for", "is_silent", "supported"]

_PLAIN: tuple[type, ...] = (int, str, float, bool, bytes, dict, list, set, tuple)
_FUNCTIONS = frozenset({"function-before", "function-after", "function-wrap", "function-plain"})
_OF_A_CLASS = frozenset({"model", "dataclass", "definition-ref", "definitions"})
_Schema = Any


class NotValidatable(Exception):  # becomes a warning, with the parameter's name
    """pydantic cannot make a validator of this annotation."""


class Check:
    """The validators of one annotation.

    Raises:
        NotValidatable: there is none.
    """

    def __init__(self, annotation: object) -> None:
        self.adapter = _adapter(annotation)
        # Never None, which no value's type is.
        self._plain = next((kind for kind in _PLAIN if annotation is kind), Check)

    def from_caller(self, value: object) -> object:
        """The value by pydantic's rules for Python values. ``pydantic.ValidationError``."""
        return self.adapter.validate_python(value)

    def from_store(self, value: object) -> object:
        """A stored value as the annotation wants it today.

        It was validated before: where it has the right type, validators that are functions do not
        run again, for they may change it a second time, or ask for a time that has passed.

        Raises:
            Exception: ``pydantic.ValidationError``, or whatever a validator raises.
        """
        if type(value) is self._plain:
            return value
        try:
            fitting: object = self._stored.validate_python(value, strict=True)
        except Exception:  # noqa: BLE001 - a __get_pydantic_core_schema__ of the user's, too
            pass
        else:
            return value if self._has_functions else fitting
        try:
            return self.adapter.validate_python(value)
        except Exception:
            if not self._has_functions:
                raise
            try:  # what a function made need not have the annotated type
                self._loosely_stored.validate_python(value, strict=True)
            except Exception:  # noqa: BLE001 - the first one is raised
                pass
            else:
                return value
            raise

    @cached_property
    def mentions_decimal(self) -> bool:
        """Whether numbers keep every digit."""
        return "'type': 'decimal'" in repr(self.adapter.core_schema)

    @cached_property
    def _has_functions(self) -> bool:
        return _mentions(self.adapter.core_schema)

    @cached_property
    def _stored(self) -> SchemaValidator:
        return _validator(_without_functions(self.adapter.core_schema, loosely=False))

    @cached_property
    def _loosely_stored(self) -> SchemaValidator:
        return _validator(_without_functions(self.adapter.core_schema, loosely=True))


_checks: dict[object, Check] = {}


def check_for(annotation: object) -> Check:
    """The check of an annotation, made once.

    Raises:
        NotValidatable: pydantic cannot make one; the message has its reason.
    """
    try:
        return _checks[annotation]
    except KeyError:
        check = _checks[annotation] = Check(annotation)
        return check
    except TypeError:  # Annotated[...] with unhashable metadata
        return Check(annotation)


def is_silent(annotation: object) -> bool:
    """Whether an annotation says nothing."""
    return annotation is Any or annotation is object or annotation is inspect.Parameter.empty


def supported(annotation: Any) -> Any:
    """The annotation in a form that pydantic takes on this version of Python.

    Before 3.12 it refuses ``typing.TypedDict``; the one of ``typing_extensions`` says the same.
    """
    return annotation if sys.version_info >= (3, 12) else _supported(annotation, {})


def _adapter(annotation: object) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    try:
        form: Any = supported(annotation)
        adapter: TypeAdapter[Any] = TypeAdapter(form)
        adapter.rebuild()
        if "'type': 'generator'" in repr(adapter.core_schema):
            adapter.core_schema = _with_lists(adapter.core_schema)
            adapter.validator = _validator(adapter.core_schema)
    except Exception as failed:  # its error classes, TypeError, NameError, code of the user's
        raise NotValidatable(f"{type(failed).__name__}: {str(failed).splitlines()[0]}") from failed
    return adapter


def _validator(schema: _Schema) -> SchemaValidator:
    from pydantic_core import SchemaValidator

    return SchemaValidator(schema)


def _with_lists(schema: _Schema) -> _Schema:
    """The schema with lists for ``Iterable`` and ``Generator``: an iterator cannot be stored."""
    parts: Any = schema  # the type checkers narrow `schema` to lists of unknown things
    if isinstance(schema, list):
        return [_with_lists(item) for item in parts]
    if isinstance(schema, tuple):
        return tuple(_with_lists(item) for item in parts)
    if not isinstance(schema, dict):
        return schema
    known = cast("dict[str, Any]", schema)
    new = {
        key: item if key == "metadata" else _with_lists(item)
        for key, item in known.items()
        if key != "serialization"
    }
    return new | {"type": "list"} if known.get("type") == "generator" else new


def _mentions(schema: _Schema) -> bool:
    """Whether validating twice may do more than validating once."""
    if isinstance(schema, dict):
        known = cast("dict[str, Any]", schema)
        if known.get("type") in _FUNCTIONS or known.get("type") == "json" or "now_op" in known:
            return True
        return any(_mentions(item) for key, item in known.items() if key != "metadata")
    if isinstance(schema, list | tuple):
        return any(_mentions(item) for item in cast("list[Any]", schema))
    return False


def _without_functions(schema: _Schema, *, loosely: bool) -> _Schema:
    """The schema without what is a function; ``loosely``: any value where one had the last word."""
    parts: Any = schema  # the type checkers narrow `schema` to lists of unknown things
    if isinstance(schema, list):
        return [_without_functions(item, loosely=loosely) for item in parts]
    if isinstance(schema, tuple):
        return tuple(_without_functions(item, loosely=loosely) for item in parts)
    if not isinstance(schema, dict):
        return schema
    known = cast("dict[str, Any]", schema)
    kind = known.get("type")
    if kind in _FUNCTIONS or kind == "json":
        inner: Any = known.get("schema")
        last = kind != "function-before" and kind != "json"
        if inner is None or (loosely and last and inner.get("type") not in _OF_A_CLASS):
            inner = {"type": "any"}
        inner = _without_functions(inner, loosely=loosely)
        return inner | {"ref": known["ref"]} if "ref" in known else inner
    return {
        key: item if key == "metadata" else _without_functions(item, loosely=loosely)
        for key, item in known.items()
        if key not in ("now_op", "now_utc_offset", "serialization")
    }


def _supported(annotation: Any, made: dict[object, Any]) -> Any:
    if typing.is_typeddict(annotation) and type(annotation).__module__ == "typing":
        return made[annotation] if annotation in made else _typed_dict(annotation, made)
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is typing.Literal or not args:
        return annotation
    if origin is Annotated:
        inner = _supported(args[0], made)
        return annotation if inner is args[0] else Annotated[(inner, *args[1:])]
    new: tuple[Any, ...] = tuple(_supported(item, made) for item in args)
    if all(one is other for one, other in zip(new, args, strict=True)):
        return annotation
    if origin is types.UnionType or origin is Union:
        return Union[new]  # noqa: UP007 - made of a tuple
    if hasattr(annotation, "copy_with"):
        return annotation.copy_with(new)
    return origin[new]


def _typed_dict(annotation: Any, made: dict[object, Any]) -> Any:
    import typing_extensions

    # Empty first: its fields may be of its own type.
    form: Any = typing_extensions.TypedDict(annotation.__name__, {})  # type: ignore[misc] # pyright: ignore[reportGeneralTypeIssues] - fields follow
    made[annotation] = form
    required: set[str] = set()
    fields: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(annotation, include_extras=True).items():
        needed = name in annotation.__required_keys__
        if get_origin(hint) in (typing.Required, typing.NotRequired):
            needed = get_origin(hint) is typing.Required
            hint = get_args(hint)[0]
        fields[name] = _supported(hint, made)
        if needed:
            required.add(name)
    form.__annotations__ = fields
    form.__required_keys__ = frozenset(required)
    form.__optional_keys__ = frozenset(fields.keys() - required)
    form.__module__, form.__qualname__ = annotation.__module__, annotation.__qualname__
    form.__doc__ = annotation.__doc__
    config: object = getattr(annotation, "__pydantic_config__", None)
    if config is not None:
        setattr(form, "__pydantic_config__", config)  # noqa: B010 - of no declared name
    return form
