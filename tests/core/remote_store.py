"""A store behind a network without a rule of its own: the model of the guide for servers.

The server keeps rows, finds them and locks a namespace for a transaction, as any database does.
The backend asks for what a change touches and writes effects; ``pyworkflow.storekit`` decides.
"""

from __future__ import annotations

import asyncio
import pickle
import threading
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta
from typing import Any, TypeVar
from uuid import uuid4

from pyworkflow.spi import (
    Answer,
    Capabilities,
    Change,
    Claim,
    Claimed,
    ClaimRef,
    ClaimRequest,
    Delta,
    Event,
    ItemKind,
    KeyMark,
    Page,
    Run,
    RunDelta,
    RunQuery,
    StorageBackend,
    StorageInfo,
    StorageUnavailable,
    WorkItem,
    utcnow,
)
from pyworkflow.storekit import (
    LoopBound,
    ReferenceStore,
    check_change,
    claimable,
    claimed,
    freed,
    imported,
    is_free,
    key_owner,
    notified,
    purgeable,
    released,
    renewed,
    tombstone,
    wakes_at,
)
from pyworkflow.storekit.remote import (
    Calls,
    Loaded,
    Look,
    Poller,
    Rows,
    Touched,
    decide_loaded,
    history_after,
    within,
)

T = TypeVar("T")


class Namespace:
    """The rows of one namespace, in the server."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.rows = ReferenceStore()  # as a place for rows: its rules are not used
        self.marks: dict[str, KeyMark] = {}
        self.run_ids: dict[str, None] = {}
        self.number = 0
        self.offset = timedelta(0)

    def now(self) -> datetime:
        return utcnow() + self.offset

    def shift(self, by: timedelta) -> None:
        self.offset += by

    def write(self, delta: Delta) -> None:
        for part in delta.parts:
            if part.removed:
                del self.run_ids[part.run_id]
            elif part.run_id not in self.run_ids:
                self.run_ids[part.run_id] = None
                self.number += 1
                part.fields["number"] = self.number
            # One by one: a later part of the same run follows an earlier one.
            self.rows.apply(Delta([part]))
        self.rows.apply(Delta([], delta.taken, delta.freed))
        self.marks.update(delta.taken)
        for key in delta.freed:
            self.marks.pop(key, None)

    def load(self, wanted: Sequence[Touched]) -> Loaded:
        found: dict[str, Rows] = {}
        for each in wanted:
            run: Any = self.rows.find(each.run_id)
            if run is None:
                continue
            after = len(run.events) if each.after is None else each.after
            items = run.items if each.all_items else each.items & run.items.keys()
            outside, recent = run.external_answers, run.answers_by_token
            found[each.run_id] = Rows(
                fields=run.row(),
                length=len(run.events),
                last_input=run.last_input,
                events=run.events[max(after, run.seen_seq) if each.unseen else after :],
                keys={key: run.keys[key] for key in each.keys & run.keys.keys()},
                items=[run.items[name] for name in items],
                records=[outside[key] for key in each.answers & outside.keys()]
                + [recent[token] for token in each.tokens & recent.keys()],
            )
        owners = {key for each in wanted for key in each.owners} & self.marks.keys()
        return Loaded(now=self.now(), runs=found, marks={key: self.marks[key] for key in owners})

    def items(self, refs: Sequence[tuple[str, str]] | None) -> list[tuple[WorkItem, bool, str]]:
        """Items with their run's ``paused`` and workflow; all of them in the order of claims."""
        if refs is not None:
            found = []
            for run_id, item_id in refs:
                run = self.rows.find(run_id)
                if run is not None and item_id in run.items:
                    found.append((run.items[item_id], run.paused, run.workflow))
            return found
        now = self.now()
        every = [
            (item, run.paused, run.workflow)
            for run_id in self.run_ids
            if (run := self.rows.find(run_id)) is not None
            for item in run.items.values()
            if (wake := wakes_at(item, paused=run.paused)) is not None and wake <= now
        ]
        return sorted(every, key=lambda row: (-row[0].priority, row[0].due_at))

    def leased(self, owner: str) -> list[WorkItem]:
        return [
            item
            for run_id in self.run_ids
            for item in self.rows.list_work(run_id)
            if item.lease is not None and item.lease.owner == owner
        ]

    def next_due(
        self, queues: frozenset[str] | None, workflows: frozenset[str] | None
    ) -> datetime | None:
        wakes: list[datetime] = []
        for run_id in self.run_ids:
            run = self.rows.find(run_id)
            for item in () if run is None else run.items.values():
                wake = wakes_at(item, paused=run.paused)
                shown = queues is None or item.queue in queues
                known = (
                    workflows is None or item.kind is ItemKind.DELIVER or run.workflow in workflows
                )
                if wake is not None and shown and known:
                    wakes.append(wake)
        return min(wakes, default=None)

    def ended(self) -> list[tuple[str, datetime | None, list[str], bool, str | None]]:
        rows = []
        for run_id in self.run_ids:
            run: Any = self.rows.find(run_id)
            parent: Any = None if run.parent is None else self.rows.find(run.parent.run_id)
            open_ = parent is not None and parent.final is None
            rows.append((run_id, run.finished_at, list(run.items), open_, run.idempotency_key))
        return rows

    def all_marks(self) -> dict[str, KeyMark]:
        return dict(self.marks)

    def run(self, run_id: str) -> Run | None:
        return self.rows.get_run(run_id, now=self.now())

    def progress(self, run_ids: frozenset[str]) -> dict[str, tuple[int, bool]]:
        return {run_id: self.rows.progress(run_id) for run_id in run_ids if run_id in self.run_ids}

    def list_runs(self, query: RunQuery, cursor: str | None) -> Page[Run]:
        return self.rows.list_runs(query, cursor, now=self.now())


