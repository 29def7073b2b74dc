"""The executor contract: how doorbells reach workers, and what a worker process may ask of the core.

A doorbell is a hint. A lost one costs time, a doubled one costs nothing; storage is the queue of
record.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Protocol

from pyworkflow.spi.capabilities import ExecutorCapabilities, StorageInfo

__all__ = ["Doorbell", "Executor", "Outcome", "Runtime", "doorbell_headers"]

#: The headers of the doorbell that is being handled here, for a plugin's ``pyworkflow_around_turn``.
doorbell_headers: ContextVar[Mapping[str, str]] = ContextVar("doorbell_headers", default={})  # noqa: B039 - never changed in place


@dataclass(frozen=True, slots=True)
class Doorbell:
    """Says that a work item is due. The body of a message is ``run_id``, ``item_id`` and ``v``."""

    run_id: str
    item_id: str
    v: int = 1
    """Version of the message. A worker drops one that it does not know: sweeps ring again."""
    queue: str = field(default="default", kw_only=True, compare=False)
    """Where the message goes. As the next three no part of the body."""
    priority: int = field(default=0, kw_only=True, compare=False)
    """Higher is sooner."""
    name: str = field(default="", kw_only=True, compare=False)
    """What people see of it: the name of the workflow or step."""
    headers: Mapping[str, str] = field(
        default_factory=dict[str, str], kw_only=True, compare=False, repr=False
    )
    """What plugins send along, for example a trace context."""


class Outcome(StrEnum):
    """What became of a doorbell. None of them is an error, and none is to be rung again."""

    HANDLED = "handled"
    """The item was claimed here, and worked on until nothing was left to do."""
    BUSY = "busy"
    """Another worker holds the item."""
    GONE = "gone"
    """The item is settled, or not due."""
    UNKNOWN_WORKFLOW = "unknown_workflow"
    """This worker lacks the workflow; the item was released without moving its due."""


class Runtime(Protocol):
    """What the core gives to a worker process (``pyworkflow.worker.create_runtime()``).

    Belongs to the event loop that ``open`` was awaited in; no method may be called elsewhere.
    """

    def info(self) -> StorageInfo:
        """The store: name, place without credentials, capabilities. No I/O."""
        ...

    async def open(self) -> None:
        """Open the store, and free what processes of this machine held that are gone.

        Raises:
            StorageError: the store cannot be used.
        """
        ...

    async def close(self) -> None:
        """Stop at once and close the store; ``drain`` first. Idempotent."""
        ...

    async def handle(self, bell: Doorbell) -> Outcome:
        """Claim the item and work on it until nothing that follows from it is left to do here.

        Any number may be under way at once. Never raises for a run or step that fails.

        Raises:
            StorageError: the store cannot be asked; a sweep rings again.
        """
        ...

    async def sweep(self, limit: int = 100) -> int:
        """Ring for up to ``limit`` due items that nobody rang for, and say how many.

        Any number of workers may sweep at once: that doubles no effect.
        """
        ...

    async def next_due(self) -> datetime | None:
        """When to sweep again, on the storage's clock; None when nothing is owed."""
        ...

    async def seconds_until_due(self) -> float | None:
        """How long until ``next_due``, by the storage's clock; 0 or less when it has passed."""
        ...

    async def wait_for_news(self, timeout: float) -> bool:
        """Wait until there may be something new to sweep for; False after ``timeout`` seconds."""
        ...

    async def drain(self, grace: str | float | timedelta = 10) -> None:
        """Take nothing more; finish what is held within ``grace``, then release the rest."""
        ...

    async def free_gone(self) -> int:
        """End the leases of processes of this machine that are gone, whoever began them; how many.

        ``open`` does it once. Ring for what was freed with ``sweep``.
        """
        ...

    def free(self, pid: int) -> Awaitable[None]:
        """Begin to end the leases of a pool child that is dead, and to ring for its items.

        It goes on whether the answer is awaited or not; awaited, it is done.
        """
        ...


class Executor(Protocol):
    """Decides how doorbells reach workers, and nothing else.

    A constructor does no I/O. What a worker does with a claimed item is the core's
    ``Runtime.handle``, the same for every executor.
    """

    name: str
    """The URL scheme, for example ``celery``."""
    capabilities: ExecutorCapabilities

    async def open(self, config: Mapping[str, str]) -> None:
        """Connect as far as ringing needs it. Idempotent; never raises for a broker that is down."""
        ...

    async def notify(self, bells: Sequence[Doorbell]) -> None:
        """Tell workers.

        Best effort: never raises for a broker that is down, since every item is durable and sweeps
        announce it again.
        """
        ...

    def serve(self, runtime: Runtime, queues: Sequence[str]) -> None:
        """Run a worker process (``pyworkflow worker``) and return after a drain."""
        ...

    async def close(self) -> None:
        """Let go of everything. Idempotent."""
        ...
