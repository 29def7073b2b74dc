"""Layers L2 to L7 fail on stores that are wrong in one way, each planted here."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from pyworkflow._memory import MemoryStorageBackend
from pyworkflow.errors import Refusal, RunClosed, RunNotFound
from pyworkflow.spi import Committed, Fenced, Page, StorageError
from pyworkflow_conformance import _crash, _profiles, _stateful
from pyworkflow_conformance._copies import CopyChecks
from pyworkflow_conformance._crash import CrashChecks
from pyworkflow_conformance._damage import DamageChecks
from pyworkflow_conformance._faulty import FaultChecks
from pyworkflow_conformance._migrations import MigrationChecks
from pyworkflow_conformance._model import ModelChecks
from pyworkflow_conformance._processes import ProcessChecks
from pyworkflow_conformance._profiles import EngineChecks
from pyworkflow_conformance._soak import SoakChecks
from pyworkflow_storage_file import FileStorageBackend


class Layers(
    ModelChecks,
    FaultChecks,
    SoakChecks,
    EngineChecks,
    CopyChecks,
    MigrationChecks,
    CrashChecks,
    DamageChecks,
    ProcessChecks,
):
    """All of them."""


def run(suite: Layers, check_id: str) -> None:
    (name,) = (name for name in dir(suite) if name.startswith(f"test_{check_id}_"))
    getattr(suite, name)()


# --- in one process -------------------------------------------------------------------------------


class Broken(MemoryStorageBackend):
    """Clones are broken the same way."""

    def clone(self):
        other = type(self)(namespace=self._namespace)
        other._shared = self._shared
        return other

    async def commit(self, changes):
        answers = []
        for change in changes:
            try:
                answers.append(await self.one(change))
            except (Refusal, RunNotFound, RunClosed) as refusal:
                answers.append(refusal)
        return answers

    async def one(self, change):
        """Commit a single change; what subclasses get wrong."""
        (answer,) = await super().commit([change])
        if isinstance(answer, Exception):
            raise answer
        return answer


class Miscounts(Broken):
    """Says that one event more is there."""

    async def one(self, change):
        answer = await super().one(change)
        return replace(answer, last_seq=answer.last_seq + 1)


class CountsReleased(Broken):
    """A claim given back stays counted."""

    async def release(self, ref, *, delay=None):
        done = await super().release(ref, delay=delay)
        run = self._shared.store._runs.get(ref.run_id)
        if done and run is not None:
            item = run.items[ref.item_id]
            run.items[ref.item_id] = replace(item, claims=item.claims + 1)
        return done


class ForgetsSkipped(Broken):
    """Does not say which events it skipped."""

    async def one(self, change):
        return replace(await super().one(change), skipped=frozenset())


class FilterBlind(Broken):
    """A poll for one workflow gives all."""

    async def claim(self, request):
        return await super().claim(replace(request, workflows=None))


class PurgesChildren(Broken):
    """Removes runs whose parent is open, and lets go of keys too early."""

    async def purge(self, **given):
        return await super().purge(**{**given, "key_retention": type(given["key_retention"])(0)})


class AppliesAgain(Broken):
    """Does not know a change that comes again."""

    async def one(self, change):
        if change.create is None:
            self._shared.sent = n = getattr(self._shared, "sent", 0) + 1
            change = replace(
                change,
                key=f"{change.key}/{n}",
                events=[event._replace(key=None) for event in change.events],
            )
        return await super().one(change)


class HalfWhenCancelled(Broken):
    """A call given up in the middle leaves the first half behind."""

    async def one(self, change):
        if len(change.events) > 1 and change.claim is None and change.create is None:
            self._shared.halves = n = getattr(self._shared, "halves", 0) + 1
            first = replace(change, key=f"{change.key}/{n}", events=change.events[:1])
            await super().one(first)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            change = replace(change, events=change.events[1:])
        return await super().one(change)


class ReadsThePast(Broken):
    """Reads may come from a copy that lags."""

    async def get_events(self, run_id, *, after=0, limit=None):
        events = await super().get_events(run_id)
        self.reads = getattr(self, "reads", 0) + 1
        seen = events[: -1 if self.reads % 7 == 0 else None]
        return seen[after:][:limit]


class DropsAnswers(Broken):
    """A copy arrives without the answers that may be asked for again."""

    async def import_delta(self, delta):
        delta.parts = [replace(part, records=[]) for part in delta.parts]
        await super().import_delta(delta)


class MigratesTwice(Broken):
    """Each migration touches every run."""

    async def migrate(self):
        for run in self._shared.store._runs.values():
            run.attributes = {**run.attributes, "migrated": True}


class Rounds(Broken):
    """Numbers become floats on the way, as some clients have it."""

    async def commit(self, changes):
        return await super().commit([self._round(change) for change in changes])

    def _round(self, change):
        events = [
            event._replace(data=json.loads(json.dumps(event.data).replace('"x":1', '"x":3')))
            if "result" in event.data
            else event
            for event in change.events
        ]
        bent = [
            event._replace(data={**event.data, "result": event.data["result"].replace("2", "3")})
            if isinstance(event.data.get("result"), str)
            else event
            for event in events
        ]
        return replace(change, events=bent)


PLANTED = [
    (Miscounts, "MOD_01"),
    (CountsReleased, "MOD_02"),
    (ForgetsSkipped, "MOD_02"),
    (FilterBlind, "MOD_02"),
    (PurgesChildren, "MOD_02"),
    (AppliesAgain, "FLT_02"),
    (AppliesAgain, "FLT_05"),
    (HalfWhenCancelled, "FLT_04"),
    (ReadsThePast, "SOAK_01"),
    (DropsAnswers, "CPY_03"),
    (DropsAnswers, "CPY_07"),
    (MigratesTwice, "MIG_03"),
    (Rounds, "ENG_01"),
]


def in_memory(kind: type[MemoryStorageBackend]) -> Layers:
    made: dict[str, MemoryStorageBackend] = {}

    class Suite(Layers):
        capabilities = MemoryStorageBackend().info().capabilities

        async def make(self, namespace):
            return made.setdefault(namespace, kind(namespace=namespace)).clone()

    return Suite()


@pytest.mark.parametrize(("kind", "check_id"), PLANTED)
def test_the_planted_fault_is_found(kind, check_id, monkeypatch):
    monkeypatch.setattr(_profiles, "PATIENCE", 5.0)
    # What the programs do undisturbed is worked out on a sound store.
    with pytest.raises((AssertionError, BaseExceptionGroup, Exception)) as caught:
        run(in_memory(kind), check_id)
    assert not isinstance(caught.value, (AttributeError, NameError, ImportError))


@pytest.mark.parametrize("check_id", sorted({check_id for _, check_id in PLANTED}))
def test_the_same_check_passes_the_sound_store(check_id):
    run(in_memory(MemoryStorageBackend), check_id)


def test_a_divergence_is_told_with_the_calls_that_led_to_it():
    with pytest.raises(AssertionError, match=r"(?s)found .*expected .*after .* of .*1\. "):
        run(in_memory(ForgetsSkipped), "MOD_02")


def test_t02_a_failure_is_shortened_for_a_bounded_time(monkeypatch):
    # Where each call takes a millisecond, Hypothesis would shorten for minutes.
    monkeypatch.setattr(_stateful, "SHRINKING_S", 0.0)
    made = []

    class Counted(Miscounts):
        async def open(self):
            made.append(self)
            await super().open()

    with pytest.raises(AssertionError, match="last_seq"):
        run(in_memory(Counted), "MOD_01")
    assert len(made) < 100, "a failure was shortened although its time was over"


# --- with processes -------------------------------------------------------------------------------


class BrokenFile(FileStorageBackend):
    """Commits change by change."""

    async def commit(self, changes):
        answers = []
        for change in changes:
            try:
                answers.append(await self.one(change))
            except (Refusal, RunNotFound, RunClosed) as refusal:
                answers.append(refusal)
        return answers

    async def one(self, change):
        """Commit a single change; what subclasses get wrong."""
        (answer,) = await super().commit([change])
        if isinstance(answer, Exception):
            raise answer
        return answer


class TwoWrites(BrokenFile):
    """A change is two writes."""

    async def one(self, change):
        if len(change.events) < 2:
            return await super().one(change)
        bare = replace(change, key=change.key + "/1", events=change.events[:1], put=(), update=None)
        first = await super().one(bare)
        await asyncio.sleep(0.05)
        rest = await super().one(replace(change, events=change.events[1:]))
        return replace(rest, seqs=[*first.seqs, *rest.seqs])


class BelievesZombies(BrokenFile):
    """Does without the claim when it was fenced."""

    async def one(self, change):
        try:
            return await super().one(change)
        except Fenced:
            return await super().one(replace(change, claim=None, seen=None, settle=None))


class LockFile(BrokenFile):
    """A lock that its holder's death does not end."""

    async def one(self, change):
        lock = self.path / "own-lock"
        while True:
            try:
                lock.touch(exist_ok=False)
            except FileExistsError:
                await asyncio.sleep(0.001)
            else:
                break
        try:
            answer = await super().one(change)
            await asyncio.sleep(0.02)
            return answer
        finally:
            lock.unlink()


