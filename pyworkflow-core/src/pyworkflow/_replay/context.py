"""The run as its own code sees it: ops, time, randomness, version markers, logs."""

from __future__ import annotations

import asyncio
import random
from asyncio import events
from collections.abc import Mapping
from typing import Any, NoReturn
from uuid import UUID

from pyworkflow._replay.commands import (
    CancelStep,
    Command,
    EmitLog,
    MarkVersion,
    RunStep,
    StartSleep,
    StepSpec,
)
from pyworkflow._replay.loop import DeterministicLoop, DurableTimer
from pyworkflow._replay.transitions import OpKind, OpState
from pyworkflow._serialization import digest, digest_arguments, digest_tree, payload_size
from pyworkflow.errors import PayloadTooLarge, WorkflowContextError
from pyworkflow.events import Json

__all__ = ["Op", "RunContext", "current_run"]


_LONGEST_LINE = 16_384
# Looked up once: a member of an enum takes long to find.
_STEP, _EMITTED = OpKind.STEP, OpState.EMITTED


class Op:
    """One emitted op and where it stands."""

    __slots__ = (
        "cancel_recorded", "digest", "future", "kind", "name", "number", "recorded", "state", "step",
        "text", "timer", "until",
    )  # fmt: skip

    def __init__(self, kind: OpKind, number: int) -> None:
        self.kind = kind
        self.number = number
        """Creation number: the order of timers that are due together."""
        self.state = _EMITTED
        self.recorded = False
        """Steps: a ``step.scheduled`` carries it, so an item may owe it."""
        self.cancel_recorded = False
        self.name = ""
        self.digest = ""
        self.until = 0
        """Sleeps and timers: µs since the epoch."""
        self.step: StepSpec | None = None
        self.text = ""
        """Steps: the arguments, until the result is there."""
        self.future: asyncio.Future[Any] | None = None
        self.timer: DurableTimer | None = None


