"""The store's clock: this machine's, which never stops and never goes back."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable
from typing import Any, Final

from pyworkflow.storekit import boot_id

__all__ = ["StoreClock"]

_log = logging.getLogger("pyworkflow.storage.sqlite")

#: A wall clock that is this far ahead of the store's was set forward, microseconds.
_JUMP: Final = 1_000_000
#: The latest instant is written down when it is this much newer, microseconds.
_LATEST: Final = 100_000
#: The boot of a machine that does not tell it; equal ones may be different boots.
_UNKNOWN: Final = bytes(16).hex()
#: The base of a clock that was never read.
_NEVER: Final = -(2**63)

_LOOK: Final = (
    "select clock_offset, clock_skew, latest, clock_base, boot, work from namespaces where id = ?"
)
_KEEP: Final = (
    "update namespaces set latest = ?, clock_base = ?, boot = ?, clock_lead = ?, work = work + ? "
    "where id = ? returning work"
)


class StoreClock:
    """The clock of one namespace, in microseconds and without ``clock_offset``.

    Every method but ``shown`` is called within a transaction of the connection that writes.
    """

    def __init__(self, clocks: Callable[[], tuple[int, int]]) -> None:
        self.micros = 0
        """The latest reading."""
        self.offset = 0
        self.work = 0
        """The count of news in the namespace's row."""
        self.jump = 0
        """By how much the wall clock was set forward, if the store has not followed it yet."""
        self._clocks = clocks
        self._base = _NEVER
        """What the clock shows when the time since boot is zero, as in ``SteadyClock``."""
        self._boot = boot_id().hex()
        self._skew = 0
        self._lead = 0
        """By how much the reading is ahead of the machine's clock."""
        self._row: tuple[Any, ...] | None = None
        """The namespace's row as this connection read or wrote it; None when it must be read."""
        self._kept = (0, 0)
        """``latest`` and ``clock_base`` as they are in the row; no base of another boot."""

    def read(self, conn: sqlite3.Connection, namespace: int, *, unchanged: bool = False) -> None:
        """Read the row and the machine's clocks.

        A wall clock that was set forward is not followed yet: ``jump`` says by how much it was.
        ``unchanged``: nobody else has written since the last transaction, which was committed.
        """
        row = self._row
        if row is None or not unchanged:
            row = self._row = conn.execute(_LOOK, (namespace,)).fetchone()
        self.offset, self._skew, latest, stored, boot, self.work = row
        wall, ticks = self._clocks()
        here = wall + self._skew - ticks
        base = self._base
        is_known = base != _NEVER
        if stored is not None and boot == self._boot != _UNKNOWN:
            is_known = True
            self._kept = latest, stored
        else:
            stored = latest - ticks
            self._kept = latest, 2**62 if self._boot == _UNKNOWN else -(2**62)
        if stored > base:
            base = stored
        self.jump = 0
        if here > base:
            if is_known and here - base > _JUMP:
                self.jump = here - base
                here = base
            base = here
        self._base = base
        self.micros = ticks + base
        self._lead = base - here + self._skew

    def follow(self, conn: sqlite3.Connection, namespace: int) -> None:
        """Follow a wall clock that was set forward. Leases keep the time that they had left."""
        conn.execute(
            "update work_items set lease_until = lease_until + ?, "
            "free_at = max(due_at, lease_until + ?) where namespace = ? and token is not null",
            (self.jump, self.jump, namespace),
        )
        self._row = None
        conn.execute(
            "update namespaces set clock_base = ?, boot = ? where id = ?",
            (self._base + self.jump, self._boot, namespace),
        )

    def shift(self, conn: sqlite3.Connection, namespace: int, by: int) -> None:
        """Move the clock for all clients.

        A shift back that takes away a lead over the machine's clock is remembered as such: after
        it the store follows the machine's clock as any other does.
        """
        skew = self._skew if by > 0 else max(self._skew, min(self._skew - by, self._lead))
        self._row = None
        conn.execute(
            "update namespaces set clock_offset = clock_offset + ?, clock_skew = ? where id = ?",
            (by, skew, namespace),
        )

    def followed(self) -> None:
        """What ``follow`` wrote is committed."""
        _log.warning("the clock of this machine was set forward: seconds=%.3f", self.jump / 1e6)
        self._base += self.jump
        self.jump = 0

    def keep(self, conn: sqlite3.Connection, namespace: int, *, work: bool) -> None:
        """Write the reading down, and news for workers, if either is needed."""
        latest, base = self._kept
        if work or self._base > base or self.micros > latest + _LATEST:
            values = (self.micros, self._base, self._boot, max(0, self._lead), work, namespace)
            self.work = conn.execute(_KEEP, values).fetchone()[0]
            row = (self.offset, self._skew, self.micros, self._base, self._boot, self.work)
            self._row = None if self._row is None else row

    def shown(self) -> int:
        """What the clock shows, as far as this process knows; from any thread, without the store."""
        wall, ticks = self._clocks()
        wall += self._skew
        if self._base == _NEVER:
            return wall
        ahead = wall - ticks - self._base
        return ticks + self._base + (ahead if 0 < ahead <= _JUMP else 0)
