"""What a measurement returns, and how readings of several rounds become one figure."""

from __future__ import annotations

import gc
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Self

from pyworkflow.spi import StorageBackend


class Reading(NamedTuple):
    """One number of one round."""

    what: str
    value: float
    unit: str
    cpu: float | None = None
    """CPU µs per step of this process, all threads."""
    raw: float | None = None
    """Ratio to the raw limit that was measured next to it."""
    aim: float | None = None
    better: str = "more"
    """``more`` or ``less``."""


@dataclass(frozen=True)
class Setting:
    """What a measurement is given."""

    store: str
    quick: bool
    directory: Path

    def size(self, full: int, quick: int) -> int:
        return quick if self.quick else full

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A directory on the disk that is measured, removed afterwards."""
        path = Path(tempfile.mkdtemp(prefix="pyworkflow-bench-", dir=self.directory))
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def storage(self) -> Iterator[StorageBackend]:
        """A fresh store; whoever gets it closes it."""
        if self.store == "memory":
            from pyworkflow.storage.memory import MemoryStorageBackend

            yield MemoryStorageBackend()
        else:
            from pyworkflow.storage.file import FileStorageBackend

            with self.scratch() as path:
                yield FileStorageBackend(path)


@dataclass(frozen=True)
class Workload:
    """Something to measure, on each of its stores."""

    name: str
    stores: tuple[str, ...]
    measure: Callable[[Setting], Iterable[Reading]]


class Stopwatch:
    """Wall and CPU time of a ``with`` block."""

    def __enter__(self) -> Self:
        gc.collect()
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall = time.perf_counter() - self._wall
        self.cpu = time.process_time() - self._cpu


@dataclass
class Figure:
    """All readings of one number."""

    workload: str
    store: str
    what: str
    unit: str
    aim: float | None
    better: str
    values: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    raw: list[float] = field(default_factory=list)

    def add(self, reading: Reading) -> None:
        self.values.append(reading.value)
        if reading.cpu is not None:
            self.cpu.append(reading.cpu)
        if reading.raw is not None:
            self.raw.append(reading.raw)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def floor(self) -> float | None:
        """Half of the aim; where less is better, twice the aim."""
        if self.aim is None:
            return None
        return self.aim / 2 if self.better == "more" else self.aim * 2

    @property
    def verdict(self) -> str:
        if self.aim is None or self.floor is None:
            return ""
        sign = 1 if self.better == "more" else -1
        if sign * self.median >= sign * self.aim:
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
            "against_raw": self.raw,
            "aim": self.aim,
            "floor": self.floor,
            "better": self.better,
            "verdict": self.verdict,
        }
