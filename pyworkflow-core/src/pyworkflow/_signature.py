"""The parameters of a definition: what fits them, and what their annotations make of a value."""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from pyworkflow._serialization import adapter_for
from pyworkflow.errors import ArgumentError

__all__ = ["Signature"]


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

    @functools.cached_property
    def hints(self) -> dict[str, Any]:
        """Annotations that resolve; one that does not is as good as none."""
        try:
            return typing.get_type_hints(self._fn, include_extras=True)
        except Exception:  # noqa: BLE001 - a name that only a type checker sees
            found: dict[str, Any] = {}
            for name, hint in inspect.get_annotations(self._fn).items():
                holder = types.SimpleNamespace(__annotations__={name: hint})
                names = getattr(self._fn, "__globals__", {})
                try:
                    found |= typing.get_type_hints(holder, names, include_extras=True)
                except Exception:  # noqa: BLE001 - as above
                    continue
            return found

    def check(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        """``TypeError`` when the arguments do not fit the parameters."""
        if kwargs or len(args) != self.exact:
            self.signature.bind(*args, **kwargs)

    def validate(
        self, what: str, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        """The arguments as the annotations want them. ``ArgumentError``."""
        from pydantic import ValidationError

        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError as exc:
            raise ArgumentError(
                f"the arguments do not fit {what}{self.signature}: {exc}; nothing was started"
            ) from exc
        problems: list[str] = []
        cause: ValidationError | None = None
        for name, value in bound.arguments.items():
            # ``None`` is an annotation, and another thing than none at all.
            adapter = adapter_for(self.hints[name]) if name in self.hints else None
            if adapter is None:
                continue
            kind = self.signature.parameters[name].kind
            try:
                if kind is inspect.Parameter.VAR_POSITIONAL:
                    value = tuple(adapter.validate_python(v) for v in value)
                elif kind is inspect.Parameter.VAR_KEYWORD:
                    value = {k: adapter.validate_python(v) for k, v in value.items()}
                else:
                    value = adapter.validate_python(value)
            except ValidationError as exc:
                cause = exc
                for error in exc.errors(include_url=False):
                    place = "".join(f"[{part!r}]" for part in error["loc"])
                    problems.append(f"{name}{place}: {error['msg']} (got {error['input']!r:.100})")
            else:
                bound.arguments[name] = value
        if problems:
            raise ArgumentError(
                f"wrong arguments for {what}: {'; '.join(problems)}; nothing was started"
            ) from cause
        return bound.args, bound.kwargs

    @functools.cached_property
    def result(self) -> Any:
        """The adapter of the return annotation, or None."""
        return adapter_for(self.hints["return"]) if "return" in self.hints else None
