"""Modes of what the stores, the offload codec and the log create: for the owner alone."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, sys
os.umask(int(sys.argv[1], 8))
from pyworkflow import configure, configure_logging, run, step, workflow
configure_logging(level="DEBUG", log_file="run.log")
configure(storage=sys.argv[2], codecs="offload", codec_offload_dir="far/offload",
          codec_offload_threshold=10)
@step()
async def one() -> str:
    return "x" * 1000
@workflow()
async def flow() -> str:
    return await one()
run(flow, timeout=60)
"""


def _run(folder: Path, umask: str, url: str) -> dict[str, int]:
    """The modes of what a run leaves in the folder, while it runs and after it."""
    (folder / "app.py").write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, "app.py", umask, url],
        cwd=folder,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {
        str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode)
        for path in folder.rglob("*")
        if path.name != "app.py"
    }


def _split(folder: Path, modes: dict[str, int]) -> tuple[set[int], set[int]]:
    folders = {mode for name, mode in modes.items() if (folder / name).is_dir()}
    files = {mode for name, mode in modes.items() if not (folder / name).is_dir()}
    return folders, files


@pytest.mark.parametrize("umask", ["000", "022", "077"])
@pytest.mark.parametrize("url", ["file:deep/er/runs", "sqlite:///runs.db"])
def test_found_m09_what_is_made_is_the_owners_alone(umask: str, url: str, tmp_path: Path) -> None:
    modes = _run(tmp_path, umask, url)
    assert _split(tmp_path, modes) == ({0o700}, {0o600}), modes
    assert "run.log" in modes
    assert any(name.startswith("far/offload/") for name in modes)


def test_found_m09_the_files_beside_a_database_have_its_mode(tmp_path: Path) -> None:
    import asyncio

    from pyworkflow._plugins import make_storage

    def made() -> list[Path]:
        return list(tmp_path.iterdir())

    async def main() -> None:
        store = make_storage(f"sqlite:///{tmp_path}/a.db")
        before = os.umask(0)
        try:
            await store.open()
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in made()}
        finally:
            os.umask(before)
            await store.close()
        assert modes.keys() >= {"a.db", "a.db-wal", "a.db-shm"}
        assert set(modes.values()) == {0o600}

    asyncio.run(main())


@pytest.mark.parametrize(("umask", "mode"), [("000", 0o660), ("007", 0o660), ("077", 0o600)])
def test_found_m09_a_store_that_others_share_stays_shared(
    umask: str, mode: int, tmp_path: Path
) -> None:
    _run(tmp_path, "022", "file:runs")
    for path in (tmp_path / "runs").rglob("*"):
        path.chmod(0o770 if path.is_dir() else 0o660)
    (tmp_path / "runs").chmod(0o770)
    manifest = tmp_path / "runs" / "default" / "manifest.json"
    assert manifest.exists()
    import asyncio

    from pyworkflow_storage_file import FileStorageBackend

    async def main() -> None:
        store = FileStorageBackend(tmp_path / "runs")
        before = os.umask(int(umask, 8))
        try:
            await store.open()
            await store.close()
            from pyworkflow_storage_file._files import Files

            files: object = Files.__new__(Files)
            files.directory = manifest.parent  # type: ignore[attr-defined]
            os.close(files.new_segment("x.jsonl"))  # type: ignore[attr-defined]
        finally:
            os.umask(before)

    asyncio.run(main())
    assert stat.S_IMODE((manifest.parent / "x.jsonl").stat().st_mode) == mode
    assert stat.S_IMODE(manifest.stat().st_mode) == 0o660
