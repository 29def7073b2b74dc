"""What a history says, for people: a line for each event, and what a run is doing just now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast

from pyworkflow._text import cut, escaped
from pyworkflow.cli._output import age, shown
from pyworkflow.cli._values import arguments_line, value_line

if TYPE_CHECKING:
    from pyworkflow.events import Event

__all__ = ["ENDS", "LONGEST", "Progress", "describe", "style_of"]

LONGEST = 20_000
"""Characters of what is shown of an event."""
ENDS = frozenset(
    {
        "workflow.completed",
        "workflow.failed",
        "workflow.cancelled",
        "workflow.terminated",
        "workflow.continued",
    }
)
#: Said by the events around them, or of interest to operators alone: `runs events` shows them.
_QUIET = frozenset({"step.scheduled", "workflow.suspended", "workflow.resumed", "timer.fired"})
_STYLES = {
    "workflow.completed": "bold green",
    "workflow.failed": "bold red",
    "workflow.cancelled": "bold yellow",
    "workflow.stalled": "bold red",
    "workflow.deadline": "red",
    "step.started": "dim",
    "step.completed": "green",
    "step.retrying": "yellow",
    "step.failed": "red",
    "sleep.created": "cyan",
    "sleep.completed": "cyan",
    "log.debug": "dim",
    "log.warning": "yellow",
    "log.error": "red",
}


def style_of(event: Event) -> str | None:
    """The colour of an event's line."""
    return _STYLES.get(event.type)


def describe(event: Event, call: str | None = None) -> str:
    """What the event says, on one line. ``call`` shows the step with its arguments."""
    return escaped(cut(_described(event, call), LONGEST))


def _described(event: Event, call: str | None) -> str:
    data = cast("Mapping[str, Any]", event.data)
    name = call or str(data.get("name", ""))
    attempt = data.get("attempt", 1)
    nth = f" on try {attempt}" if attempt != 1 else ""
    match event.type:
        case "workflow.started":
            return f"started {data['workflow']}({arguments_line(None, data['args'], 60)})"
        case "workflow.resumed":
            return f"taken up by {data['worker']} ({data['cause']})"
        case "workflow.suspended":
            until = f" until {_clock(data['until'])}" if data.get("until") else ""
            return f"waits for {', '.join(data['waiting']) or 'the outside'}{until}"
        case "workflow.completed":
            return f"completed: {value_line(data['result'])}"
        case "workflow.failed":
            return f"failed: {_error(data['error'])}"
        case "workflow.stalled":
            return f"stalled: {data['reason']}"
        case "workflow.cancelled" | "workflow.terminated" | "workflow.paused":
            return event.type.partition(".")[2] + _because(data)
        case "workflow.deadline":
            return f"max_duration is over: deadline={_clock(data['deadline'])}"
        case "limit.reached":
            return f"the history is too long: events={data['length']} limit={data['limit']}"
        case "cancel.requested":
            return f"asked to cancel{_because(data)}"
        case "step.scheduled":
            return f"step {data['name']}({arguments_line(None, data['args'], 60)}) scheduled"
        case "step.started":
            again = f", try {attempt}" if attempt != 1 else ""
            return f"step {name} started{again}"
        case "step.completed":
            return f"step {name} completed{nth}: {value_line(data['result'])}"
        case "step.retrying":
            wait = (_instant(data["retry_at"]) - event.timestamp).total_seconds()
            return (
                f"step {name} failed on try {attempt}, next try in {age(max(0.0, wait))}: "
                f"{_error(data['error'])}"
            )
        case "step.failed":
            return f"step {name} failed for good on try {attempt}: {_error(data['error'])}"
        case "step.cancelled":
            return f"step {name} cancelled"
        case "sleep.created":
            left = (_instant(data["until"]) - event.timestamp).total_seconds()
            return f"sleeps {age(max(0.0, left))}, until {_clock(data['until'])}"
        case "sleep.completed":
            return f"sleep is over{_late(data['lag'])}"
        case "timer.fired":
            return f"timer is over{_late(data['lag'])}"
        case "version.marked":
            return f"takes the code of patch {data['id']!r}"
        case "log.debug" | "log.info" | "log.warning" | "log.error":
            fields = "".join(f" {key}={shown(value, 80)}" for key, value in data["fields"].items())
            return f"{event.type.partition('.')[2]}: {data['message']}{fields}"
        case _:
            return shown(dict(data)) if data else event.type.replace(".", " ")


