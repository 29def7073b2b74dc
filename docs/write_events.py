"""Write ``reference/events.md``, the table of events, from the schema itself.

``python -m docs.write_events``; a test checks that the page is up to date.
"""

# ruff: noqa: INP001 - a script, run from the root of the repository

from __future__ import annotations

from pathlib import Path

from pyworkflow.event_schema import DATA_MODELS
from pyworkflow.events import EventType, event_class

PAGE = Path(__file__).parent / "reference" / "events.md"
HEAD = """# Events

What a history is made of. Every event has `v` (version of its schema, now 1), `run_id`, `seq`
(1, 2, 3 … without a gap, in order of arrival), `timestamp` (aware UTC, microseconds, never
decreasing within a run), `type`, `class`, `op` (the command it belongs to), `key` (unique within
the run; an event whose key stands is skipped) and `data`, a JSON object.

Classes: **C** command, emitted by workflow code, which replay must emit again · **I** input, from
outside, which replay delivers in order · **O** observation, for people: nothing is decided by it.
*Payloads* inside `data` (`args`, `result`) are JSON text made by the serializer.

`pyworkflow.event_schema.schema()` gives all of this as JSON Schema.

| type | class | data | meaning |
|---|---|---|---|
"""


def page() -> str:
    """The page as it should be."""
    rows: list[str] = []
    for kind in EventType:
        model = DATA_MODELS[kind]
        fields = ", ".join(
            f"`{name}`" + ("" if field.is_required() else "?")
            for name, field in model.model_fields.items()
        )
        meaning = (model.__doc__ or "").strip().partition("\n")[0]
        rows.append(f"| `{kind}` | {event_class(kind)} | {fields} | {meaning} |")
    return HEAD + "\n".join(rows) + "\n\nA `?` marks what may be absent.\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
