"""What lives in a worker beside the store: a run's coroutine, and the steps that run in place."""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import Any

from pyworkflow._definitions import Workflow
from pyworkflow._engine.steps import StepEnd, StepTry
from pyworkflow._replay.replay import Replay
from pyworkflow.runs import WorkItem

__all__ = ["TURNS", "InPlace", "LiveRun"]

TURNS = 500
"""Turns that one worker drives at once; more wait in the storage."""


class LiveRun:
    """A coroutine that may be kept between turns."""

    __slots__ = ("replay", "run_id", "warned", "workflow")

    def __init__(self, workflow: Workflow[Any, Any], run_id: str, max_result: int = 0) -> None:
        self.run_id = run_id
        self.workflow = workflow
        self.replay = Replay(workflow, run_id)
        self.replay.max_result = max_result
        self.warned: set[int] = set()
        """Percent of its limit at which the history was said to get long."""


class InPlace:
    """A step that runs in this session, or is about to be handed off."""

    __slots__ = ("end", "item", "since", "task", "what")

    def __init__(self, what: StepTry) -> None:
        self.what = what
        self.since = monotonic()
        self.task: asyncio.Task[None] | None = None
        self.end: StepEnd | None = None
        self.item: WorkItem | None = None
        """Set once it was handed off: from then on it is a dispatched step."""
