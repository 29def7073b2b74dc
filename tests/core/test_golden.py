"""Histories of every release are replayed by today's code, on every supported Python."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from pyworkflow import Event, NonDeterminism, __version__
from pyworkflow.event_schema import validate_event
from pyworkflow.testing import History, replay
from tests.core import golden_workflows
from tests.core.histories.record import RECORDINGS

HISTORIES = Path(__file__).parent / "histories"
FILES = sorted(HISTORIES.glob("*/*.json"))
assert golden_workflows.before_patch is False

each_history = pytest.mark.parametrize(
    "path", FILES, ids=[f"{path.parent.name}-{path.stem}" for path in FILES]
)


@each_history
def test_todays_code_fits_the_history(path: Path) -> None:
    history = History.load(path)
    result = replay(history)
    result.check()
    assert result.ok
    assert result.status == history.run.status


@each_history
def test_every_event_fits_the_schema(path: Path) -> None:
    for event in History.load(path).events:
        validate_event(event)


@each_history
def test_a_history_is_written_as_it_was_read(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / path.name
    History.load(path).dump(copy)
    assert copy.read_bytes() == path.read_bytes()


@each_history
def test_another_name_of_a_step_is_found(path: Path) -> None:
    history = History.load(path)
    steps = [e for e in history.events if e.type in ("step.completed", "step.scheduled")]
    if not steps:
        return  # nothing but sleeps: the next test looks at those
    changed = steps[-1]._replace(data={**steps[-1].data, "name": "golden.renamed"})
    result = replay(_with(history, changed))
    assert isinstance(result.mismatch, NonDeterminism)
    assert result.mismatch.seq == changed.seq
    assert "golden.renamed" in result.mismatch.expected
    with pytest.raises(NonDeterminism):
        result.check()


@each_history
def test_each_op_is_pinned(path: Path) -> None:
    history = History.load(path)
    for event in history.events:
        if event.op is not None and event.klass != "O" and not event.op.startswith("0#"):
            elsewhere = event._replace(op=f"1.77{event.op[1:]}")
            result = replay(_with(history, elsewhere))
            assert isinstance(result.mismatch, NonDeterminism), event
            assert result.mismatch.seq == event.seq


@each_history
def test_another_result_is_found(path: Path) -> None:
    history = History.load(path)
    last = history.events[-1]
    if last.type != "workflow.completed":
        return
    result = replay(_with(history, last._replace(data={"result": '"something else"'})))
    assert isinstance(result.mismatch, NonDeterminism)


def test_this_release_has_every_history() -> None:
    recorded = {path.stem for path in FILES if path.parent.name == __version__}
    # A version in development has none of its own: its histories are written at its release.
    assert recorded == (set() if ".dev" in __version__ else set(RECORDINGS))


def _with(history: History, changed: Event) -> History:
    events = tuple(changed if e.seq == changed.seq else e for e in history.events)
    return dataclasses.replace(history, events=events)
