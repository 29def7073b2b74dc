"""Limits of names: those that users give, and those that the engine makes of them.

Stores index names, and an index has a limit. What runs of 0.1.0 have is longer at times: limits are
for new names, where they are given, and never for what is read back.
"""

from __future__ import annotations

from hashlib import blake2b

from pyworkflow.errors import ArgumentError

__all__ = [
    "LONGEST_DERIVED",
    "LONGEST_NAME",
    "check_limit",
    "derived_name",
    "is_name",
    "step_name",
    "step_names",
]

LONGEST_NAME = 255
"""Bytes of UTF-8 in a run id, an idempotency key, a workflow, step, queue or tag."""
LONGEST_DERIVED = 512
"""Bytes of UTF-8 in a name that the engine makes: an event key, a work item, a change key."""
_DIGEST_BYTES = 16


def is_name(value: object) -> bool:
    """True for text of 1 to ``LONGEST_NAME`` bytes of UTF-8 without NUL."""
    if not isinstance(value, str) or not value or "\x00" in value:
        return False
    return len(value) * 4 <= LONGEST_NAME or _size(value) <= LONGEST_NAME


def check_limit(what: str, value: object) -> str:
    """Return the name.

    Raises:
        ArgumentError: It is none, see ``is_name``.
    """
    if isinstance(value, str) and is_name(value):
        return value
    size = f" bytes={_size(value)}" if isinstance(value, str) else f" type={type(value).__name__}"
    raise ArgumentError(
        f"{what}={value!r:.80} is not text of 1 to {LONGEST_NAME} bytes of UTF-8 without NUL:{size}"
    )


def derived_name(*parts: str) -> str:
    """The parts with colons between them, in at most ``LONGEST_DERIVED`` bytes.

    Only when the whole is longer, the longest parts are replaced by 32 hex digits of their blake2b,
    one after the other until it fits.
    """
    name = ":".join(parts)
    if len(name) * 4 <= LONGEST_DERIVED or _size(name) <= LONGEST_DERIVED:
        return name
    short = list(parts)
    longest_first = sorted(range(len(parts)), key=lambda place: -_size(parts[place]))
    for place in longest_first:
        data = parts[place].encode("utf-8", "surrogatepass")
        short[place] = blake2b(data, digest_size=_DIGEST_BYTES).hexdigest()
        if _size(":".join(short)) <= LONGEST_DERIVED:
            break
    return ":".join(short)


def step_name(op: str) -> str:
    """The work item of a step, and the key of the event that ends it.

    An op has the path of the task that made it: it is long where tasks are nested deeply.
    """
    name = f"step:{op}"
    return name if len(name) * 4 <= LONGEST_DERIVED else derived_name("step", op)


def step_names(op: str) -> tuple[str, ...]:
    """All that a work item of the step may be called: 0.1.0 shortened no name."""
    name, plain = step_name(op), f"step:{op}"
    return (name,) if name == plain else (name, plain)


def _size(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))
