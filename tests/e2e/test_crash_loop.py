"""The crash loop: a real process is killed at every failpoint, at its every hit; another goes on.

After that all runs have the results of a process that nobody disturbed, nothing that was recorded
ran again, and the store is sound. A few hits of each failpoint here, all of them in the long matrix.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from docs.write_failpoints import all_failpoints
from pyworkflow._serialization import decode, decode_arguments
from tests.e2e._crashes import EXPECTED, KEPT, PURGED, TWICE, Nursery, Order, command
from tests.e2e._stage import KINDS, ROOT, SERVED, Stage, staged

#: The distribution's modules whose failpoints a process on this kind of store can reach.
OF_KIND = {
    "file": "pyworkflow_storage_file.",
    "sqlite": "pyworkflow_storage_sql.sqlite.",
    "postgresql": "pyworkflow_storage_sql.postgres.",
    "redis": "pyworkflow_storage_redis.",
}
#: Whoever is stopped there holds a lock of the store, and nobody can go on meanwhile.
LOCKED = ("postgres.migrating",)
OF_CELERY = "pyworkflow_celery."
#: Any failpoint: while one is on, all are counted.
COUNTING = "client.after_start=sleep:0"
QUICK = ("file", "sqlite")


def reachable(kind: str) -> list[str]:
    """The failpoints that the loop reaches on a kind of store."""
    own = OF_KIND[kind]
    return [
        name
        for name, point in all_failpoints().items()
        if point.module.startswith(("pyworkflow.", own))
    ]


class Loop:
    """A nursery, and stores on which one process is killed and another goes on."""

    def __init__(self, kind: str, path: Path, nursery: Nursery, shared: Stage) -> None:
        self.kind = kind
        self.nursery = nursery
        self._path = path
        self._shared = shared
        self._cases = 0
        self._hits: Counter[str] | None = None

    def stage(self) -> Stage:
        """An empty store."""
        self._cases += 1
        path = self._path / f"{self._cases}"
        path.mkdir()
        urls = {"file": f"file://{path}/store", "sqlite": f"sqlite:///{path}/store.db"}
        url = urls.get(self.kind, self._shared.url)
        return Stage(path, url, f"crash-{uuid4().hex[:12]}")

    def hits(self) -> Counter[str]:
        """How often a process that nobody disturbs reaches each failpoint."""
        if self._hits is None:
            stage = self.stage()
            assert self.first(stage, COUNTING) == 0, said(stage)
            self.finish(stage)
            self._hits = Counter(json.loads((stage.path / "hits").read_text("ascii")))
        return self._hits

    def stop(self, name: str, number: int) -> bool:
        """Stop a process at a failpoint for longer than its lease; whether it came there."""
        stage = self.stage()
        told = self.nursery.run(order(stage, f"{name}=stop@{number}"))
        if told.status != -signal.SIGSTOP:
            return False
        try:
            self.finish(stage)
            before = {number: len(events) for number, events in stage.histories().items()}
        finally:
            os.kill(told.pid, signal.SIGCONT)
            told = self.nursery.wait(told.pid)
        assert told.status == 0, said(stage)
        after = stage.histories()
        assert {number: len(after[number]) for number in before} == before
        # It may have begun a step that the other has recorded meanwhile; its end is refused.
        check(stage, processes=3)
        return True

    def first(self, stage: Stage, orders: str) -> int:
        """Run the first process; how it ended."""
        return self.nursery.run(order(stage, orders)).status

    def finish(self, stage: Stage) -> None:
        """Run another process to the end, and compare everything."""
        begun = (stage.path / "steps.log").exists()
        with stage.nothing_recorded_runs_again() as remember:
            if begun:
                remember()
            assert self.nursery.run(order(stage, "", last=True)).status == 0, said(stage)
        check(stage)

    def disturb(self, name: str, action: str) -> int:
        """Have something happen at a failpoint, then go on; how the first process ended."""
        stage = self.stage()
        status = self.first(stage, f"{name}={action}")
        try:
            self.finish(stage)
        except AssertionError as error:
            error.add_note(f"after {name}={action} (status {status}), in {stage.path}")
            raise
        return status


def order(stage: Stage, orders: str, *, last: bool = False) -> Order:
    return Order(stage.url, stage.namespace, str(stage.path), orders, last)


def said(stage: Stage) -> str:
    return (stage.path / "process.log").read_text("utf-8", "replace")[-6000:]


def check(stage: Stage, processes: int = 2) -> None:
    """Every run has ended with its result, and every step was executed as often as it may be."""
    stage.check()
    runs = {decode_arguments(run.args_text)[0][0]: run for run in stage.runs()}
    assert EXPECTED.keys() - {PURGED} <= runs.keys() <= EXPECTED.keys()
    for number, run in runs.items():
        assert str(run.status) == "completed"
        assert decode(run.result_text) in EXPECTED[number]
    acknowledged = [line.split() for line in (stage.path / "acks").read_text("ascii").splitlines()]
    assert {runs[int(number)].run_id for number, _ in acknowledged} == {
        run_id for _, run_id in acknowledged
    }
    executions = stage.executions()
    assert executions[str(KEPT), "once"] <= 1
    if decode(runs[KEPT].result_text) == "once":
        assert executions[str(KEPT), "once"] == 1
    for (number, name), times in executions.items():
        # Once in each process that came to it and did not record its end.
        assert 1 <= times <= processes + (name in TWICE), (number, name)
    steps = Counter(int(number) for number, _ in executions)
    assert [steps[number] for number in (1, 2, 3, 4, 5, 7)] == [7, 1, 1, 1, 1, 7]


@pytest.fixture(scope="module", params=KINDS)
def loop(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Loop]:
    """The crash loop on each kind of store."""
    path = tmp_path_factory.mktemp("crashes")
    with staged(request.param, path) as shared:
        process = subprocess.Popen(
            command(),
            cwd=ROOT,
            env=shared.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            yield Loop(request.param, path, Nursery(process), shared)
        finally:
            # At the end of its input it ends.
            process.communicate()


everywhere = pytest.mark.parametrize("loop", KINDS, indirect=True)


def test_every_failpoint_is_of_the_engine_of_a_store_or_of_celery() -> None:
    modules = ("pyworkflow.", OF_CELERY, *OF_KIND.values())
    assert [n for n, p in all_failpoints().items() if not p.module.startswith(modules)] == []


@everywhere
def test_every_failpoint_is_reached(loop: Loop) -> None:
    hits = loop.hits()
    assert [name for name in reachable(loop.kind) if not hits[name]] == []


def each(*kinds: str, fails: bool = False, free: bool = False) -> pytest.MarkDecorator:
    """Every failpoint that is reached on these kinds of store.

    ``fails``: those that can raise. ``free``: those where no lock is held.
    """
    found = [
        pytest.param(kind, name, id=f"{kind}-{name}")
        for kind in kinds
        for name in reachable(kind)
        if not (fails and all_failpoints()[name].raises is None)
        and not (free and name.startswith(LOCKED))
    ]
    return pytest.mark.parametrize(("loop", "name"), found, indirect=["loop"])


@each(*QUICK)
def test_f01_f06_f07_f40_a_process_killed_at_a_failpoint_loses_and_repeats_nothing(
    loop: Loop, name: str
) -> None:
    number = random.Random(f"{loop.kind} {name}").randint(1, loop.hits()[name])
    status = loop.disturb(name, f"kill@{number}")
    if status == 0:  # it was not reached so often this time
        status = loop.disturb(name, "kill")
    assert status == -signal.SIGKILL


@pytest.mark.long
@each(*KINDS)
def test_a_process_killed_at_every_hit_of_a_failpoint_loses_and_repeats_nothing(
    loop: Loop, name: str
) -> None:
    number = 1
    while loop.disturb(name, f"kill@{number}") == -signal.SIGKILL:
        number += 1
    assert number > 1


@pytest.mark.long
@each(*KINDS, fails=True)
def test_a_failure_at_a_failpoint_is_survived_by_the_process(loop: Loop, name: str) -> None:
    hits = loop.hits()[name]
    for number in {1, (hits + 1) // 2, hits}:
        assert loop.disturb(name, f"raise@{number}") == 0, number


@pytest.mark.long
@each(*SERVED, free=True)  # elsewhere a thread may hold the store's lock
def test_f14_a_process_stopped_at_a_failpoint_past_its_lease_writes_nothing_when_it_goes_on(
    loop: Loop, name: str
) -> None:
    hits = loop.hits()[name]
    reached = [loop.stop(name, number) for number in sorted({1, (hits + 1) // 2})]
    assert any(reached)
