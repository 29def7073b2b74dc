"""`pyworkflow storage`: what operators do to a store."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pyworkflow.storage.file import FileStorageBackend

FLOW = """
from pyworkflow import step, workflow

@step
async def blob() -> str:
    return "x" * 300_000

@workflow
async def flow() -> int:
    return len(await blob())
"""


def make_store(path: Path) -> None:
    async def main() -> None:
        async with FileStorageBackend(path):
            pass

    asyncio.run(main())


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.fixture
def command(tmp_path: Path):
    (tmp_path / "flow.py").write_text(FLOW)

    def run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYWORKFLOW_")}
        return subprocess.run(
            [sys.executable, "-m", "pyworkflow.cli", *args],
            cwd=tmp_path,
            env=inherited | env,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run


def test_copy_says_what_it_did_and_does_nothing_the_second_time(command):
    for _ in range(2):
        assert command("run", "flow.py:flow").returncode == 0
    done = command("storage", "copy", "file:.pyworkflow", "file:other", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["copied"] == 2
    again = command("storage", "copy", "file:.pyworkflow", "file:other", "--json")
    assert json.loads(again.stdout)["copied"] == 0
    told = command("storage", "copy", "file:.pyworkflow", "file:other")
    assert "everything was there already" in told.stdout
    volatile = command("storage", "copy", "file:.pyworkflow", "memory:", "--not-durable")
    assert volatile.returncode == 0, volatile.stderr
    listed = command("runs", "list", "--storage", "file:other", "--json")
    assert [run["result"] for run in json.loads(listed.stdout)["runs"]] == [300_000, 300_000]


def test_copy_says_what_it_did_until_a_run_differs(command, tmp_path: Path):
    starts = """
import asyncio
import sys

from flow import flow
from pyworkflow import Client

async def main():
    async with Client(storage=sys.argv[1]) as client:
        for run_id in sys.argv[2:]:
            await client.run(flow.options(run_id=run_id))