class Lies(BrokenFile):
    """Says that it is done when the disk failed."""

    async def one(self, change):
        try:
            return await super().one(change)
        except StorageError:
            now = datetime.now(UTC)
            return Committed(
                last_seq=99, seen_seq=0, paused=False, timestamp=now, now=now, seqs=[99]
            )


class HidesDamage(FileStorageBackend):
    """What cannot be read is not there."""

    async def open(self):
        try:
            await super().open()
        except StorageError:
            pass

    async def _hidden(self, call, nothing):
        try:
            return await call
        except StorageError:
            return nothing

    async def get_run(self, run_id):
        return await self._hidden(super().get_run(run_id), None)

    async def find_run(self, key):
        return await self._hidden(super().find_run(key), None)

    async def list_runs(self, query, cursor=None):
        return await self._hidden(super().list_runs(query, cursor), Page(items=[]))

    async def list_work(self, run_id):
        return await self._hidden(super().list_work(run_id), [])

    async def get_events(self, run_id, *, after=0, limit=None):
        return await self._hidden(super().get_events(run_id, after=after, limit=limit), [])


class RefusesTornEnds(FileStorageBackend):
    """A file that was cut is damage."""

    async def open(self):
        for path in self.path.rglob("*.jsonl"):
            content = path.read_bytes()
            if content and not content.endswith(b"\n"):
                raise StorageError(f"the file is damaged: file={path}")
        await super().open()


