"""The Redis backend: the storage contract as calls of scripts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final

from redis import exceptions

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
    RunStatus,
    StorageBackend,
    StorageInfo,
    WorkItem,
)
from pyworkflow.storekit import LoopBound, check_change
from pyworkflow_storage_redis._keys import parse_url
from pyworkflow_storage_redis._link import Link
from pyworkflow_storage_redis._news import Waiter
from pyworkflow_storage_redis._wire import (
    answer_in,
    change_out,
    claim_in,
    delta_out,
    events_in,
    export_in,
    instant,
    item_in,
    micros,
    run_in,
    span,
    text_of,
)

__all__ = ["RedisStorageBackend"]

MAX_PAYLOAD: Final = 16 * 1024 * 1024
MAX_EVENTS: Final = 10_000
#: One script handles so many changes, or so many bytes of them: it blocks the server meanwhile.
_BATCH: Final = 50
_BATCH_BYTES: Final = 512 * 1024
#: So many of a claimer's histories are looked at.
_KNOWN: Final = 1000
_LONGEST_WAIT: Final = 5.0
#: No history is as long: who waits for more than this waits for the end.
_NO_SEQ: Final = 2**31
_ENDED: Final = [status.value for status in RunStatus if status.is_terminal]
_OPEN: Final = {status.value for status in RunStatus if not status.is_terminal}


class RedisStorageBackend(StorageBackend):
    """Storage on Redis 6.2 or later, or Valkey; for any number of processes and machines.

    Every call is one Lua script, hence atomic, and all keys of a namespace are in one hash slot.
    A commit that returned survives the death of the server's process as far as the server's
    append-only file has it: with ``appendfsync always`` it survives power loss, too, and ``info``
    says ``durable`` once an open connection has shown that.
    An object belongs to the event loop that first used it; ``clone`` makes one for another.
    After a fork, parent and child go on with connections of their own.

    Args:
        url: ``redis://user:password@host:port/database``, or ``rediss://`` for TLS.
        namespace: Stores of different namespaces share a database and nothing else.
        timeout: Seconds after which a server that is silent counts as gone.
        durable: Refuse to open a server that is not durable; ``info`` says so beforehand then.
    """

    def __init__(
        self,
        url: str,
        *,
        namespace: str = "default",
        timeout: float | None = None,
        durable: bool | None = None,
    ) -> None:
        self._address = parse_url(url)
        if timeout is None:
            text = self._address.options.get("timeout", "10")
            try:
                timeout = float(text)
            except ValueError:
                timeout = 0.0
        if not 0 < timeout < 86_400:
            raise ConfigurationError(
                "the timeout of the Redis storage is a number of seconds above 0; "
                "write for example timeout=10"
            )
        if durable is None:
            text = self._address.options.get("durable", "false").lower()
            if text not in {"true", "false"}:
                raise ConfigurationError(
                    f"option durable of the Redis storage is neither true nor false: durable={text!r}"
                )
            durable = text == "true"
        self._url = url
        self._must_be_durable = durable
        self._timeout = timeout
        self.namespace = self._address.options.get("namespace", namespace)
        self._bound = LoopBound[Link](self)
        self._looked = -1
        self._durable = durable

    def __repr__(self) -> str:
        return f"RedisStorageBackend({self._address.location!r}, namespace={self.namespace!r})"

    # --- life ---------------------------------------------------------------------------------

    async def open(self) -> None:
        """Connect, and prove that the server keeps what it is given. Idempotent.

        Raises:
            ConfigurationError: wrong credentials, a server that is too old, evicts, or a replica.
            SchemaTooNew: a newer version wrote the namespace.
            StorageUnavailable: no server answers.
        """
        link = self._started()
        await link.connect()
        self._durable = link.durable

    async def close(self) -> None:
        """Let go of the connections. Idempotent."""
        link = self._bound.close()
        if link is not None:
            await link.close()

    def info(self) -> StorageInfo:
        """Name, place, capabilities and limits; ``durable`` is false until ``open`` has proved it."""
        return StorageInfo(
            contract_version=2,
            name="redis",
            location=self._address.location,
            namespace=self.namespace,
            capabilities=Capabilities(
                durable=self._durable,
                multi_process=True,
                multi_host=True,
                server_clock=True,
                watch=True,
                batched=True,
                indexed_filters=True,
                purge_by_age=True,
                large_history=True,
            ),
            max_payload=MAX_PAYLOAD,
            max_events_per_commit=MAX_EVENTS,
            batches=2,
        )

    async def migrate(self) -> None:
        """Bring the keys to the layout of this version, as opening does, and complete its lists.

        Workers of 0.1.0 that still run leave new stalled and paused runs out of them.
        """
        await self.open()
        link = self._started()
        after: int | None = 0
        while after is not None:
            after = await link.call("upgrade", str(after))

    async def pending_migrations(self) -> list[str]:
        """The numbers of the migrations that ``migrate`` would apply; writes nothing."""
        return await self._started().pending_migrations()

    def clone(self) -> RedisStorageBackend:
        """Another object on the same server and namespace."""
        clone = type(self)(
            self._url,
            namespace=self.namespace,
            timeout=self._timeout,
            durable=self._must_be_durable,
        )
        clone._durable = self._durable
        return clone

    # --- clock --------------------------------------------------------------------------------

    async def now(self) -> datetime:
        """The server's clock plus the offset that the store keeps."""
        return instant((await self._started().ask("read", "now", ""))[1])

    async def shift_clock(self, by: timedelta) -> None:
        """Add to the offset, for all clients."""
        await self._started().call("shift", span(by), again=False)

    # --- writing ------------------------------------------------------------------------------

    async def commit(self, changes: Sequence[Change]) -> list[Answer]:
        """Apply independent changes in one round trip."""
        for change in changes:
            check_change(change, max_payload=MAX_PAYLOAD, max_events=MAX_EVENTS)
        link = self._started()
        calls: list[tuple[list[Change], asyncio.Future[Any]]] = []
        waiting: list[Change] = []
        args: list[bytes] = []
        size, sent = 0, set[str]()
        try:
            for change in changes:
                parts = change_out(change)
                length = sum(map(len, parts))
                if waiting and (size + length > _BATCH_BYTES or len(waiting) >= _BATCH):
                    await self._send(link, calls, waiting, args, sent)
                    waiting, args, size = [], [], 0
                size += length
                waiting.append(change)
                args += parts
            answers: list[Answer] = []
            if not calls:
                # All of it is one batch, as it mostly is.
                raw = await link.call("commit", *args)
                return [answer_in(one, change) for one, change in zip(raw, waiting, strict=True)]
            await self._send(link, calls, waiting, args, sent)
            for some, call in calls:
                raw = await call
                answers += [answer_in(one, change) for one, change in zip(raw, some, strict=True)]
            return answers
        finally:
            for _, call in calls:
                call.add_done_callback(_forget)

    async def _send(
        self,
        link: Link,
        calls: list[tuple[list[Change], asyncio.Future[Any]]],
        changes: list[Change],
        args: list[bytes],
        sent: set[str],
    ) -> None:
        """Send a batch of changes; the server works while the next one is made ready."""
        runs = {change.run_id for change in changes}
        if not runs.isdisjoint(sent):
            # Sent again after a lost connection, a batch would come after a later one of its run.
            await asyncio.wait([call for _, call in calls])
        sent |= runs
        calls.append((changes, asyncio.ensure_future(link.call("commit", *args))))
        # Two turns of the loop: the call begins, its bytes go out.
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def claim(self, request: ClaimRequest) -> Claimed:
        """Take due, free items. A caller that is cancelled meanwhile gives them back."""
        link = self._started()
        query: dict[str, Any] = {
            "owner": request.owner,
            "lease": span(request.lease),
            "limit": request.limit,
            "bytes": request.max_bytes,
            "known": dict(list(request.known.items())[:_KNOWN]),
        }
        if request.items is not None:
            query["items"] = list(request.items)
        for name in ("queues", "workflows", "kinds"):
            value = getattr(request, name)
            if value is not None:
                query[name] = sorted(value)
        asking = asyncio.ensure_future(link.ask("claim", text_of(query), again=False))
        try:
            _, now, (work, raw) = await asyncio.shield(asking)
        except asyncio.CancelledError:
            # Nobody will ever see what was taken.
            asking.add_done_callback(self._give_back)
            raise
        self._looked = work
        return Claimed(claims=[claim_in(one) for one in raw], now=instant(now))

    def _give_back(self, asking: asyncio.Future[list[Any]]) -> None:
        if asking.cancelled() or asking.exception() is not None:
            return
        for raw in asking.result()[2][1]:
            ref = claim_in(raw).ref
            asyncio.ensure_future(self.release(ref)).add_done_callback(_forget)

    async def renew(self, refs: Sequence[ClaimRef], lease: timedelta) -> list[bool]:
        """Extend leases."""
        kept: list[bool] = []
        for start in range(0, len(refs), 500):
            some = [(r.run_id, r.item_id, r.token) for r in refs[start : start + 500]]
            kept += map(bool, await self._started().call("renew", text_of(some), span(lease)))
        return kept

    async def release(self, ref: ClaimRef, *, delay: timedelta | None = None) -> bool:
        """Give an item back."""
        name = text_of((ref.run_id, ref.item_id, ref.token))
        wait = "" if delay is None else span(delay)
        return bool(await self._started().call("release", name, wait, again=False))

    async def announce(self, limit: int, mute: timedelta) -> list[WorkItem]:
        """Due, free items that nobody rang for lately, of the first 2,000 in line."""
        raw = await self._started().call("announce", str(limit), span(mute), again=False)
        return [item_in(run_id, item) for run_id, item in raw]

    async def free(self, owner: str) -> int:
        """End every lease of a process that is gone."""
        freed: int = await self._started().call("free", owner, again=False)
        return freed

    async def recover(self) -> None:
        """Release all items, and move the counter of tokens by 2**32."""
        await self._started().call("recover")

    async def purge(
        self,
        *,
        before: datetime,
        limit: int = 1000,
        key_retention: timedelta = timedelta(days=30),
    ) -> int:
        """Remove ended runs, some hundred per script."""
        link = self._started()
        removed, skip, more = 0, 0, True
        while more:
            some, skip, more = await link.call(
                "purge", micros(before), str(limit - removed), span(key_retention), str(skip),
                again=False,
            )  # fmt: skip
            removed += some
            more = more and removed < limit
        return removed

    # --- reading ------------------------------------------------------------------------------

    async def next_due(
        self,
        *,
        queues: frozenset[str] | None = None,
        workflows: frozenset[str] | None = None,
    ) -> datetime | None:
        """When an item can be claimed next."""
        query: dict[str, Any] = {}
        if queues is not None:
            query["queues"] = sorted(queues)
        if workflows is not None:
            query["workflows"] = sorted(workflows)
        due = await self._started().call("next_due", text_of(query))
        return None if due is None else instant(due)

    async def get_run(self, run_id: str) -> Run | None:
        """The run, or None."""
        raw = await self._started().call("read", "run", _name(run_id))
        return None if raw is None else run_in(run_id, raw)

    async def find_run(self, idempotency_key: str) -> str | None:
        """The run that has the key, or had it and was purged; or None."""
        owner: str | None = await self._started().call("read", "find", _name(idempotency_key))
        return owner

    async def list_runs(self, query: RunQuery, cursor: str | None = None) -> Page[Run]:
        """Runs, newest first, by the index of their workflow and end."""
        if not 1 <= query.limit <= 1000:
            raise ValueError(f"the limit is 1 to 1000: limit={query.limit}")
        found: list[Run] = []
        below = None if cursor is None else _parse_cursor(cursor)
        wanted = None if query.status is None else {status.value for status in query.status}
        last = 0
        # One more than is asked for shows whether there is another page.
        async for number, run_id, raw in self._listed(
            wanted, query.workflow, query.limit + 1, below
        ):
            if len(found) == query.limit:
                return Page(items=found, cursor=f"run-{last}")
            found.append(run_in(run_id, raw))
            last = number
        return Page(items=found)

    async def _listed(
        self, statuses: set[str] | None, workflow: str | None, limit: int, below: int | None
    ) -> AsyncIterator[tuple[int, str, Any]]:
        query: dict[str, Any] = {"bound": 1000, "states": ["open", *_ENDED]}
        if statuses is not None:
            query["statuses"] = sorted(statuses)
            query["states"] = [s for s in _ENDED if s in statuses]
            query["states"] += _open_lists(statuses)
        if workflow is not None:
            query["workflow"] = workflow
        more = bool(query["states"])
        while more and limit > 0:
            if below is not None:
                query["below"] = str(below)
            query["limit"] = min(limit, 100)
            rows, last, more = await self._started().call("list", text_of(query))
            for row in rows:
                yield row
            limit -= len(rows)
            below = last

    async def get_events(
        self, run_id: str, *, after: int = 0, limit: int | None = None
    ) -> list[Event]:
        """Events in order of seq; a long history comes in parts."""
        link = self._started()
        found: list[Event] = []
        after, left = max(0, after), 10**12 if limit is None else max(0, limit)
        while left > 0:
            total, raw = await link.call("read", "events", _name(run_id), str(after), str(left))
            found += events_in(run_id, raw)
            after += len(raw)
            left -= len(raw)
            if not raw or after >= total:
                break
        return found

    async def list_work(self, run_id: str) -> list[WorkItem]:
        """The run's items, ordered by id."""
        raw = await self._started().call("read", "items", _name(run_id))
        return sorted((item_in(run_id, item) for item in raw), key=lambda item: item.item_id)

    async def holders(self) -> list[str]:
        """The owners of leases that have not ended."""
        return sorted(await self._started().call("free"))

    async def leases(self, owner: str) -> list[ClaimRef]:
        """The claims of ``owner`` whose leases have not ended."""
        found = await self._started().call("free", owner, "list")
        return [ClaimRef(*names) for names in found]

    async def stats(self) -> Mapping[str, int]:
        """Numbers of runs, per status, of events and of items."""
        link = self._started()
        counts = dict.fromkeys([status.value for status in RunStatus], 0)
        counts |= await link.call("list", text_of({"counts": True}))
        query: dict[str, Any] = {"bound": 1000, "limit": 1000, "states": ["open"], "names": True}
        more = True
        while more:
            names, last, more = await link.call("list", text_of(query))
            for name in names:
                counts[name] += 1
            query["below"] = str(last)
        counts["runs"] = sum(counts[status.value] for status in RunStatus)
        return counts

    # --- news ---------------------------------------------------------------------------------

    async def watch(self, run_id: str | None, *, after: int, timeout: timedelta) -> bool:
        """Wait for news; what came since this object's last ``claim`` counts as news."""
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout.total_seconds()
        name = "news" if run_id is None else f"{'end' if after >= _NO_SEQ else 'run'}:{run_id}"
        channel = _name(self._started().prefix + name)
        pause = 0.02
        while True:
            link, waiter = self._started(), Waiter(channel, after)  # raises once it is closed
            # Subscribed before the look, or news in between are missed.
            try:
                await link.news.add(waiter)
                subscribed = True
            except (exceptions.RedisError, OSError, TimeoutError):
                subscribed = False  # perhaps the account may not: look now and then
            try:
                if await self._is_news(link, run_id, after):
                    return True
                left = end - loop.time()
                if left <= 0:
                    return False
                try:
                    async with asyncio.timeout(min(left, _LONGEST_WAIT if subscribed else pause)):
                        await waiter.woken.wait()
                except TimeoutError:
                    pause = min(pause * 1.5, 0.5)
                if waiter.told and run_id is not None:
                    return True
            finally:
                if subscribed:
                    link.news.drop(waiter)

    async def _is_news(self, link: Link, run_id: str | None, after: int) -> bool:
        if run_id is None:
            work = await link.call("read", "work", "")
            if work == self._looked:
                return False
            self._looked = work
            return True
        found = await link.call("read", "peek", _name(run_id))
        return found is not None and (found[0] > after or found[1])

    # --- moving between stores ----------------------------------------------------------------

    async def export_run(self, run_id: str) -> RunDelta | None:
        """The run without its events."""
        raw = await self._started().call("read", "export", _name(run_id))
        return None if raw is None else export_in(run_id, raw)

    async def export_keys(self, cursor: str | None = None) -> Page[tuple[str, KeyMark]]:
        """Idempotency keys in their order; the cursor is the last one shown."""
        start = b"-" if cursor is None else b"(" + _name(cursor)
        raw = await self._started().call("read", "keys", start, "1001")
        found = [
            (key, KeyMark(owner, None if until is None else instant(until)))
            for key, owner, until in raw
        ]
        return Page(items=found[:1000], cursor=found[999][0] if len(found) > 1000 else None)

    async def import_delta(self, delta: Delta) -> None:
        """Write effects as they are: how a copy arrives."""
        answer = await self._started().call("import", *delta_out(delta))
        if answer is not None:
            _, run_id, last, found = answer
            raise ValueError(f"events are missing: run_id={run_id} last_seq={last} next={found}")

    def _started(self) -> Link:
        return self._bound.get() or self._bound.put(
            Link(
                self._address,
                self.namespace,
                timeout=self._timeout,
                must_be_durable=self._must_be_durable,
            )
        )


def _forget(future: asyncio.Future[Any]) -> None:
    """Take note of an error that nobody waits for any more."""
    if not future.cancelled():
        future.exception()


def _name(text: str) -> bytes:
    # What is no Unicode names nothing that is stored, and that is the answer.
    return text.encode("utf-8", "surrogatepass")


def _open_lists(statuses: set[str]) -> list[str]:
    """Where open runs with these statuses are found: lists, and what ``list.lua`` puts together."""
    if statuses >= _OPEN:
        return ["open"]
    found = sorted({"stalled", "paused"} & statuses)
    if "suspended" in statuses:
        found.append("started")
    elif "running" in statuses:
        found.append("awake")
    if "pending" in statuses:
        found.append("unstarted")
    elif "suspended" in statuses:
        found.append("tried")
    return found


def _parse_cursor(cursor: str) -> int:
    number = cursor.removeprefix("run-")
    if number == cursor or not number.isascii() or not number.isdigit() or len(number) > 18:
        raise ValueError(f"not a cursor of this store: cursor={cursor!r}; start without one")
    return int(number)