class Server:
    """A server on loopback, in a thread of its own."""

    def __init__(self) -> None:
        self.port = 0
        self.calls: list[str] = []
        self._namespaces: dict[str, Namespace] = {}
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(60)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._end = asyncio.Event()
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._client, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._end.wait()
        server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.sleep(0)  # for the ends of their connections

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held: Namespace | None = None
        try:
            while True:
                name, op, arguments = await receive(reader)
                self.calls.append(op)
                place = self._namespaces.setdefault(name, Namespace())
                answer: object = None
                try:
                    if op == "begin":
                        await place.lock.acquire()
                        held = place
                    elif op == "end":
                        place.lock.release()
                        held = None
                    else:
                        method = getattr(place, op, None) or getattr(place.rows, op)
                        answer = method(*arguments)
                except ValueError as error:
                    answer = error
                await send(writer, answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has gone
        finally:
            if held is not None:
                held.lock.release()
            writer.close()


async def send(writer: asyncio.StreamWriter, message: object) -> None:
    data = pickle.dumps(message)
    writer.write(len(data).to_bytes(8, "big") + data)
    await writer.drain()


async def receive(reader: asyncio.StreamReader) -> Any:
    size = int.from_bytes(await reader.readexactly(8), "big")
    return pickle.loads(await reader.readexactly(size))


class Connection:
    """What belongs to one event loop."""

    def __init__(self, poller: Poller) -> None:
        self.poller = poller
        self.alone = asyncio.Lock()
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self.calls = Calls()


class RemoteBackend(StorageBackend):
    """The backend: a connection, transactions, and no rule."""

    capabilities = Capabilities(server_clock=True, watch=True)

    def __init__(self, port: int, namespace: str) -> None:
        self.port, self.namespace = port, namespace
        self._bound = LoopBound[Connection](self)

    def clone(self) -> RemoteBackend:
        return RemoteBackend(self.port, self.namespace)

    def info(self) -> StorageInfo:
        return StorageInfo(
            contract_version=2,
            name="remote",
            location=f"remote://127.0.0.1:{self.port}",
            namespace=self.namespace,
            capabilities=self.capabilities,
        )

    # --- one loop, one connection, transactions that outlive a cancelled caller ----------------

    def _use(self) -> Connection:
        found = self._bound.get()
        if found is None:  # the first use, and the first one in a forked child
            found = self._connection = self._bound.put(Connection(Poller(self._look)))
        return found

    async def _run(
        self,
        work: Callable[[], Awaitable[T]],
        unwanted: Callable[[T], Awaitable[object]] | None = None,
    ) -> T:
        """``work`` alone on the connection; it is carried out even when the caller is cancelled."""
        connection = self._use()
        calls = connection.calls
        return await calls.run(lambda: self._exclusive(connection, work), unwanted=unwanted)

    async def _exclusive(self, connection: Connection, work: Callable[[], Awaitable[T]]) -> T:
        async with connection.alone:
            try:
                if connection.streams is None:
                    connection.streams = await asyncio.open_connection("127.0.0.1", self.port)
                return await work()
            except (OSError, EOFError) as error:
                connection.streams = None
                raise StorageUnavailable(f"the server does not answer: cause={error}") from error

    async def _call(self, op: str, *arguments: object) -> Any:
        assert self._connection.streams is not None
        reader, writer = self._connection.streams
        await send(writer, (self.namespace, op, arguments))
        answer = await receive(reader)
        if isinstance(answer, ValueError):
            raise answer
        return answer

    async def _read(self, op: str, *arguments: object) -> Any:
        return await self._run(lambda: self._call(op, *arguments))

    async def _write(
        self,
        work: Callable[[], Awaitable[tuple[T, Delta | None]]],
        unwanted: Callable[[T], Awaitable[object]] | None = None,
    ) -> T:
        async def transaction() -> T:
            await self._call("begin")
            try:
                answer, delta = await work()
                if delta is not None:
                    await self._call("write", delta)
            finally:
                await self._call("end")
            return answer

        return await self._run(transaction, unwanted)

    async def open(self) -> None:
        await self.now()

    async def migrate(self) -> None:
        await self.open()

    async def close(self) -> None:
        connection = self._bound.close()
        if connection is None:
            return
        await connection.poller.close()
        await connection.calls.close()
        if connection.streams is not None:
            connection.streams[1].close()
            await connection.streams[1].wait_closed()

    # --- changes ------------------------------------------------------------------------------

    async def commit(self, changes: Sequence[Change]) -> list[Answer]:
        info = self.info()
        for each in changes:
            check_change(each, max_payload=info.max_payload, max_events=info.max_events_per_commit)

        async def load(wanted: Sequence[Touched]) -> Loaded:
            loaded: Loaded = await self._call("load", wanted)
            return loaded

        async def work() -> tuple[list[Answer], Delta | None]:
            decided = await decide_loaded(load, changes, token=new_token)
            return decided.answers, decided.delta if decided.delta.parts else None

        answers = await self._write(work)
        self._connection.poller.hurry()
        return answers

    async def claim(self, request: ClaimRequest) -> Claimed:
        async def work() -> tuple[Claimed, Delta | None]:
            now: datetime = await self._call("now")
            until = now + request.lease
            taken: dict[tuple[str, str], WorkItem] = {}
            for item, paused, workflow in await self._call("items", request.items):
                if len(taken) >= request.limit:
                    break
                if claimable(item, request, paused=paused, workflow=workflow, now=now):
                    new = claimed(item, owner=request.owner, token=new_token(), until=until)
                    taken[item.run_id, item.item_id] = new
            if taken:
                await self._call("write", effects(list(taken.values())))
            return Claimed(claims=await self._claims(list(taken.values()), request), now=now), None

        return await self._write(work, self._release_all)

    async def _release_all(self, claimed: Claimed) -> None:
        for each in claimed.claims:
            await self.release(each.ref)

    async def _claims(self, items: list[WorkItem], request: ClaimRequest) -> list[Claim]:
        budget = request.max_bytes
        claims: list[Claim] = []
        for item in items:
            run: Run = await self._call("run", item.run_id)
            if item.kind is not ItemKind.TURN:
                claims.append(Claim(item=item, run=run))
                continue
            after = history_after(request, item.run_id, run.history_length)
            history = await self._call("get_events", item.run_id)
            events, size = within(history[after:], budget)
            budget -= size
            cut = after + len(events) < run.history_length
            claims.append(Claim(item=item, run=run, events=events, after=after, cut=cut))
        return claims

    async def _changed(
        self, change: Callable[[datetime], Awaitable[tuple[T, list[WorkItem]]]]
    ) -> T:
        async def work() -> tuple[T, Delta | None]:
            answer, items = await change(await self._call("now"))
            return answer, effects(items) if items else None

        return await self._write(work)

    async def _item(self, ref: ClaimRef) -> WorkItem | None:
        rows = await self._call("items", [(ref.run_id, ref.item_id)])
        return rows[0][0] if rows else None

    async def renew(self, refs: Sequence[ClaimRef], lease: timedelta) -> list[bool]:
        async def change(now: datetime) -> tuple[list[bool], list[WorkItem]]:
            kept = [renewed(await self._item(ref), ref, lease, now=now) for ref in refs]
            return [item is not None for item in kept], [i for i in kept if i is not None]

        return await self._changed(change)

    async def release(self, ref: ClaimRef, *, delay: timedelta | None = None) -> bool:
        async def change(now: datetime) -> tuple[bool, list[WorkItem]]:
            item = released(await self._item(ref), ref, delay, now=now)
            return item is not None, [] if item is None else [item]

        return await self._changed(change)

    async def announce(self, limit: int, mute: timedelta) -> list[WorkItem]:
        async def change(now: datetime) -> tuple[list[WorkItem], list[WorkItem]]:
            rows = await self._call("items", None)
            free = [item for item, paused, _ in rows if is_free(item, paused=paused, now=now)]
            found = [new for item in free if (new := notified(item, mute, now=now)) is not None]
            return found[:limit], found[:limit]

        return await self._changed(change)

    async def free(self, owner: str) -> int:
        async def change(now: datetime) -> tuple[int, list[WorkItem]]:
            held = await self._call("leased", owner)
            ended = [new for item in held if (new := freed(item, owner, now=now)) is not None]
            return len(ended), ended

        return await self._changed(change)

    async def purge(
        self,
        *,
        before: datetime,
        limit: int = 1000,
        key_retention: timedelta = timedelta(days=30),
    ) -> int:
        async def work() -> tuple[int, Delta | None]:
            now: datetime = await self._call("now")
            marks: dict[str, KeyMark] = await self._call("all_marks")
            lapsed = [key for key, mark in marks.items() if key_owner(mark, now=now) is None]
            delta = Delta(freed=lapsed)
            for run_id, ended, items, parent_open, key in await self._call("ended"):
                if len(delta.parts) >= limit:
                    break
                if not purgeable(ended, before=before, items=items, parent_open=parent_open):
                    continue
                delta.parts.append(RunDelta(run_id, removed=True))
                if key is not None:
                    mark = tombstone(run_id, ended, key_retention, now=now)
                    if mark is None:
                        delta.freed.append(key)
                    else:
                        delta.taken[key] = mark
            return len(delta.parts), delta

        return await self._write(work)

    # --- reads --------------------------------------------------------------------------------

    async def now(self) -> datetime:
        return await self._read("now")

    async def shift_clock(self, by: timedelta) -> None:
        await self._read("shift", by)

    async def next_due(
        self,
        *,
        queues: frozenset[str] | None = None,
        workflows: frozenset[str] | None = None,
    ) -> datetime | None:
        return await self._read("next_due", queues, workflows)

    async def get_run(self, run_id: str) -> Run | None:
        return await self._read("run", run_id)

    async def find_run(self, idempotency_key: str) -> str | None:
        marks = await self._read("all_marks")
        return key_owner(marks.get(idempotency_key), now=await self.now())

    async def list_runs(self, query: RunQuery, cursor: str | None = None) -> Page[Run]:
        return await self._read("list_runs", query, cursor)

    async def get_events(
        self, run_id: str, *, after: int = 0, limit: int | None = None
    ) -> list[Event]:
        events = (await self._read("get_events", run_id))[max(0, after) :]
        return events if limit is None else events[: max(0, limit)]

    async def list_work(self, run_id: str) -> list[WorkItem]:
        return await self._read("list_work", run_id)

    async def watch(self, run_id: str | None, *, after: int, timeout: timedelta) -> bool:
        return await self._use().poller.wait(run_id, after=after, timeout=timeout)

    async def _look(self, run_ids: frozenset[str]) -> Look:
        progress = await self._read("progress", run_ids) if run_ids else {}
        return Look(progress=progress, due=await self._read("next_due", None, None))

    # --- moving between stores ----------------------------------------------------------------

    async def export_run(self, run_id: str) -> RunDelta | None:
        return await self._read("export_run", run_id)

    async def export_keys(self, cursor: str | None = None) -> Page[tuple[str, KeyMark]]:
        return await self._read("export_keys", cursor)

    async def import_delta(self, delta: Delta) -> None:
        async def work() -> tuple[None, Delta]:
            applied = Delta(taken=delta.taken, freed=delta.freed)
            for part in delta.parts:
                run: Run | None = await self._call("run", part.run_id)
                items = await self._call("list_work", part.run_id)
                length = None if run is None else run.history_length
                applied.parts.append(imported(part, length, {item.item_id for item in items}))
            return None, applied

        await self._write(work)


def effects(items: list[WorkItem]) -> Delta:
    return Delta([RunDelta(item.run_id, items=[item]) for item in items])


def new_token() -> str:
    return uuid4().hex
