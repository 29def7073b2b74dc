"""Printing: JSON, tables, values. Results go to stdout, everything about them to stderr."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Generator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, TextIO

from pyworkflow._text import cut, escaped, escaped_json

if TYPE_CHECKING:
    from pyworkflow.events import Event
    from pyworkflow.runs import Run

__all__ = [
    "age",
    "counted",
    "event_json",
    "json_alone",
    "lines",
    "moment",
    "note",
    "own_frames",
    "print_json",
    "print_pairs",
    "print_table",
    "run_json",
    "shown",
    "styled",
]

_STYLES = {
    "completed": "green",
    "failed": "bold red",
    "cancelled": "yellow",
    "terminated": "yellow",
    "stalled": "bold red",
    "suspended": "cyan",
    "running": "blue",
}


_CELL = 200
"""Characters of a cell of a table."""

_json_stream: TextIO | None = None


def print_json(document: object, *, line: bool = False) -> None:
    """One JSON document, indented, or on a line of its own in a stream."""
    text = json.dumps(document, ensure_ascii=False, indent=None if line else 2)
    stream = _json_stream or sys.stdout
    stream.write(escaped_json(text) + "\n")
    stream.flush()


@contextlib.contextmanager
def json_alone() -> Generator[None]:
    """Send what the user's code prints to stderr, so that stdout holds JSON and nothing else."""
    global _json_stream
    _json_stream = sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _json_stream = None


def note(text: str) -> None:
    """Something about the result, which is not the result."""
    sys.stderr.write(lines(text) + "\n")
    sys.stderr.flush()


def styled(text: str, style: str | None) -> None:
    """A line on stdout, in colour where the terminal has it."""
    text = lines(text)
    if style is None or not sys.stdout.isatty():
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
        return
    from rich.console import Console

    Console(highlight=False, soft_wrap=True).print(text, style=style, markup=False)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table: rich's on a terminal, aligned columns otherwise.

    A cell is one line; of a very long one its beginning and end are shown.
    """
    rows = [[escaped(cut(cell, _CELL)) for cell in row] for row in rows]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="bold")
        for number, column in enumerate(columns):
            table.add_column(column, overflow="fold", no_wrap=number == 0)
        for row in rows:
            table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
        Console().print(table)
        return
    widths = [max(len(cell) for cell in cells) for cells in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        sys.stdout.write("  ".join(cells).rstrip() + "\n")


def print_pairs(pairs: Mapping[str, str | Sequence[str]]) -> None:
    """Names and values, one under the other; empty ones are left out.

    A text is one line, whatever is in it; what has several lines is given as a list of them.
    """
    width = max(len(name) for name in pairs)
    for name, value in pairs.items():
        if value:
            parts = [value] if isinstance(value, str) else value
            text = ("\n" + " " * (width + 2)).join(map(escaped, parts))
            styled(f"{name.ljust(width)}  {text}", _STYLES.get(text))


def lines(text: str) -> str:
    """The text with its own line breaks, and every other control character escaped."""
    return text if text.isprintable() else "\n".join(map(escaped, text.split("\n")))


def shown(value: object, limit: int = 200) -> str:
    """A value for people, on one line."""
    text = escaped(" ".join(repr(value).split()))
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def counted(number: int, what: str) -> str:
    """``1 run``, ``2 runs``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def own_frames(traceback: str) -> list[str]:
    """The lines of a traceback without the frames of the engine, which tell the reader nothing."""
    kept: list[str] = []
    inside = False
    for line in traceback.rstrip().split("\n"):
        if line.startswith("  File "):
            inside = "/pyworkflow/_" in line.replace("\\", "/")
        elif not line.startswith("    "):
            inside = False
        if not inside:
            kept.append(line)
    return kept


def moment(at: datetime | None) -> str:
    """An instant for people, in UTC."""
    return "" if at is None else f"{at:%Y-%m-%d %H:%M:%S}Z"


def age(seconds: float) -> str:
    """A span of time for people."""
    from datetime import timedelta

    from pyworkflow._duration import format_duration

    if seconds < 0.01:
        return "0s"
    digits = 2 if seconds < 10 else 1 if seconds < 60 else 0
    return format_duration(timedelta(seconds=round(seconds, digits)))


def run_json(run: Run) -> dict[str, Any]:
    """A run as JSON, its values plain."""
    from pyworkflow.cli._values import plain_arguments, plain_value

    error = None
    if run.error is not None:
        error = {
            "type": run.error.type,
            "message": run.error.message,
            "traceback": run.error.traceback,
        }
    return {
        "run_id": run.run_id,
        "workflow": run.workflow,
        "version": run.version,
        "status": run.status.value,
        "args": plain_arguments(run.workflow, run.args_text),
        "result": plain_value(run.result_text),
        "error": error,
        "stalled": run.stalled,
        "paused": run.paused,
        "idempotency_key": run.idempotency_key,
        "parent": None if run.parent is None else [run.parent.run_id, run.parent.op],
        "root": run.root,
        "next": run.next,
        "queue": run.queue,
        "priority": run.priority,
        "tags": list(run.tags),
        "attributes": dict(run.attributes),
        "created_at": _instant(run.created_at),
        "started_at": _instant(run.started_at),
        "updated_at": _instant(run.updated_at),
        "finished_at": _instant(run.finished_at),
        "deadline": _instant(run.deadline),
        "history_length": run.history_length,
        "seen_seq": run.seen_seq,
    }


def event_json(event: Event, *, plain: bool = False) -> dict[str, Any]:
    """An event as the schema has it; with ``plain``, arguments and results as plain values."""
    data = dict(event.data)
    if plain:
        from pyworkflow.cli._values import plain_arguments, plain_value

        args, result = data.get("args"), data.get("result")
        if isinstance(args, str):
            data["args"] = plain_arguments(str(data.get("workflow")), args)
        if isinstance(result, str):
            data["result"] = plain_value(result)
    return {
        "v": event.v,
        "run_id": event.run_id,
        "seq": event.seq,
        "timestamp": _instant(event.timestamp),
        "type": str(event.type),
        "class": str(event.klass),
        "op": event.op,
        "key": event.key,
        "data": data,
    }


def _instant(at: datetime | None) -> str | None:
    return None if at is None else at.isoformat()
