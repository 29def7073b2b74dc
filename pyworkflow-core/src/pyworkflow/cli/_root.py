"""The group of all commands, and what an error means for the exit status."""

from __future__ import annotations

import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import cast

import click

from pyworkflow.cli._options import Unusable, shared

__all__ = ["DONE", "FAILED", "INTERRUPTED", "MISUSED", "UNUSABLE", "execute"]

DONE, FAILED, MISUSED, UNUSABLE, INTERRUPTED = 0, 1, 2, 3, 130

_COMMANDS = {
    "run": "pyworkflow.cli.run",
    "worker": "pyworkflow.cli.worker",
    "runs": "pyworkflow.cli.runs",
    "replay": "pyworkflow.cli.replay",
    "storage": "pyworkflow.cli.storage",
    "conformance": "pyworkflow.cli.conformance",
    "plugins": "pyworkflow.cli.plugins",
}


class _Unread(Exception):
    """Nobody reads the output any more."""


#: Commands that people know and that a plugin brings.
_OF_PLUGINS = {"dev": "pyworkflow-celery[dev]"}


class _Root(click.Group):
    """Imports the module of a command when it is used, and asks plugins for those it lacks."""

    _asked = False

    def list_commands(self, ctx: click.Context) -> list[str]:
        self._ask_plugins()
        return [*_COMMANDS, *sorted(self.commands)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        home = _COMMANDS.get(cmd_name)
        if home is not None:
            return cast("click.Command", importlib.import_module(home).command)
        self._ask_plugins()
        return self.commands.get(cmd_name)

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:  # which click would make an exit with status 1
            raise _Unread from error

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        import difflib

        if not ctx.resilient_parsing and self.get_command(ctx, args[0]) is None:
            if args[0] in _OF_PLUGINS:
                package = _OF_PLUGINS[args[0]]
                raise click.UsageError(
                    f"the command {args[0]!r} comes with another distribution: "
                    f"pip install '{package}', from a clone './{package}'",
                    ctx,
                )
            close = difflib.get_close_matches(args[0], self.list_commands(ctx))
            hint = f" Did you mean {' or '.join(close)}?" if close else ""
            raise click.UsageError(f"No such command {args[0]!r}.{hint}", ctx)
        return super().resolve_command(ctx, args)

    def _ask_plugins(self) -> None:
        if not self._asked:
            self._asked = True
            from pyworkflow import _plugins

            _plugins.load_all()
            _plugins.observe("pyworkflow_cli", group=self)


@click.group(
    cls=_Root,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit status: 0 done, 1 a run or check failed, 2 wrong use, 3 storage or plugin "
    "unusable, 130 interrupted. Settings come from the options, PYWORKFLOW_* variables, and "
    "[tool.pyworkflow] in pyproject.toml, in this order.",
)
@click.version_option(package_name="pyworkflow-core", prog_name="pyworkflow")
@shared
def root() -> None:
    r"""Durable workflows: start them, work on them, look at them.

    \b
    pyworkflow run app.py:onboarding --arg user=ada    start a run and follow it
    pyworkflow worker app.py                           work on whatever is due
    pyworkflow runs list                               what is there
    pyworkflow runs events RUN_ID                      all that happened to one
    """


def execute(args: Sequence[str] | None = None) -> int:
    """Run one command; the exit status. Foreseeable errors are a line on stderr."""
    from pyworkflow.errors import WorkflowError

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that lacks a character shows another one; it is no reason to fail.
            stream.reconfigure(errors="backslashreplace")
    try:
        status = root.main(
            None if args is None else list(args), prog_name="pyworkflow", standalone_mode=False
        )
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        _complain("interrupted")
        return INTERRUPTED
    except (_Unread, BrokenPipeError):
        # The reader has seen enough (`| head`). The exit's own flush must not complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except WorkflowError as error:
        _complain(str(error))
        return _status_of(error)
    return status if isinstance(status, int) else DONE


def _status_of(error: Exception) -> int:
    from pyworkflow import errors

    if isinstance(error, (Unusable, errors.StorageError, errors.PluginNotFound)):
        return UNUSABLE
    if isinstance(error, errors.PluginBroken):
        return UNUSABLE
    misuse = (
        errors.ArgumentError,
        errors.ConfigurationError,
        errors.DefinitionError,
        errors.IdempotencyConflict,
        errors.PayloadTooLarge,
        errors.RunNotFound,
        errors.SerializationError,
    )
    return MISUSED if isinstance(error, misuse) else FAILED


def _complain(text: str) -> None:
    from pyworkflow._text import escaped

    # A message may hold a value with line breaks: they make no line that seems to be ours.
    sys.stderr.write("pyworkflow: " + "\n  ".join(map(escaped, text.split("\n"))) + "\n")
