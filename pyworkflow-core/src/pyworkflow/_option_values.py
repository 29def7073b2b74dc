"""Values of options: of a definition (``DefinitionError``), and of one start (``ArgumentError``)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any, cast

from pyworkflow._duration import parse_duration
from pyworkflow._retry import Delay, RetryDelay, delay_of
from pyworkflow.errors import ArgumentError, DefinitionError, WorkflowError

__all__ = [
    "MOST_RETRIES",
    "check_attributes",
    "check_hard_timeout",
    "check_place",
    "check_tags",
    "delay_option",
    "duration_option",
]

D = str | int | float | timedelta
_HIGHEST = 9
MOST_RETRIES = 2**31 - 1
"""More are taken for a mistake."""


def check_place(error: type[WorkflowError], queue: object, priority: object) -> None:
    """Refuse a queue without a name, and a priority other than 0 to 9; None is left out."""
    if queue is not None and (not isinstance(queue, str) or not queue.strip()):
        raise error(f"queue={queue!r} is no name of a queue; write text, or leave it out")
    if priority is None:
        return
    if type(priority) is not int or not 0 <= priority <= _HIGHEST:
        raise error(f"priority={priority!r} is not a whole number from 0 to {_HIGHEST}")


def check_tags(error: type[WorkflowError], tags: object) -> tuple[str, ...]:
    """The tags; one text alone is not taken for its letters."""
    if isinstance(tags, str | bytes) or not isinstance(tags, Iterable):
        raise error(f"tags={tags!r} is no list of tags; write tags=[{tags!r}]")
    checked: list[str] = []
    for tag in cast("Iterable[object]", tags):
        if not isinstance(tag, str) or not tag:
            raise error(f"a tag is not text: tag={tag!r}")
        checked.append(tag)
    return tuple(checked)


def check_attributes(attributes: object) -> dict[str, Any]:
    """The attributes of one start; None has none. ``ArgumentError``."""
    if attributes is None:
        return {}
    given = attributes  # the type checkers narrow `attributes` to maps of unknown things
    if not isinstance(attributes, Mapping):
        raise ArgumentError(
            f"attributes={given!r:.80} is no mapping; write attributes={{'customer': 7}}"
        )
    found = dict(cast("Mapping[object, Any]", given))
    for name in found:
        if not isinstance(name, str):
            raise ArgumentError(f"the name of an attribute is not text: name={name!r:.80}")
    return cast("dict[str, Any]", found)


def check_hard_timeout(hard_timeout: object, timeout: object) -> None:
    """Refuse what is neither True nor False, and True without a timeout."""
    if type(hard_timeout) is not bool:
        raise DefinitionError(f"hard_timeout={hard_timeout!r} is neither True nor False")
    if hard_timeout and timeout is None:
        raise DefinitionError("hard_timeout=True says what a timeout does; add timeout=…")


def duration_option(
    setting: str, value: D, error: type[WorkflowError] = DefinitionError
) -> timedelta:
    """A duration above zero."""
    try:
        parsed = parse_duration(value)
    except (ValueError, TypeError, OverflowError) as exc:
        raise error(f"{setting}={value!r}: {exc}") from exc
    if parsed <= timedelta(0):
        raise error(f"{setting}={value!r} leaves no time at all; write a duration above zero")
    return parsed


def delay_option(value: RetryDelay) -> Delay:
    """A ``retry_delay``."""
    try:
        return delay_of(value)
    except (ValueError, TypeError) as exc:
        raise DefinitionError(f"retry_delay={value!r}: {exc}") from exc
