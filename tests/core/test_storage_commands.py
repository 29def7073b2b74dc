"""`pyworkflow storage`: what operators do to a store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

FLOW = """
from pyworkflow import step, workflow

@step
async def blob() -> str:
    return "x" * 300_000

@workflow
async def flow() -> int:
    return len(await blob())
"""


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
    listed = command("runs", "list", "--storage", "file:other", "--json")
    assert [run["result"] for run in json.loads(listed.stdout)["runs"]] == [300_000, 300_000]


@pytest.mark.parametrize(
    ("args", "status", "said"),
    [
        (["copy", "file:a", "file:a"], 3, "same store"),
        (["copy", "file:a", "nowhere://b"], 3, "no installed plugin serves"),
        (["copy", "file:a"], 2, "Missing argument"),
        (["copy", "file:a", "file:b", "--storage", "file:c"], 2, "leave out --storage"),
        (["purge"], 2, "--older-than"),
        (["purge", "--older-than", "soon"], 2, "not a duration"),
        (["sweep-offloaded"], 2, "codec_offload_dir"),
        (["sweep-offloaded", "--older-than", "5m"], 2, "an hour at least"),
    ],
)
def test_wrong_use_is_told_with_the_remedy(command, args, status, said):
    done = command("storage", *args)
    assert done.returncode == status, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


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


def test_offloaded_files_go_when_no_run_refers_to_them(command, tmp_path):
    env = {"PYWORKFLOW_CODECS": "offload", "PYWORKFLOW_CODEC_OFFLOAD_DIR": str(tmp_path / "files")}
    assert command("run", "flow.py:flow", **env).returncode == 0
    files = [path for path in (tmp_path / "files").rglob("*") if path.is_file()]
    assert files
    for path in files:
        os.utime(path, (time.time() - 7200, time.time() - 7200))
    kept = command("storage", "sweep-offloaded", "--older-than", "1h", **env)
    assert kept.stdout.startswith("removed 0 files"), kept.stderr
    command("storage", "purge", "--older-than", "0s", **env)
    done = command("storage", "sweep-offloaded", "--older-than", "1h", **env)
    assert done.stdout.startswith(f"removed {len(files)} files"), done.stderr
    assert not any(path.exists() for path in files)
