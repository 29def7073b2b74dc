"""``pyworkflow worker``: work on whatever is due, until told to stop."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import click

from pyworkflow.cli._options import (
    import_workflows,
    opening,
    queue_names,
    settle_settings,
    shared,
    wants_json,
)

__all__ = ["command"]


@click.command("worker", short_help="Work on due runs until stopped.")
@click.argument("modules", nargs=-1, metavar="[MODULE]...")
@click.option(
    "--queue",
    "queues",
    multiple=True,
    metavar="QUEUE",
    callback=queue_names,
    help="Take work of this queue only: a name, or names with commas between them. May be given "
    "again. Default: every queue, with celery:// the queue `default` alone.",
)
@click.option(
    "--concurrency",
    type=click.IntRange(min=1),
    metavar="N",
    help="Steps that run at once (default 100 async ones, and a thread or so per processor).",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="What is logged to stderr, unless a module has set up logging itself.",
)
@shared
def command(
    modules: Sequence[str], queues: Sequence[str], concurrency: int | None, log_level: str
) -> int:
    r"""Work on due runs of the workflows that MODULEs define.

    MODULE is a dotted name or path/file.py; without any, the setting `modules` counts
    (PYWORKFLOW_MODULES, or modules in [tool.pyworkflow]). Any number of workers may share a
    store. SIGTERM and Ctrl-C drain: what is begun may end within 10 s (setting `drain`), the rest
    is given back; a second one ends at once, and nothing is lost either way. With --json the log
    is JSON lines.

    \b
    pyworkflow worker app.py
    pyworkflow worker shop.orders shop.mails --queue default --queue slow
    """
    from pyworkflow._config import configure, settings
    from pyworkflow._definitions import workflow_names
    from pyworkflow._local import configured_executor
    from pyworkflow._logging import configure_logging
    from pyworkflow.worker import create_runtime

    if modules:
        # Before the settings are read, since the modules may configure them.
        import_workflows(modules)
    settle_settings()
    if concurrency is not None:
        configure(concurrency=concurrency)
    if not modules:
        modules = settings().modules
        import_workflows(modules)
    with opening():
        executor = configured_executor(settings())
        runtime = create_runtime(queues=queues or None, spread=executor.capabilities.distributed)
    names = sorted(workflow_names())  # plugins may have brought some as well
    if not names and modules:
        raise click.UsageError(
            f"no workflow is defined: modules={','.join(modules)}; decorate an async function "
            "with @workflow()"
        )
    if not names:
        raise click.UsageError(
            "no module is named whose workflows could be worked on; write `pyworkflow worker "
            "MODULE`, or set modules in [tool.pyworkflow] or PYWORKFLOW_MODULES"
        )
    if not logging.getLogger().handlers:
        configure_logging(level=log_level.upper(), json_logs=wants_json())
    log = logging.getLogger("pyworkflow.worker")
    default = "default" if executor.capabilities.distributed else "every queue"
    log.info("the worker takes from queues: %s", ", ".join(queues) or default)
    log.info("the worker has workflows: %s", ", ".join(names))
    with opening():
        executor.serve(runtime, list(queues))
    log.info("the worker has stopped")
    return 0
