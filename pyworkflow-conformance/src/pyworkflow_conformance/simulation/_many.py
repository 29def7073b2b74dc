"""Many seeds, in several processes; and a failing one made as small as it can be."""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import signal
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

from pyworkflow.errors import ConfigurationError
from pyworkflow.spi.storage import StorageBackend
from pyworkflow.testing.internals import MemoryStorageBackend
from pyworkflow_conformance.simulation._faults import Fault, make_plan
from pyworkflow_conformance.simulation._probe import probe
from pyworkflow_conformance.simulation._simulate import MakeStore, Report, simulate

__all__ = [
    "Total",
    "assert_holds",
    "backend_of",
    "check_backend",
    "explain",
    "run_many",
    "shrink",
]

_CHUNK = 40
_COLLECT = 20
_SHOWN = 60
"""Lines of a failing run that are shown."""


@dataclass(slots=True)
class Total:
    """What came of many seeds of one profile."""

    seeds: int = 0
    calls: int = 0
    steps: int = 0
    seconds: float = 0.0
    """Virtual."""
    seen: Counter[str] = field(default_factory=Counter[str])
    failed: list[tuple[int, str, str]] = field(default_factory=list[tuple[int, str, str]])
    """(seed, rule, what was found), in the order of seeds."""

    def add(self, other: Total) -> None:
        """Count another one in."""
        self.seeds += other.seeds
        self.calls += other.calls
        self.steps += other.steps
        self.seconds += other.seconds
        self.seen += other.seen
        self.failed += other.failed


def backend_of(name: str) -> MakeStore:
    """``memory``, or ``module:callable`` that makes an empty store.

    Raises:
        ConfigurationError: There is no such callable.
    """
    if name == "memory":
        return MemoryStorageBackend
    module, colon, attribute = name.partition(":")
    try:
        if not colon:
            raise ImportError("no colon in it")
        found: Callable[[], object] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as exc:
        raise ConfigurationError(
            f"the backend cannot be used: backend={name}: {exc}; give memory, or module:callable "
            "of a module that is installed or in this folder"
        ) from exc
    return found  # type: ignore[return-value]  # what it makes is seen when it is made


def check_backend(name: str) -> None:
    """Whether a name makes a store that can be simulated.

    Raises:
        ConfigurationError: It does not.
    """
    make_store: Callable[[], object] = backend_of(name)
    try:
        made = make_store()
    except Exception as exc:  # noqa: BLE001 - whatever a callable of somebody else raises
        made = exc
    if not isinstance(made, StorageBackend):
        raise ConfigurationError(
            f"the backend cannot be used: backend={name} made {made!r:.80}; name a callable "
            "without arguments that makes an empty store"
        )
    probe(made, name)


def _chunk(seeds: Sequence[int], profile: str, backend: str) -> Total:
    make_store = backend_of(backend)
    total = Total()
    gc.collect()
    gc.freeze()
    enabled = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            # Coroutines of processes that were killed.
            warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
            for number, seed in enumerate(seeds):
                _count(total, simulate(seed, profile, make_store=make_store))
                if number % _COLLECT == _COLLECT - 1:
                    gc.collect()
            gc.collect()
    finally:
        if enabled:
            gc.enable()
        gc.unfreeze()
    return total


def _count(total: Total, report: Report) -> None:
    total.seeds += 1
    total.calls += report.calls
    total.steps += report.steps
    total.seconds += report.seconds
    total.seen += report.seen
    if report.broken is not None:
        total.failed.append((report.seed, report.broken.rule, str(report.broken)))


def run_many(
    seeds: Iterable[int],
    profile: str,
    *,
    jobs: int = 1,
    backend: str = "memory",
    stop_after: int = 20,
    on_progress: Callable[[Total], None] | None = None,
) -> Total:
    """Run seeds; stops once so many have failed."""
    total = Total()
    for part in _parts(list(seeds), profile, jobs, backend):
        total.add(part)
        if on_progress is not None:
            on_progress(total)
        if len(total.failed) >= stop_after:
            break
    return total


def _parts(seeds: list[int], profile: str, jobs: int, backend: str) -> Iterator[Total]:
    chunks = [seeds[start : start + _CHUNK] for start in range(0, len(seeds), _CHUNK)]
    if jobs <= 1 or len(chunks) == 1:
        for chunk in chunks:
            yield _chunk(chunk, profile, backend)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, _follow_parent) as pool:
        ahead = [pool.submit(_chunk, chunk, profile, backend) for chunk in chunks]
        try:
            for future in ahead:
                yield future.result()
        finally:
            for future in ahead:
                future.cancel()


def _follow_parent() -> None:
    """In a process of the pool: end with the one that prints, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of them, and is for that one
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def shrink(
    seed: int,
    profile: str,
    *,
    make_store: MakeStore = MemoryStorageBackend,
    faults: tuple[Fault, ...] | None = None,
) -> tuple[Report, list[int]]:
    """Drop one fault after the other while the same property is broken.

    The smallest report, with its trace, and which of the plan's faults are left (by number).
    """
    planned = make_plan(seed, profile).faults if faults is None else faults
    left = list(range(len(planned)))

    def attempt(numbers: list[int], *, tracing: bool = False) -> Report:
        kept = tuple(planned[n] for n in numbers)
        return simulate(seed, profile, faults=kept, make_store=make_store, tracing=tracing)

    report = attempt(left)
    if report.broken is None:
        return report, left
    rule = report.broken.rule
    smaller = True
    while smaller:
        smaller = False
        for number in list(left):
            fewer = [n for n in left if n != number]
            found = attempt(fewer).broken
            if found is not None and found.rule == rule:
                left, smaller = fewer, True
    return attempt(left, tracing=True), left


def explain(report: Report, kept: list[int], backend: str = "memory") -> str:
    """What is left of a failing seed, and how to see it again."""
    command = f"pyworkflow-sim --seeds {report.seed} --profile {report.profile}"
    if backend != "memory":
        command += f" --backend {backend}"
    said = [f"seed={report.seed} profile={report.profile}, as small as it gets:"]
    said.append(f"  broken: {report.broken}")
    said += [
        f"  fault {number}: {fault}" for number, fault in zip(kept, report.faults, strict=True)
    ]
    lines = report.trace
    run_id = report.broken.run_id if report.broken is not None else "-"
    if run_id != "-":
        lines = tuple(
            line for line in lines if run_id in line or " fault: " in line or " operator: " in line
        )
    if len(lines) > _SHOWN:
        said.append(f"  … {len(lines) - _SHOWN} lines before")
    said += [f"  {line[:240]}" for line in lines[-_SHOWN:]]
    said.append(f"again: {command} --keep {','.join(map(str, kept)) or 'none'} --trace")
    return "\n".join(said)


def assert_holds(
    seed: int, profile: str = "all", *, make_store: MakeStore = MemoryStorageBackend
) -> None:
    """Run a seed; for tests.

    Raises:
        AssertionError: Something does not hold. It says what is left of the seed when it is made
            as small as it gets, and the trace of the run concerned.
        ValueError, ConfigurationError, RuntimeError: As ``simulate``.
    """
    if simulate(seed, profile, make_store=make_store).broken is not None:
        name = f"{make_store.__module__}:{make_store.__qualname__}"
        report, kept = shrink(seed, profile, make_store=make_store)
        raise AssertionError(
            explain(report, kept, "memory" if make_store is MemoryStorageBackend else name)
        )
