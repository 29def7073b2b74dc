"""Which files make up the repository, as a fresh clone would have them."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Where the tree did not come from git (a downloaded archive), these are what its use leaves behind.
LEFTOVERS = frozenset({"__pycache__", "build", "dist"})


def files() -> list[Path]:
    """What git tracks or would add; without git, all that no tool left behind. Absolute paths."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listed.returncode == 0:
        names = filter(None, listed.stdout.decode().split("\0"))
        return sorted(path for name in names if (path := ROOT / name).is_file())
    return sorted(
        path
        for path in ROOT.rglob("*")
        if path.is_file()
        and not any(
            part in LEFTOVERS or (part.startswith(".") and part not in {".ci", ".gitignore"})
            for part in path.relative_to(ROOT).parts
        )
    )
