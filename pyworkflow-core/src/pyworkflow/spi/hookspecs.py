"""Hook specs: how plugins are found and asked, and what they may observe.

Hooks return factories and observe; nothing hot goes through a hook but a set lookup. Every hook is
a plain function (``async def`` and pluggy's wrappers are refused when the plugin loads) and is
called on the thread, often the event loop, where the thing happens: it must return quickly.

A hook that raises is counted and logged, and never changes a run's outcome; factories are the
exception: their error reaches whoever asked for the URL. *Observers* are called after the durable
commit, at least once, in order of ``seq`` per run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from typing import TYPE_CHECKING, Literal, Protocol

import pluggy

if TYPE_CHECKING:
    from pyworkflow.events import Event
    from pyworkflow.runs import ErrorInfo, RunStatus, WorkItem
    from pyworkflow.spi.executor import Executor
    from pyworkflow.spi.storage import StorageBackend

__all__ = ["CliGroup", "Codec", "Registry", "hookimpl", "hookspec"]

hookspec = pluggy.HookspecMarker("pyworkflow")
hookimpl = pluggy.HookimplMarker("pyworkflow")


class Codec(Protocol):
    """Transforms payloads on their way to storage: compression, encryption, offload.

    What ``encode`` made is stored for as long as the run, beside the codec's name and the
    parameters that ``encode`` gave; ``decode`` gets these back, whatever the settings are by then.
    One object serves all threads of a process at once.
    """

    @property
    def secret(self) -> bool:
        """Whether it hides what is stored; then messages and tracebacks of errors go through it."""
        ...

    @property
    def blocking(self) -> bool:
        """Whether it may wait for files or network: then it is called beside the event loop."""
        ...

    def encode(self, data: bytes, context: bytes) -> tuple[bytes, Mapping[str, str]] | None:
        """The bytes to store, and what undoing it needs; None leaves this payload as it is.

        ``context`` stands for the codecs applied before: encryption binds its result to it.
        ``StorageUnavailable`` is tried again; any other exception gives up the change.
        """
        ...

    def decode(self, data: bytes, context: bytes, params: Mapping[str, str]) -> bytes:
        """Inverse of ``encode``, with its ``context`` and its parameters.

        What it raises stalls the run, with the exception's message, and loses nothing.
        """
        ...


class Registry(Protocol):
    """Where plugins name the modules that define workflows."""

    def add_module(self, module: str) -> None:
        """Import ``module`` (a dotted name) when workers start."""
        ...


class CliGroup(Protocol):
    """The command group ``pyworkflow``, as click and typer know it."""

    def add_command(self, cmd: object, name: str | None = None) -> None:
        """Add a click command under ``name``."""
        ...


# --- factories --------------------------------------------------------------------------------


@hookspec(firstresult=True)
def pyworkflow_make_storage(url: str, options: Mapping[str, str]) -> StorageBackend | None:
    """Make the backend for a storage URL, or None when the URL is not this plugin's.

    Does no I/O: the backend's first call opens. ``url`` is the whole URL; of ``file:`` and
    ``sqlite:`` the path was made absolute, other schemes come as they were written: refuse a
    relative path, since a worker would start elsewhere. ``options`` is the query, decoded, plus
    ``namespace`` (1 to 64 letters, digits, dots, underscores and hyphens). Unknown options are the plugin's to refuse,
    with ``ConfigurationError``; no message may repeat credentials.
    """


@hookspec(firstresult=True)
def pyworkflow_make_executor(url: str, options: Mapping[str, str]) -> Executor | None:
    """Make the executor for an executor URL, or None when the URL is not this plugin's.

    Does no I/O. ``options`` are the core's configuration as text, overridden by the URL's query.
    """


@hookspec(firstresult=True)
def pyworkflow_make_codec(name: str, options: Mapping[str, str]) -> Codec | None:
    """Make the codec called ``name``, or None when it is another's.

    Asked are the application's plugins, then the plugin whose entry point has this name. Does no
    I/O but to read keys. ``options`` are the core's codec settings as text (``max_size``,
    ``compress_threshold``, ``offload_dir``, ``offload_threshold``; for ``aesgcm`` also its keys),
    overridden by what follows the name, as in ``codecs="name?bucket=b"``. ``ConfigurationError``
    for what is missing or wrong; no message may repeat credentials.
    """


# --- configuration ----------------------------------------------------------------------------


@hookspec
def pyworkflow_register(registry: Registry) -> None:
    """Name workflow modules that every worker imports beside the configured ones."""


@hookspec
def pyworkflow_configure(config: Mapping[str, str]) -> None:
    """Learn the settings, once per process, when it first works on runs or starts one."""


@hookspec
def pyworkflow_cli(group: CliGroup) -> None:
    """Add commands to ``pyworkflow``."""


@hookspec(firstresult=True)
def pyworkflow_route(item: WorkItem) -> str | None:
    """The queue whose workers are told of ``item``; None for no opinion. Storage keeps its own."""


@hookspec(firstresult=True)
def pyworkflow_error_class(exc: BaseException) -> Literal["retry", "fatal"] | None:
    """Whether a step that raised ``exc`` is tried again; None for no opinion.

    Asked for exceptions other than ``RetryableError`` and ``FatalError``; ``max_retries`` holds.
    """


@hookspec
def pyworkflow_inject_headers(run_id: str, headers: dict[str, str]) -> None:
    """Add text to the message headers of a doorbell, for example a trace context."""


# --- context managers -------------------------------------------------------------------------


@hookspec
def pyworkflow_around_turn(run_id: str, workflow: str) -> AbstractContextManager[object] | None:
    """A context manager that is open while a claimed turn is driven. Never around other runs."""


@hookspec
def pyworkflow_around_step(
    run_id: str, workflow: str, step_id: str, step_name: str, attempt: int
) -> AbstractContextManager[object] | None:
    """A context manager that is open while a step's body runs; never around replayed steps.

    It sees the exception that the body raises and cannot swallow or replace it.
    """


# --- observers --------------------------------------------------------------------------------


@hookspec
def pyworkflow_run_created(run_id: str, workflow: str) -> None:
    """A run is durable and pending."""


@hookspec
def pyworkflow_run_ended(
    run_id: str, workflow: str, status: RunStatus, error: ErrorInfo | None
) -> None:
    """A run has a terminal status."""


@hookspec
def pyworkflow_run_stalled(run_id: str, workflow: str, reason: str) -> None:
    """A run's code does not fit its history or cannot go on; once per distinct cause."""