class RunContext:
    """What primitives talk to; found through the running loop (``current_run``)."""

    def __init__(self, *, run_id: str, workflow: str, seed: str, start: int) -> None:
        self.run_id = run_id
        self.workflow = workflow
        self.now = self.start = start
        """µs since the epoch; whole, never decreasing."""
        self.seed = seed
        self.loop = DeterministicLoop(salt=int(seed[:15], 16))
        self.loop.run = self
        self.ops: dict[str, Op] = {}
        self.waiting_timers: dict[str, Op] = {}
        self.commands: list[Command] = []
        self.closed = False
        """No further command is taken: the root is done, or the coroutine is being closed."""
        self.evicting = False
        self.misuse: WorkflowContextError | None = None
        self.input_seq = 0
        """seq of the input being delivered."""
        self.seen_seq = 0
        """Inputs up to here were delivered by a committed turn."""
        self.max_payload = 0
        """Largest payload in bytes, as it was when the run started; 0 for no limit."""
        self.salt = b""
        """What digests of arguments are keyed with: a secret of the run, when it is encrypted."""
        self.markers: set[str] = set()
        """Version markers anywhere in the history."""
        self.warnings: list[str] = []
        self.step_errors: list[tuple[BaseException, str]] = []
        """The last errors of steps that were raised in the code, with the steps' tracebacks."""
        self._patched: dict[str, bool] = {}
        self._deprecated: set[str] = set()
        self._random: random.Random | None = None

    # --- primitives -----------------------------------------------------------------------------

    def start_step(
        self, step: StepSpec, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> str:
        """Emit a step; its result arrives at ``ops[op].future``."""
        if self.closed:
            self.check_open(step.name)
        text = step.encode_call(args, kwargs)
        if self.max_payload and (size := payload_size(text)) > self.max_payload:
            raise PayloadTooLarge(f"the arguments of step {step.name!r}", size, self.max_payload)
        name = self.loop.branch().next_op("step")
        op = Op(_STEP, len(self.ops))
        op.name = step.name
        if kwargs:
            op.digest = digest_tree(step.bound_call(text), self.salt)
        else:
            # One brace is the arguments' own: nothing in them has an order to be freed of.
            made = digest if text.count("{") == 1 else digest_arguments
            op.digest = made(text, self.salt)
        op.text = text
        op.step = step
        op.future = self.loop.create_future()
        self.ops[name] = op
        self.commands.append(RunStep(name, step, text, op.digest))
        return name

    def same_call(self, op: Op, recorded: object) -> bool:
        """Whether a recorded digest is that of the same call, written in another way.

        Code changes ``charge(5)`` into ``charge(amount=5)`` or spells a default out, and 0.1.0
        made digests of calls as they were written.
        """
        if op.step is None or not op.text:
            return False
        for text in op.step.equal_calls(op.text):
            if digest_arguments(text, self.salt) == recorded:
                op.digest = str(recorded)
                return True
        return False

    def cancel_step(self, name: str) -> None:
        """The code gave a step up."""
        op = self.ops[name]
        if op.state in (OpState.EMITTED, OpState.RECORDED) and not self.closed:
            op.state = OpState.CANCELLED
            self.commands.append(CancelStep(name, op.name))

    def start_sleep(self, until: int) -> str:
        """Emit a sleep that ends at ``until``."""
        self.check_open("sleep")
        name = self.loop.branch().next_op("sleep")
        op = self._timer_op(OpKind.SLEEP, name, until)
        op.future = self.loop.create_future()
        self.commands.append(StartSleep(name, until))
        return name

    def start_timer(self, elapsed: int, timer: DurableTimer) -> str:
        """Emit a timer of asyncio; ``elapsed`` µs after the start of the run."""
        self.check_open("a timer")
        name = self.loop.branch().next_op("timer")
        self._timer_op(OpKind.TIMER, name, self.start + elapsed).timer = timer
        return name

    def _timer_op(self, kind: OpKind, name: str, until: int) -> Op:
        op = self.ops[name] = self.waiting_timers[name] = Op(kind, len(self.ops))
        op.until = until
        return op

    def cancel_timer(self, name: str) -> None:
        """The code gave a sleep or timer up."""
        op = self.ops[name]
        if op.state in (OpState.EMITTED, OpState.RECORDED):
            op.state = OpState.CANCELLED
            self.waiting_timers.pop(name, None)

    def patched(self, id: str) -> bool:
        """Whether this run takes the new code: the first call decides for the coroutine's life."""
        decided = self._patched.get(id)
        if decided is None:
            if id in self.markers:
                decided = True
            elif self.is_replaying:
                decided = False
            else:
                self.check_open("patched")
                decided = True
                self.commands.append(MarkVersion(id))
            self._patched[id] = decided
        return decided

    def deprecate_patch(self, id: str) -> None:
        """The code is the patched one, in every run that is still open."""
        self._deprecated.add(id)

    def knows_patch(self, id: str) -> bool:
        """Whether the code has come past this patch."""
        return id in self._patched or id in self._deprecated

    def log(self, level: str, message: str, fields: Mapping[str, Json]) -> bool:
        """Record a log line; True when handlers shall get it too (not on replay)."""
        if self.is_replaying or self.closed:
            return False
        if len(message) > _LONGEST_LINE:
            message = message[:_LONGEST_LINE] + "… (cut)"
        self.commands.append(EmitLog(level, message, fields))
        return True

    @property
    def random(self) -> random.Random:
        """The run's stream of random numbers."""
        if self._random is None:
            self._random = random.Random(self.seed)
        return self._random

    def uuid4(self) -> UUID:
        """The run's next random UUID."""
        return UUID(int=self.random.getrandbits(128), version=4)

    @property
    def is_replaying(self) -> bool:
        """Whether the input being delivered was delivered by a committed turn before."""
        return self.input_seq <= self.seen_seq

    # --- faults ---------------------------------------------------------------------------------

    def misused(self, error: WorkflowContextError) -> None:
        """Remember a misuse: the run stalls whatever the code does with the exception."""
        if self.misuse is None and not self.evicting:
            self.misuse = error

    def refuse(self, why: str) -> NoReturn:
        """Refuse something in workflow code: raises at the line, and the run stalls."""
        self.loop.refuse(why)

    def loop_error(self, context: Mapping[str, Any]) -> None:
        """An exception that nobody awaits: shown to people, decides nothing."""
        if not self.evicting and not self.closed and len(self.warnings) < 20:
            exc = context.get("exception")
            try:
                shown = repr(exc)
            except Exception:  # noqa: BLE001 - a __repr__ of the user's
                shown = type(exc).__name__
            self.warnings.append(f"{context.get('message', '')}: {shown}")

    def raised(self, error: BaseException, traceback: str) -> None:
        """A step's error is raised where the code awaits it: people want the step's traceback."""
        self.step_errors[:-19] = []
        self.step_errors.append((error, traceback))

    def check_open(self, what: str) -> None:
        """Raise when the run takes no further command."""
        if self.closed:
            raise WorkflowContextError(
                f"the run is over or being put aside: {what} cannot start; "
                "effects belong in steps that the workflow awaits"
            )


def current_run() -> RunContext | None:
    """The run whose code is executing in this thread, or None outside of workflow code."""
    loop = events._get_running_loop()
    if isinstance(loop, DeterministicLoop):
        run: RunContext | None = loop.run
        return run
    return None
