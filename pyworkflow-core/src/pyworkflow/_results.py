"""Waiting for the end of a run: what a waiting step does meanwhile, stalls, and outcomes."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime, timedelta
from typing import Any

from pyworkflow._config import settings
from pyworkflow._declared import known_workflow
from pyworkflow._duration import parse_duration
from pyworkflow._engine.places import current_place
from pyworkflow._engine.worker import Worker
from pyworkflow._portable import import_listed
from pyworkflow._serialization import decode, decode_error
from pyworkflow.errors import ArgumentError, RunCancelled, RunTerminated
from pyworkflow.events import EventType
from pyworkflow.runs import Run, RunStatus
from pyworkflow.spi.storage import StorageBackend

__all__ = ["POLL", "Help", "outcome", "parse_timeout", "stalled_since", "still_running"]

D = str | int | float | timedelta

POLL = timedelta(seconds=5)
"""Between two looks at a run for which the store has no news."""
_HELP = timedelta(milliseconds=50)
_MOST_HELP = timedelta(seconds=2)
_BACKWARDS = 100
"""Events of one look into a history from its end."""


class Help:
    """What a step that waits for a run does for it, in a worker that works on doorbells.

    Each look that finds nothing to do doubles the pause before the next one.
    """

    def __init__(self, worker: Worker | None) -> None:
        self._worker = worker if worker is not None and current_place() is not None else None
        self.pause = POLL if self._worker is None else _HELP
        # A worker without doorbells that looks for nothing itself belongs to a test.
        self._most = _HELP if worker is not None and not worker.rings else _MOST_HELP

    def awaiting(self, run_id: str) -> AbstractContextManager[None]:
        """A step waits for the run meanwhile."""
        return nullcontext() if self._worker is None else _counted(self._worker, run_id)

    async def with_run(self, run_id: str) -> bool:
        """Work on what is due of the run; whether there was something."""
        if self._worker is None or self._worker.is_serving:
            self.pause = POLL
            return False
        helped = await self._take_due(self._worker, run_id)
        self.pause = _HELP if helped else min(self.pause * 2, self._most)
        return helped

    async def _take_due(self, worker: Worker, run_id: str) -> bool:
        """Claim what is due of the run.

        Workers that work on doorbells may all be busy with steps that wait: then no doorbell is
        ever answered.
        """
        if worker.is_stopping:
            return False
        now, due = await worker.storage.now(), list[tuple[str, str]]()
        for item in await worker.storage.list_work(run_id):
            is_free = item.lease is None or item.lease.until <= now
            if is_free and item.due_at <= now and worker.serves(item.queue):
                due.append((run_id, item.item_id))
        return bool(due and await worker.claim_due(due))


@contextmanager
def _counted(worker: Worker, run_id: str) -> Generator[None]:
    awaited = worker.runner.awaited
    awaited[run_id] += 1
    try:
        yield
    finally:
        awaited[run_id] -= 1
        if not awaited[run_id]:
            del awaited[run_id]


async def stalled_since(storage: StorageBackend, run: Run) -> datetime | None:
    """Since when a stalled run has been stalled without a break; None when it is not any more."""
    before, since = run.history_length, None
    while before > 0:
        after = max(0, before - _BACKWARDS)
        events = await storage.get_events(run.run_id, after=after, limit=before - after)
        for event in reversed(events):
            if event.type == EventType.WORKFLOW_UNSTALLED:
                return since
            if event.type == EventType.WORKFLOW_STALLED:
                since = event.timestamp
        before = after
        if since is not None and not events:
            break
    return since


def parse_timeout(timeout: D | None) -> timedelta | None:
    """How long to wait for a result; None waits for ever. ``ArgumentError``."""
    if timeout is None:
        return None
    try:
        return parse_duration(timeout)
    except ValueError as error:
        raise ArgumentError(f"timeout={timeout!r}: {error}") from error


def still_running(run: Run, timeout: D | None) -> TimeoutError:
    if run.stalled is not None:
        return TimeoutError(
            f"the run is stalled: run_id={run.run_id}: {run.stalled}; it resumes when a worker "
            f"has code that fits, `pyworkflow runs show {run.run_id}` tells more"
        )
    return TimeoutError(
        f"the run has not ended within timeout={timeout}: run_id={run.run_id} "
        f"status={run.status}; it is not cancelled, ask again later"
    )


def outcome(found: Run) -> Any:
    match found.status:
        case RunStatus.COMPLETED:
            workflow = known_workflow(found.workflow)
            text = found.result_text or ""
            return (workflow.decode_result if workflow is not None else decode)(text)
        case RunStatus.FAILED if found.error is not None:
            import_listed(settings().portable_modules, required=False)
            raise decode_error(found.error.to_json(), exact=False)
        case RunStatus.TERMINATED:
            raise RunTerminated(found.run_id)
        case _:
            raise RunCancelled(found.run_id, found.error.message if found.error else "")
