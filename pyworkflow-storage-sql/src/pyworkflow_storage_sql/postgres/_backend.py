"""The PostgreSQL backend: each method is one call of a function that lives in the server.

The rules of ``commit`` are in ``postgres/migrations``; here are arguments, answers and batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta

from pyworkflow.spi import (
    Answer,
    Change,
    Claimed,
    ClaimRef,
    ClaimRequest,
    Delta,
    StorageError,
    WorkItem,
)
from pyworkflow.storekit import check_change
from pyworkflow_storage_sql.postgres._base import INFO
from pyworkflow_storage_sql.postgres._changes import Request, span
from pyworkflow_storage_sql.postgres._connections import EventsMissing
from pyworkflow_storage_sql.postgres._names import escape
from pyworkflow_storage_sql.postgres._reads import PostgresReads

__all__ = ["PostgresStorageBackend"]

_BATCH_SIZE = 4_000_000


class PostgresStorageBackend(PostgresReads):
    """A namespace in a schema of a PostgreSQL database (13 or later).

    An object belongs to the event loop that first used it; ``clone`` makes one for another. After a
    fork, parent and child go on with connections of their own. ``pooled`` says that a pooler in
    transaction mode is in between: then nothing is kept in a session, and ``watch`` polls.
    """

    async def shift_clock(self, by: timedelta) -> None:
        """Move the clock of all clients."""
        await self._call(
            self._schema.fill("UPDATE {schema}.store SET shift = shift + $1::text::interval"),
            span(by),
        )
        self._news.tell((), work=True)

    async def commit(self, changes: Sequence[Change]) -> list[Answer]:
        """Each change accepted or refused alone; what cannot be stored refuses all of them."""
        await self._use()
        for change in changes:
            check_change(
                change,
                max_payload=INFO.max_payload,
                max_events=INFO.max_events_per_commit,
            )
        answers = await self._send_commits(changes)
        refused: list[Answer] = []
        for answer in answers:
            if isinstance(answer, ValueError):
                raise answer
            refused.append(answer)
        return refused

    async def _send_commits(self, changes: Sequence[Change]) -> list[Answer | ValueError]:
        request = Request(self._names)
        order = list(range(len(changes)))
        if len(changes) > 1:
            # Everybody locks runs in this order.
            order.sort(key=lambda index: changes[index].run_id)
        answers: list[Answer | ValueError | None] = [None] * len(changes)
        texts: list[str] = []
        size = start = 0
        for place, index in enumerate(order):
            texts.append(request.change(changes[index]))
            size += len(texts[-1])
            if size > _BATCH_SIZE or place == len(order) - 1:
                await self._meet(request)
                rows = await self._call(self._commit_sql, f"[{','.join(texts)}]")
                for row in rows:
                    placed: int = row["o_place"]
                    at = order[start + placed]
                    answers[at] = self._reader.answer(changes[at], row)
                start, size = place + 1, 0
                texts.clear()
        self._news.tell_of(changes, answers)
        done = [answer for answer in answers if answer is not None]
        assert len(done) == len(changes), "the server left a change out"
        return done

    async def claim(self, request: ClaimRequest) -> Claimed:
        """Take due, free items."""
        await self._use()
        self._news.looked = self._news.number
        return await self._claims.add(request)

    async def _send_claims(self, requests: Sequence[ClaimRequest]) -> list[Claimed]:
        request = Request(self._names)
        text = f"[{','.join([request.claim(r) for r in requests])}]"
        rows = await self._call(self._claim_sql, text)
        answers: list[Claimed] = [Claimed(claims=[], now=rows[0]["o_now"]) for _ in requests]
        for row in rows:
            place: int = row["o_place"]
            answer = answers[place]
            if row["o_item"] is None:
                answers[place] = replace(answer, now=row["o_now"])
            else:
                answers[place] = Claimed(
                    claims=[*answer.claims, self._reader.claim(row)], now=row["o_now"]
                )
        return answers

    async def _give_back(self, claimed: Claimed) -> None:
        """Release what was claimed for somebody who had given up."""
        for claim in claimed.claims:
            try:
                await self.release(claim.ref)
            except StorageError:
                return  # it is due again when the lease ends

    async def renew(self, refs: Sequence[ClaimRef], lease: timedelta) -> list[bool]:
        """Extend leases."""
        kept: list[bool] = await self._ask(
            "{schema}.renew($1::jsonb, $2::text::interval)",
            Request(self._names).refs(refs),
            span(lease),
        )
        if lease <= timedelta(0):
            self._news.tell((), work=True)
        return kept

    async def release(self, ref: ClaimRef, *, delay: timedelta | None = None) -> bool:
        """Give an item back."""
        done: bool = await self._ask(
            "{schema}.release($1, $2, $3, $4::text::interval)",
            self._name(ref.run_id),
            self._name(ref.item_id),
            self._name(ref.token),
            None if delay is None else span(delay),
        )
        if done:
            self._news.tell((), work=True)
        return done

    async def announce(self, limit: int, mute: timedelta) -> list[WorkItem]:
        """Due, free items that nobody rang for."""
        rows = await self._call(
            self._schema.fill("SELECT {schema}.announce($1, $2::text::interval) AS item"),
            limit,
            span(mute),
        )
        return self._reader.items([row["item"] for row in rows])

    async def free(self, owner: str) -> int:
        """End every lease of ``owner``."""
        freed: int = await self._ask("{schema}.free($1)", escape(owner))
        if freed:
            self._news.tell((), work=True)
        return freed

    async def recover(self) -> None:
        """Release all items; tokens are random, none is issued twice."""
        await self._call(
            self._schema.fill(
                "UPDATE {schema}.work_items SET owner = NULL, token = NULL, lease_until = NULL, "
                "rung_at = NULL, claims = greatest(0, claims - 1) WHERE token IS NOT NULL"
            )
        )
        self._news.tell((), work=True)

    async def watch(self, run_id: str | None, *, after: int, timeout: timedelta) -> bool:
        """Wait for news; what came since this object's last ``claim`` counts as news."""
        await self._use()
        news = self._news
        late = False

        async def changed() -> bool:
            if run_id is None:
                if news.number != news.looked:
                    news.looked = news.number
                    return True
                nonlocal late
                if late:
                    # Nothing was told in the meantime, which may have been lost: who wrote it
                    # may have died, or the connection that listens.
                    return bool(
                        await self._ask("{schema}.next_due(NULL, NULL) <= {schema}.instant()")
                    )
                late = True
                return False
            run = await self.get_run(run_id)
            return run is not None and (run.history_length > after or run.status.is_terminal)

        return await news.wait(run_id, after, timeout.total_seconds(), changed)

    async def purge(
        self,
        *,
        before: datetime,
        limit: int = 1000,
        key_retention: timedelta = timedelta(days=30),
    ) -> int:
        """Remove ended runs."""
        removed: int = await self._ask(
            "{schema}.purge($1, $2, $3::text::interval)", before, limit, span(key_retention)
        )
        return removed

    async def import_delta(self, delta: Delta) -> None:
        """Write effects as they are."""
        request = Request(self._names)
        text = request.delta(delta)
        await self._meet(request)
        try:
            await self._ask("{schema}.import_delta($1::jsonb)", text)
        except EventsMissing as exc:
            raise ValueError(str(exc)) from None
        self._news.tell((part.run_id for part in delta.parts), work=True)
