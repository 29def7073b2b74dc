"""``python -m benchmarks [--only W2,replay] [--store memory,file] [--quick] [--json FILE]``.

Measures in rounds, each workload once per round, so that a disturbance of the machine meets all of
them, and next to the raw limit of its store. Reports ratios first, then medians, spreads and how
they stand to the aims; the exit status is 0 whatever they are.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks import celery_workers, memory, raw, replay, startup, throughput, wakeups
from benchmarks.readings import RATIOS, Figure, Setting, Workload
from benchmarks.stores import STORES

_ALL: list[Workload] = [
    *raw.WORKLOADS,
    *throughput.WORKLOADS,
    *replay.WORKLOADS,
    *wakeups.WORKLOADS,
    *startup.WORKLOADS,
    *memory.WORKLOADS,
    *celery_workers.WORKLOADS,
]
#: These take long and vary little: fewer rounds.
_SLOW = {"wake-ups": 1, "memory": 1, "start": 2, "celery-sleepers": 1}


def _options() -> argparse.Namespace:
    names = ", ".join(dict.fromkeys(w.name for w in _ALL))
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=f"Workloads: {names}")
    parser.add_argument("--only", help="workloads, by comma", default="")
    parser.add_argument(
        "--store", help=f"stores, by comma: {', '.join(STORES)}", default="memory,file"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, two rounds")
    parser.add_argument("--rounds", type=int, help="rounds (default 5, quick 2)")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="which disk")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all readings there")
    return parser.parse_args()


def _chosen(only: str, stores: str) -> list[tuple[Workload, str]]:
    names = {name.strip().lower() for name in only.split(",") if name.strip()}
    wanted = {"-", *(store.strip() for store in stores.split(","))}
    unknown = (names - {w.name.lower() for w in _ALL}) | (wanted - {"-", *STORES})
    if unknown:
        sys.exit(f"no such workload or store: {', '.join(sorted(unknown))}; --help lists them")
    return [
        (workload, store)
        for workload in _ALL
        if not names or workload.name.lower() in names
        for store in workload.stores
        if store in wanted
    ]


def _number(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _rows(figures: list[Figure]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for f in figures:
        spread = f"{_number(min(f.values))} .. {_number(max(f.values))}"
        cpu, server = (
            _number(statistics.median(each)) if each else "" for each in (f.cpu, f.server)
        )
        sign = ">=" if f.better == "more" else "<="
        aim = "" if f.aim is None else f"{sign} {_number(f.aim)}"
        floor = "" if f.floor is None else _number(f.floor)
        value = f"{_number(f.median)} {f.unit}"
        spread = spread if len(f.values) > 1 else ""
        row = (f.workload, f.store, f.what, value, spread, cpu, server, aim, floor, f.verdict)
        rows.append(row)
    return rows


_HEAD = (
    "workload", "store", "what", "median", "min .. max", "CPU us/step", "server", "aim", "floor",
    "verdict",
)  # fmt: skip


def _print(rows: list[tuple[str, ...]]) -> None:
    used = [i for i in range(len(_HEAD)) if any(row[i] for row in rows)]
    head, *rows = [tuple(row[i] for i in used) for row in [_HEAD, *rows]]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, tuple("-" * width for width in widths), *rows]:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )


def main() -> None:
    options = _options()
    logging.getLogger("pyworkflow").setLevel(logging.ERROR)  # warnings of long runs are expected
    tempfile.tempdir = str(options.dir)  # servers keep their data there as well
    chosen = _chosen(options.only, options.store)
    rounds = options.rounds or (2 if options.quick else 5)
    figures: dict[tuple[str, str, str], Figure] = {}
    failed: dict[tuple[str, str], str] = {}
    for number in range(rounds):
        for workload, store in chosen:
            if number >= _SLOW.get(workload.name, rounds) or (workload.name, store) in failed:
                continue
            if sys.stderr.isatty():
                sys.stderr.write(f"\r\x1b[Kround {number + 1} of {rounds}: {workload.name} {store}")
            try:
                for r in workload.measure(Setting(store, options.quick, options.dir)):
                    key = (workload.name, store, r.what)
                    if key not in figures:
                        figures[key] = Figure(*key, r.unit, r.aim, r.better, r.floor)
                    figures[key].add(r)
            except Exception as error:  # noqa: BLE001 - the others are measured all the same
                failed[workload.name, store] = f"{type(error).__name__}: {error}"
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K")
    machine = f"Python {platform.python_version()}, {os.cpu_count()} CPUs, {platform.system()}"
    print(f"{machine}, {rounds} rounds{', quick' if options.quick else ''}\n")
    order = list(dict.fromkeys((w.name, store) for w, store in chosen))
    ordered = sorted(figures.values(), key=lambda f: order.index((f.workload, f.store)))
    ratios = [f for f in ordered if f.unit in RATIOS]
    for table in (ratios, [f for f in ordered if f not in ratios]):
        if table:
            _print(_rows(table))
            print()
    for (name, store), why in failed.items():
        print(f"{name} on {store} could not be measured: {why}")
    if options.json is not None:
        report = {
            "machine": machine,
            "load": os.getloadavg(),
            "rounds": rounds,
            "quick": options.quick,
            "figures": [f.to_json() for f in ordered],
            "failed": {f"{name} {store}": why for (name, store), why in failed.items()},
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
