"""Work that the store cannot read or record, because what it holds of one run is damaged."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from datetime import timedelta
from typing import Any

from pyworkflow._engine.faults import Faults
from pyworkflow.errors import StorageDamaged
from pyworkflow.spi.storage import ClaimRef, StorageBackend

__all__ = ["DamagedWork"]

_log = logging.getLogger("pyworkflow.engine")
_REMEMBERED = 10_000


class DamagedWork:
    """Leaves damaged items alone, each time for longer, so that the other runs continue."""

    def __init__(self, storage: StorageBackend, on_given_up: Callable[[], None]) -> None:
        self._storage = storage
        self._on_given_up = on_given_up
        self._faults = Faults()
        self._logged: dict[tuple[str, str], str] = {}
        """(run, item) -> the damage that was logged last."""

    async def attempt(self, work: Coroutine[Any, Any, None], ref: ClaimRef | None) -> None:
        """Do work under a claim; where damage ends it, release the item until later.

        Raises:
            StorageError: The store cannot even release it, or there is no claim.
        """
        try:
            await work
        except StorageDamaged as damage:
            if ref is None:
                raise
            await self._storage.release(ref, delay=self._note(ref, damage))
            self._on_given_up()  # the work may have held the run's turn besides

    def _note(self, ref: ClaimRef, damage: StorageDamaged) -> timedelta:
        """For how long the item is left alone now; the log names it once."""
        key, text = (ref.run_id, ref.item_id), str(damage)
        if self._logged.get(key) != text:
            if len(self._logged) >= _REMEMBERED:
                self._logged.clear()
            self._logged[key] = text
            _log.error(
                "an item is left alone, for the store is damaged there; the other runs continue: "
                "item_id=%s run_id=%s: %s",
                ref.item_id,
                ref.run_id,
                text,
            )
        pause, _ = self._faults.count(key)
        return pause
