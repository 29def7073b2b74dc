"""How a history and the code differ, for people: texts and the path of the first difference."""

from __future__ import annotations

import json
from typing import Any, cast

from pyworkflow._replay.commands import RunStep
from pyworkflow._replay.context import Op, RunContext
from pyworkflow._serialization import unwrapped
from pyworkflow.errors import SerializationError
from pyworkflow.events import Event

__all__ = ["OTHER_ARGUMENTS", "arguments_of", "describe_mismatch", "first_difference"]

OTHER_ARGUMENTS = (
    "A replay must give a step the same arguments. Clocks, ids and random numbers give others each "
    "time, also inside libraries: take them from now(), uuid4() and random() of pyworkflow, or "
    "from a step. After a change of the code put the old code back, or guard the change with "
    "patched(); check_args='warn' of the workflow accepts other arguments"
)
_LONGEST = 120


def describe_mismatch(
    context: RunContext | None, event: Event, op: Op | None, *, fits: bool
) -> tuple[str, str]:
    """(expected, found) of an event that the code does not account for.

    ``fits``: the op may be followed by an event of this type.
    """
    name = event.data.get("name")
    expected = f"{event.type} op={event.op}" + (f" name={name}" if name is not None else "")
    if context is None or op is None:
        found = "no such op"
        if context is not None and (near := _near(context, event.op or "")):
            found += f"; the code emitted {near}"
        return expected, found
    if not fits:
        return expected, f"{op.kind} op={event.op} that is {op.state}"
    if name is not None and name != op.name:
        return expected, f"step op={event.op} name={op.name}"
    return (
        f"{expected} digest={event.data.get('digest')}",
        f"other arguments for step={op.name} op={event.op}: digest={op.digest}"
        + _what_differs(context, event),
    )


def _near(context: RunContext, name: str) -> str:
    """What the code emitted at the same place."""
    branch = name.partition("#")[0] + "#"
    last = [n for n in context.ops if n.startswith(branch)][-3:]
    return ", ".join(f"{n} {context.ops[n].name}".strip() for n in last)


def arguments_of(context: RunContext | None, op: str) -> str | None:
    """The arguments that the code gave a step, as payload text, while they are known."""
    for command in [] if context is None else context.commands:
        if isinstance(command, RunStep) and command.op == op:
            return command.args
    return None


def _what_differs(context: RunContext, event: Event) -> str:
    found = arguments_of(context, event.op or "")
    recorded = event.data.get("args")
    if found is None:
        return ""
    if recorded is None:
        return (
            ""
            if context.salt
            else f"; of the recorded arguments only the digest is known: {_shown(found)}"
        )
    try:
        return first_difference(unwrapped(str(recorded)), found, values=not context.salt)
    except SerializationError:
        return ""


def _shown(text: str) -> str:
    return f"found={text[:_LONGEST]}{'…' if len(text) > _LONGEST else ''}"


def first_difference(
    recorded: str,
    found: str,
    *,
    values: bool = True,
    names: tuple[str, str] = ("recorded", "found"),
) -> str:
    """Where two argument payloads differ first, as an end of a sentence; empty if nowhere.

    ``values``: whether what differs is shown, too, under these ``names``.
    """
    difference = _difference(json.loads(recorded), json.loads(found), "")
    if difference is None:
        return ""
    path, before, after = difference
    shown = f"; the first difference is at {path.removeprefix('.')}"
    if values:
        shown += f": {names[0]}={_value(before)} {names[1]}={_value(after)}"
    return shown


_MISSING: Any = object()


def _difference(before: Any, after: Any, path: str) -> tuple[str, Any, Any] | None:
    one, other = before, after  # the type checkers narrow these to containers of unknown things
    if isinstance(one, dict) and isinstance(other, dict):
        if "$py" in before or "$py" in after:
            return _tagged_difference(before, after, path)
        for key in [*before, *(k for k in after if k not in before)]:
            inner = f"{path}.{key}" if path in ("", ".kwargs") else f"{path}[{key!r}]"
            found = _difference(before.get(key, _MISSING), after.get(key, _MISSING), inner)
            if found is not None:
                return found
        return None
    if isinstance(one, list) and isinstance(other, list):
        for index in range(max(len(before), len(after))):
            found = _difference(_item(before, index), _item(after, index), f"{path}[{index}]")
            if found is not None:
                return found
        return None
    if type(before) is type(after) and before == after:
        return None
    return path, before, after


def _tagged_difference(
    before: dict[str, Any], after: dict[str, Any], path: str
) -> tuple[str, Any, Any] | None:
    """Of tagged values: into a container of the same type, else the values themselves."""
    if before == after:
        return None
    if before.get("$py") == after.get("$py"):
        for key in before.keys() & after.keys():
            if isinstance(before[key], dict | list):
                found = _difference(before[key], after[key], path)
                if found is not None:
                    return found
    return path, before, after


def _item(values: list[Any], index: int) -> Any:
    return values[index] if index < len(values) else _MISSING


def _value(value: Any) -> str:
    if value is _MISSING:
        return "nothing"
    if isinstance(value, dict):
        tagged = cast("dict[str, Any]", value)
        if "$py" in tagged and set(tagged) == {"$py", "v"} and isinstance(tagged["v"], str):
            return f"{tagged['$py']} {tagged['v']}"[:_LONGEST]
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"
