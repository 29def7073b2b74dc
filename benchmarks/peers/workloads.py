"""The workloads seen from outside: their sizes, the numbers they yield, the aims, and who is killed when."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.peers.peer import Peer, Program, resident, scratch
from benchmarks.peers.report import OURS, Figure, Metric, figure


@dataclass(frozen=True)
class Workload:
    """Something that every peer does."""

    name: str
    full: Mapping[str, int]
    quick: Mapping[str, int]
    metrics: tuple[Metric, ...]
    rounds: int | None = None
    """At most so many: it takes long and varies little."""

    def size(self, peer: Peer, *, quick: bool) -> dict[str, int]:
        """Its sizes for a peer, never more than everybody's."""
        common = dict(self.quick if quick else self.full)
        own = peer.SIZES.get(self.name, {})
        return {name: min(value, own.get(name, value)) for name, value in common.items()}


WORKLOADS = [
    Workload(
        "W1",
        {"runs": 100, "steps": 10},
        {"runs": 20, "steps": 10},
        (
            Metric("p50", "one run of 10 steps, p50", "ms", ratios={"*": 1 / 8}),
            Metric("p99", "one run of 10 steps, p99", "ms"),
        ),
    ),
    Workload(
        "W2",
        {"runs": 500, "steps": 10},
        {"runs": 100, "steps": 10},
        (
            Metric(
                "rate", "runs of 10 steps at once", "steps/s", "more",
                ratios={"sqlite": 50.0, "postgres": 25.0},
            ),
            Metric("cpu", "CPU of the worker's process per step", "us"),
        ),
    ),
    Workload(
        "W3",
        {"width": 200, "times": 5},
        {"width": 200, "times": 2},
        (Metric("time", "one run, 200 steps at once", "ms", ratios={"*": 1 / 20}, scales=True),),
    ),
    Workload(
        "W4",
        {"short": 1_000, "long": 8_000},
        {"short": 200, "long": 1_600},
        (
            Metric("short", "1,000 sequential steps, each", "ms", ratios={"*": 1 / 10}),
            Metric("long", "8,000 sequential steps, each", "ms", ratios={"*": 1 / 10}),
            Metric("growth", "8,000 steps : 1,000", "x", own=8.5, compared=False),
        ),
        rounds=2,
    ),
    Workload(
        "W5",
        {"runs": 2_000, "seconds": 5},
        {"runs": 200, "seconds": 2},
        (
            Metric("all", "sleepers of 5 s: until all are done", "s", scales=True),
            Metric("started", "sleepers: until all are started", "s", scales=True),
            Metric("late p50", "sleepers: later than 5 s, p50", "ms", scales=True),
            Metric("late p99", "sleepers: later than 5 s, p99", "ms", scales=True),
        ),
        rounds=1,
    ),
    Workload(
        "W6",
        {"runs": 50, "steps": 20},
        {"runs": 20, "steps": 10},
        (
            Metric("again", "recorded steps that ran again", "steps", own=0.0, compared=False),
            Metric("twice", "steps that ran twice", "steps", compared=False),
            Metric("first", "restarted worker: until its first step", "s", own=1.0),
            Metric("done", "restarted worker: until all is done", "s", scales=True),
        ),
    ),
    Workload(
        "W6B",
        {"runs": 50, "steps": 20},
        {"runs": 20, "steps": 10},
        (
            Metric("stall", "killed beside another worker: longest stall of a run", "s", own=6.0),
            Metric("twice", "steps that ran twice", "steps", compared=False),
        ),
    ),
    Workload(
        "W7",
        {"runs": 100_000, "naps": 5},
        {"runs": 2_000, "naps": 3},
        (
            Metric("pss", "idle worker beside sleeping runs: PSS", "MB", own=150.0, scales=True),
            Metric("server", "its server: PSS", "MB", compared=False),
            Metric("ready", "its start, until it is idle", "s", scales=True),
            Metric("late", "a further sleeper of 1 s ends late by", "ms"),
            Metric("created", "sleeping runs created", "runs/s", "more"),
        ),
        rounds=1,
    ),
]  # fmt: skip

#: Seconds that one program may take.
PATIENCE = 1_200.0


class Setting(NamedTuple):
    """Who is measured where."""

    peer: Peer
    command: list[str]
    store: str
    directory: Path
    quick: bool


def measure(workload: Workload, setting: Setting) -> tuple[dict[str, float], dict[str, Any]]:
    """One round of a workload on an empty store: its numbers by key, and the program's facts."""
    peer = setting.peer
    size = workload.size(peer, quick=setting.quick)
    with scratch(setting.directory) as path, peer.place(setting.store, setting.directory) as place:

        def program(do: str, **more: Any) -> Program:
            told = {"do": do, "store": setting.store, "size": size, "leash": True, **place, **more}
            return Program(setting.command, told, path / f"{do}.log", own=peer.NAME == OURS)

        if workload.name in {"W6", "W6B"}:
            kill = _kill_and_restart if workload.name == "W6" else _kill_beside
            return kill(program, size, path / "effects")
        if workload.name == "W7":
            created = program("W7-begin").wait(PATIENCE)
            said = created | program("W7-again").wait(PATIENCE)
            if "server" in place:
                said["server"] = resident(place["server"])
        else:
            said = program(workload.name).wait(PATIENCE)
    facts = said.pop("facts", {})
    if workload.name == "W4":
        said["growth"] = said["long"] / said["short"]
        for name in ("short", "long"):
            said[name] *= 1e3 / size[name]
    return said, facts


