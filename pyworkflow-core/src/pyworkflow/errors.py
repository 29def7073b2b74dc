"""Every exception of the core, ordered by who must act.

Each one says what happened, the facts, and the remedy; every fact is also an attribute, and every
exception pickles and rebuilds from its ``args``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyworkflow.events import Event

__all__ = [
    "ArgumentError",
    "ConfigurationError",
    "DefinitionError",
    "DuplicateName",
    "FatalError",
    "HistoryTooLong",
    "IdempotencyConflict",
    "NonDeterminism",
    "PayloadTooLarge",
    "PayloadUnreadable",
    "PluginBroken",
    "PluginNotFound",
    "RetryableError",
    "RunCancelled",
    "RunClosed",
    "RunIdConflict",
    "RunNotFound",
    "RunStalled",
    "RunTerminated",
    "SchemaTooNew",
    "SerializationError",
    "StepError",
    "StepInterrupted",
    "StepTimeout",
    "StorageDamaged",
    "StorageError",
    "StorageFull",
    "StorageUnavailable",
    "WorkerLost",
    "WorkflowContextError",
    "WorkflowError",
    "WorkflowTimeout",
]


class WorkflowError(Exception):
    """Base of everything that PyWorkflow raises on purpose."""


# --- for authors of workflows -----------------------------------------------------------------


class FatalError(WorkflowError):
    """Raised by a step that must not be tried again."""


class RetryableError(WorkflowError):
    """Raised by a step that should be tried again.

    ``retry_after`` (a duration or an instant) overrides the step's ``retry_delay`` for this try.
    """

    def __init__(
        self,
        message: str = "",
        retry_after: str | float | timedelta | datetime | None = None,
    ) -> None:
        super().__init__(message, retry_after)
        self.message = message
        self.retry_after = retry_after

    def __str__(self) -> str:
        return self.message


class StepError(WorkflowError):
    """A step failed with an exception whose type other workers may not have.

    ``type`` is ``module:qualname`` as raised, ``message`` its text, ``traceback`` the formatted
    traceback of the worker that ran the step.
    """

    def __init__(self, type: str, message: str, traceback: str = "") -> None:
        super().__init__(type, message, traceback)
        self.type = type
        self.message = message
        self.traceback = traceback

    def __str__(self) -> str:
        return f"{self.type}: {self.message}"


class StepTimeout(WorkflowError, TimeoutError):
    """A try of a step took longer than its ``timeout``."""


class StepInterrupted(WorkflowError):
    """An at-most-once step was begun and its worker disappeared: it may or may not have run."""


class WorkerLost(WorkflowError):
    """A step took its worker down with it, several times."""


class WorkflowTimeout(WorkflowError):
    """The run did not end within its ``max_duration``."""


class WorkflowContextError(WorkflowError):
    """Something was called where it must not be; the message names the remedy."""


class DefinitionError(WorkflowError):
    """A workflow or step cannot be defined like this."""


class DuplicateName(DefinitionError):
    """Two different functions claim one name."""

    def __init__(self, kind: str, name: str, first: str, second: str) -> None:
        super().__init__(kind, name, first, second)
        self.kind, self.name, self.first, self.second = kind, name, first, second

    def __str__(self) -> str:
        return (
            f"two {self.kind}s are called {self.name!r}: first={self.first} second={self.second}; "
            f"give one of them another name with @{self.kind}(name=...)"
        )


class ArgumentError(WorkflowError, ValueError):
    """The arguments do not fit the signature or the annotations; nothing was started."""


class SerializationError(WorkflowError, TypeError):
    """A value cannot be stored as it is, or a stored value cannot be read back."""


class PayloadUnreadable(SerializationError):
    """A stored payload cannot be unwrapped here; nothing of it is lost.

    ``codec`` is the one that could not undo its work, ``key_id`` the key that it asks for.
    """

    def __init__(self, codec: str, why: str, remedy: str, key_id: str | None = None) -> None:
        super().__init__(codec, why, remedy, key_id)
        self.codec, self.why, self.remedy, self.key_id = codec, why, remedy, key_id

    def __str__(self) -> str:
        key = "" if self.key_id is None else f" key_id={self.key_id}"
        return (
            f"a stored payload cannot be unwrapped: codec={self.codec}{key}: {self.why}; "
            f"{self.remedy}"
        )


class PayloadTooLarge(WorkflowError):
    """An encoded value is larger than the store or the settings allow.

    ``limited_by`` is ``"setting"`` (``max_payload``) or ``"store"``, whose limit no setting raises.
    """

    def __init__(self, what: str, size: int, limit: int, limited_by: str = "setting") -> None:
        given = () if limited_by == "setting" else (limited_by,)
        super().__init__(what, size, limit, *given)
        self.what, self.size, self.limit, self.limited_by = what, size, limit, limited_by

    def __str__(self) -> str:
        remedy = "store the data elsewhere and pass a reference"
        if self.limited_by == "store":
            remedy = f"this is the limit of the store: {remedy}"
        else:
            remedy += ", or raise the setting max_payload, up to the limit of the store"
        return (
            f"too large to store: {self.what} size={self.size} limit={self.limit} bytes; {remedy}"
        )


class HistoryTooLong(WorkflowError):
    """The run's history reached ``max_history`` events.

    The workflow was cancelled where it waited, and could clean up.
    """

    def __init__(self, length: int, limit: int) -> None:
        super().__init__(length, limit)
        self.length, self.limit = length, limit

    def __str__(self) -> str:
        return (
            f"the history is too long: events={self.length} limit={self.limit}; split the work "
            "over several runs, or raise the setting max_history"
        )


class NonDeterminism(WorkflowError):
    """The workflow's code does not produce what its history records.

    ``expected`` is what the history holds at ``seq``, ``found`` what the code did instead.
    """

    def __init__(self, expected: str, found: str, seq: int, remedy: str | None = None) -> None:
        super().__init__(
            *(expected, found, seq) if remedy is None else (expected, found, seq, remedy)
        )
        self.expected, self.found, self.seq = expected, found, seq
        self.remedy = remedy or "Put the old code back, or guard the change with patched()"

    def __str__(self) -> str:
        return (
            f"the code does not match the history at event {self.seq}: expected {self.expected}; "
            f"found {self.found}. {self.remedy}"
        )


# --- for callers ------------------------------------------------------------------------------


class RunNotFound(WorkflowError, KeyError):
    """No run has this id in this store and namespace."""

    def __init__(self, run_id: str) -> None:
        super().__init__(run_id)
        self.run_id = run_id

    def __str__(self) -> str:
        return (
            f"no such run: run_id={self.run_id}; is this the storage and namespace it started in?"
        )


class RunClosed(WorkflowError):
    """The run has ended, and what was asked needs an open one."""

    def __init__(self, run_id: str, status: str) -> None:
        super().__init__(run_id, status)
        self.run_id, self.status = run_id, status

    def __str__(self) -> str:
        return f"the run has ended: run_id={self.run_id} status={self.status}"


class RunCancelled(WorkflowError):
    """The run was cancelled; there is no result."""

    def __init__(self, run_id: str, reason: str = "") -> None:
        super().__init__(run_id, reason)
        self.run_id, self.reason = run_id, reason

    def __str__(self) -> str:
        return f"the run was cancelled: run_id={self.run_id} reason={self.reason!r}"


class RunTerminated(WorkflowError):
    """The run was terminated by an operator; there is no result."""

    def __init__(self, run_id: str, reason: str = "") -> None:
        super().__init__(run_id, reason)
        self.run_id, self.reason = run_id, reason

    def __str__(self) -> str:
        return f"the run was terminated: run_id={self.run_id} reason={self.reason!r}"


class RunStalled(WorkflowError):
    """The run has been stalled for longer than the setting ``stalled_after``; it has not ended.

    ``cause`` says why no worker can drive it now.
    """

    def __init__(self, run_id: str, cause: str) -> None:
        super().__init__(run_id, cause)
        self.run_id, self.cause = run_id, cause

    def __str__(self) -> str:
        return (
            f"the run is stalled: run_id={self.run_id}: {self.cause}; it resumes when a worker has "
            f"code that fits: `pyworkflow runs show {self.run_id}` tells more, and "
            'result(run_id, if_stalled="wait") waits on'
        )


class RunIdConflict(WorkflowError):
    """The run id belongs to a run that was started with something else.

    ``differences`` maps ``workflow``, ``idempotency_key`` or an argument's name to
    (existing, asked for) as text.
    """

    def __init__(self, run_id: str, differences: Mapping[str, Sequence[str]]) -> None:
        super().__init__(run_id, differences)
        self.run_id, self.differences = run_id, differences

    def __str__(self) -> str:
        return (
            f"the run id is taken by another start: run_id={self.run_id} "
            f"({_shown(self.differences)}); use another run id, or the same arguments"
        )


class IdempotencyConflict(WorkflowError):
    """The idempotency key belongs to a run that was started with something else.

    ``differences`` maps ``workflow`` or an argument's name to (existing, asked for) as text.
    """

    def __init__(self, key: str, run_id: str, differences: Mapping[str, Sequence[str]]) -> None:
        super().__init__(key, run_id, differences)
        self.key, self.run_id, self.differences = key, run_id, differences

    def __str__(self) -> str:
        return (
            f"the idempotency key is taken by another start: key={self.key!r} "
            f"run_id={self.run_id} ({_shown(self.differences)}); use another key, or the same "
            "arguments"
        )


def _shown(differences: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(
        f"{name}: existing {old}, asked for {new}" for name, (old, new) in differences.items()
    )


# --- for operators ----------------------------------------------------------------------------


class ConfigurationError(WorkflowError):
    """A setting, URL or module is wrong."""


class PluginNotFound(ConfigurationError):
    """No installed plugin serves this URL scheme."""

    def __init__(self, kind: str, scheme: str, distribution: str | None = None) -> None:
        super().__init__(kind, scheme, distribution)
        self.kind, self.scheme, self.distribution = kind, scheme, distribution

    def __str__(self) -> str:
        remedy = (
            f"pip install '{self.distribution}', from a clone './{self.distribution}'"
            if self.distribution
            else "`pyworkflow plugins` lists what is installed"
        )
        return (
            f"no installed plugin serves {self.kind} URLs of the scheme {self.scheme!r}; {remedy}"
        )


class PluginBroken(ConfigurationError):
    """A plugin is installed and cannot be loaded."""

    def __init__(self, name: str, distribution: str, cause: str) -> None:
        super().__init__(name, distribution, cause)
        self.name, self.distribution, self.cause = name, distribution, cause

    def __str__(self) -> str:
        return (
            f"the plugin {self.name!r} of {self.distribution} does not load: {self.cause}; "
            "repair or uninstall it, or name it in PYWORKFLOW_DISABLE_PLUGINS"
        )


class StorageError(WorkflowError):
    """The store cannot do what was asked."""


class StorageUnavailable(StorageError):
    """The store does not answer now; asking again later is right."""


class StorageDamaged(StorageError):
    """The store holds bytes that were not written like this.

    ``file`` is a path, or the place in a server (a table and a run), which has no ``offset``.
    """

    def __init__(self, file: str, offset: int | None, detail: str) -> None:
        super().__init__(file, offset, detail)
        self.file, self.offset, self.detail = file, offset, detail

    def __str__(self) -> str:
        if self.offset is None:
            return (
                f"the store is damaged: place={self.file}: {self.detail}; nothing was changed. "
                "Check the server, and restore what is damaged from a backup"
            )
        remedy = "Restore the file from a copy, or move it aside"
        if "run_id=" in self.detail:
            remedy = (
                "Only this run is concerned, the others continue. Repair its rows from a copy; "
                "where its events alone are damaged, `pyworkflow runs cancel` ends it"
            )
        return (
            f"the store is damaged: file={self.file} offset={self.offset}: {self.detail}; "
            f"nothing was changed. {remedy}"
        )


class StorageFull(StorageError):
    """No room is left; nothing of the change was written."""


class SchemaTooNew(StorageError):
    """The store was written by a newer version."""

    def __init__(self, where: str, found: int, supported: int) -> None:
        super().__init__(where, found, supported)
        self.where, self.found, self.supported = where, found, supported

    def __str__(self) -> str:
        return (
            f"the store is newer than this code: {self.where} version={self.found} "
            f"supported={self.supported}; upgrade pyworkflow and its storage plugin"
        )


# --- refusals of the storage contract (pyworkflow.spi) ------------------------------------------


class Refusal(WorkflowError):
    """A change was refused and nothing of it was written."""


class RunExists(Refusal):
    """``create`` names a run id that another change created."""

    def __init__(self, run_id: str) -> None:
        super().__init__(run_id)
        self.run_id = run_id


class Fenced(Refusal):
    """The claim under which the change was made is over: another may hold the item."""

    def __init__(self, run_id: str, item_id: str) -> None:
        super().__init__(run_id, item_id)
        self.run_id, self.item_id = run_id, item_id


class UnseenInput(Refusal):
    """A final change does not know these inputs yet; deliver ``inputs`` and try again."""

    def __init__(self, run_id: str, inputs: Sequence[Event]) -> None:
        super().__init__(run_id, inputs)
        self.run_id, self.inputs = run_id, tuple(inputs)


class KeyTaken(Refusal):
    """The idempotency key belongs to run ``owner`` (which may have been purged)."""

    def __init__(self, key: str, owner: str) -> None:
        super().__init__(key, owner)
        self.key, self.owner = key, owner
