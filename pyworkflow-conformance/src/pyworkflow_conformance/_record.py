"""Records what a check calls on its stores, so that a failure can say how it came to it."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from datetime import datetime
from typing import Any, cast

from pyworkflow.spi.capabilities import StorageInfo
from pyworkflow.spi.storage import StorageBackend

__all__ = ["Record", "brief"]

KEPT = 60
"""Calls that are kept: a check may make a hundred thousand."""
WIDTH = 240
#: The outcome of a call that has not ended.
RUNNING = "still running"


@dataclass(slots=True)
class _Call:
    """One call and, once it is over, how it ended."""

    store: int
    method: str
    args: tuple[object, ...]
    named: Mapping[str, object]
    outcome: object = RUNNING
    failed: bool = False

    def __str__(self) -> str:
        given = [brief(value) for value in self.args]
        given += [f"{name}={brief(value)}" for name, value in self.named.items()]
        arrow = "!!" if self.failed else "->"
        line = f"store {self.store}: {self.method}({', '.join(given)})"
        return f"{_cut(line)} {arrow} {_cut(brief(self.outcome))}"


class Record:
    """The last calls of one check, over all its store objects."""

    def __init__(self) -> None:
        self._calls: deque[_Call] = deque(maxlen=KEPT)
        self._stores = 0
        self.number = 0
        """Calls made in all."""

    def of(self, store: StorageBackend) -> StorageBackend:
        """The same store, with its calls recorded, and those of its clones."""
        self._stores += 1
        make = cast("Callable[[StorageBackend, Record, int], StorageBackend]", _Recorded)
        return make(store, self, self._stores)

    def begin(self, store: int, method: str, args: tuple[object, ...], named: Any) -> _Call:
        """Note a call before it is made."""
        call = _Call(store, method, args, named)
        self.number += 1
        self._calls.append(call)
        return call

    def in_progress(self) -> list[str]:
        """The calls that have no answer yet."""
        return [str(call) for call in list(self._calls) if call.outcome == RUNNING]

    def lines(self) -> list[str]:
        """The calls in order, oldest first."""
        calls = [str(call) for call in list(self._calls)]
        left_out = self.number - len(calls)
        return ([f"({left_out} calls before these)"] if left_out else []) + calls


def _cut(text: str) -> str:
    return text if len(text) <= WIDTH else f"{text[:WIDTH]}…"


def brief(value: object) -> str:
    """A value in one line, without the fields that are as they always are."""
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, BaseException):
        return f"{type(value).__name__}: {value}"
    if is_dataclass(value) and not isinstance(value, type):
        told = [
            f"{field.name}={brief(getattr(value, field.name))}"
            for field in fields(value)
            if not _is_default(field, getattr(value, field.name))
        ]
        return f"{type(value).__name__}({', '.join(told)})"
    if isinstance(value, (list, tuple)):
        items = cast("Sequence[object]", value)
        shown = [brief(item) for item in items[:4]]
        more = [f"… {len(items)} in all"] if len(items) > 4 else []
        return f"[{', '.join(shown + more)}]"
    return _cut(repr(value)) if not isinstance(value, (str, bytes)) else _cut(repr(value[:WIDTH]))


def _is_default(field: Any, value: object) -> bool:
    if field.default is not MISSING:
        return bool(value is field.default or value == field.default)
    return field.default_factory is not MISSING and value == field.default_factory()


def _forwarded(method: str) -> Callable[..., Awaitable[object]]:
    async def call(self: _State, *args: object, **named: object) -> object:
        noted = self.record.begin(self.number, method, args, named)
        try:
            noted.outcome = await getattr(self.recorded, method)(*args, **named)
        except BaseException as error:
            noted.outcome, noted.failed = error, True
            raise
        return noted.outcome

    call.__name__ = method
    return call


class _State:
    """The part of a recorded store that is written out."""

    def __init__(self, store: StorageBackend, record: Record, number: int) -> None:
        self.recorded = store
        self.record = record
        self.number = number

    def __getattr__(self, name: str) -> object:
        # What only this backend has, for checks that ask for it.
        return getattr(self.recorded, name)

    def info(self) -> StorageInfo:
        return self.recorded.info()

    def clone(self) -> StorageBackend:
        return self.record.of(self.recorded.clone())


#: A proxy and not a changed object: a backend may copy itself to make a clone.
_Recorded = type(
    "Recorded",
    (_State, StorageBackend),
    {
        name: _forwarded(name)
        for name, _ in inspect.getmembers(StorageBackend, inspect.iscoroutinefunction)
        if not name.startswith("_")
    },
)
