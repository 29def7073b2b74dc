"""``pyworkflow runs``: list, show, events, cancel."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, cast

import click

from pyworkflow._text import cut, escaped
from pyworkflow.cli import _output as output
from pyworkflow.cli._options import in_store, shared, store_hint, wants_json
from pyworkflow.cli._progress import ENDS, LONGEST, describe, style_of
from pyworkflow.cli._values import arguments_line, value_line

if TYPE_CHECKING:
    from pyworkflow._operations import Operations
    from pyworkflow.events import Event
    from pyworkflow.runs import Run, WorkItem
    from pyworkflow.spi.storage import Page

__all__ = ["command"]

_STATUSES = (
    "pending",
    "running",
    "suspended",
    "paused",
    "stalled",
    "completed",
    "failed",
    "cancelled",
    "terminated",
    "continued",
)
_PAGE = 1000
"""Events that are read at once."""
_GLANCE = timedelta(seconds=5)


@click.group("runs", short_help="List runs, look at one, cancel one.")
@shared
def command() -> None:
    r"""List runs, look at one, cancel one.

    \b
    pyworkflow runs list --status failed --status stalled
    pyworkflow runs show RUN_ID
    pyworkflow runs events RUN_ID --follow
    pyworkflow runs cancel RUN_ID --reason "ordered twice"
    """


@command.command("list")
@click.option(
    "--status",
    "statuses",
    multiple=True,
    type=click.Choice(_STATUSES),
    help="Only runs with this status. May be given again.",
)
@click.option("--workflow", metavar="NAME", help="Only runs of this workflow.")
@click.option(
    "--limit", type=click.IntRange(1, 1000), default=20, show_default=True, help="How many."
)
@click.option("--cursor", metavar="CURSOR", help="Where the page before ended.")
@shared
def list_runs(
    statuses: Sequence[str], workflow: str | None, limit: int, cursor: str | None
) -> None:
    """List runs, newest first."""

    async def read(operations: Operations) -> tuple[Page[Run], str]:
        try:
            page = await operations.list_runs(statuses or None, workflow, limit, cursor)
        except ValueError as error:
            raise click.UsageError(f"--cursor {cursor!r}: {error}") from error
        return page, operations.storage.info().location

    page, location = in_store(read)
    if wants_json():
        output.print_json(
            {"runs": [output.run_json(run) for run in page.items], "cursor": page.cursor}
        )
        return
    if not page.items:
        output.note(
            f"no such runs in {location}" if statuses or workflow else f"no runs in {location}"
        )
        return
    rows = [
        (
            run.run_id,
            run.workflow,
            run.status.value,
            output.moment(run.created_at),
            output.moment(run.finished_at),
        )
        for run in page.items
    ]
    output.print_table(("RUN", "WORKFLOW", "STATUS", "CREATED", "ENDED"), rows)
    if page.cursor is not None:
        output.note(f"more: add --cursor {page.cursor}")


@command.command("show")
@click.argument("run_id")
@shared
def show_run(run_id: str) -> None:
    """Show a run: status, arguments, result or error, and what it waits for."""

    async def read(operations: Operations) -> tuple[Run, list[WorkItem], str]:
        run = await operations.get_run(run_id)
        failure = await _last_failure(operations, run) if run.error and not wants_json() else ""
        return run, await operations.storage.list_work(run_id), failure

    run, work, failure = in_store(read)
    if wants_json():
        items = [
            {
                "item_id": item.item_id,
                "kind": item.kind.value,
                "queue": item.queue,
                "due_at": item.due_at.isoformat(),
                "claims": item.claims,
                "owner": None if item.lease is None else item.lease.owner,
            }
            for item in work
        ]
        output.print_json({**output.run_json(run), "work": items})
        return
    error: list[str] = []
    if run.error is not None:
        error = [line for line in output.own_frames(run.error.traceback) if line] or [
            f"{run.error.type}: {run.error.message}"
        ]
        if failure:
            step = [f"  {line}" for line in output.own_frames(failure) if line]
            whole = [f"  {line}" for line in error]
            error = ["In the step that failed last:", *step, "In the workflow:", *whole]
    output.print_pairs(
        {
            "run": run.run_id,
            "workflow": run.workflow + (f" (version {run.version})" if run.version != "1" else ""),
            "status": run.status.value,
            "stalled": run.stalled or "",
            "arguments": arguments_line(run.workflow, run.args_text),
            "result": "" if run.result_text is None else value_line(run.result_text, 10_000),
            "error": error,
            "key": run.idempotency_key or "",
            "tags": ", ".join(run.tags),
            "created": output.moment(run.created_at),
            "started": output.moment(run.started_at),
            "ended": output.moment(run.finished_at),
            "deadline": output.moment(run.deadline),
            "events": str(run.history_length),
            "next run": run.next or "",
            "work": [_owed(item) for item in work],
        }
    )


async def _last_failure(operations: Operations, run: Run) -> str:
    """The traceback of the step that failed last, or nothing."""
    end = run.history_length
    while end > 0:
        after = max(0, end - _PAGE)
        for event in reversed(await operations.get_events(run.run_id, after, end - after)):
            if event.type == "step.failed":
                error = cast("Mapping[str, object]", event.data["error"])
                return str(error.get("traceback", ""))
        end = after
    return ""


def _owed(item: WorkItem) -> str:
    held = f", last held by {item.lease.owner}" if item.lease is not None else ""
    return f"{item.item_id} due {output.moment(item.due_at)} in queue {item.queue}{held}"


def _event_types(
    ctx: click.Context, parameter: click.Parameter, given: Sequence[str]
) -> Sequence[str]:
    """Event types, and beginnings of them up to their dot; other levels of ``log`` may come."""
    from pyworkflow.events import EventType

    known = sorted(str(kind) for kind in EventType)
    for one in given:
        if not one.startswith("log.") and one not in known and not _is_beginning(one, known):
            raise click.BadParameter(
                f"{one!r} is no type of events; there are {', '.join(known)}", ctx, parameter
            )
    return given


def _is_beginning(text: str, known: Sequence[str]) -> bool:
    return text.endswith(".") and any(kind.startswith(text) for kind in known)


def _is_wanted(kind: str, types: Sequence[str]) -> bool:
    return any(kind == one or (one.endswith(".") and kind.startswith(one)) for one in types)


@command.command("events")
@click.argument("run_id")
@click.option("--after", type=click.IntRange(min=0), default=0, metavar="SEQ", help="Start behind.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="How many at most.")
@click.option(
    "--type",
    "types",
    multiple=True,
    metavar="TYPE",
    callback=_event_types,
    help="Only these, as step.failed; `step.` means every type that begins so. May be given again.",
)
@click.option("--follow", is_flag=True, help="Go on until the run ends.")
@click.option("--plain", is_flag=True, help="With --json: values as objects, not as stored text.")
@shared
def show_events(
    run_id: str, after: int, limit: int | None, types: Sequence[str], follow: bool, plain: bool
) -> None:
    """Show a run's history, event by event.

    With --json one event per line, in the form of the event schema: arguments and results are the
    JSON text that the store has. With --plain they are objects.
    """

    async def read(operations: Operations) -> None:
        position, left = after, limit
        while True:
            events = await operations.get_events(run_id, position, left)
            for event in events:
                position = event.seq
                if not types or _is_wanted(event.type, types):
                    _show_event(event, plain)
            left = None if left is None else left - len(events)
            if not follow or left == 0 or any(event.type in ENDS for event in events):
                return
            if not events and (await operations.get_run(run_id)).status.is_terminal:
                return
            await operations.storage.watch(run_id, after=position, timeout=_GLANCE)

    in_store(read)


def _show_event(event: Event, plain: bool) -> None:
    if wants_json():
        output.print_json(output.event_json(event, plain=plain), line=True)
        return
    try:
        said = describe(event)
    except (KeyError, TypeError, ValueError):  # written by another version: shown as it is
        said = escaped(cut(json.dumps(dict(event.data)), LONGEST))
    op = escaped(event.op or "")
    at = f"{event.timestamp:%Y-%m-%d %H:%M:%S}.{event.timestamp.microsecond // 1000:03}Z"
    output.styled(f"{event.seq:>5}  {at}  {event.type:<19} {op:<14} {said}", style_of(event))


@command.command("cancel")
@click.argument("run_id")
@click.option("--reason", default="", metavar="TEXT", help="Recorded, and shown to the workflow.")
@shared
def cancel_run(run_id: str, reason: str) -> None:
    """Ask a run to end: its code gets CancelledError where it waits, and may clean up.

    Returns when the request is durable. A run that no code has begun, or that is stalled, ends at
    once. Exit status 1 when it has ended otherwise.
    """

    async def ask(operations: Operations) -> Run:
        await operations.cancel(run_id, reason)
        return await operations.get_run(run_id)

    run = in_store(ask)
    if wants_json():
        output.print_json({"run_id": run_id, "status": run.status.value})
    elif run.status.is_terminal:
        output.styled(f"{run.status.value}  {escaped(run_id)}", "yellow")
    else:
        output.styled(f"asked to cancel  {escaped(run_id)}", "yellow")
        output.note(
            f"its code ends it when a worker drives it: `pyworkflow runs show {escaped(run_id)}"
            f"{store_hint()}`"
        )
