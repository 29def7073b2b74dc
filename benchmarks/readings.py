"""What a measurement returns, and how readings of several rounds become one figure."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Self

from benchmarks import stores
from pyworkflow.spi import StorageBackend


class Reading(NamedTuple):
    """One number of one round."""

    what: str
    value: float
    unit: str
    cpu: float | None = None
    """CPU µs per step of this process, all threads."""
    server: float | None = None
    """CPU µs per step of the store's server."""
    aim: float | None = None
    floor: float | None = None
    """Half of the aim, or twice the aim where less is better, unless it says otherwise."""
    better: str = "more"
    """``more`` or ``less``."""


#: Units of readings that compare with the raw limit measured next to them.
RATIOS = frozenset({"x raw rate", "x raw time"})


@dataclass(frozen=True)
class Setting:
    """What a measurement is given."""

    store: str
    quick: bool
    directory: Path

    def size(self, full: int, quick: int) -> int:
        return quick if self.quick else full

    def storage(self) -> AbstractContextManager[StorageBackend]:
        """A fresh store; whoever gets it closes it."""
        return stores.fresh(self.store, self.directory)

    def scratch(self) -> AbstractContextManager[Path]:
        """A directory on the disk that is measured, removed afterwards."""
        return stores.scratch(self.directory)

    def raw(self, seconds: float = 0.25) -> float | None:
        """The store's raw commits per second, now."""
        return stores.raw_rate(self.store, self.directory, seconds)


@dataclass(frozen=True)
class Workload:
    """Something to measure, on each of its stores."""

    name: str
    stores: tuple[str, ...]
    measure: Callable[[Setting], Iterable[Reading]]


class Stopwatch:
    """Wall and CPU time of a ``with`` block; also the CPU time of the store's server."""

    def __init__(self, store: str = "-") -> None:
        self._store = store

    def __enter__(self) -> Self:
        gc.collect()
        self._server = stores.server_seconds(self._store)
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall = time.perf_counter() - self._wall
        self.cpu = time.process_time() - self._cpu
        used = stores.server_seconds(self._store)
        self.server = None if used is None or self._server is None else used - self._server

    def per_step(self, steps: int) -> dict[str, float | None]:
        """What a ``Reading`` says about CPU time."""
        server = None if self.server is None else self.server / steps * 1e6
        return {"cpu": self.cpu / steps * 1e6, "server": server}


@dataclass
class Figure:
    """All readings of one number."""

    workload: str
    store: str
    what: str
    unit: str
    aim: float | None
    better: str
    lowest: float | None
    values: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    server: list[float] = field(default_factory=list)

    def add(self, reading: Reading) -> None:
        self.values.append(reading.value)
        if reading.cpu is not None:
            self.cpu.append(reading.cpu)
        if reading.server is not None:
            self.server.append(reading.server)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def floor(self) -> float | None:
        """What is too little, or too much where less is better."""
        if self.aim is None or self.lowest is not None:
            return self.lowest
        return self.aim / 2 if self.better == "more" else self.aim * 2

    @property
    def verdict(self) -> str:
        if self.floor is None:
            return ""
        sign = 1 if self.better == "more" else -1
        if self.aim is not None and sign * self.median >= sign * self.aim:
            return "reached"
        return "above floor" if sign * self.median >= sign * self.floor else "below floor"

    def to_json(self) -> dict[str, object]:
        return {
            "workload": self.workload,
            "store": self.store,
            "what": self.what,
            "unit": self.unit,
            "median": self.median,
            "values": self.values,
            "cpu_us_per_step": self.cpu,
            "server_cpu_us_per_step": self.server,
            "aim": self.aim,
            "floor": self.floor,
            "better": self.better,
            "verdict": self.verdict,
        }