asyncio.run(main())
"""
    for names in (["file:a", "r1", "r2"], ["file:b", "r2"]):
        subprocess.run([sys.executable, "-c", starts, *names], cwd=tmp_path, check=True)
    told = command("storage", "copy", "file:a", "file:b")
    assert told.returncode == 1
    assert "run_id=r2" in told.stderr
    assert "copied: runs=" in told.stderr
    again = command("storage", "copy", "file:a", "file:b", "--json")
    assert again.returncode == 1
    assert "run_id=r2" in json.loads(again.stdout)["error"]


@pytest.mark.parametrize(
    ("args", "status", "said"),
    [
        (["copy", "file:there", "file:there"], 3, "same store"),
        (["copy", "file:there", "file:alias"], 3, "same store"),
        (["copy", "file:there", "file:b"], 1, "no runs in FROM"),
        (["copy", "file:there", "memory:"], 3, "--not-durable"),
        (["copy", "file:missing", "file:b"], 3, "there is no store"),
        (["copy", "sqlite:///missing", "file:b"], 3, "there is no store"),
        (["purge", "--older-than", "1d", "--storage", "file:missing"], 3, "there is no store"),
        (["copy", "file:there", "nowhere://b"], 3, "no installed plugin serves"),
        (["copy", "file:a"], 2, "Missing argument"),
        (["copy", "file:a", "file:b", "--storage", "file:c"], 2, "leave out --storage"),
        (["purge"], 2, "--older-than"),
        (["purge", "--older-than", "soon"], 2, "not a duration"),
        (["sweep-offloaded"], 2, "codec_offload_dir"),
        (["sweep-offloaded", "--older-than", "5m"], 2, "an hour at least"),
    ],
)
def test_wrong_use_is_told_with_the_remedy(command, tmp_path, args, status, said):
    make_store(tmp_path / "there")
    (tmp_path / "alias").symlink_to(tmp_path / "there")
    done = command("storage", *args)
    assert done.returncode == status, done.stderr
    assert said in done.stderr
    assert not (tmp_path / "missing").exists()
    assert "Traceback" not in done.stderr


LOOKS = [
    ["runs", "list"],
    ["runs", "show", "x"],
    ["replay", "x"],
    ["storage", "check"],
    ["storage", "stats"],
    ["storage", "purge", "--older-than", "1d"],
    ["storage", "set-clock", "--to-now"],
]


@pytest.mark.parametrize("words", LOOKS, ids=" ".join)
def test_a_directory_that_is_no_store_is_told_like_a_missing_one_and_stays_as_it_is(
    command, tmp_path, words
):
    before = contents(tmp_path)
    told = command(*words, "--storage", "file:.")
    assert told.returncode == 3
    assert told.stderr == (
        f"pyworkflow: there is no store: {tmp_path}; check --storage or PYWORKFLOW_STORAGE, and the "
        "current directory. A store is made by the first run or worker that uses it\n"
    )
    assert told.stdout == ""
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("file:.", "there is no store"),
        ("file:.pyworkflow/default", "name the directory above it"),
        ("sqlite:///empty.db", "there is no store"),
        ("sqlite:///other.db", "a database of something else"),
        ("sqlite:///flow.py", "flow.py"),
    ],
)
def test_what_is_no_store_is_neither_copied_nor_changed_nor_sound(command, tmp_path, source, said):
    if ".pyworkflow" in source:
        make_store(tmp_path / ".pyworkflow")
    (tmp_path / "empty.db").touch()
    other = sqlite3.connect(tmp_path / "other.db")
    other.execute("pragma journal_mode = wal")
    other.execute("create table mine(x)")
    other.close()
    before = contents(tmp_path)
    for words in (
        ["storage", "copy", source, "file:to"],
        ["storage", "check", "--storage", source],
    ):
        done = command(*words)
        assert done.returncode == 3, done.stderr
        assert said in done.stderr
        assert "Traceback" not in done.stderr
        assert contents(tmp_path) == before


def test_looking_from_another_namespace_finds_the_store(command):
    assert command("run", "flow.py:flow").returncode == 0
    done = command("storage", "stats", "--json", PYWORKFLOW_NAMESPACE="other")
    assert done.returncode == 0, done.stderr


def test_purge_counts_first_and_then_removes(command):
    assert command("run", "flow.py:flow").returncode == 0
    kept = command("storage", "purge", "--older-than", "1h", "--json")
    assert json.loads(kept.stdout)["runs"] == 0
    trial = command("storage", "purge", "--older-than", "0s", "--dry-run", "--json")
    assert json.loads(trial.stdout) | {"storage": ""} == {
        "storage": "",
        "runs": 1,
        "removed": False,
    }
    done = command("storage", "purge", "--older-than", "0s", "--json")
    assert json.loads(done.stdout)["runs"] == 1
    assert json.loads(command("runs", "list", "--json").stdout)["runs"] == []


@pytest.fixture
def offloaded(command, tmp_path) -> tuple[dict[str, str], list[Path]]:
    """Settings, and the old files of a run."""
    env = {"PYWORKFLOW_CODECS": "offload", "PYWORKFLOW_CODEC_OFFLOAD_DIR": str(tmp_path / "files")}
    assert command("run", "flow.py:flow", **env).returncode == 0
    files = [path for path in (tmp_path / "files").rglob("*") if path.is_file()]
    assert files
    for path in files:
        os.utime(path, (time.time() - 7200, time.time() - 7200))
    return env, files


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--storage", "file:typo"], "there is no store"),
        (["--storage", "file:."], "there is no store"),
        (["--storage", "file:empty"], "the store has no runs"),
        (["--namespace", "typo"], "namespace=typo"),
        (["--also", "sqlite:///typo.db"], "there is no store"),
    ],
)
def test_nothing_is_swept_when_a_store_that_is_named_has_no_runs(
    command, offloaded, tmp_path, given, said
):
    env, files = offloaded
    make_store(tmp_path / "empty")
    done = command("storage", "sweep-offloaded", "--older-than", "1h", *given, **env)
    assert done.returncode == 3
    assert said in done.stderr
    assert all(path.exists() for path in files)
    assert not (tmp_path / "typo").exists()


def test_what_a_sweep_would_remove_is_shown_first(command, offloaded, tmp_path):
    env, files = offloaded
    make_store(tmp_path / "empty")
    asked = ("storage", "sweep-offloaded", "--older-than", "1h", "--storage", "file:empty")
    shown = command(*asked, "--allow-empty", "--dry-run", "--json", **env)
    assert json.loads(shown.stdout)["would_remove"] == [str(path) for path in files]
    assert all(path.exists() for path in files)
    done = command(*asked, "--allow-empty", "--json", **env)
    assert json.loads(done.stdout)["removed"] == [str(path) for path in files]
    assert not any(path.exists() for path in files)


def test_offloaded_files_go_when_no_run_refers_to_them(command, offloaded):
    env, files = offloaded
    kept = command("storage", "sweep-offloaded", "--older-than", "1h", **env)
    assert kept.stdout.startswith("removed 0 files"), kept.stderr
    command("storage", "purge", "--older-than", "0s", **env)
    assert command("run", "flow.py:flow", PYWORKFLOW_CODECS="").returncode == 0
    done = command("storage", "sweep-offloaded", "--older-than", "1h", **env)
    assert done.stdout.startswith(f"removed {len(files)} file"), done.stderr
    assert not any(path.exists() for path in files)
