"""What a backend or an executor declares of itself. All false by default; the suite proves it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["CONTRACT_VERSION", "Capabilities", "ExecutorCapabilities", "StorageInfo"]

#: Version of the contracts of backends and executors. Each writes the number that it was written
#: for, and not this name: the core refuses every other number.
CONTRACT_VERSION = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a storage backend guarantees beyond the base contract."""

    durable: bool = False
    """An acknowledged commit survives power loss."""
    multi_process: bool = False
    """Several processes on one machine may use the store at once."""
    multi_host: bool = False
    """Processes on different machines may."""
    server_clock: bool = False
    """``now`` is one clock for all clients that may use the store at once."""
    watch: bool = False
    """``watch`` is woken, not polled."""
    batched: bool = False
    """``commit`` of many changes costs one round trip."""
    indexed_filters: bool = False
    """``list_runs`` with filters reads what it returns, not all runs."""
    payload_offload: bool = False
    """Large payloads are kept outside the rows."""
    purge_by_age: bool = False
    """``purge`` reads what it removes, not all runs."""
    large_history: bool = False
    """A commit costs the same after 100,000 events, a claim with 20,000 runs."""
    gaps: Mapping[str, str] = field(default_factory=dict[str, str])
    """Test id → reason, for parts of a level that the backend knowingly lacks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorCapabilities:
    """What an executor can do."""

    contract_version: int
    """The version of the contract that the executor is written for, as a number."""
    distributed: bool = False
    """Doorbells reach other processes: parallel branches are dispatched."""
    priority: bool = False
    hard_time_limit: bool = False
    kill_detection: bool = False
    graceful_drain: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageInfo:
    """Name and limits of a store."""

    name: str
    location: str
    """Where the data lies, absolute and without credentials."""
    namespace: str = "default"
    capabilities: Capabilities
    contract_version: int
    """The version of the contract that the backend is written for, as a number."""
    max_payload: int = 16 * 1024 * 1024
    """Largest payload in bytes of UTF-8."""
    max_events_per_commit: int = 10_000
    batches: int = 1
    """Calls of ``commit`` that one worker makes at once: more than one only where that is
    faster, as with a server that can work on one while the worker prepares the next. The changes
    of one run are in one of them at a time."""
