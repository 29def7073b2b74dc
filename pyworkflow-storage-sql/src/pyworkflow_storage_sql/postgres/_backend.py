"""The PostgreSQL backend: each method is one call of a function that lives in the server.

The rules of ``commit`` are in ``postgres/migrations``; here are arguments, answers and batches.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Self

from pyworkflow.spi import (
    Answer,
    Capabilities,
    Change,
    Claimed,
    ClaimRef,
    ClaimRequest,
    ConfigurationError,
    Delta,
    Event,
    KeyMark,
    Page,
    Run,
    RunDelta,
    RunQuery,
    StorageBackend,
    StorageError,
    StorageInfo,
    WorkItem,
)
from pyworkflow.storekit import check_change
from pyworkflow_storage_sql.postgres import _reads as reads
from pyworkflow_storage_sql.postgres._changes import span
from pyworkflow_storage_sql.postgres._connections import EventsMissing, Settings, location
from pyworkflow_storage_sql.postgres._handle import StoreHandle
from pyworkflow_storage_sql.postgres._names import escape, unescape
from pyworkflow_storage_sql.postgres._schema import Schema, schema_name

__all__ = ["PostgresStorageBackend"]

_BATCH_SIZE = 4_000_000
_COMMIT = "SELECT * FROM {schema}.commit_many($1::jsonb)"
_CLAIM = "SELECT * FROM {schema}.claim_many($1::jsonb)"
_RUNS = (
    "SELECT {schema}.show_run(run_id, {schema}.instant()) AS run FROM unnest($1::text[]) AS run_id"
)
_CAPABILITIES = Capabilities(
    durable=True,
    multi_process=True,
    multi_host=True,
    server_clock=True,
    watch=True,
    batched=True,
    indexed_filters=True,
    purge_by_age=True,
    large_history=True,
)
#: What every object of this kind declares.
_INFO = StorageInfo(
    contract_version=2, name="postgresql", location="", capabilities=_CAPABILITIES, batches=2
)


class PostgresStorageBackend(StorageBackend):
    """A namespace in a schema of a PostgreSQL database (13 or later).

    An object belongs to the event loop that first used it; ``clone`` makes one for another. After a
    fork, parent and child go on with connections of their own. ``pooled`` says that a pooler in
    transaction mode is in between: then nothing is kept in a session, and ``watch`` polls.
    """

    def __init__(
        self,
        dsn: str,
        *,
        namespace: str = "default",
        schema: str = "pyworkflow",
        connections: int = 2,
        pooled: bool | None = None,
        timeout: float = 30,
    ) -> None:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,30}", schema) or schema.startswith("pg_"):
            raise ConfigurationError(
                f"not a name for a schema: schema={schema!r}; "
                "take letters, digits and underscores, at most 31, and not pg_"
            )
        if connections < 1:
            raise ConfigurationError(
                f"there must be a connection: connections={connections}; 2 is right mostly"
            )
        where, port = location(dsn)
        settings = Settings(
            dsn,
            where,
            connections,
            # Where poolers usually listen; whoever runs PostgreSQL itself there says so.
            port in {6432, 6543} if pooled is None else pooled,
            timeout,
        )
        self._namespace = namespace
        self._base = schema
        self._store = StoreHandle(
            self,
            settings,
            Schema(schema_name(schema, namespace)),
            claims=self._send_claims,
            reads=self._send_reads,
            unwanted=self._release_all,
        )
        self._decoder = self._store.decoder

    def clone(self) -> Self:
        """Another object on the same schema."""
        settings = self._store.settings
        return type(self)(
            settings.dsn,
            namespace=self._namespace,
            schema=self._base,
            connections=settings.connections,
            pooled=settings.pooled,
            timeout=settings.timeout,
        )

    def info(self) -> StorageInfo:
        """Name, location and capabilities.

        ``durable`` is what the server said when it was opened: not with ``fsync`` or
        ``full_page_writes`` off.
        """
        store = self._store
        capabilities = replace(
            _CAPABILITIES, durable=store.durable, watch=not store.settings.pooled
        )
        return replace(
            _INFO,
            location=f"postgresql://{store.settings.where}?schema={store.schema.name}",
            namespace=self._namespace,
            capabilities=capabilities,
        )

    async def open(self) -> None:
        """Connect, and bring the schema forward."""
        await self._store.use()

    async def close(self) -> None:
        """Close the connections. Idempotent."""
        await self._store.close()

    async def migrate(self) -> None:
        """Bring the schema forward."""
        await self._store.migrate()

    async def pending_migrations(self) -> list[str]:
        """Names of the migrations that ``migrate`` would apply; writes nothing."""
        return await self._store.pending_migrations()

    # --- changes, claims, leases --------------------------------------------------------------

    async def shift_clock(self, by: timedelta) -> None:
        """Move the clock of all clients."""
        await self._store.call(
            "UPDATE {schema}.store SET shift = shift + $1::text::interval",
            span(by),
        )
        self._store.news.tell((), work=True)

    async def commit(self, changes: Sequence[Change]) -> list[Answer]:
        """Each change accepted or refused alone; what cannot be stored refuses all of them."""
        await self._store.use()
        for change in changes:
            check_change(
                change,
                max_payload=_INFO.max_payload,
                max_events=_INFO.max_events_per_commit,
            )
        answers = await self._send_commits(changes)
        refused: list[Answer] = []
        for answer in answers:
            if isinstance(answer, ValueError):
                raise answer
            refused.append(answer)
        return refused

    async def _send_commits(self, changes: Sequence[Change]) -> list[Answer | ValueError]:
        encoder = await self._store.encoder()
        order = list(range(len(changes)))
        if len(changes) > 1:
            # Everybody locks runs in this order.
            order.sort(key=lambda index: changes[index].run_id)
        answers: list[Answer | ValueError | None] = [None] * len(changes)
        texts: list[str] = []
        size = start = 0
        for place, index in enumerate(order):
            texts.append(encoder.change(changes[index]))
            size += len(texts[-1])
            if size > _BATCH_SIZE or place == len(order) - 1:
                rows = await self._store.call(_COMMIT, f"[{','.join(texts)}]")
                for row in rows:
                    placed: int = row["o_place"]
                    at = order[start + placed]
                    answers[at] = self._decoder.answer(changes[at], row)
                start, size = place + 1, 0
                texts.clear()
        self._store.news.tell_of(changes, answers)
        done = [answer for answer in answers if answer is not None]
        assert len(done) == len(changes), "the server left a change out"
        return done

    async def claim(self, request: ClaimRequest) -> Claimed:
        """Take due, free items."""
        link = await self._store.use()
        link.news.looked = link.news.number
        return await link.claims.add(request)

    async def _send_claims(self, requests: Sequence[ClaimRequest]) -> list[Claimed]:
        encoder = await self._store.encoder()
        text = f"[{','.join([encoder.claim(r) for r in requests])}]"
        rows = await self._store.call(_CLAIM, text)
        answers: list[Claimed] = [Claimed(claims=[], now=rows[0]["o_now"]) for _ in requests]
        for row in rows:
            place: int = row["o_place"]
            answer = answers[place]
            if row["o_item"] is None:
                answers[place] = replace(answer, now=row["o_now"])
            else:
                answers[place] = Claimed(
                    claims=[*answer.claims, self._decoder.claim(row)], now=row["o_now"]
                )
        return answers

    async def _release_all(self, claimed: Claimed) -> None:
        """Release what was claimed for a caller that was cancelled."""
        for claim in claimed.claims:
            try:
                await self.release(claim.ref)
            except StorageError:
                return  # it is due again when the lease ends

    async def renew(self, refs: Sequence[ClaimRef], lease: timedelta) -> list[bool]:
        """Extend leases."""
        encoder = await self._store.encoder()
        kept: list[bool] = await self._store.ask(
            "{schema}.renew($1::jsonb, $2::text::interval)", encoder.refs(refs), span(lease)
        )
        if lease <= timedelta(0):
            self._store.news.tell((), work=True)
        return kept

    async def release(self, ref: ClaimRef, *, delay: timedelta | None = None) -> bool:
        """Give an item back."""
        name = (await self._store.encoder()).name
        done: bool = await self._store.ask(
            "{schema}.release($1, $2, $3, $4::text::interval)",
            name(ref.run_id),
            name(ref.item_id),
            name(ref.token),
            None if delay is None else span(delay),
        )
        if done:
            self._store.news.tell((), work=True)
        return done

    async def announce(self, limit: int, mute: timedelta) -> list[WorkItem]:
        """Due, free items that nobody rang for."""
        rows = await self._store.call(
            "SELECT {schema}.announce($1, $2::text::interval) AS item",
            limit,
            span(mute),
        )
        return self._decoder.items([row["item"] for row in rows])

    async def free(self, owner: str) -> int:
        """End every lease of ``owner``."""
        freed: int = await self._store.ask("{schema}.free($1)", escape(owner))
        if freed:
            self._store.news.tell((), work=True)
        return freed

    async def recover(self) -> None:
        """Release all items; tokens are random, none is issued twice."""
        await self._store.call(
            "UPDATE {schema}.work_items SET owner = NULL, token = NULL, lease_until = NULL, "
            "rung_at = NULL, claims = greatest(0, claims - 1) WHERE token IS NOT NULL"
        )
        self._store.news.tell((), work=True)

    async def watch(self, run_id: str | None, *, after: int, timeout: timedelta) -> bool:
        """Wait for news; what came since this object's last ``claim`` counts as news."""
        news = (await self._store.use()).news
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
                        await self._store.ask("{schema}.next_due(NULL, NULL) <= {schema}.instant()")
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
        removed: int = await self._store.ask(
            "{schema}.purge($1, $2, $3::text::interval)", before, limit, span(key_retention)
        )
        return removed

    async def import_delta(self, delta: Delta) -> None:
        """Write effects as they are."""
        text = (await self._store.encoder()).delta(delta)
        try:
            await self._store.ask("{schema}.import_delta($1::jsonb)", text)
        except EventsMissing as exc:
            raise ValueError(str(exc)) from None
        self._store.news.tell((part.run_id for part in delta.parts), work=True)

    # --- reads --------------------------------------------------------------------------------

    async def now(self) -> datetime:
        """The server's clock, moved by ``shift_clock``."""
        now: datetime = await self._store.ask("{schema}.instant()")
        return now

    async def get_run(self, run_id: str) -> Run | None:
        """The run, or None."""
        return await (await self._store.use()).reads.add(run_id)

    async def _send_reads(self, run_ids: Sequence[str]) -> list[Run | None]:
        name = (await self._store.encoder()).name
        rows = await self._store.call(_RUNS, [name(run_id) for run_id in run_ids])
        read = self._decoder.run
        return [None if row["run"] is None else read(row["run"]) for row in rows]

    async def find_run(self, idempotency_key: str) -> str | None:
        """Who has the key."""
        name = (await self._store.encoder()).name
        rows = await self._store.call(
            "SELECT run_id FROM {schema}.idempotency_keys WHERE key = $1 "
            "AND (until IS NULL OR until > {schema}.instant())",
            name(idempotency_key),
        )
        return self._decoder.name(rows[0]["run_id"]) if rows else None

    async def get_events(
        self, run_id: str, *, after: int = 0, limit: int | None = None
    ) -> list[Event]:
        """Events in order of seq."""
        name = (await self._store.encoder()).name
        rows = await self._store.call(
            'SELECT seq, "timestamp", type, class, op, key, v, data FROM {schema}.events '
            "WHERE run_id = $1 AND seq > $2 ORDER BY seq LIMIT $3",
            name(run_id),
            max(0, after),
            None if limit is None else max(0, limit),
        )
        return [self._decoder.row(run_id, row) for row in rows]

    async def list_work(self, run_id: str) -> list[WorkItem]:
        """The run's items."""
        name = (await self._store.encoder()).name
        rows = await self._store.call(
            "SELECT {schema}.show_item(w)::text AS item FROM {schema}.work_items w "
            "WHERE w.run_id = $1",
            name(run_id),
        )
        items = self._decoder.items([row["item"] for row in rows])
        return sorted(items, key=lambda item: item.item_id)

    async def holders(self) -> list[str]:
        """Owners of leases that have not ended."""
        rows = await self._store.call("SELECT owner FROM {schema}.holders() AS owner")
        return sorted(unescape(row["owner"]) for row in rows)

    async def leases(self, owner: str) -> list[ClaimRef]:
        """The claims of ``owner`` whose leases have not ended."""
        rows = await self._store.call(
            "SELECT run_id, item_id, token FROM {schema}.leases($1)", escape(owner)
        )
        name = self._decoder.name
        return [ClaimRef(name(row["run_id"]), name(row["item_id"]), row["token"]) for row in rows]

    async def next_due(
        self,
        *,
        queues: frozenset[str] | None = None,
        workflows: frozenset[str] | None = None,
    ) -> datetime | None:
        """When to look again."""
        name = (await self._store.encoder()).name
        due: datetime | None = await self._store.ask(
            "{schema}.next_due($1, $2)",
            None if queues is None else [name(queue) for queue in queues],
            None if workflows is None else [name(workflow) for workflow in workflows],
        )
        return due

    async def list_runs(self, query: RunQuery, cursor: str | None = None) -> Page[Run]:
        """Runs, newest first."""
        return await reads.list_runs(self._store, query, cursor)

    async def stats(self) -> Mapping[str, int]:
        """Numbers of runs, per status, of events and of items."""
        return await reads.stats(self._store)

    async def export_run(self, run_id: str) -> RunDelta | None:
        """The run without its events."""
        return await reads.export_run(self._store, run_id)

    async def export_keys(self, cursor: str | None = None) -> Page[tuple[str, KeyMark]]:
        """Idempotency keys and their owners."""
        return await reads.export_keys(self._store, cursor)
