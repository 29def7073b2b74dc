"""The parameters of a definition: what fits them, and what their annotations make of a value."""

from __future__ import annotations

import functools
import inspect
import logging
import re
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

from pyworkflow._annotations import Check, NotValidatable, check_for, is_silent
from pyworkflow._parameters import Parameters
from pyworkflow._restore import from_text
from pyworkflow._serialization import (
    StoredArgumentInvalid,
    adapter_for,
    encode_arguments,
    unwrapped,
)
from pyworkflow._tagged import PLAIN, NotSerializable, text_of
from pyworkflow.errors import ArgumentError

__all__ = ["Signature"]

_log = logging.getLogger("pyworkflow.client")
_PLAIN_DEFAULTS = frozenset({type(None), bool, int, float, str, bytes, type})
_KEYWORDS = inspect.Parameter.VAR_KEYWORD
_BY_PLACE = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_NOT_BY_NAME = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.VAR_POSITIONAL,
    inspect.Parameter.VAR_KEYWORD,
)


class _Hints(NamedTuple):
    found: dict[str, Any]
    missing: dict[str, str]
    """Why others cannot be looked up."""


class Signature:
    """Parameters of a definition and their annotations, looked at when first needed."""

    def __init__(self, fn: Callable[..., object]) -> None:
        self._fn = fn
        self.signature = inspect.signature(fn)
        parameters = self.signature.parameters.values()
        plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        simple = all(p.kind in plain for p in parameters)
        # The number of positional arguments that certainly fit, for a check without ``bind``.
        self.exact = len(self.signature.parameters) if simple else -1

    @property
    def hints(self) -> dict[str, Any]:
        """Annotations that resolve; one that does not is as good as none."""
        return self._hints.found

    @functools.cached_property
    def _hints(self) -> _Hints:
        try:
            return _Hints(typing.get_type_hints(self._fn, include_extras=True), {})
        except Exception:  # noqa: BLE001 - a name that only a type checker sees
            found: dict[str, Any] = {}
            missing: dict[str, str] = {}
            fn = inspect.unwrap(self._fn)
            for name, hint in inspect.get_annotations(fn).items():
                holder = types.SimpleNamespace(__annotations__={name: hint})
                names = getattr(fn, "__globals__", {})
                try:
                    found |= typing.get_type_hints(holder, names, include_extras=True)
                except Exception as failed:  # noqa: BLE001 - as above
                    missing[name] = f"{type(failed).__name__}: {failed}"
            return _Hints(found, missing)

    @functools.cached_property
    def _checks(self) -> dict[str, Check]:
        """How arguments are validated, by parameter. What cannot be validated is warned of once."""
        checks: dict[str, Check] = {}
        for name, parameter in self.signature.parameters.items():
            why = self._hints.missing.get(name)
            hint = self.hints.get(name, Any)
            if why is None:
                if is_silent(hint):
                    continue
                if parameter.kind is _KEYWORDS and typing.get_origin(hint) is typing.Unpack:
                    hint = typing.get_args(hint)[0]
                try:
                    checks[name] = check_for(hint)
                    continue
                except NotValidatable as failed:
                    why = str(failed)
            _log.warning(
                "arguments are not validated: function=%s parameter=%s annotation=%s (%s); "
                "annotate it with a type that pydantic can validate and that exists when the "
                "code runs, or with Any",
                self._fn.__qualname__,
                name,
                parameter.annotation,
                why,
            )
        return checks

    def check_of(self, name: str) -> Check | None:
        """How an argument given by name is validated, or None; ``**kwargs`` take other names."""
        parameters = self.signature.parameters
        if name in parameters and parameters[name].kind not in _NOT_BY_NAME:
            return self._checks.get(name)
        rest = next((p.name for p in parameters.values() if p.kind is _KEYWORDS), None)
        if rest is None or rest not in self._checks:
            return None
        hint = self.hints[rest]
        if typing.get_origin(hint) is not typing.Unpack:
            return self._checks[rest]
        return _field_check(typing.get_args(hint)[0], name)

    def check_at(self, place: int) -> Check | None:
        """How an argument given by position is validated, or None; ``*args`` take the rest."""
        for at, parameter in enumerate(self.signature.parameters.values()):
            if parameter.kind is inspect.Parameter.VAR_POSITIONAL or at == place:
                return self._checks.get(parameter.name)
        return None

    @functools.cached_property
    def _parameters(self) -> Parameters:
        return Parameters(self.signature)

    def fresh_defaults(self, only: Collection[type] | None = None) -> dict[str, object]:
        """Defaults that each execution gets a copy of; with ``only``, of these types.

        Raises:
            DefinitionError: one can be changed and not be copied.
        """
        if all(type(p.default) in _PLAIN_DEFAULTS for p in self.signature.parameters.values()):
            return {}
        return self._parameters.mutable_defaults(self._fn.__qualname__, only)

    def filled(
        self, fresh: Mapping[str, object], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with copies of the ``fresh`` defaults that they leave out."""
        return self._parameters.filled(fresh, args, kwargs)

    def bound_form(self, text: str) -> dict[str, Any]:
        """The tree of a call's arguments with all that can be by position."""
        tree = from_text(text)
        return self._parameters.bound(tree["args"], tree.get("kwargs", {}))

    def equal_forms(self, text: str) -> Iterator[str]:
        """The texts of every way to write a call: by position or name, defaults or none."""
        tree = from_text(unwrapped(text))
        for call in self._parameters.equal_calls(tree["args"], tree.get("kwargs", {})):
            yield text_of(call)

    def check(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        """``TypeError`` when the arguments do not fit the parameters."""
        if kwargs or len(args) != self.exact:
            self.signature.bind(*args, **kwargs)

    def _misfit(
        self, first: TypeError, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> str:
        """What does not fit: with an argument that is missing, also one that is unknown."""
        try:
            self.signature.bind_partial(*args, **kwargs)
        except TypeError as unknown:
            if str(unknown) != str(first):
                return f"{first}; {unknown}"
        return str(first)

    def validate(
        self, what: str, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        """The arguments as the annotations want them. ``ArgumentError``."""
        from pydantic import ValidationError

        bound = None
        named: dict[str, Any]
        if kwargs or len(args) != self.exact:
            try:
                bound = self.signature.bind(*args, **kwargs)
            except TypeError as exc:
                raise ArgumentError(
                    f"the arguments do not fit {what}{self.signature}: "
                    f"{self._misfit(exc, args, kwargs)}; nothing was started"
                ) from exc
            named = bound.arguments
        else:
            named = dict(zip(self.signature.parameters, args, strict=True))
        problems: list[str] = []
        cause: ValidationError | None = None

        def taken(check: Check, label: str, value: object) -> object:
            nonlocal cause
            try:
                return check.from_caller(value)
            except ValidationError as exc:
                cause = exc
                for error in exc.errors(include_url=False):
                    place = _place(label, error["loc"])
                    problems.append(f"{place}: {error['msg']} (got {error['input']!r:.100})")
                return value

        for name, value in named.items():
            check = self._checks.get(name)
            if check is not None:
                named[name] = self._each(name, value, functools.partial(taken, check))
        if problems:
            raise ArgumentError(
                f"wrong arguments for {what}: {'; '.join(problems)}; nothing was started"
            ) from cause
        return (tuple(named.values()), {}) if bound is None else (bound.args, bound.kwargs)

    def fit_stored(
        self, what: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Stored arguments as the annotations want them today.

        Raises:
            StoredArgumentInvalid: one does not fit its annotation.
        """
        if not self._checks or not (args or kwargs):
            return args, kwargs
        if not kwargs and len(args) == self.exact:
            named = zip(self.signature.parameters, args, strict=True)
            return tuple(self._from_store(what, name, value) for name, value in named), kwargs
        bound = self.signature.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            bound.arguments[name] = self._from_store(what, name, value)
        return bound.args, bound.kwargs

    def _from_store(self, what: str, name: str, value: Any) -> Any:
        check = self._checks.get(name)
        if check is None:
            return value
        return self._each(name, value, functools.partial(self._stored_item, what, name, check))

    def _stored_item(self, what: str, name: str, check: Check, label: str, item: object) -> object:
        try:
            return check.from_store(item)
        except Exception as failed:  # validators are user code
            expected = self.hints[name]
            raise StoredArgumentInvalid(
                what,
                label or name,
                expected.__qualname__ if isinstance(expected, type) else repr(expected),
                type(item).__qualname__,
                _problem(failed),
            ) from failed

    def _each(self, name: str, value: Any, take: Callable[[str, object], object]) -> object:
        """What ``take`` makes of each argument of a parameter, by the label that callers know.

        No label: the value is a mapping whose keys are the labels.
        """
        kind = self.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            return tuple(take(f"{name}[{at}]", item) for at, item in enumerate(value))
        if kind is not _KEYWORDS:
            return take(name, value)
        if typing.get_origin(self.hints[name]) is typing.Unpack:
            return take("", value)
        return {key: take(key, item) for key, item in value.items()}

    def encode(self, args: tuple[object, ...], kwargs: Mapping[str, object], end: str = "") -> str:
        """Arguments as payload text; ``NotSerializable`` names the parameter, and has the end."""
        try:
            return encode_arguments(args, kwargs)
        except NotSerializable as error:
            raise self._named(error, end) from error.__cause__

    def _named(self, error: NotSerializable, end: str) -> NotSerializable:
        path, remedy = error.path, error.remedy
        if found := re.match(r"args\[(\d+)\]", path):
            place = int(found[1])
            names = [p.name for p in self.signature.parameters.values() if p.kind in _BY_PLACE]
            if place < len(names):
                path = f"argument {names[place]!r}{path[found.end() :]}"
        if remedy == PLAIN:
            remedy = "pass plain data, a dataclass or a pydantic model, and annotate it with that"
        return NotSerializable(path, error.type, error.why, remedy + end)

    @functools.cached_property
    def result(self) -> Any:
        """The adapter of the return annotation, or None."""
        return adapter_for(self.hints["return"]) if "return" in self.hints else None


def _field_check(fields: Any, name: str) -> Check | None:
    """How one key of a ``TypedDict`` is validated, or None."""
    hint = typing.get_type_hints(fields, include_extras=True).get(name, Any)
    if typing.get_origin(hint) in (typing.Required, typing.NotRequired):
        hint = typing.get_args(hint)[0]
    return None if is_silent(hint) else check_for(hint)


def _place(label: str, parts: tuple[int | str, ...]) -> str:
    if not label and parts:
        label, parts = str(parts[0]), parts[1:]
    return label + "".join(f"[{part!r}]" for part in parts)


def _problem(failed: Exception) -> str:
    """What is wrong, without the values: they may be secret, and this is stored."""
    errors: Callable[..., list[dict[str, Any]]] | None = getattr(failed, "errors", None)
    if errors is None:
        return type(failed).__name__
    found = errors(include_url=False, include_input=False, include_context=False)
    places = [(".".join(str(part) for part in e["loc"]), e["msg"]) for e in found[:5]]
    return "; ".join(f"{place}: {said}" if place else str(said) for place, said in places)
