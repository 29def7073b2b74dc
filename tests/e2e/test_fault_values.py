"""Values that cannot be stored or read, and histories without end: one run is told, none is harmed."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing

import pytest

from pyworkflow._serialization import decode
from pyworkflow.errors import StorageDamaged
from tests.e2e import _fault_program
from tests.e2e._fault_stage import begin_worker, kinds
from tests.e2e._stage import Stage, eventually, stage

__all__ = ["stage"]


@pytest.mark.parametrize("stage", kinds("sqlite", "redis"), indirect=True)
def test_f43_results_that_no_store_takes_fail_their_steps_once(stage: Stage) -> None:
    stage.start(_fault_program.fault_values, [7])
    stage.start(_fault_program.fault_pair, [8])
    begin_worker(stage)
    eventually(stage.all_over, "all runs end", say=stage.output)
    results = {run.workflow: decode(run.result_text) for run in stage.runs()}
    assert results == {
        "fault_values": ["SerializationError", "PayloadTooLarge"],
        "fault_pair": ["one", "two"],
    }
    # No retry loop, though steps have retries: another try would give the same.
    executions = stage.executions()
    assert (executions["7", "unstorable"], executions["7", "oversized"]) == (1, 1)
    types = [event.type for event in stage.histories()["7"]]
    assert types.count("step.failed") == 2
    assert "step.retrying" not in types
    stage.check()


@pytest.mark.parametrize(
    ("stage", "limit"),
    [
        pytest.param("sqlite", 500, id="sqlite-500"),
        pytest.param("redis", 51_200, marks=pytest.mark.long, id="redis-51200"),
    ],
    indirect=["stage"],
)
def test_f45_a_history_at_its_limit_ends_its_run_and_no_other(
    stage: Stage, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if limit != 51_200:  # what settings say by themselves
        monkeypatch.setattr(stage, "environment", limited(stage, limit))
    stage.start(_fault_program.fault_endless, [7])
    stage.start(_fault_program.fault_pair, [8])
    process = begin_worker(stage)
    eventually(stage.all_over, "all runs end", say=stage.output)
    runs = {run.workflow: run for run in stage.runs()}
    assert str(runs["fault_pair"].status) == "completed"
    endless = runs["fault_endless"]
    assert str(endless.status) == "failed"
    assert endless.error is not None
    assert "HistoryTooLong" in endless.error.type
    assert str(limit) in endless.error.message
    assert limit <= endless.history_length < limit + 20
    warned = [line for line in stage.output().splitlines() if "the history is getting long" in line]
    assert [f"used={share}%" in line for share, line in zip((20, 50, 80), warned, strict=True)]
    assert process.poll() is None
    stage.check()


def limited(stage: Stage, limit: int):
    inner = stage.environment
    return lambda url=None: inner(url) | {"PYWORKFLOW_MAX_HISTORY": str(limit)}


@pytest.mark.parametrize("stage", ["sqlite"], indirect=True)
def test_f31_a_damaged_event_is_named_and_nothing_goes_on_from_it_until_it_is_repaired(
    stage: Stage,
) -> None:
    ids = stage.start(_fault_program.fault_napper, [7, 8])
    first = begin_worker(stage)
    eventually(
        lambda: all(str(run.status) == "suspended" for run in stage.runs()),
        "both runs sleep",
        say=stage.output,
    )
    first.kill()
    first.wait()
    before = stage.histories()
    flip(stage, ids[0], "one", "ooe")
    stage.ask(lambda storage: storage.shift_clock(_fault_program.NAP))
    second = begin_worker(stage)
    for said in ("store is damaged", f"file={stage.path}/store.db", f"run_id={ids[0]}", "seq="):
        eventually(lambda said=said: said in stage.output(), f"it says {said}", say=stage.output)
    with pytest.raises(StorageDamaged):
        stage.ask(lambda storage: storage.get_events(ids[0]))
    checked = stage.command("storage", "check", "--json")
    assert checked.returncode == 1
    assert [v["run_id"] for v in json.loads(checked.stdout)["violations"]] == [ids[0]]
    eventually(
        lambda: sorted(str(run.status) for run in stage.runs()) == ["completed", "stalled"],
        "the damaged run is put aside, the other one goes on",
        say=stage.output,
    )
    assert stage.executions() == {("7", "one"): 1, ("8", "one"): 1, ("8", "two"): 1}
    assert second.poll() is None
    flip(stage, ids[0], "ooe", "one")
    eventually(stage.all_over, "both runs end", say=stage.output)
    after = stage.histories()
    for number, events in before.items():
        assert after[number][: len(events)] == events
    assert {decode(run.result_text)[-1] for run in stage.runs()} == {"two"}
    stage.check()


def flip(stage: Stage, run_id: str, old: str, new: str) -> None:
    """Change the result of a step behind the store's back, by the difference of one byte."""
    with closing(sqlite3.connect(stage.path / "store.db", isolation_level=None)) as other:
        changed = other.execute(
            "update events set data = replace(data, ?, ?) where instr(data, ?) and type = ? "
            "and run = (select id from runs where run_id = ?)",
            (old, new, old, "step.completed", run_id),
        )
        assert changed.rowcount == 1
