"""Which files belong to this run."""

from __future__ import annotations

from pathlib import Path

from tests.e2e._full_disk_ways import may_mount


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """A disk that fills up is there where a process may have mounts of its own."""
    if collection_path.name == "test_full_disk.py" and not may_mount():
        return True
    return None


def pytest_report_header() -> str:
    """Say so, rather than skip in silence."""
    return f"full disks: {'tested' if may_mount() else 'not tested, mounts are not allowed'}"
