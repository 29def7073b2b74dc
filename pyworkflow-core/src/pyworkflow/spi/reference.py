"""The reference store: the rules of the storage contract, without clock, randomness or I/O.

One object holds one namespace. Signatures are final; bodies follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta

from pyworkflow.events import Event
from pyworkflow.runs import Run, WorkItem
from pyworkflow.spi._delta import Delta, KeyMark, Record, RunDelta
from pyworkflow.spi.storage import Change, Claim, ClaimRef, ClaimRequest, Committed, Page, RunQuery

__all__ = ["Delta", "KeyMark", "Record", "ReferenceStore", "RunDelta", "check_change"]

Token = Callable[[], str]


def check_change(change: Change, *, max_payload: int, max_events: int) -> None:
    """Refuse what cannot be stored. A backend calls it before ``ReferenceStore.commit``.

    Raises:
        PayloadTooLarge: a text longer than ``max_payload`` bytes, or too many events.
        SerializationError: something that is not JSON, or no Unicode.
        ValueError: fields of the change that do not go together.
    """
    raise NotImplementedError


class ReferenceStore:
    def commit(
        self, change: Change, *, now: datetime, token: Token
    ) -> tuple[Committed, Delta | None]:
        raise NotImplementedError

    def claim(
        self, request: ClaimRequest, *, now: datetime, token: Token
    ) -> tuple[list[Claim], Delta | None]:
        raise NotImplementedError

    def renew(
        self, refs: Sequence[ClaimRef], lease: timedelta, *, now: datetime
    ) -> tuple[list[bool], Delta | None]:
        raise NotImplementedError

    def release(
        self, ref: ClaimRef, delay: timedelta | None, *, now: datetime
    ) -> tuple[bool, Delta | None]:
        raise NotImplementedError

    def announce(
        self, limit: int, mute: timedelta, *, now: datetime
    ) -> tuple[list[WorkItem], Delta | None]:
        raise NotImplementedError

    def free(self, owner: str, *, now: datetime) -> tuple[int, Delta | None]:
        raise NotImplementedError

    def purge(
        self, *, before: datetime, limit: int, key_retention: timedelta, now: datetime
    ) -> tuple[int, Delta | None]:
        raise NotImplementedError

    def apply(self, delta: Delta) -> None:
        raise NotImplementedError

    def snapshot(self) -> Iterator[Delta]:
        raise NotImplementedError

    def get_run(self, run_id: str, *, now: datetime) -> Run | None:
        raise NotImplementedError

    def find_run(self, idempotency_key: str, *, now: datetime) -> str | None:
        raise NotImplementedError

    def list_runs(self, query: RunQuery, cursor: str | None, *, now: datetime) -> Page[Run]:
        raise NotImplementedError

    def get_events(self, run_id: str, *, after: int = 0, limit: int | None = None) -> list[Event]:
        raise NotImplementedError

    def list_work(self, run_id: str) -> list[WorkItem]:
        raise NotImplementedError

    def next_due(
        self, *, queues: frozenset[str] | None, workflows: frozenset[str] | None, now: datetime
    ) -> datetime | None:
        raise NotImplementedError

    def holders(self, *, now: datetime) -> list[str]:
        raise NotImplementedError

    def stats(self, *, now: datetime) -> Mapping[str, int]:
        raise NotImplementedError
