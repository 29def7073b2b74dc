"""JSON of records: text in UTF-8 without a raw newline, and the values back."""

from __future__ import annotations

import json
from typing import cast

from pydantic_core import from_json, to_json

from pyworkflow.spi import Json, SerializationError

__all__ = ["decode", "encode"]


def encode(data: Json) -> bytes:
    """JSON text without a raw newline; ``decode`` gives an equal value.

    Raises:
        SerializationError: no JSON can represent it as it is.
    """
    try:
        body = to_json(data, inf_nan_mode="constants")
    except Exception:  # noqa: BLE001  what pydantic refuses (deep nesting), json may still take
        body = b""
    # One byte is found faster than three.
    if not body or (b"N" in body and b"NaN" in body) or b"Infinity" in body:
        try:
            text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
            body = text.encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise SerializationError(
                f"the change cannot be stored as JSON: {error}; encode its values first"
            ) from error
    return body


def decode(body: bytes) -> dict[str, Json]:
    """The JSON object that ``encode`` made ``body`` of."""
    try:
        value = from_json(body)
    except ValueError:  # nested deeper than pydantic reads
        value = json.loads(body)
    if not isinstance(value, dict):
        raise TypeError("the record is no JSON object")
    return cast("dict[str, Json]", value)