class Progress:
    """Follows a history: which lines to show, and what runs or sleeps now."""

    def __init__(self) -> None:
        self.failure = ""
        """The traceback of the step that failed last."""
        self._begun: datetime | None = None
        self._calls: dict[str | None, str] = {}
        """Op → the call of its step, as far as the history shows arguments."""
        self._running: dict[str | None, str] = {}
        self._until: dict[str | None, tuple[str, datetime]] = {}

    def lines(self, event: Event) -> Iterator[tuple[str, str | None]]:
        """The event's line and its style, if it has one."""
        self._note(event)
        if event.type in _QUIET:
            return
        at = event.timestamp
        if event.type == "step.started":
            at = _instant(cast("str", event.data["at"]))
        begun = self._begun or at
        branch = (event.op or "").partition("#")[0].partition(".")[2]
        place = f"[{escaped(branch)}] " if branch else ""
        text = describe(event, self._calls.get(event.op))
        if event.type == "workflow.started":
            text += f"  {escaped(event.run_id)}"
        elif event.type in ENDS:
            text = event.type.partition(".")[2]  # what became of it is said at the end
        yield f"{(at - begun).total_seconds():7.2f}s  {place}{text}", style_of(event)

    def now(self) -> str:
        """What the run is doing at this moment, for a line that is written anew."""
        parts: list[str] = []
        if self._running:
            parts.append(f"running {', '.join(self._running.values())}")
        instant = datetime.now(UTC)
        for what, until in sorted(self._until.values(), key=lambda one: one[1])[:4]:
            left = (until - instant).total_seconds()
            parts.append(f"{what}, {age(round(left, 1))} left" if left > 0 else f"{what}, due")
        return escaped(" · ".join(parts))

    def _note(self, event: Event) -> None:
        data = cast("Mapping[str, Any]", event.data)
        match event.type:
            case "workflow.started":
                self._begun = event.timestamp
            case "step.scheduled":
                self._calls[event.op] = f"{data['name']}({arguments_line(None, data['args'], 60)})"
            case "step.started":
                called = self._calls.get(event.op)
                self._until.pop(event.op, None)
                self._running[event.op] = called or str(data["name"])
            case "step.retrying":
                self._running.pop(event.op, None)
                what = f"waiting to try {data['name']} again"
                self._until[event.op] = (what, _instant(data["retry_at"]))
            case "step.completed" | "step.failed" | "step.cancelled":
                if event.type == "step.failed":
                    self.failure = str(data["error"].get("traceback", ""))
                self._running.pop(event.op, None)
                self._until.pop(event.op, None)
            case "sleep.created":
                self._until[event.op] = ("sleeping", _instant(data["until"]))
            case "sleep.completed":
                self._until.pop(event.op, None)
            case _:
                pass


def _instant(text: str) -> datetime:
    return datetime.fromisoformat(text)


def _clock(text: str) -> str:
    return f"{_instant(text):%Y-%m-%d %H:%M:%S}Z"


def _late(lag: float) -> str:
    return f" ({age(lag)} late)" if lag >= 0.1 else ""


def _because(data: Mapping[str, Any]) -> str:
    return f": {data['reason']}" if data.get("reason") else ""


def _error(error: Mapping[str, Any]) -> str:
    kind = str(error["type"]).rpartition(":")[2].rpartition(".")[2]
    message = " ".join(str(error["message"]).split())
    return f"{kind}: {message[:300]}" if message else kind
