"""The store's server, and what stands between it and a process: calls are messages with a delay.

A message that was sent arrives even when its sender dies; an answer to the dead is lost. So a call
is one of a few things that really happen, and never half of one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from pyworkflow.errors import ConfigurationError, StorageError, StorageUnavailable
from pyworkflow.events import Event
from pyworkflow.runs import Run, WorkItem
from pyworkflow.spi.capabilities import StorageInfo
from pyworkflow.spi.storage import (
    Answer,
    Change,
    Claimed,
    ClaimRef,
    ClaimRequest,
    Committed,
    Page,
    RunQuery,
    StorageBackend,
)
from pyworkflow.testing.internals import MemoryStorageBackend
from pyworkflow_conformance.simulation._loop import ProcessLoop, make_loop

if TYPE_CHECKING:
    from pyworkflow_conformance.simulation._cluster import Cluster

__all__ = ["Server", "SimulatedStorage"]

#: Calls that change the store.
WRITES = frozenset({"commit", "claim", "renew", "release", "free", "announce", "purge"})

_COUNTED = frozenset({"commit", "claim"})


class _InOrder(dict[Any, None]):
    """Of a set, what the memory store asks of it; in the order in which things came."""

    def add(self, entry: Any) -> None:
        self[entry] = None

    def discard(self, entry: Any) -> None:
        self.pop(entry, None)


class _Waiters(dict[Any, Any]):
    """Who waits for news of what."""

    def setdefault(self, key: Any, default: Any = None, /) -> Any:
        return super().setdefault(key, _InOrder())


class Server:
    """Where the store lives: takes messages, carries out calls, sends answers."""

    def __init__(self, cluster: Cluster, inner: StorageBackend) -> None:
        self._cluster = cluster
        self._clockwork = cluster.clockwork
        self.inner = inner
        self.loop = make_loop(cluster.clockwork, "store")
        self.calls = 0
        """Calls that were sent so far."""
        self._writes = 0
        """Commits and claims among them."""
        self.down = False
        """Whether no call gets through."""
        other = type(inner.clone())
        if other is not type(inner):
            raise ConfigurationError(
                f"the backend cannot be simulated: clone() of {type(inner).__name__} makes a "
                f"{other.__name__}, and every process has a clone; let it make one of its own kind"
            )
        self._direct = type(inner) is MemoryStorageBackend
        if isinstance(inner, MemoryStorageBackend):
            # A set of them is walked by address, which no seed decides.
            inner._shared.waiters = _Waiters()
        self._turnstile = asyncio.Lock()

    def send(
        self,
        sender: ProcessLoop,
        inner: StorageBackend,
        method: str,
        args: tuple[Any, ...],
        named: dict[str, Any],
    ) -> asyncio.Future[Any]:
        """Send a call; its answer, if one comes."""
        answer = sender.create_future()
        if sender.is_dead:
            return answer
        self.calls += 1
        cluster = self._cluster
        if cluster.tracing:
            cluster.trace(sender.name, f"calls {method}{_said(method, args)}")
        if method == "renew":
            cluster.checks.asks_again(args[0])
        write = 0
        if method in _COUNTED:
            self._writes += 1
            write = self._writes
        if not self.calls % 500:
            cluster.check_work()
        fault = cluster.faults.of_call(self.calls, write, method)
        if fault is not None or self.down:
            cluster.checks.misled = True
        delay = cluster.latency()
        if fault is not None and fault.hangs_before:
            delay += fault.seconds
        call = _Call(sender, method, args, named, answer, fault, self._clockwork.now)
        self.loop.call_later(delay, self._arrived, call, inner)
        return answer

    def _arrived(self, call: _Call, inner: StorageBackend) -> None:
        cluster, fault = self._cluster, call.fault
        if self.down or (fault is not None and fault.fails_before):
            cluster.saw("call failed before" if not self.down else "call during an outage")
            self._answer(call, StorageUnavailable("simulated: the store was not reached"))
            return
        result: Any = None
        times = 2 if fault is not None and fault.doubles else 1
        for _ in range(times):
            coro = getattr(inner, call.method)(*call.args, **call.named)
            if call.method == "watch" or not self._direct:
                self._begin(coro, call)
                return
            result = _made_at_once(coro)
            if call.method in WRITES:
                problem = _made_at_once(self._looks(call, result))
                if problem is not None:
                    cluster.broke(problem)
        self._answer(call, result)

    def _looks(self, call: _Call, result: Any) -> Coroutine[Any, Any, None]:
        return self._cluster.checks.after(call.sender.name, call.method, call.args, result)

    def _begin(self, coro: Any, call: _Call) -> None:
        """Carry a call out that waits for something."""

        async def work() -> None:
            if call.method == "watch":
                result = await _made(coro)
            else:
                # One after the other, so that what is looked at afterwards is what the call did.
                async with self._turnstile:
                    result = await _made(coro)
                    if call.method in WRITES:
                        problem = await _made(self._looks(call, result))
                        if problem is not None:
                            self._cluster.broke(problem)
            self._answer(call, result)

        task = self.loop.create_task(work())
        if call.method == "watch":
            call.answer.add_done_callback(lambda _: task.cancel())

    def _answer(self, call: _Call, result: Any) -> None:
        cluster, fault = self._cluster, call.fault
        delay = cluster.latency()
        if fault is not None:
            if fault.fails_after:
                cluster.saw("answer lost")
                result = StorageUnavailable("simulated: the answer was lost")
            if fault.hangs_after:
                delay += fault.seconds
        if cluster.tracing:
            cluster.trace("store", f"answers {call.sender.name} {call.method}: {_answered(result)}")
        call.sender.call_later(delay, self._told, call, result)

    def _told(self, call: _Call, result: Any) -> None:
        """The answer has arrived."""
        answer = call.answer
        if answer.done():
            return
        if isinstance(result, Exception):
            answer.set_exception(result)
            return
        if call.method in _COUNTED:
            self._gives(call, result)
        answer.set_result(result)

    def _gives(self, call: _Call, result: Any) -> None:
        """What the sender may begin on this answer, unless it was too long under way."""
        cluster = self._cluster
        late = self._clockwork.now - call.sent > cluster.settings.lease.total_seconds() / 2
        cluster.checks.misled |= late
        if given := _given(result):
            if late:
                cluster.saw("claims in a late answer")
            cluster.checks.told(given, late=late)
        if call.method == "commit":
            for change, one in zip(call.args[0], result, strict=True):
                settle = change.settle
                if isinstance(one, Committed) and settle is not None and settle.keep:
                    if late:
                        cluster.saw("begin recorded late")
                    cluster.checks.marked(call.sender.process.owner, change, late=late)


@dataclass(slots=True, frozen=True)
class _Call:
    """A message to the store."""

    sender: ProcessLoop
    method: str
    args: tuple[Any, ...]
    named: dict[str, Any]
    answer: asyncio.Future[Any]
    fault: Any
    sent: float


def _given(result: Any) -> list[WorkItem]:
    """The items that an answer says are claimed now."""
    if isinstance(result, Claimed):
        return [claim.item for claim in result.claims]
    if isinstance(result, Committed):
        return [*result.claims]
    if isinstance(result, list):
        answers: list[Any] = [*result]  # pyright: ignore[reportUnknownArgumentType] - a list of whatever it is
        return [item for answer in answers for item in _given(answer)]
    return []


def _made_at_once(coro: Coroutine[Any, Any, Any]) -> Any:
    """What a call that waits for nothing returns or raises."""
    try:
        coro.send(None)
    except StopIteration as stop:
        return stop.value
    except Exception as exc:  # noqa: BLE001 - it is the call's answer
        return exc
    coro.close()
    raise RuntimeError("the memory store waited for something")


async def _made(coro: Coroutine[Any, Any, Any]) -> Any:
    """What a call returns or raises."""
    try:
        return await coro
    except Exception as exc:  # noqa: BLE001 - it is the call's answer
        return exc


def _said(method: str, args: tuple[Any, ...]) -> str:
    if method == "commit":
        return "".join(f" [{_change(change)}]" for change in args[0])
    if method == "claim" and args[0].items is not None:
        return "".join(f" {run}/{item}" for run, item in args[0].items)
    if method == "renew":
        return "".join(f" {ref.run_id}/{ref.item_id} token={ref.token}" for ref in args[0])
    if method in ("get_run", "get_events", "list_work", "release", "find_run"):
        return f" {args[0]}"
    return ""


def _change(change: Change) -> str:
    parts = [change.run_id, f"key={change.key}"]
    if change.seen is not None:
        parts.append(f"seen={change.seen}")
    parts += [f"{event.type}({event.op or ''})" for event in change.events]
    if change.settle is not None:
        again = (
            ""
            if change.settle.reschedule_at is None
            else f" until {change.settle.reschedule_at:%T.%f}"
        )
        parts.append(f"settle{again}")
    parts += [f"put {put.item_id}" for put in change.put]
    parts += [f"drop {item_id}" for item_id in change.drop]
    if change.take_turn is not None:
        parts.append("take_turn")
    if change.final is not None:
        parts.append(f"final={change.final}")
    return " ".join(parts)


def _answered(result: Any) -> str:
    if isinstance(result, Exception):
        return f"{type(result).__name__}: {result}"
    if isinstance(result, Claimed):
        return " ".join(
            f"{c.item.run_id}/{_holding(c.item)} claims={c.item.claims}" for c in result.claims
        )
    if isinstance(result, Committed):
        again = " again" if result.duplicate else ""
        taken = "".join(f" holds {_holding(item)}" for item in result.claims)
        return f"last_seq={result.last_seq}{again} others={len(result.unseen_events)}{taken}"
    if isinstance(result, Run):
        return str(result.status)
    if isinstance(result, list):
        answers: list[Any] = [*result]  # pyright: ignore[reportUnknownArgumentType] - a list of whatever it is
        if answers and isinstance(answers[0], Event):
            return f"{len(answers)} events"
        return "; ".join(map(_answered, answers))
    if isinstance(result, WorkItem):
        return f"{result.run_id}/{result.item_id}"
    return str(result)


def _holding(item: WorkItem) -> str:
    lease = item.lease
    return item.item_id + (f" token={lease.token} until={lease.until:%T.%f}" if lease else "")


class SimulatedStorage(StorageBackend):
    """One process's object on the store: every call is a message, and its answer another."""

    def __init__(self, server: Server, loop: ProcessLoop) -> None:
        self._server = server
        self._loop = loop
        self._inner = server.inner.clone()
        self._closed = False

    async def _call(self, method: str, *args: Any, **named: Any) -> Any:
        if self._closed:
            raise StorageError("the storage is closed; make another one, or a clone before")
        return await self._server.send(self._loop, self._inner, method, args, named)

    async def open(self) -> None:
        """The server is there already."""

    async def close(self) -> None:
        """Later calls raise."""
        self._closed = True

    def info(self) -> StorageInfo:
        """What the store says of itself."""
        return self._server.inner.info()

    async def migrate(self) -> None:
        """The server has done it."""

    def clone(self) -> SimulatedStorage:
        """Another object of the same process."""
        return SimulatedStorage(self._server, self._loop)

    async def now(self) -> datetime:
        """As the server."""
        found: datetime = await self._call("now")
        return found

    async def shift_clock(self, by: timedelta) -> None:
        """As the server."""
        await self._call("shift_clock", by)

    async def commit(self, changes: Sequence[Change]) -> list[Answer]:
        """As the server."""
        found: list[Answer] = await self._call("commit", list(changes))
        return found

    async def claim(self, request: ClaimRequest) -> Claimed:
        """As the server."""
        found: Claimed = await self._call("claim", request)
        return found

    async def renew(self, refs: Sequence[ClaimRef], lease: timedelta) -> list[bool]:
        """As the server."""
        found: list[bool] = await self._call("renew", list(refs), lease)
        return found

    async def release(self, ref: ClaimRef, *, delay: timedelta | None = None) -> bool:
        """As the server."""
        found: bool = await self._call("release", ref, delay=delay)
        return found

    async def next_due(
        self,
        *,
        queues: frozenset[str] | None = None,
        workflows: frozenset[str] | None = None,
    ) -> datetime | None:
        """As the server."""
        found: datetime | None = await self._call("next_due", queues=queues, workflows=workflows)
        return found

    async def get_run(self, run_id: str) -> Run | None:
        """As the server."""
        found: Run | None = await self._call("get_run", run_id)
        return found

    async def find_run(self, idempotency_key: str) -> str | None:
        """As the server."""
        found: str | None = await self._call("find_run", idempotency_key)
        return found

    async def list_runs(self, query: RunQuery, cursor: str | None = None) -> Page[Run]:
        """As the server."""
        found: Page[Run] = await self._call("list_runs", query, cursor)
        return found

    async def get_events(
        self, run_id: str, *, after: int = 0, limit: int | None = None
    ) -> list[Event]:
        """As the server."""
        found: list[Event] = await self._call("get_events", run_id, after=after, limit=limit)
        return found

    async def list_work(self, run_id: str) -> list[WorkItem]:
        """As the server."""
        found: list[WorkItem] = await self._call("list_work", run_id)
        return found

    async def purge(
        self,
        *,
        before: datetime,
        limit: int = 1000,
        key_retention: timedelta = timedelta(days=30),
    ) -> int:
        """As the server."""
        found: int = await self._call(
            "purge", before=before, limit=limit, key_retention=key_retention
        )
        return found

    async def announce(self, limit: int, mute: timedelta) -> list[WorkItem]:
        """As the server."""
        found: list[WorkItem] = await self._call("announce", limit, mute)
        return found

    async def holders(self) -> list[str]:
        """As the server."""
        found: list[str] = await self._call("holders")
        return found

    async def leases(self, owner: str) -> list[ClaimRef]:
        """As the server."""
        found: list[ClaimRef] = await self._call("leases", owner)
        return found

    async def recover(self) -> None:
        """As the server."""
        await self._call("recover")

    async def free(self, owner: str) -> int:
        """As the server."""
        found: int = await self._call("free", owner)
        return found

    async def watch(self, run_id: str | None, *, after: int, timeout: timedelta) -> bool:
        """As the server."""
        found: bool = await self._call("watch", run_id, after=after, timeout=timeout)
        return found

    async def stats(self) -> Mapping[str, int]:
        """As the server."""
        found: Mapping[str, int] = await self._call("stats")
        return found
