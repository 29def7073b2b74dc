"""Commits that wait together go together.

While one batch is at the storage, the changes that come meanwhile form the next: that is all the
batching there is. ``call_soon`` lets everything that is ready in one turn of the loop join.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from time import monotonic

from pyworkflow import _plugins
from pyworkflow._clock import to_micros
from pyworkflow._codecs import Writer
from pyworkflow.errors import (
    PayloadTooLarge,
    SerializationError,
    StorageError,
    StorageFull,
    StorageUnavailable,
)
from pyworkflow.spi.storage import Answer, Change, Committed, StorageBackend

__all__ = ["Pipeline", "StorageClock"]

_log = logging.getLogger("pyworkflow.engine")

BATCH = 500


class StorageClock:
    """A live turn's idea of the storage's time: the last answer, plus the time since.

    Never ahead of the storage, whatever this machine's clock says.
    """

    def __init__(self) -> None:
        self._micros = 0
        self._at = 0.0

    def update(self, now: datetime) -> None:
        """An answer carried this ``now``."""
        self._micros = to_micros(now)
        self._at = monotonic()

    def micros(self) -> int:
        """µs since the epoch."""
        return self._micros + int((monotonic() - self._at) * 1_000_000)


class Pipeline:
    """The way of a worker's changes to its storage."""

    def __init__(
        self,
        storage: StorageBackend,
        clock: StorageClock,
        patience: float,
        codecs: Writer | None = None,
        max_payload: int = 0,
    ) -> None:
        self.write_with(codecs, max_payload)
        self._storage = storage
        self._clock = clock
        self._patience = patience
        """Seconds to go on trying while the storage does not answer: about a lease."""
        self._waiting: deque[tuple[Change, Callable[[Answer | Exception], None]]] = deque()
        # Not the context of the step or session that happens to send first.
        self._context = contextvars.copy_context()
        self._sender: asyncio.Task[None] | None = None
        self.on_trouble: Callable[[StorageError], None] | None = None
        self.batch: AbstractContextManager[None] = nullcontext()
        """Entered while changes are under way."""

    def write_with(self, codecs: Writer | None, max_payload: int) -> None:
        """Write payloads with these codecs, each of at most so many bytes as it is stored."""
        self.codecs = codecs
        self._max_payload = max_payload

    async def commit(self, change: Change) -> Committed:
        """Commit a change; raises the refusal, or ``StorageError`` when the storage gave up."""
        if self.codecs is not None:
            change = await self._wrapped(self.codecs, change)
        future: asyncio.Future[Committed] = asyncio.get_running_loop().create_future()

        def done(answer: Answer | Exception) -> None:
            if future.done():
                return
            if isinstance(answer, Committed):
                future.set_result(answer)
            else:
                future.set_exception(answer)

        self.submit(change, done)
        return await future

    def submit(self, change: Change, done: Callable[[Answer | Exception], None]) -> None:
        """Send a change along as it is; ``done`` is called with what came of it, and raises not.

        Only while there are no codecs.
        """
        self._waiting.append((change, done))
        if self._sender is None:
            self._sender = asyncio.get_running_loop().create_task(
                self._send(), name="pyworkflow-pipeline", context=self._context.copy()
            )

    async def _wrapped(self, codecs: Writer, change: Change) -> Change:
        """The change as it is stored; made once, so that sending it again sends the same.

        What is done under a claim waits for as long as it takes: the lease is renewed meanwhile,
        and the store, which is in order, would count a claim that ends as a worker that died.
        """
        end = monotonic() + self._patience
        pause = 0.05
        while True:
            try:
                return await codecs.wrap_change(change, self._max_payload)
            except (StorageUnavailable, StorageFull) as exc:
                if self.on_trouble is not None:
                    self.on_trouble(exc)
                if change.claim is None and monotonic() + pause > end:
                    raise
                _log.warning("a payload cannot be wrapped now; trying again: %s", exc)
            await asyncio.sleep(pause)
            pause = min(pause * 2, 5.0)

    async def idle(self, timeout: float) -> None:
        """Until no change is under way, or for ``timeout`` seconds."""
        if self._sender is not None:
            await asyncio.wait({self._sender}, timeout=timeout)

    async def _send(self) -> None:
        try:
            with self.batch:
                while self._waiting:
                    await self._send_batch()
                    # Let the sessions that were just answered send their next change along: at
                    # once, or when the short step that they begin has ended.
                    await asyncio.sleep(0)
                    if not self._waiting:
                        await asyncio.sleep(0)
        finally:
            self._sender = None

    async def _send_batch(self) -> None:
        batch = [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]
        answers = await self._deliver([change for change, _ in batch])
        if answers and isinstance(answers[-1], Committed):
            self._clock.update(answers[-1].now)
        for (change, done), answer in zip(batch, answers, strict=True):
            try:
                done(answer)
            except Exception:  # noqa: BLE001 - the others must have their answers
                _log.exception("an answer could not be given: run_id=%s", change.run_id)

    async def _deliver(self, changes: list[Change]) -> list[Answer | Exception]:
        """Send a batch, again while the storage is unavailable: changes carry their keys."""
        end = monotonic() + self._patience
        pause = 0.05
        while True:
            try:
                return list(await self._storage.commit_many(changes))
            except StorageError as exc:
                _plugins.observe("pyworkflow_storage_error", operation="commit", error=exc)
                if self.on_trouble is not None:
                    self.on_trouble(exc)
                if not isinstance(exc, StorageUnavailable) or monotonic() + pause > end:
                    _log.error("the storage failed; giving up %d changes: %s", len(changes), exc)
                    return [exc] * len(changes)
                _log.warning("the storage does not answer; trying again: %s", exc)
            except Exception as exc:  # noqa: BLE001 - a backend's own bug must not hang its callers
                if len(changes) > 1:
                    # One of them cannot be stored: it must not take the others along.
                    return [answer for c in changes for answer in await self._deliver([c])]
                if isinstance(exc, PayloadTooLarge | SerializationError | ValueError):
                    return [exc]
                _log.exception("the storage failed in an unexpected way")
                return [StorageError(f"unexpected: {exc!r}")]
            await asyncio.sleep(pause)
            pause = min(pause * 2, 5.0)