FILES: dict[str, type[FileStorageBackend]] = {
    kind.__name__.lower(): kind
    for kind in (TwoWrites, BelievesZombies, LockFile, Lies, HidesDamage, RefusesTornEnds)
}
PLANTED_IN_FILES = [
    ("twowrites", "CRA_01"),
    ("twowrites", "CRA_07"),
    ("believeszombies", "CRA_08"),
    ("lockfile", "CRA_12"),
    ("lies", "CRA_06"),
    ("hidesdamage", "CRA_04"),
    ("refusestornends", "CRA_03"),
]


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the broken stores known to child processes, by a plugin on their path."""
    place = tmp_path / "plugin"
    info = place / "broken_stores-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-stores\nVersion: 1\n")
    lines = [f"{name} = broken_stores_plugin" for name in FILES]
    (info / "entry_points.txt").write_text("[pyworkflow]\n" + "\n".join(lines) + "\n")
    (place / "broken_stores_plugin.py").write_text(_PLUGIN)
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    return tmp_path / "store"


_PLUGIN = """
from pathlib import Path

from pyworkflow.spi import hookimpl
from tests.conformance.test_layers_bite import FILES


@hookimpl
def pyworkflow_make_storage(url, options):
    scheme, _, path = url.partition(":")
    kind = FILES.get(scheme)
    return None if kind is None else kind(Path(path), namespace=options["namespace"])
"""


def in_files(kind: type[FileStorageBackend], scheme: str, path: Path) -> Layers:
    class Suite(Layers):
        capabilities = FileStorageBackend("unused").info().capabilities

        async def make(self, namespace: str) -> Any:
            return kind(path, namespace=namespace)

        def url(self, namespace: str) -> str:
            return f"{scheme}:{path}"

        def files(self, namespace: str) -> list[Path]:
            return [p for p in path.rglob("*") if p.is_file()]

    return Suite()


@pytest.mark.parametrize(("scheme", "check_id"), PLANTED_IN_FILES)
def test_the_planted_fault_in_files_is_found(scheme, check_id, plugins, monkeypatch):
    monkeypatch.setattr(_crash, "SOON", 3.0)
    if scheme == "lockfile":
        # Whether a kill meets the lock's holder is chance: one of so many will.
        monkeypatch.setattr(_crash, "sizes", lambda small, full=None: 20 * small)
    with pytest.raises((AssertionError, TimeoutError, StorageError)) as caught:
        run(in_files(FILES[scheme], scheme, plugins), check_id)
    assert "the child process" not in str(caught.value), "the child did not get that far"


@pytest.mark.parametrize("check_id", sorted({check_id for _, check_id in PLANTED_IN_FILES}))
def test_the_same_check_passes_sound_files(check_id, tmp_path):
    run(in_files(FileStorageBackend, "file", tmp_path / "store"), check_id)
