"""This engine, as it is installed where the comparison runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from benchmarks.peers.peer import Files, ours


class Ours(Files):
    NAME = "ours"
    STORES: ClassVar[Mapping[str, str]] = {"sqlite": "sqlite", "postgres": "postgres"}

    def setup(self, cache: Path) -> list[str]:
        return ours()


PEER = Ours()
