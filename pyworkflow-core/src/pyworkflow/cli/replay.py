"""``pyworkflow replay``: does today's code still produce a recorded history?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pyworkflow.cli import _output as output
from pyworkflow.cli._options import import_workflows, in_store, settle_settings, shared, wants_json

if TYPE_CHECKING:
    from pyworkflow._operations import Operations
    from pyworkflow.testing import History

__all__ = ["command"]


@click.command("replay", short_help="Check that code still fits a recorded history.")
@click.argument("source", metavar="FILE|RUN_ID")
@click.option(
    "--module",
    "modules",
    multiple=True,
    metavar="MODULE",
    help="Defines the workflow: dotted name or path/file.py. Default: the setting `modules`.",
)
@click.option(
    "--save",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write the history to FILE too, for a test to replay.",
)
@shared
def command(source: str, modules: Sequence[str], save: Path | None) -> int:
    r"""Feed a history to today's code of its workflow. Runs no step, writes nothing.

    The history is a FILE (made by --save or pyworkflow.testing.History.dump), or a run of the
    store. Use it before a deployment: a run whose history no longer fits would stall.

    \b
    pyworkflow replay RUN_ID --module app.py
    pyworkflow replay tests/histories/onboarding.json --module app.py

    Exit status: 0 the code fits, 1 it does not.
    """
    import_workflows(modules)
    settle_settings()
    if not modules:
        from pyworkflow._config import settings

        import_workflows(settings().modules)
    from pyworkflow._definitions import find_workflow
    from pyworkflow.testing import replay

    history = _history(source)
    if save is not None:
        try:
            history.dump(save)
        except OSError as error:
            raise click.UsageError(f"--save {save}: {error}") from error
    if find_workflow(history.run.workflow) is None:
        raise click.UsageError(
            f"no workflow of this name is defined: workflow={history.run.workflow}; name its "
            "module with --module, or set modules in [tool.pyworkflow] or PYWORKFLOW_MODULES"
        )
    found = replay(history)
    mismatch = None if found.mismatch is None else str(found.mismatch)
    if wants_json():
        output.print_json(
            {
                "ok": found.ok,
                "run_id": history.run.run_id,
                "workflow": history.run.workflow,
                "events": len(history.events),
                "status": str(found.status),
                "waiting": list(found.waiting),
                "mismatch": mismatch,
            }
        )
    elif found.ok:
        output.styled(
            f"the code fits: workflow={history.run.workflow} run_id={history.run.run_id} "
            f"events={len(history.events)} status={found.status}",
            "green",
        )
    else:
        output.styled(
            f"the code does not fit: workflow={history.run.workflow} "
            f"run_id={history.run.run_id} events={len(history.events)}\n{mismatch}",
            "red",
        )
    return 0 if found.ok else 1


def _history(source: str) -> History:
    from pyworkflow.testing import History

    path = Path(source)
    if path.is_file():
        try:
            return History.load(path)
        except OSError as error:
            raise click.UsageError(f"the file cannot be read: {error}") from error
    if path.suffix == ".json" or "/" in source:
        raise click.UsageError(f"no such file: {source}; give a history's file or a run id")

    async def read(operations: Operations) -> History:
        return await History.fetch(source, operations.storage)

    found: History = in_store(read)
    return found
