"""News between processes: LISTEN and NOTIFY, beside the transactions, never inside them.

NOTIFY in a commit would make every commit of the database wait for one lock. So what a commit
changed is told afterwards, many at once; who waits looks again from time to time, in case that a
process died in between.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

from pyworkflow.spi import Change, Committed, StorageError, StorageUnavailable
from pyworkflow_storage_sql.postgres._connections import Connections, Transport

__all__ = ["News"]

_PAUSE = 0.005
#: What neither brings work nor ends a run: only who follows along waits for it.
_UNHURRIED = 0.05
_LONGEST = 6000
_PARTS = 16
_LOOK_AGAIN = 2.0
_ENDED = -1
_Seqs = Mapping[str, int | None]
"""The runs that changed: the last seq, ``_ENDED``, or None for whatever it may be."""


class _Waiter:
    """Somebody who waits for a run, or for work."""

    __slots__ = ("after", "event", "known")

    def __init__(self, after: int) -> None:
        self.after = after
        self.event = asyncio.Event()
        self.known = False
        """What it waits for is there: no need to ask the server."""

    def notify(self, last: int | None) -> None:
        if last is None:
            self.event.set()
        elif last == _ENDED or last > self.after:
            self.known = True
            self.event.set()


class News:
    """Who waits in this process, and what the others are told."""

    def __init__(self, connections: Connections, channel: str) -> None:
        self._connections = connections
        self._channel = channel
        self._sender = os.urandom(8).hex()
        self._waiting: dict[str | None, set[_Waiter]] = {}
        self._listener: Transport = None
        self._opening = asyncio.Lock()
        self._closed = False
        self._told: dict[str, int | None] = {}
        self._work = False
        self._hurry = asyncio.Event()
        self._teller: asyncio.Task[None] | None = None
        self.number = 0
        """Grows with everything that may be work."""
        self.looked = 0
        """What it was at the last claim."""

    # --- telling ------------------------------------------------------------------------------

    def tell(self, run_ids: Iterable[str], *, work: bool) -> None:
        """These runs changed; ``work``: there may be something to claim."""
        self._tell(dict.fromkeys(run_ids), work=work, hurry=True)

    def tell_of(self, changes: Sequence[Change], answers: Sequence[object]) -> None:
        """Tell what these changes did."""
        seqs: dict[str, int | None] = {}
        work = ended = False
        for change, answer in zip(changes, answers, strict=True):
            if isinstance(answer, Committed):
                run_id = change.run_id
                if change.final is not None:
                    seqs[run_id] = _ENDED
                    ended = True
                elif seqs.get(run_id) != _ENDED:
                    seqs[run_id] = answer.last_seq
                work = work or _brings_work(change, answer)
        if seqs:
            self._tell(seqs, work=work, hurry=work or ended)

    def _tell(self, seqs: _Seqs, *, work: bool, hurry: bool) -> None:
        self._wake(seqs, work=work)
        for run_id, last in seqs.items():
            if self._told.get(run_id, 0) != _ENDED:
                self._told[run_id] = last
        self._work = self._work or work
        if hurry:
            self._hurry.set()
        if self._teller is None:
            self._teller = asyncio.get_running_loop().create_task(self._tell_others())

    async def _tell_others(self) -> None:
        try:
            while self._told or self._work:
                if not self._hurry.is_set():
                    try:
                        async with asyncio.timeout(_UNHURRIED):
                            await self._hurry.wait()
                    except TimeoutError:
                        pass
                await asyncio.sleep(_PAUSE)
                self._hurry.clear()
                told, self._told = self._told, {}
                work, self._work = self._work, False
                await self._connections.call(
                    "SELECT set_config('synchronous_commit', 'off', true), "
                    "(SELECT count(pg_notify($1, text)) FROM unnest($2::text[]) text)",
                    self._channel,
                    self._texts(work, told),
                )
        except StorageError:
            pass  # they look again by themselves
        finally:
            self._teller = None

    def _texts(self, work: bool, told: Mapping[str, int | None]) -> list[str]:
        """The news in as many parts as are needed; what would take too many names no run."""
        texts: list[str] = []
        part: dict[str, int | None] = {}
        size = 0
        for run_id, last in told.items():
            long = len(json.dumps(run_id)) + 24
            if size + long > _LONGEST and part:
                texts.append(json.dumps([work, part, self._sender]))
                part, size = {}, 0
            if long > _LONGEST or len(texts) == _PARTS:
                return [json.dumps([work, None, self._sender])]
            part[run_id] = last
            size += long
        texts.append(json.dumps([work, part, self._sender]))
        return texts

    def _wake(self, seqs: _Seqs | None, *, work: bool) -> None:
        waiting = self._waiting
        if work:
            self.number += 1
            for waiter in waiting.get(None, ()):
                waiter.event.set()
        if len(waiting) == (None in waiting):
            return
        if seqs is None:
            for run_id, waiters in waiting.items():
                if run_id is not None:
                    for waiter in waiters:
                        waiter.event.set()
            return
        for run_id, last in seqs.items():
            for waiter in waiting.get(run_id, ()):
                waiter.notify(last)

    # --- listening ----------------------------------------------------------------------------

    async def listen(self) -> None:
        """Be told from now on."""
        if self._connections.settings.pooled:
            return
        if self._listener is not None and not self._listener.is_closed():
            return
        async with self._opening:
            if self._listener is not None and not self._listener.is_closed():
                return
            connection = await self._connections.connect()
            try:
                await connection.add_listener(self._channel, self._heard)
                connection.add_termination_listener(self._lost)
                if self._closed:
                    raise StorageUnavailable(
                        f"the storage is closing: storage={self._connections.settings.where}"
                    )
            except BaseException:
                connection.terminate()
                raise
            self._listener = connection
            self._wake(None, work=True)  # what was told before it stood

    def _lost(self, connection: object) -> None:
        # Workers notice an outage at once, and so its end: whoever waits on would not.
        if connection is self._listener:
            self._wake({}, work=True)

    def _heard(self, _connection: object, _pid: int, _channel: str, payload: object) -> None:
        seqs: _Seqs | None
        try:
            work, seqs, sender = json.loads(str(payload))
            if sender == self._sender:
                return
            if seqs is not None:
                seqs = {str(run): None if last is None else int(last) for run, last in seqs.items()}
        except (ValueError, TypeError, AttributeError):
            work, seqs = True, None
        self._wake(seqs, work=bool(work))

    async def wait(
        self, key: str | None, after: int, timeout: float, changed: Callable[[], Awaitable[bool]]
    ) -> bool:
        """Until there is news; ``changed`` is asked at the begin, and where news leave it open."""
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout
        waiter = _Waiter(after)
        event = waiter.event
        pooled = self._connections.settings.pooled
        pause = 0.02 if pooled else _LOOK_AGAIN
        self._waiting.setdefault(key, set()).add(waiter)
        try:
            await self.listen()
            while True:
                if waiter.known or await changed():
                    return True
                left = end - loop.time()
                if left <= 0:
                    return False
                try:
                    async with asyncio.timeout(min(left, pause)):
                        await event.wait()
                except TimeoutError:
                    if pooled and key is None and loop.time() < end:
                        return True
                    pause = min(pause * 1.5, 0.5) if pooled else pause
                event.clear()
        finally:
            standing = self._waiting[key]
            standing.discard(waiter)
            if not standing:
                del self._waiting[key]

    async def close(self) -> None:
        """Tell what is still to be told, and stop listening."""
        self._closed = True
        teller = self._teller
        if teller is not None:
            self._hurry.set()
            await asyncio.wait({teller}, timeout=2)
            teller.cancel()
        if self._listener is not None:
            try:
                await self._listener.close(timeout=2)
            except Exception:  # noqa: BLE001 - it ends one way or the other
                self._listener.terminate()


def _brings_work(change: Change, answer: Committed) -> bool:
    """Whether a change may leave something to claim that has no lease."""
    leased = {item.item_id for item in answer.claims}
    if any(put.item_id not in leased for put in change.put):
        return True
    if change.create is not None:
        return "turn" not in leased
    settle = change.settle
    return bool(
        change.control is not None
        or (settle is not None and settle.reschedule_at is not None)
        or ((change.claim is None or change.claim.item_id != "turn") and change.events)
    )