def _half(program: Any, size: dict[str, int], log: Path) -> None:
    """Kill a worker when all runs are accepted and half of the steps have had their effect."""
    log.touch()
    started = log.with_name("effects.started")
    wanted = size["runs"] * size["steps"]
    first: Program = program("W6-begin", log=str(log))
    try:
        end = time.monotonic() + PATIENCE
        while log.read_bytes().count(b"\n") < wanted // 2 or not started.exists():
            if first.ended:
                raise RuntimeError(first.failure())
            if time.monotonic() > end:
                raise RuntimeError("half of the steps were not done in time")
            time.sleep(0.01)
    finally:
        first.kill()


def _kill_and_restart(
    program: Any, size: dict[str, int], log: Path
) -> tuple[dict[str, float], dict[str, Any]]:
    """The next worker begins when the first one is dead."""
    _half(program, size, log)
    before = effects(log)
    recorded = {(run, step) for run, step in program("W6-recorded").wait(PATIENCE)["recorded"]}
    said = program("W6-again").wait(PATIENCE)
    after = effects(log)
    found = compare(before, after, recorded, size["runs"] * size["steps"])
    first = min([at for _, _, at in after[len(before) :]], default=said["ready"])
    found |= {"first": first - said["ready"], "done": said["done"] - said["ready"]}
    return found, said.get("facts", {})


def _kill_beside(
    program: Any, size: dict[str, int], log: Path
) -> tuple[dict[str, float], dict[str, Any]]:
    """Another worker is there already, and has to notice."""
    other: Program = program("W6-stand", log=str(log))
    try:
        standing = log.with_name("effects.standing")
        while not standing.exists():
            if other.ended:
                raise RuntimeError(other.failure())
            time.sleep(0.01)
        _half(program, size, log)
        at = time.time()
        before = effects(log)
        log.with_name("effects.killed").touch()
        said = other.wait(PATIENCE)
    finally:
        other.kill()
    after = effects(log)
    found = compare(before, after, set(), size["runs"] * size["steps"])
    return {"twice": found["twice"], "stall": stall(after, at)}, said.get("facts", {})


def stall(lines: list[tuple[int, int, float]], killed: float) -> float:
    """How long after a kill the last of the runs that were not done had its next effect."""
    first: dict[int, float] = {}
    for run, _, at in lines:
        if at > killed:
            first[run] = min(at, first.get(run, at))
    return max((at - killed for at in first.values()), default=0.0)


def effects(log: Path) -> list[tuple[int, int, float]]:
    """Run, step and time of each effect; a line that a kill cut off is none."""
    whole = [
        line.split() for line in log.read_text().splitlines(keepends=True) if line[-1:] == "\n"
    ]
    return [(int(run), int(step), float(at)) for run, step, at in whole]


def compare(
    before: list[tuple[int, int, float]],
    after: list[tuple[int, int, float]],
    recorded: set[tuple[int, int]],
    wanted: int,
) -> dict[str, float]:
    """What a kill cost: steps that ran more than once, and those that were recorded and ran again."""
    times = Counter((run, step) for run, step, _ in after)
    if len(times) != wanted:
        raise RuntimeError(f"steps={len(times)} of {wanted}: some never ran")
    later = [(run, step) for run, step, _ in after[len(before) :]]
    return {
        "twice": float(sum(count > 1 for count in times.values())),
        "again": float(sum(each in recorded for each in later)),
        "recorded": float(len(recorded)),
    }


def machine() -> dict[str, object]:
    """What the figures depend on."""
    import platform

    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "cpus": os.cpu_count(),
        "load": [round(each, 2) for each in os.getloadavg()],
    }


def dump(file: Path, report: dict[str, object]) -> None:
    """Write a report as JSON."""
    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def check(files: Iterable[Path]) -> None:
    """Whether ``dump`` wrote these; ``ValueError`` for one that it did not write."""
    for file in files:
        try:
            known = "figures" in json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, TypeError):
            known = False
        if not known:
            raise ValueError(f"no readings: {file}; give what --json wrote")


def load(files: Iterable[Path]) -> tuple[list[dict[str, Any]], list[Figure]]:
    """Reports that ``dump`` wrote, and their figures: a later report's are further rounds."""
    reports = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    metrics = {(w.name, metric.key): metric for w in WORKLOADS for metric in w.metrics}
    merged: dict[tuple[str, str, str, str], Figure] = {}
    for saved in [each for report in reports for each in report["figures"]]:
        metric = metrics.get((saved["workload"], saved["key"]))
        if metric is None:
            continue
        read = figure(saved, metric)
        known = merged.setdefault((read.workload, metric.key, read.peer, read.store), read)
        if known is not read:
            known.further(read)
    return reports, list(merged.values())
