"""A store whose tables are made without a lock is failed by eight openers of an empty one."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from pyworkflow._plugins import register, unregister
from pyworkflow.spi import hookimpl
from pyworkflow_conformance import StorageConformance, _at_once, run_conformance
from pyworkflow_storage_sql import SQLiteStorageBackend


class MigratesWithoutLock(SQLiteStorageBackend):
    """Looks for its table, and makes it in a second step."""

    async def open(self):
        await super().open()
        path = Path(self.info().location.partition(":")[2] or self.info().location)
        with closing(sqlite3.connect(path, timeout=30)) as conn:
            there = conn.execute("select 1 from sqlite_master where name = 'marks'").fetchone()
            if not there:
                await asyncio.sleep(0.3)  # as a round trip: all others look meanwhile
                conn.execute("create table marks (one)")


class LocksItsProcess(MigratesWithoutLock):
    """Keeps the objects of a process apart, and not the processes."""

    lock = asyncio.Lock()

    async def open(self):
        async with self.lock:
            await super().open()


KINDS = {"broken-migrates": MigratesWithoutLock, "broken-locks": LocksItsProcess}


class Plugin:
    """Serves the schemes above; in child processes as a module of this name."""

    @hookimpl
    def pyworkflow_make_storage(self, url, options):
        scheme, _, path = url.partition(":")
        kind = KINDS.get(scheme)
        return None if kind is None else kind(path, namespace=options["namespace"])


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Make the broken stores known here and in child processes."""
    info = tmp_path / "plugin" / "broken_fresh-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-fresh\nVersion: 1\n")
    lines = [f"{scheme} = broken_fresh_plugin" for scheme in KINDS]
    (info / "entry_points.txt").write_text("[pyworkflow]\n" + "\n".join(lines) + "\n")
    (tmp_path / "plugin" / "broken_fresh_plugin.py").write_text(
        "from tests.conformance.broken.test_fresh import Plugin\n"
        "pyworkflow_make_storage = Plugin().pyworkflow_make_storage\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "plugin"))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3]))
    monkeypatch.setattr(_at_once, "OPENERS", 3)  # enough to collide, and soon started
    plugin = Plugin()
    register(plugin, "broken-fresh")
    yield tmp_path
    unregister(plugin)


def check(scheme, path, check_id):
    class Suite(StorageConformance):
        capabilities = SQLiteStorageBackend("unused").info().capabilities
        made = 0

        async def make(self, namespace):
            return SQLiteStorageBackend(path / "store.db", namespace=namespace)

        def url(self, namespace):
            return f"sqlite:///{path / 'store.db'}"

        async def make_fresh(self):
            self.made += 1
            return f"{scheme}:{path}/fresh-{self.made}.db"

    (name,) = (name for name in dir(Suite) if name.startswith(f"test_{check_id}_"))
    getattr(Suite(), name)()


def test_g11_tables_made_without_a_lock_are_noticed(served):
    with pytest.raises(AssertionError, match=r"eight objects in one process: .*marks already"):
        check("broken-migrates", served, "MIG_08")


def test_g11_a_lock_within_the_process_is_noticed(served):
    with pytest.raises(AssertionError, match=r"eight processes: .*marks already"):
        check("broken-locks", served, "MIG_04")


def test_g11_the_run_by_url_begins_with_eight_processes_on_an_empty_database(served):
    report = run_conformance(f"broken-locks:{served}/by-url.db", only=["MIG-08"])
    (result,) = (one for one in report.results if one.id == "MIG-08")
    assert result.status == "failed"
    assert "marks already" in result.reason
    sound = run_conformance(f"sqlite:///{served}/sound.db", only=["MIG-08"])
    assert [one.status for one in sound.results if one.id == "MIG-08"] == ["passed"]
