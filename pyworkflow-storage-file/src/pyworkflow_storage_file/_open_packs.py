"""The packs that a process has open: read whole at first, exchanged for others later."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from pyworkflow.spi import SchemaTooNew, StorageDamaged
from pyworkflow_storage_file._packs import Pack
from pyworkflow_storage_file._records import Sink

__all__ = ["OpenPacks"]


class OpenPacks:
    """The packs of one namespace, whose lines go to ``sink``."""

    def __init__(self, directory: Path, sink: Sink) -> None:
        self._directory = directory
        self._sink = sink
        self.opened: list[Pack] = []
        """In the order in which they count."""
        self.size = 0
        """Bytes of all of them."""

    def close(self) -> None:
        """Close the files. Idempotent."""
        _close(self.opened)
        self.opened, self.size = [], 0

    def restart(self, names: Sequence[str]) -> None:
        """Read these packs into a sink that was reset.

        Raises:
            StorageDamaged, SchemaTooNew: one of them is not what it should be.
        """
        self.close()
        for name in names:
            pack = Pack(self._directory / name)
            self.opened.append(pack)
            self.size += pack.size
            self._read(pack)

    def exchange(self, names: Sequence[str], first: str) -> None:
        """Have these packs, which amount to the same; ``first`` is the segment after them.

        Raises:
            StorageDamaged, SchemaTooNew: one of them is not what it should be.
        """
        known = {pack.name: pack for pack in self.opened}
        if list(names) == list(known):
            return
        packs: list[Pack] = []
        came: list[Pack] = []
        try:
            for name in names:
                pack = known.pop(name, None)
                if pack is None:
                    pack = Pack(self._directory / name)
                    came.append(pack)
                packs.append(pack)
            self._sink.exchange(packs, came, list(known.values()), first)
        except BaseException:
            _close(came)
            raise
        self.opened, self.size = packs, sum(pack.size for pack in packs)
        _close(known.values())

    def _read(self, pack: Pack) -> None:
        for line in pack.lines():
            try:
                self._sink.load_pack(pack, line)
            except (SchemaTooNew, StorageDamaged, MemoryError):
                raise
            except Exception as error:
                raise StorageDamaged(
                    str(pack.path),
                    line.offset,
                    f"the record does not load: {type(error).__name__}: {error}",
                ) from error


def _close(packs: Iterable[Pack]) -> None:
    for pack in packs:
        pack.close()
