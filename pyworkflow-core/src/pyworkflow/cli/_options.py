"""The options that every command has, and the store and modules that they lead to."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pyworkflow.errors import ConfigurationError, StorageError

if TYPE_CHECKING:
    from pyworkflow._operations import Operations
    from pyworkflow.spi.storage import StorageBackend

__all__ = [
    "Unusable",
    "import_workflows",
    "in_store",
    "opening",
    "queue_names",
    "refuse_absent",
    "settle_settings",
    "shared",
    "store_hint",
    "wants_json",
]

T = TypeVar("T")
Command = TypeVar("Command", bound=Callable[..., Any])
_META = "pyworkflow.cli."


class Unusable(ConfigurationError):
    """The storage or a plugin cannot be used."""


def shared(command: Command) -> Command:
    """Add ``--storage``, ``--executor`` and ``--json``; they may stand before the command too."""
    # In raw docstrings, click's mark for "keep these lines" is two characters.
    command.__doc__ = (command.__doc__ or "").replace("\\b\n", "\b\n")
    command = click.option(
        "--json",
        "json",
        is_flag=True,
        default=None,
        expose_value=False,
        callback=_remember,
        help="Print JSON: one document, or one line each for what comes bit by bit.",
    )(command)
    command = click.option(
        "--executor",
        metavar="URL",
        expose_value=False,
        callback=_remember,
        help="How work reaches workers, for example local:// (the default).",
    )(command)
    return click.option(
        "--storage",
        metavar="URL",
        expose_value=False,
        callback=_remember,
        help="Where the runs are, for example file:data or file:///srv/data "
        "(default file:.pyworkflow).",
    )(command)


def _remember(ctx: click.Context, parameter: click.Parameter, value: object) -> None:
    if value is not None:
        ctx.meta[f"{_META}{parameter.name}"] = value


def wants_json() -> bool:
    """Whether ``--json`` was given."""
    return bool(click.get_current_context().meta.get(f"{_META}json"))


def queue_names(
    ctx: click.Context, parameter: click.Parameter, given: Iterable[str]
) -> tuple[str, ...]:
    """The names of a repeated ``--queue``, each once; commas separate them as in the setting.

    Raises:
        click.BadParameter: a name is empty, or too long for any run to have it.
    """
    from pyworkflow._names import check_limit

    names = [name.strip() for text in given for name in text.split(",")]
    for name in names:
        if not name:
            raise click.BadParameter(
                "a queue's name is empty; write a name, or leave the option out", ctx, parameter
            )
        try:
            check_limit("queue", name)
        except ValueError as error:
            raise click.BadParameter(str(error), ctx, parameter) from error
    return tuple(dict.fromkeys(names))


def settle_settings() -> None:
    """Make the options settings of this process.

    After the import of modules, which may call ``configure`` themselves: the command line wins.
    """
    from pyworkflow._config import configure

    meta = click.get_current_context().meta
    configure(storage=meta.get(f"{_META}storage"), executor=meta.get(f"{_META}executor"))


def store_hint() -> str:
    """What has to be added to a command that shall see the same store."""
    from pyworkflow._urls import redact_url

    url = click.get_current_context().meta.get(f"{_META}storage")
    return f" --storage {redact_url(url)}" if url else ""


@contextmanager
def opening() -> Generator[None]:
    """What is wrong while a store is opened or an executor made makes it unusable."""
    try:
        yield
    except ConfigurationError as error:
        raise Unusable(str(error)) from error
    except OSError as error:
        raise StorageError(f"the store cannot be opened: {error}") from error


async def refuse_absent(
    storage: StorageBackend,
    check: str = "--storage or PYWORKFLOW_STORAGE, and the current directory",
) -> None:
    """Raise ``Unusable`` for a store that would only be made by opening it."""
    location = storage.info().location
    with opening():
        if _has_no_path(location) or not await storage.exists():
            raise Unusable(
                f"there is no store: {location}; check {check}. "
                "A store is made by the first run or worker that uses it"
            )


def _has_no_path(location: str) -> bool:
    return Path(location).is_absolute() and not Path(location).exists()


def in_store(call: Callable[[Operations], Any]) -> Any:
    """Await ``call`` with a client's operations, no worker, on the configured store."""
    import asyncio

    from pyworkflow._config import settings
    from pyworkflow._local import configured_executor, configured_storage
    from pyworkflow._operations import Operations

    async def main() -> Any:
        with opening():
            storage: StorageBackend = configured_storage(settings())
            executor = configured_executor(settings())
            await refuse_absent(storage)
            await storage.open()
        try:
            if not executor.capabilities.distributed:
                return await call(Operations(storage, None, None))
            await executor.open({})
            try:
                return await call(Operations(storage, None, executor))
            finally:
                await executor.close()
        finally:
            await storage.close()

    settle_settings()
    return asyncio.run(main())


def import_workflows(modules: Iterable[str]) -> None:
    """Import modules that define workflows.

    Raises:
        ConfigurationError: one cannot be imported; says where in the user's code it went wrong.
    """
    from pyworkflow.worker import import_modules

    try:
        import_modules(modules)
    except ConfigurationError as error:
        where = _where(error.__cause__)
        if where:
            raise ConfigurationError(f"{error}\n  {where}") from error
        raise


def _where(error: BaseException | None) -> str:
    """The last line of the user's own code that an exception went through."""
    if error is None:
        return ""
    ours = str(Path(__file__).parents[1])
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if not f.filename.startswith((ours, "<")) and f.line]
    if not theirs or theirs[-1].filename.endswith("importlib/__init__.py"):
        return ""
    last = theirs[-1]
    return f"at {last.filename}:{last.lineno} in {last.name}: {last.line}"
