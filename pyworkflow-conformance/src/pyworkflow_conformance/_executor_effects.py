"""How steps in worker processes tell the check what they did: lines in one file of a folder."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Effect", "leave", "read_effects"]

_FILE = "effects"


@dataclass(frozen=True, slots=True)
class Effect:
    """One thing that a step did."""

    name: str
    what: str
    """``begin`` or ``end``; ``headers`` of a turn."""
    pid: int
    value: str = ""


def leave(folder: str, name: str, what: str, value: str = "") -> None:
    """Add a line; whole, since a file takes short appends whole."""
    line = json.dumps([name, what, os.getpid(), value]) + "\n"
    place = os.open(Path(folder) / _FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(place, line.encode())
    finally:
        os.close(place)


def read_effects(folder: Path) -> list[Effect]:
    """What was done so far, in order."""
    try:
        text = (folder / _FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [Effect(*json.loads(line)) for line in text.splitlines() if line]
