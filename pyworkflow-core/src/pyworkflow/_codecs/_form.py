"""The form of a wrapped payload: JSON text with a tag of its own, which no user value can have.

``{"$py":"codec","v":1,"c":[["zstd",{}],["aesgcm",{"k":"2026"}]],"d":"<base64>"}``: ``c`` lists the
codecs in the order in which they were applied, each with what it needs to undo its work.
"""

from __future__ import annotations

import json
import re
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from pyworkflow._serialization import WRAPPED
from pyworkflow.errors import PayloadUnreadable

__all__ = ["CODEC_NAME", "FORM", "Wrapped", "context", "parse"]

#: Version of the form that this code writes.
FORM = 1
CODEC_NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_MOST = 16
"""Codecs over one payload; more are nobody's."""


#: One codec's work: its name, and what it needs to undo it.
Applied = tuple[str, Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class Wrapped:
    """A parsed payload text."""

    codecs: Sequence[Applied]
    data: bytes

    def text(self) -> str:
        """The JSON text that is stored."""
        applied = json.dumps(
            [[name, dict(params)] for name, params in self.codecs], separators=(",", ":")
        )
        return f'{WRAPPED},"v":{FORM},"c":{applied},"d":"{b64encode(self.data).decode()}"}}'


def context(before: Sequence[Applied]) -> bytes:
    """What stands for the codecs applied before one: encryption binds its text to it."""
    return json.dumps(
        ["pyworkflow codec", FORM, [[name, dict(params)] for name, params in before]],
        sort_keys=True,
        separators=(",", ":"),
    ).encode()


def parse(text: str) -> Wrapped:
    """The parts of a wrapped payload.

    Raises:
        PayloadUnreadable: A newer version wrote it, or it is damaged.
    """
    version: object = None
    try:
        tree: Any = json.loads(text)
        version = tree["v"]
        if version == FORM:
            codecs = [_applied(one) for one in tree["c"]]
            if not 0 < len(codecs) <= _MOST:
                raise ValueError("codecs")
            return Wrapped(codecs, b64decode(tree["d"], validate=True))
    except (ValueError, KeyError, TypeError, RecursionError):
        version = None
    if isinstance(version, int) and version > FORM:
        raise PayloadUnreadable("(form)", f"its form has version={version}", "upgrade pyworkflow")
    raise PayloadUnreadable(
        "(form)", "its text is damaged", "restore the run from a copy of the store"
    )


def _applied(one: Any) -> Applied:
    name, params = one
    if not isinstance(name, str) or not CODEC_NAME.fullmatch(name) or not isinstance(params, dict):
        raise ValueError("codec")
    given = cast("dict[str, object]", params)
    if not all(isinstance(value, str) for value in given.values()):
        raise ValueError("params")
    return name, cast("dict[str, str]", params)
