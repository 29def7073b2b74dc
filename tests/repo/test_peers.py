"""The comparison with other engines: its ratios, verdicts and counts. No peer is installed here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest

from benchmarks.peers import environments, report, workloads
from benchmarks.peers.peer import Program
from benchmarks.peers.report import Figure, Metric
from tests.repo.clone import ROOT

LATENCY = Metric("p50", "latency", "ms", ratios={"*": 1 / 8})
RATE = Metric("rate", "rate", "steps/s", "more", ratios={"sqlite": 50.0, "postgres": 25.0})


def figure(metric: Metric, ours: list[float], theirs: list[float], **more: object) -> Figure:
    told: dict[str, object] = {"peer": "dbos", "store": "sqlite", "our_store": "sqlite"}
    made = Figure("W1", metric, **{**told, **more})  # type: ignore[arg-type]  # names as given
    made.ours = dict(enumerate(ours))
    made.theirs = dict(enumerate(theirs))
    return made


def test_the_ratio_is_the_median_of_the_rounds_and_not_of_the_medians() -> None:
    made = figure(LATENCY, [1.0, 10.0, 2.0], [10.0, 50.0, 40.0])
    assert made.ratios == [0.1, 0.2, 0.05]
    assert made.ratio == 0.1
    assert made.verdict == "reached"


def test_a_round_that_one_side_missed_has_no_ratio() -> None:
    made = figure(LATENCY, [1.0, 2.0], [10.0])
    assert made.ratios == [0.1]


def test_a_missed_aim_says_by_how_much() -> None:
    assert figure(LATENCY, [1.0], [4.0]).verdict == "missed: 2.00 x the aim"
    assert figure(RATE, [400.0], [10.0]).verdict == "missed: 0.80 of it"


@pytest.mark.parametrize(("store", "aim"), [("sqlite", ">= 50.0 x"), ("postgres", ">= 25.0 x")])
def test_the_aim_depends_on_the_store(store: str, aim: str) -> None:
    made = figure(RATE, [300.0], [10.0], our_store=store)
    assert made.aim == aim
    assert made.verdict.startswith("reached" if store == "postgres" else "missed")


def test_only_one_peer_is_an_aim() -> None:
    made = figure(LATENCY, [1.0], [2.0], peer="temporal")
    assert (made.aim, made.verdict) == ("", "")
    assert made.ratio == 0.5


def test_an_aim_of_ours_alone_needs_no_peer() -> None:
    memory = Metric("pss", "memory", "MB", own=150.0)
    assert figure(memory, [120.0], []).verdict == "reached"
    assert figure(memory, [300.0], []).verdict == "missed: 2.00 x the aim"
    none = Metric("again", "steps", "steps", own=0.0, compared=False)
    assert figure(none, [0.0], [3.0]).verdict == "reached"
    assert figure(none, [3.0], [0.0]).verdict == "missed by 3.00"


def test_other_sizes_are_not_compared_where_size_matters() -> None:
    total = Metric("all", "all done", "s", scales=True)
    assert figure(total, [1.0], [2.0], same_size=False).ratio is None
    assert figure(total, [1.0], [2.0]).ratio == 0.5
    assert figure(LATENCY, [1.0], [2.0], same_size=False).ratio == 0.5


def test_the_table_leaves_empty_columns_out() -> None:
    text = report.table([figure(LATENCY, [1.0, 3.0], [10.0, 20.0]).row()])
    head, _, line = text.splitlines()
    assert "note" not in head
    assert "2.00 (1.00 .. 3.00)" in line
    assert line.endswith("reached")


def test_readings_survive_as_json() -> None:
    made = json.loads(json.dumps(figure(LATENCY, [1.0], [10.0]).to_json()))
    assert made["ratio"] == 0.1
    assert made["ours"] == [1.0]


def test_a_kill_is_judged_by_effects_and_by_what_was_recorded() -> None:
    before = [(0, 0, 1.0), (1, 0, 1.0), (0, 1, 2.0)]
    after = [*before, (0, 1, 3.0), (1, 0, 3.0), (1, 1, 3.0)]
    found = workloads.compare(before, after, {(0, 0), (1, 0)}, 4)
    assert found == {"twice": 2.0, "again": 1.0, "recorded": 2.0}


def test_a_lost_step_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="steps=1 of 2"):
        workloads.compare([], [(0, 0, 1.0)], set(), 2)


def test_a_line_that_a_kill_cut_off_is_no_effect(tmp_path: Path) -> None:
    log = tmp_path / "effects"
    log.write_text("0 0 1.5\n1 0 2.5\n0 1 3.")
    assert workloads.effects(log) == [(0, 0, 1.5), (1, 0, 2.5)]


def test_a_peer_measures_no_more_than_everybody() -> None:
    class Slow:
        SIZES: ClassVar = {"W7": {"runs": 500_000, "naps": 2}}

    full = next(each for each in workloads.WORKLOADS if each.name == "W7")
    assert full.size(Slow, quick=False) == {"runs": 100_000, "naps": 2}  # type: ignore[arg-type]  # only its sizes matter


def test_what_cannot_be_installed_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments.shutil, "which", lambda _: None)
    with pytest.raises(environments.CannotSetUp, match="needs node and npm"):
        environments.node(tmp_path, "restate", ["a"])


def test_the_command_explains_itself() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.peers", "--help"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for option in ("--peers", "--only", "--store", "--rounds", "--quick", "--plot", "--json"):
        assert option in done.stdout


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (["--from-json", "README.md"], "no readings: README.md"),
        (["--from-json", "nowhere.json"], "no such file: nowhere.json"),
        (["--json", "nowhere/x.json"], "no such directory: nowhere"),
        (["--plot", "nowhere/x.png"], "no such directory: nowhere"),
        (["--cache", "README.md/x"], "no cache can be there"),
        (["--peers", "x"], "no such peer: x"),
    ],
)
def test_the_command_refuses_what_it_cannot_use(wrong: list[str], told: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.peers", *wrong],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr


def test_the_last_words_of_a_peer_are_the_exception(tmp_path: Path) -> None:
    raised = (
        "Traceback\n  File x\nsqlalchemy.exc.IntegrityError: NOT NULL\n(Background: https://x)\n"
    )
    log = tmp_path / "log"
    program = f"import sys; sys.stderr.write({raised!r}); sys.exit(1)"
    with pytest.raises(RuntimeError, match="IntegrityError: NOT NULL"):
        Program([sys.executable, "-c", program], {}, log, own=True).wait(60)


def test_saved_readings_give_the_same_figures(tmp_path: Path) -> None:
    metric = next(w for w in workloads.WORKLOADS if w.name == "W1").metrics[0]
    made = figure(metric, [1.0, 2.0], [10.0])
    made.ours = {1: 2.0}
    made.theirs = {0: 10.0, 1: 40.0}
    workloads.dump(tmp_path / "a.json", {"figures": [made.to_json()]})
    _, [read] = workloads.load([tmp_path / "a.json"])
    assert read == made
    assert read.ratios == [0.05]
    _, [twice] = workloads.load([tmp_path / "a.json", tmp_path / "a.json"])
    assert twice.ratios == [0.05, 0.05]


def test_a_stall_is_that_of_the_slowest_run() -> None:
    lines = [(0, 0, 1.0), (1, 0, 1.0), (0, 1, 2.5), (1, 1, 7.0), (0, 2, 8.0)]
    assert workloads.stall(lines, 2.0) == 5.0
    assert workloads.stall(lines, 9.0) == 0.0
