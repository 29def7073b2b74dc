"""What a store refuses whatever it holds: values that are not JSON, and malformed changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from typing import Any, cast

from pyworkflow.errors import PayloadTooLarge, SerializationError
from pyworkflow.events import EventType
from pyworkflow.runs import ItemKind
from pyworkflow.spi.storage import TURN, Change, ControlKind

__all__ = ["check_change", "check_json"]

_MAX_DEPTH = 200
_SMALL = 1 << 63
# What most events are made of: known to be short, and ASCII.
_TYPES = frozenset(str(t) for t in EventType)
_NAMES = frozenset(
    {"name", "attempt", "digest", "result", "worker", "at", "dispatched", "error", "until", "lag"}
)
_MAX_BITS = 14_000  # json refuses integers of more than 4,300 digits


def check_change(change: Change, *, max_payload: int, max_events: int) -> None:
    """Refuse what cannot be stored. A backend calls this before ``ReferenceStore.commit``.

    Raises:
        PayloadTooLarge: A text longer than ``max_payload`` bytes of UTF-8, or too many events.
        SerializationError: Something that is not JSON, or text that is not Unicode.
        ValueError: Fields of the change that do not go together.
    """
    _check_shape(change)
    if len(change.events) > max_events:
        raise PayloadTooLarge(
            "the number of events in one change", len(change.events), max_events, "store"
        )
    for text in (change.run_id, change.key):
        # Most texts are short and ASCII: checked without a call.
        if len(text) > max_payload or not text.isascii():
            _check_text("a name", max_payload, (text,))
    for event in change.events:
        op, key = event.op, event.key
        if (
            event.type not in _TYPES
            or not (op is None or (len(op) <= max_payload and op.isascii()))
            or not (key is None or (len(key) <= max_payload and key.isascii()))
        ):
            _check_text("an event", max_payload, (event.type, op, key))
        check_json(event.data, max_payload, 0)
    create = change.create
    if create is not None:
        names = (create.workflow, create.version, create.queue, create.root, *create.tags)
        _check_text("a name", max_payload, (*names, create.idempotency_key))
        if create.parent is not None:
            _check_text("a name", max_payload, (create.parent.run_id, create.parent.op))
        _check_text("the arguments", max_payload, (create.args,))
        check_json(create.attributes, max_payload, 0)
    update = change.update
    if update is not None:
        _check_text("the result", max_payload, (update.result, update.next))
        if update.error is not None:
            check_json(update.error.to_json(), max_payload, 0)
        if update.attributes is not None:
            check_json(update.attributes, max_payload, 0)
    if change.control is not None:
        _check_text("the reason", max_payload, (change.control.reason,))
    if change.settle is not None and change.settle.payload is not None:
        check_json(change.settle.payload, max_payload, 0)
    for put in change.put:
        _check_text("a name", max_payload, (put.item_id, put.queue))
        check_json(put.payload, max_payload, 0)


def _check_shape(change: Change) -> None:
    claim = change.claim
    if claim is None:
        if change.settle is not None or change.seen is not None or change.drop:
            raise ValueError("settle, seen and drop need the claim under which the change is made")
    elif claim.run_id != change.run_id:
        raise ValueError(
            f"the claim is of another run: claim={claim.run_id!r} change={change.run_id!r}"
        )
    elif change.create is not None:
        raise ValueError("a run that is created has no claim yet: use put(claimed=) or take_turn")
    if change.control is not None:
        if change.create is not None:
            raise ValueError("a change creates a run or controls one, not both")
        closes = change.control.kind in (ControlKind.CANCEL, ControlKind.TERMINATE)
        if closes != (change.final is not None):
            raise ValueError(
                f"cancel and terminate need final, other controls must not have it: "
                f"control={change.control.kind} final={change.final}"
            )
    if change.final is not None and not change.final.is_terminal:
        raise ValueError(f"final must be a terminal status: final={change.final}")
    for put in change.put:
        if (put.item_id == TURN) != (put.kind is ItemKind.TURN):
            raise ValueError(
                f"the turn's item id is {TURN!r}, and no other's: item_id={put.item_id!r} "
                f"kind={put.kind}"
            )
        if put.due_at is not None and put.due_at.tzinfo is None:
            raise ValueError(f"a naive datetime names no instant: due_at={put.due_at!r}")
    if change.settle is not None:
        reschedule_at = change.settle.reschedule_at
        if reschedule_at is not None and reschedule_at.tzinfo is None:
            raise ValueError(f"a naive datetime names no instant: reschedule_at={reschedule_at!r}")


def _check_text(what: str, limit: int, texts: Iterable[str | None]) -> None:
    for text in texts:
        if text is None:
            continue
        size = len(text)
        if not text.isascii():
            try:
                size = len(text.encode())
            except UnicodeEncodeError as error:
                raise SerializationError(
                    f"{what} holds a lone surrogate, which is no character: "
                    f"position={error.start}; decode the text with the right codec"
                ) from None
        if size > limit:
            raise PayloadTooLarge(what, size, limit, "store")


def check_json(value: Any, limit: int, depth: int = 0) -> None:
    """Refuse what is not JSON, or holds a text longer than ``limit`` bytes."""
    if type(value) is dict and depth <= _MAX_DEPTH:
        # Most of what is stored: checked without a call for each plain entry.
        plain: dict[Any, Any] = value  # pyright: ignore[reportUnknownVariableType] - its type was asked
        if not _NAMES.issuperset(plain):
            for key in plain:
                if type(key) is not str or not key.isascii():
                    _check_key(key, limit)
        for entry in plain.values():
            kind = type(entry)  # pyright: ignore[reportUnknownVariableType] - whatever it is
            if kind is str:
                if len(entry) > limit or not entry.isascii():
                    _check_text("a value", limit, (entry,))
            elif kind is int:
                if not -_SMALL < entry < _SMALL:
                    check_json(entry, limit, depth + 1)
            elif kind is not bool and entry is not None:
                check_json(entry, limit, depth + 1)
    elif isinstance(value, str):
        if len(value) > limit or not value.isascii():
            _check_text("a value", limit, (value,))
    elif value is None or value is True or value is False:
        pass
    elif isinstance(value, int):
        if value.bit_length() > _MAX_BITS:
            raise SerializationError(
                f"an integer is too long for JSON: bits={value.bit_length()}; send it as text"
            )
    elif isinstance(value, float):
        if not isfinite(value):
            raise SerializationError(f"JSON has no such number: value={value}; send it as text")
    elif depth > _MAX_DEPTH:
        raise SerializationError(f"nested too deeply: levels={_MAX_DEPTH}; flatten the value")
    elif isinstance(value, dict) or (depth == 0 and isinstance(value, Mapping)):
        fields = cast("Mapping[object, Any]", value)
        for key, entry in fields.items():
            _check_key(key, limit)
            check_json(entry, limit, depth + 1)
    elif isinstance(value, list):
        entries = cast("Sequence[Any]", value)
        for entry in entries:
            check_json(entry, limit, depth + 1)
    else:
        raise SerializationError(
            f"not a JSON value: type={type(value).__name__}; encode it with the serializer"
        )


def _check_key(key: object, limit: int) -> None:
    if type(key) is not str:
        raise SerializationError(
            f"JSON objects have text keys: key={key!r} type={type(key).__name__}"
        )
    if not key.isascii():
        _check_text("a key", limit, (key,))