@hookspec
def pyworkflow_turn_started(run_id: str, workflow: str, replayed: int) -> None:
    """A turn was claimed; ``replayed`` events lie behind it."""


@hookspec
def pyworkflow_turn_ended(run_id: str, workflow: str, seconds: float) -> None:
    """A turn was settled or dropped after ``seconds``."""


@hookspec
def pyworkflow_step_started(
    run_id: str, workflow: str, step_id: str, step_name: str, attempt: int
) -> None:
    """A try of a step began. For a short step this comes with its end, in one commit."""


@hookspec
def pyworkflow_step_ended(
    run_id: str,
    workflow: str,
    step_id: str,
    step_name: str,
    attempt: int,
    error: ErrorInfo | None,
    seconds: float,
) -> None:
    """A step has its result, or with ``error`` failed for good; ``seconds`` of its last try."""


@hookspec
def pyworkflow_step_retrying(
    run_id: str,
    workflow: str,
    step_id: str,
    step_name: str,
    attempt: int,
    error: ErrorInfo,
    retry_at: datetime,
) -> None:
    """Try ``attempt`` failed and the next one is due at ``retry_at``."""


@hookspec
def pyworkflow_events_committed(run_id: str, events: Sequence[Event]) -> None:
    """Events are durable. An exporter keeps the last ``seq`` per run to drop repetitions."""


@hookspec
def pyworkflow_worker_started(worker: str, queues: Sequence[str]) -> None:
    """A worker takes work from now on. With several processes, its main process tells, once."""


@hookspec
def pyworkflow_worker_stopping(worker: str) -> None:
    """A worker takes no more work and drains. As above, once."""


@hookspec
def pyworkflow_sweep_ended(announced: int, seconds: float) -> None:
    """A sweep rang for ``announced`` items."""


@hookspec
def pyworkflow_storage_error(operation: str, error: Exception) -> None:
    """A call of the storage failed and will be sent again, or was given up."""
