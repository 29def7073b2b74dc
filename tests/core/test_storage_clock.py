"""A store whose clock is ahead of the machine's: what says so, and what puts it right."""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
import subprocess
import sys
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import time_machine

from pyworkflow._config import Settings
from pyworkflow._engine import pipeline
from pyworkflow._engine.outages import Outages
from pyworkflow._engine.pipeline import StorageClock
from pyworkflow._engine.suspects import POISON, is_poison
from pyworkflow.events import Event, EventClass, EventType
from pyworkflow.storage.memory import MemoryStorageBackend
from tests.devops.processes import environment

TWO_DAYS = timedelta(days=2)
APP = """
from pyworkflow import configure, start, workflow
from pyworkflow.spi import Change, ClaimRequest, ItemKind, NewRun, Put
from pyworkflow.storage.sql import SQLiteStorageBackend
import asyncio, sys, time
from datetime import timedelta
real = time.time_ns
time.time_ns = lambda: real() + 2 * 86400 * 10**9
async def main(lease):
    async with SQLiteStorageBackend("runs.db") as store:
        await store.commit_one(Change(
            run_id="r", key="start", create=NewRun(workflow="w", version="1", args="[]"),
            put=[Put(item_id="turn", kind=ItemKind.TURN)],
        ))
        if lease:
            request = ClaimRequest(owner="host/1", lease=timedelta(seconds=lease))
            assert (await store.claim(request)).claims
asyncio.run(main(int(sys.argv[1])))
"""


def use_wrong_clock(folder: Path, lease: int = 0) -> None:
    command = [sys.executable, "-c", APP, str(lease)]
    subprocess.run(command, cwd=folder, env=environment(), check=True, timeout=60)


def cli(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pyworkflow.cli", *words, "--storage", "sqlite:///runs.db"],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_found_h05_check_says_by_how_much_the_clock_is_ahead_and_set_clock_puts_it_right(
    tmp_path: Path,
) -> None:
    use_wrong_clock(tmp_path)
    checked = cli(tmp_path, "storage", "check")
    assert checked.returncode == 0, checked.stderr
    assert "clock: ahead=172800s" in checked.stdout
    assert "set-clock --to-now" in checked.stdout
    facts = json.loads(cli(tmp_path, "storage", "check", "--json").stdout)
    assert abs(facts["clock_ahead_s"] - TWO_DAYS.total_seconds()) < 1
    done = cli(tmp_path, "storage", "set-clock", "--to-now")
    assert done.returncode == 0, done.stderr
    assert "was_ahead=172800s ahead=0s" in done.stdout
    after = json.loads(cli(tmp_path, "storage", "check", "--json").stdout)
    assert abs(after["clock_ahead_s"]) < 1
    assert after["violations"] == []


def test_found_h05_after_set_clock_the_store_follows_the_machine_over_a_restart_of_it(
    tmp_path: Path,
) -> None:
    use_wrong_clock(tmp_path)
    assert cli(tmp_path, "storage", "set-clock", "--to-now").returncode == 0
    with closing(sqlite3.connect(tmp_path / "runs.db")) as conn, conn:
        # The machine was off for a day after its last write.
        conn.execute("update namespaces set boot = 'another', latest = latest - 86400000000")
    after = json.loads(cli(tmp_path, "storage", "check", "--json").stdout)
    assert abs(after["clock_ahead_s"]) < 1


def test_found_h05_set_clock_is_refused_while_a_lease_is_live(tmp_path: Path) -> None:
    use_wrong_clock(tmp_path, lease=3600)
    refused = cli(tmp_path, "storage", "set-clock", "--to-now")
    assert refused.returncode == 3, refused.stdout
    assert "owners=host/1; stop them" in refused.stderr
    facts = json.loads(cli(tmp_path, "storage", "check", "--json").stdout)
    assert facts["clock_ahead_s"] > 172_000


def test_found_h05_a_worker_says_so_when_it_starts_and_once_an_hour(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed = [1000.0]
    monkeypatch.setattr(pipeline, "monotonic", lambda: passed[0])
    clock = StorageClock()
    with caplog.at_level(logging.WARNING, logger="pyworkflow.engine"):
        clock.begin(datetime.now(UTC) + TWO_DAYS)
        for n in range(1, 61):
            passed[0] += 119
            # No two readings are equal: that would be a clock that stands still.
            clock.update(datetime.now(UTC) + TWO_DAYS + timedelta(microseconds=n))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2  # at the start, and once in the 119 minutes after it
    assert all("ahead=-172800s" in line and "set-clock --to-now" in line for line in lines)


def test_o03_a_frozen_clock_of_this_machine_is_reported_as_such(
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = datetime.now(UTC)
    with time_machine.travel("2020-01-01", tick=False):
        StorageClock().begin(before)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("the clock of this machine stands still: now=2020-01-01T00:00:00+00:00")
    assert "set-clock" not in line


def test_o03_a_clock_that_freezes_while_a_worker_works_is_reported_within_minutes(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed = [1000.0]
    monkeypatch.setattr(pipeline, "monotonic", lambda: passed[0])
    clock = StorageClock()
    with time_machine.travel("2020-01-01", tick=False):
        now = datetime.now(UTC)
        clock.begin(now)
        assert not caplog.records
        for seconds in range(180):
            passed[0] += 1
            clock.update(now + timedelta(seconds=seconds))
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("the clock of this machine stands still: now=2020-01-01T00:00:00+00:00")


def test_o03_a_frozen_clock_of_the_store_is_reported_as_such(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed = [1000.0]
    monkeypatch.setattr(pipeline, "monotonic", lambda: passed[0])
    clock = StorageClock()
    began = datetime.now(UTC)
    clock.begin(began)
    for seconds in range(180):
        passed[0] += 1
        with time_machine.travel(began + timedelta(seconds=seconds), tick=True):
            clock.update(began)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("the clock of the store stands still: now=")
    assert "for=61s" in line


@pytest.mark.parametrize(("turns", "poisonous"), [(0, True), (1, True), (2, False), (12, False)])
def test_o03_turns_that_end_with_nothing_to_do_are_not_called_poison(
    turns: int, poisonous: bool
) -> None:
    """Under a frozen clock a turn may be due whose timer is not."""
    idle = Event(EventType.WORKFLOW_SUSPENDED, EventClass.OBSERVATION, {})
    started = Event("workflow.started", EventClass.INPUT, {}, None, "started")

    async def get_events(run_id: str) -> list[Event]:
        return [started] + [idle] * turns

    async def main() -> bool:
        store = MemoryStorageBackend()
        worker = SimpleNamespace(
            storage=SimpleNamespace(get_events=get_events),
            settings=Settings(),
            outages=Outages(store.now, "me"),
        )
        item = SimpleNamespace(claims=POISON + 1)
        run = SimpleNamespace(run_id="r", stalled=None)
        return await is_poison(
            cast("Any", worker), cast("Any", SimpleNamespace(item=item, run=run))
        )

    assert asyncio.run(main()) is poisonous
