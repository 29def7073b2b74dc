"""Stores and networks that fail under working processes: all recovers, nothing told is lost."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path
from random import Random

import pytest

from pyworkflow.errors import StorageError, StorageUnavailable, WorkflowError
from pyworkflow.events import Event
from pyworkflow.spi import Change, NewRun, StorageBackend
from tests.e2e import _program
from tests.e2e._stage import (
    SERVED,
    Stage,
    eventually,
    served,
    stage,
    staged,
    start_one,
)
from tests.watched import UNPRIVILEGED, spawn

__all__ = ["served", "stage"]

RUNS = range(8)

# A worker whose own clock is wrong by so many seconds.
SKEWED = """
import sys, time
from datetime import timedelta
skew = float(sys.argv.pop(1))
now, utcnow = time.time, None
time.time = lambda: now() + skew
import pyworkflow._clock as clock
utcnow = clock.utcnow
clock.utcnow = lambda: utcnow() + timedelta(seconds=skew)
from pyworkflow.cli import main
main()
"""


class Starter:
    """A thread that starts runs without end and remembers those that the store acknowledged."""

    def __init__(self, stage: Stage) -> None:
        self.acknowledged: dict[int, str] = {}
        self.failures: list[WorkflowError] = []
        self._stage = stage
        self._over = threading.Event()
        self._broken: BaseException | None = None
        self._thread = threading.Thread(target=self._main)
        self._thread.start()

    def end(self) -> None:
        """Stop starting runs."""
        self._over.set()
        self._thread.join()
        if self._broken is not None:
            raise self._broken

    def _main(self) -> None:
        try:
            asyncio.run(self._work())
        except BaseException as error:  # noqa: BLE001 - raised again in the test's thread
            self._broken = error

    async def _work(self) -> None:
        number = 1000
        async with self._stage.storage() as storage:
            while not self._over.is_set():
                try:
                    self.acknowledged[number] = await start_one(storage, _program.errand, number)
                except StorageError as error:
                    # The outcome is unknown: the same start again finds out, under its own key.
                    self.failures.append(error)
                    await asyncio.sleep(0.01)
                else:
                    number += 1
                    await asyncio.sleep(0.02)


@contextmanager
def starting(stage: Stage) -> Iterator[Starter]:
    starter = Starter(stage)
    try:
        yield starter
    finally:
        starter.end()


def settled(stage: Stage, starter: Starter) -> None:
    """Every run ended, every acknowledged one is there, each key once, and the store is sound."""
    eventually(stage.all_over, "all runs end", say=stage.output)
    runs = {run.run_id: run for run in stage.runs()}
    assert set(starter.acknowledged.values()) <= set(runs)
    assert len(set(starter.acknowledged.values())) == len(starter.acknowledged)
    assert {str(run.status) for run in runs.values()} == {"completed"}
    stage.check()


def test_f24_a_server_that_is_killed_under_load_keeps_every_acknowledged_start(
    served: Stage,
) -> None:
    workers = [served.worker() for _ in range(2)]
    eventually(lambda: all(map(served.ready, workers)), "workers are ready", say=served.output)
    with starting(served) as starter, served.nothing_recorded_runs_again() as remember:
        for lines in (30, 60):
            eventually(lambda lines=lines: len(served.lines()) >= lines, "work", say=served.output)
            served.server.kill()
            failed = len(starter.failures)
            eventually(lambda failed=failed: len(starter.failures) > failed, "a failed start")
            served.server.start()
            remember()
            done = len(starter.acknowledged)
            eventually(
                lambda done=done: len(starter.acknowledged) > done + 3,
                "starts go on",
                say=lambda: repr(starter.failures[-1:]),
            )
        starter.end()
        settled(served, starter)
    assert [worker.poll() for worker in workers] == [None, None], served.output()
    assert served.server.password not in served.output()


def test_f24_a_server_that_stands_still_for_a_while_loses_nothing(served: Stage) -> None:
    served.worker()
    with starting(served) as starter:
        eventually(lambda: len(served.lines()) >= 20, "work", say=served.output)
        served.server.pause()
        before = len(served.lines())
        # As long as it takes to notice: steps that run now end, and none of them is recorded.
        eventually(lambda: not _grows(served), "the work stands still")
        served.server.resume()
        eventually(lambda: len(served.lines()) > before + 8, "work goes on", say=served.output)
        starter.end()
        settled(served, starter)


def _grows(stage: Stage) -> bool:
    before = len(stage.lines())
    return any(len(stage.lines()) > before for _ in _moments())


def _moments() -> Iterator[None]:
    """Half a second in small pieces: as long as a look for something that must not be takes."""
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        yield
        time.sleep(0.02)


def test_dropped_connections_are_made_again_and_nothing_is_lost(served: Stage, make_proxy) -> None:
    proxy = make_proxy(served.url)
    worker = served.worker(proxy.url)
    served.start(_program.journey, RUNS)
    with served.nothing_recorded_runs_again() as remember:
        for lines in range(10, 80, 10):
            eventually(
                lambda lines=lines: len(served.lines()) >= lines or served.all_over(),
                "work",
                say=served.output,
                pause=0.01,
            )
            proxy.drop()
            remember()
        eventually(served.all_over, "all runs end", say=served.output)
    assert worker.poll() is None
    served.journeys_ended(RUNS)
    assert served.server.password not in served.output()


def test_f25_answers_that_get_lost_are_asked_for_again_and_nothing_is_written_twice(
    served: Stage, make_proxy
) -> None:
    proxy = make_proxy(served.url)
    served.worker(proxy.url)
    eventually(lambda: proxy.connections, "the worker connects", say=served.output)
    served.start(_program.journey, RUNS)
    with served.nothing_recorded_runs_again() as remember:
        for lines in range(5, 80, 15):
            eventually(
                lambda lines=lines: len(served.lines()) >= lines or served.all_over(),
                "work",
                say=served.output,
                pause=0.01,
            )
            proxy.drop_before_answer(2)
            remember()
        proxy.heal()
        eventually(served.all_over, "all runs end", say=served.output)
    served.journeys_ended(RUNS)


def test_f22_a_connection_that_nothing_comes_through_any_more_is_given_up(
    served: Stage, make_proxy
) -> None:
    proxy = make_proxy(served.url)
    worker = served.worker(proxy.url)
    served.start(_program.journey, RUNS)
    eventually(lambda: len(served.lines()) >= 10, "work", pause=0.01, say=served.output)
    proxy.blackhole()
    with served.nothing_recorded_runs_again() as remember:
        eventually(lambda: not _grows(served), "the work stands still")
        remember()
        proxy.drop()
        proxy.heal()
        eventually(served.all_over, "all runs end", say=served.output)
    assert worker.poll() is None
    served.journeys_ended(RUNS)


@pytest.mark.parametrize("served", ["postgresql"], indirect=True)
def test_f25_terminated_sessions_of_postgres_are_made_again(served: Stage) -> None:
    served.worker()
    with starting(served) as starter, served.nothing_recorded_runs_again() as remember:
        for lines in range(10, 70, 10):
            eventually(lambda lines=lines: len(served.lines()) >= lines, "work", pause=0.01)
            served.server.sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
            )
            remember()
        starter.end()
        settled(served, starter)


def test_f20_a_valkey_that_forgot_what_it_told_is_refused_until_clients_start_anew(
    tmp_path: Path,
) -> None:
    with staged("redis", tmp_path, own=True) as stage:
        stage.start(_program.errand, [0])
        server = stage.server
        older = tmp_path / "older"

        async def main() -> None:
            async with stage.storage() as storage:
                await start_one(storage, _program.errand, 1)
                server.stop()
                shutil.copytree(server.data, older)
                server.start()
                await _again(lambda: start_one(storage, _program.errand, 2))
                server.kill()
                # What a replica that took over too early shows: an earlier state, without a word.
                for found in (older / "appendonlydir").iterdir():
                    target = server.data / "appendonlydir" / found.name
                    target.write_bytes(found.read_bytes())
                server.start()
                with pytest.raises(StorageError, match="lost writes"):
                    await _again(lambda: start_one(storage, _program.errand, 3))
                with pytest.raises(StorageError, match="lost writes"):
                    await start_one(storage, _program.errand, 3)

        asyncio.run(main())
        assert len(stage.runs()) == 2
        stage.worker()
        eventually(stage.all_over, "a worker that begins anew goes on", say=stage.output)


async def _again(call: Callable[[], Awaitable[str]]) -> str:
    """As a client does it: again while the store does not answer."""
    while True:
        try:
            return await call()
        except StorageUnavailable:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("stage", ["sqlite"], indirect=True)
def test_f27_another_writer_of_the_file_is_waited_for(stage: Stage) -> None:
    stage.start(_program.errand, [0])
    with closing(sqlite3.connect(stage.path / "store.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with starting(stage) as starter:
            assert not any(starter.acknowledged for _ in _moments())
            other.execute("ROLLBACK")
            eventually(lambda: len(starter.acknowledged) > 3, "starts go on")
    assert starter.failures == []


def test_f26_fifty_writers_of_one_run_lose_no_event(stage: Stage) -> None:
    async def main() -> None:
        async with stage.storage() as storage:
            await _create(storage, "run")
            others = [storage, *(storage.clone() for _ in range(4))]
            await asyncio.gather(*(_write(others[n % 5], n) for n in range(50)))
            events = await storage.get_events("run")
            for other in others[1:]:
                await other.close()
        assert [event.seq for event in events] == list(range(1, 252))
        assert {event.key for event in events[1:]} == {
            f"{n}:{i}" for n in range(50) for i in range(5)
        }

    asyncio.run(main())
    stage.start(_program.errand, ())
    assert stage.ask(lambda storage: storage.get_run("run")).history_length == 251


async def _create(storage: StorageBackend, run_id: str) -> None:
    new = NewRun(workflow="flow", version="1", args="[]")
    first = Event("workflow.started", "I", {"workflow": "flow", "args": "[]"})
    await storage.commit_one(Change(run_id=run_id, key="start", create=new, events=[first]))


async def _write(storage: StorageBackend, writer: int) -> None:
    for i in range(5):
        event = Event("log.info", "O", {"message": "m"}, key=f"{writer}:{i}")
        await storage.commit_one(Change(run_id="run", key=f"{writer}:{i}", events=[event]))


@pytest.mark.parametrize("served", SERVED, indirect=True)
def test_f33_workers_whose_clocks_are_wrong_by_an_hour_do_as_the_store_says(
    served: Stage,
) -> None:
    before = served.ask(lambda storage: storage.now())
    for skew in (3600, -3600):
        command = [sys.executable, "-c", SKEWED, str(skew), "worker", _program.__name__]
        with (served.path / f"worker-{skew}.log").open("wb") as log:
            served.processes.append(
                spawn(command, env=served.environment(), cwd=served.path, stdout=log, stderr=log)
            )
    served.start(_program.journey, RUNS)
    eventually(served.all_over, "all runs end", say=served.output)
    after = served.ask(lambda storage: storage.now())
    served.journeys_ended(RUNS)
    for events in served.histories().values():
        assert all(before <= event.timestamp <= after for event in events)
    for ahead in (r"\+3[56]\d\ds", r"-3[56]\d\ds"):
        line = re.compile(f"not the store's: ahead={ahead}")
        # One worker may end all runs before the other has started.
        eventually(lambda line=line: line.search(served.output()), "a warning", say=served.output)


def test_f34_a_storage_clock_that_is_set_back_fires_nothing_twice(stage: Stage) -> None:
    stage.start(_program.journey, RUNS)
    stage.worker()
    eventually(lambda: len(stage.lines()) >= 15, "work", pause=0.001, say=stage.output)
    with stage.nothing_recorded_runs_again() as remember:
        stage.ask(lambda storage: storage.shift_clock(timedelta(minutes=-10)))
        remember()
        # What was due in ten minutes of the old clock is due in twenty now.
        eventually(lambda: not _grows(stage), "work comes to its timers")
        stage.ask(lambda storage: storage.shift_clock(timedelta(minutes=20)))
        eventually(stage.all_over, "all runs end", say=stage.output)
    stage.journeys_ended(RUNS)
    for events in stage.histories().values():
        stamps = [event.timestamp for event in events]
        assert stamps == sorted(stamps)
        fired = [event.key for event in events if event.type == "timer.fired"]
        assert len(fired) == len(set(fired))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
@pytest.mark.parametrize("kind", ["file", "sqlite"])
def test_f28_a_full_disk_refuses_starts_and_loses_none_that_was_acknowledged(
    kind: str, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", "2m") as disk, staged(kind, disk) as stage:
        (disk / "ballast").write_bytes(bytes(1024 * 1024))
        acknowledged, refusal = asyncio.run(_fill(stage))
        assert type(refusal).__name__ == "StorageFull", repr(refusal)
        assert {run.run_id for run in stage.runs()} >= set(acknowledged)
        (disk / "ballast").unlink()
        # The last one's outcome is known when it is asked for again.
        again, _ = asyncio.run(_fill(stage, up_to=len(acknowledged) + 3))
        assert again[: len(acknowledged)] == acknowledged
        stage.check()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_f28_a_full_tablespace_of_postgres_refuses_whole_starts(tmp_path: Path) -> None:
    settings = {"temp_tablespaces": "pg_default"}  # what is read may need some room as well
    with staged("postgresql", tmp_path, own=True, settings=settings) as stage:
        server = stage.server
        with small_disk(server.folder / "disk", "12m") as disk:
            shutil.chown(disk, UNPRIVILEGED)
            server.sql(f"CREATE TABLESPACE small LOCATION '{disk}'")
            server.sql("CREATE DATABASE small TABLESPACE small")
            stage.url = stage.url.rpartition("/")[0] + "/small"
            server.sql(
                "CREATE TABLE ballast AS SELECT repeat(md5(n::text), 30) FROM "
                "generate_series(1, 1000) n",
                url=stage.url,
            )
            acknowledged, refusal = asyncio.run(_fill(stage))
            assert type(refusal).__name__ == "StorageFull", repr(refusal)
            assert {run.run_id for run in stage.runs()} >= set(acknowledged)
            server.sql("DROP TABLE ballast", url=stage.url)
            again, _ = asyncio.run(_fill(stage, up_to=len(acknowledged) + 3))
            assert again[: len(acknowledged)] == acknowledged
            stage.check()


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path]:
    path.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={size}", "none", str(path)]
    made = subprocess.run(["mount", *options], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no small disk can be mounted: {made.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)  # a server may still look at it


async def _fill(stage: Stage, up_to: int = 10_000) -> tuple[list[str], WorkflowError | None]:
    """Start runs until there are so many, or the store says that it is full."""
    started: list[str] = []
    ballast = Random(1).randbytes(15_000).hex()  # cannot be compressed to nothing
    async with stage.storage() as storage:
        for number in range(up_to):
            try:
                started.append(await start_one(storage, _program.heavy, number, ballast))
            except WorkflowError as error:
                return started, error
    return started, None
