"""What passes between the journal and the state: records, and the protocol of the latter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from pyworkflow_storage_file import _lines
from pyworkflow_storage_file._packs import Pack

__all__ = ["Record", "Sink"]


class Record(NamedTuple):
    """What one line carries: a kind and its JSON."""

    kind: bytes
    body: bytes


class Sink(Protocol):
    """Who keeps the state that the journal amounts to."""

    @property
    def latest(self) -> int:
        """The latest instant among the records, without the clock's offset, ns; 0 for none."""
        ...

    def reset(self) -> None:
        """Forget everything: the journal is read from its start."""
        ...

    def load(self, kind: bytes, body: bytes) -> None:
        """Apply one record. An exception means that the record is damaged."""
        ...

    def load_pack(self, pack: Pack, line: _lines.Line) -> None:
        """Apply one line of a pack. An exception means that it is damaged."""
        ...

    def exchange(
        self, packs: Sequence[Pack], came: Sequence[Pack], went: Sequence[Pack], first: str
    ) -> None:
        """Use other packs for what is known."""
        ...

    segment: str
    """Set before the records of a segment come."""
