"""``pyworkflow run``: start a run, follow it to its end, show the result."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from datetime import timedelta
from decimal import Decimal
from time import monotonic
from typing import TYPE_CHECKING, Any, cast

import click

from pyworkflow._text import escaped
from pyworkflow.cli import _output as output
from pyworkflow.cli._options import (
    import_workflows,
    opening,
    settle_settings,
    shared,
    store_hint,
    wants_json,
)
from pyworkflow.cli._progress import ENDS, Progress
from pyworkflow.cli._values import value_line
from pyworkflow.errors import ArgumentError

if TYPE_CHECKING:
    from pyworkflow._annotations import Check
    from pyworkflow._definitions import Workflow
    from pyworkflow._local import EmbeddedHost
    from pyworkflow.events import Event
    from pyworkflow.runs import Run

__all__ = ["command"]

_GLANCE = timedelta(seconds=5)
_PATIENCE = 8.0
"""Seconds after which it is said that no worker has taken the run."""


@click.command("run", short_help="Start a run and follow it to its end.")
@click.argument("target", metavar="MODULE:WORKFLOW")
@click.option(
    "--arg",
    "named",
    multiple=True,
    metavar="NAME=VALUE",
    help="An argument of the workflow. VALUE is JSON, or else text. May be given again.",
)
@click.option(
    "--args",
    "document",
    metavar="JSON",
    help="All arguments: an object by name, or a list by position.",
)
@click.option(
    "--key",
    metavar="KEY",
    help="Idempotency key: a run that has it already is followed, none is started.",
)
@shared
def command(target: str, named: Sequence[str], document: str | None, key: str | None) -> int:
    r"""Start a run of WORKFLOW, show what happens, and print its result.

    MODULE is a dotted name or path/file.py; the current directory is on the path. With the local
    executor the run is worked on in this process. It is durable at once: interrupted (Ctrl-C) or
    killed, it goes on when `pyworkflow worker MODULE` runs.

    \b
    pyworkflow run shop.orders:process_order --arg order_id=ORD-123 --key order-ORD-123
    pyworkflow run examples/quickstart.py:tour --args '{"visitor": "Ada"}'

    Exit status: 0 completed, 1 failed, cancelled or stalled, 130 interrupted.
    """
    module, colon, name = target.rpartition(":")
    if not colon or not module or not name:
        raise click.UsageError(
            f"{target!r} names no workflow; write MODULE:WORKFLOW, for example "
            "app.py:onboarding or shop.orders:process_order"
        )
    with output.json_alone() if wants_json() else contextlib.nullcontext():
        import_workflows([module])
        settle_settings()
        workflow = _find(module, name)
        args, kwargs = _arguments(workflow, named, document)
        text = workflow.encode_call(tuple(args), kwargs)  # wrong arguments need no store
        from pyworkflow._functions import start_encoded
        from pyworkflow._local import host

        with opening():
            embedded = host()
        keyed = workflow.options(idempotency_key=key)
        return _follow(embedded, module, lambda: start_encoded(keyed, text))


def _find(module: str, name: str) -> Workflow[Any, Any]:
    """The workflow by the name of its variable, or by the name that it goes by."""
    import difflib
    from pathlib import Path

    from pyworkflow._declared import DeclaredWorkflow
    from pyworkflow._definitions import Workflow, find_workflow, workflow_names

    stem = Path(module).stem if module.endswith(".py") else module
    there = vars(sys.modules[stem])
    found = there.get(name)
    registered = find_workflow(found.name if isinstance(found, Workflow) else name)
    if registered is not None:
        return registered
    if isinstance(found, DeclaredWorkflow):
        return cast("Workflow[Any, Any]", found)  # its workers are elsewhere
    known = sorted({k for k, v in there.items() if isinstance(v, Workflow)} | workflow_names())
    if found is not None:
        raise ArgumentError(f"{name} in {module} is no workflow; decorate it with @workflow()")
    close = difflib.get_close_matches(name, known)
    if close:
        remedy = f"did you mean {' or '.join(close)}?"
    elif known:
        remedy = f"there are {', '.join(known)}"
    else:
        remedy = "it defines none; decorate an async function with @workflow()"
    raise ArgumentError(f"no such workflow: module={module} workflow={name}; {remedy}")


def _arguments(
    workflow: Workflow[Any, Any], named: Sequence[str], document: str | None
) -> tuple[list[object], dict[str, object]]:
    args: list[object] = []
    kwargs: dict[str, object] = {}
    if document is not None:
        try:
            given: object = json.loads(document, parse_float=_Digits)
        except ValueError as error:
            raise click.UsageError(f"--args is no JSON: {error}") from error
        signature = workflow._signature
        if isinstance(given, dict):
            for key, item in cast("Mapping[str, object]", given).items():
                kwargs[key] = _numbers(item, signature.check_of(key))
        elif isinstance(given, list):
            for place, item in enumerate(cast("Sequence[object]", given)):
                args.append(_numbers(item, signature.check_at(place)))
        else:
            raise click.UsageError("--args takes a JSON object, or a list")
    for one in named:
        name, equals, text = one.partition("=")
        if not equals or not name:
            raise click.UsageError(f"--arg {one!r} is not NAME=VALUE")
        if name in kwargs:
            raise click.UsageError(f"argument {name!r} is given twice; give it once")
        kwargs[name] = _value(text, workflow._signature.check_of(name))
    return args, kwargs


def _value(text: str, check: Check | None) -> object:
    """What the annotation takes: JSON if it is that, or else the text: ``--arg id=007``.

    A type that takes both as they are gets JSON, before one is converted to another. Where the
    annotation names ``Decimal``, numbers keep every digit.
    """
    from pydantic import ValidationError

    try:
        value: object = json.loads(text)
    except ValueError:
        return text
    if check is None or isinstance(value, str):
        return value
    value = _numbers(json.loads(text, parse_float=_Digits), check)
    for strict in (True, None):
        for candidate in (value, text):
            with contextlib.suppress(ValidationError):
                check.adapter.validate_python(candidate, strict=strict)
                return candidate
    return value


class _Digits(Decimal):
    """A number with a point in a JSON text."""


def _numbers(tree: Any, check: Check | None) -> Any:
    """The tree with floats; where Decimal is wanted, a number that no float has stays exact."""
    parts = tree  # the type checkers narrow `tree` to lists of unknown things
    if isinstance(tree, list):
        return [_numbers(item, check) for item in parts]
    if isinstance(tree, dict):
        return {key: _numbers(item, check) for key, item in cast("dict[str, Any]", tree).items()}
    if not isinstance(tree, _Digits):
        return tree
    exact = check is not None and check.mentions_decimal and repr(float(tree)) != str(tree)
    return Decimal(tree) if exact else float(tree)


# --- following ----------------------------------------------------------------------------------


def _follow(embedded: EmbeddedHost, module: str, start: Callable[[], str]) -> int:
    from pyworkflow._logging import show_lines_alone
    from pyworkflow.runs import RunStatus

    run_id = ""
    progress = Progress()
    show_lines_alone()
    try:
        run_id = start()
        # The exit waits for runs that the process started; from here on this command does.
        embedded.started.discard(run_id)
        with _shown(progress) as show:
            run = _watch(embedded, run_id, show)
    except KeyboardInterrupt:
        if not run_id:
            raise
        embedded.started.clear()
        _say_how_to_go_on(embedded, module, run_id)
        return 130
    if wants_json():
        location = embedded.storage.info().location
        output.print_json({**output.run_json(run), "storage": location}, line=True)
    else:
        _say_the_end(embedded, run, progress.failure)
    return 0 if run.status is RunStatus.COMPLETED else 1


def _watch(embedded: EmbeddedHost, run_id: str, show: Callable[[Event], None]) -> Run:
    """Show events as they come; the run when it has ended, or stalled."""
    from pyworkflow._operations import Operations
    from pyworkflow.runs import RunStatus

    operations = Operations(embedded.storage, None, None)
    after = 0
    # With a worker here, too: it may not have the code, or not be for the queue.
    unseen_since: float | None = monotonic()
    while True:
        events = embedded.call(operations.get_events(run_id, after, None))
        for event in events:
            show(event)
            after = event.seq
        if not events or any(e.type in ENDS or e.type == "workflow.stalled" for e in events):
            run = embedded.call(operations.get_run(run_id))
            if run.status.is_terminal and run.next is not None:
                run_id, after = run.next, 0
                continue
            if run.status.is_terminal or run.status is RunStatus.STALLED:
                return run
            if run.status is not RunStatus.PENDING:
                unseen_since = None
            elif unseen_since is not None and monotonic() - unseen_since > _PATIENCE:
                unseen_since = None
                output.note(
                    f"pyworkflow: nobody has taken the run yet: run_id={run_id} queue={run.queue}; "
                    "is a worker with its module running, on this store and this broker?"
                )
        embedded.call(embedded.storage.watch(run_id, after=after, timeout=_GLANCE))


@contextlib.contextmanager
def _shown(progress: Progress) -> Generator[Callable[[Event], None]]:
    """How events are shown: as JSON lines, as plain lines, or above a line that is alive."""
    if wants_json():
        yield lambda event: output.print_json({"event": output.event_json(event)}, line=True)
        return
    if not sys.stdout.isatty():

        def plain(event: Event) -> None:
            for text, _ in progress.lines(event):
                output.styled(text, None)

        yield plain
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)

    def alive() -> Text:
        doing = progress.now()
        return Text(f"          … {doing}" if doing else "", style="dim", overflow="ellipsis")

    # The steps' own prints go through it too: they appear above the line that is alive.
    with Live(get_renderable=alive, console=console, refresh_per_second=8, transient=True):

        def coloured(event: Event) -> None:
            for text, style in progress.lines(event):
                console.print(Text(text, style=style or ""))

        yield coloured


def _say_the_end(embedded: EmbeddedHost, run: Run, failure: str) -> None:
    from pyworkflow.runs import RunStatus

    if run.status is RunStatus.COMPLETED:
        output.styled(f"result   {value_line(run.result_text, 10_000)}", None)
    else:
        sys.stdout.flush()
        output.note(f"pyworkflow: the run {_what_became(run)}")
        if run.error is not None and run.error.traceback:
            if failure:
                output.note("In the step that failed last:")
                output.note(_indented(output.own_frames(failure)))
                output.note("In the workflow:")
            output.note(_indented(output.own_frames(run.error.traceback)))
    output.styled(f"history  {embedded.storage.info().location}, run {run.run_id}", "dim")
    output.styled(f"         pyworkflow runs events {run.run_id}{store_hint()}", "dim")


def _indented(lines: list[str]) -> str:
    """Lines of a traceback: a message in it has lines of its own, which pass for none of ours."""
    return "\n".join(f"  {escaped(line)}" for line in lines)


def _what_became(run: Run) -> str:
    from pyworkflow.runs import RunStatus

    if run.status is RunStatus.STALLED:
        return f"is stalled: {escaped(run.stalled or '')}\nIt is durable: a worker with corrected code goes on with it"
    if run.status is RunStatus.CANCELLED:
        reason = "" if run.error is None else run.error.message
        return f"was cancelled: {escaped(reason)}" if reason else "was cancelled"
    if run.error is None:
        return run.status.value
    kind = run.error.type.rpartition(":")[2]
    return escaped(f"{run.status.value}: {kind}: {run.error.message}".rstrip(": "))


def _say_how_to_go_on(embedded: EmbeddedHost, module: str, run_id: str) -> None:
    hint = store_hint()
    if embedded.worker is None:
        output.note(f"\npyworkflow: interrupted; workers go on with the run: run_id={run_id}")
    else:
        output.note(
            f"\npyworkflow: interrupted; the run is durable and waits for a worker: run_id={run_id}"
        )
        output.note(f"  pyworkflow worker {module}{hint}")
    output.note(f"  pyworkflow runs events {run_id} --follow{hint}")
    output.note(f"  pyworkflow runs cancel {run_id}{hint}")
