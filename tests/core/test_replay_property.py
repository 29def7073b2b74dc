"""Random programs and random histories: what replay must give, whatever happened between commits."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyworkflow._clock import from_micros
from pyworkflow._failures import encode_error
from pyworkflow._replay.commands import (
    CancelRun,
    CancelStep,
    CompleteRun,
    EmitLog,
    FailRun,
    MarkVersion,
    RunStep,
    StartSleep,
)
from pyworkflow._replay.replay import DEADLINE_OP, Replay
from pyworkflow._replay.transitions import OpState
from pyworkflow._serialization import decode, decode_arguments
from pyworkflow.events import Event
from tests.core.programs import (
    CANCELLED,
    duration,
    examples,
    program,
    program_bare,
    programs,
    run_plain,
)

START = 1_790_000_000_000_000
RUN = "run_property"


class World:
    """A history in the making: a live replay, commits, crashes, and inputs from outside.

    It does what a session does, in a random order. ``plain`` instead gives every step its
    duration and commits at once, so that the run can be compared with an ordinary program.
    """

    def __init__(
        self, node: Any, seed: int, *, plain: bool = False, bare: bool = False, foreign: bool = True
    ) -> None:
        self.workflow = program_bare if bare else program
        self.random = random.Random(seed)
        self.plain = plain
        self.foreign = foreign
        self.clock = START
        self.history: list[Event] = []
        self.keys: set[str] = set()
        self.seen = 0
        self.buffer: list[Event] = []  # commands that the next commit carries
        self.running: dict[str, tuple[RunStep, int]] = {}  # in place: lost by a crash
        self.items: dict[str, tuple[RunStep, int]] = {}  # dispatched: not lost
        self.logs: list[str] = []
        self.crashes = 0
        deadline = None
        if foreign and self.random.random() < 0.15:
            deadline = from_micros(START + self.random.randrange(1, 20_000)).isoformat()
        self.started = {
            "workflow": self.workflow.name,
            "version": "1",
            "args": self.workflow.encode_call((node, True), {}),
            "seed": hashlib.sha256(str(seed).encode()).hexdigest()[:32],
            "deadline": deadline,
            "profile": 1,
        }
        self.replay = Replay(self.workflow, RUN)
        self._record(Event("workflow.started", "I", self.started, None, "started"))
        self.replay.feed(self.history)

    # --- history ----------------------------------------------------------------------------

    def _record(self, event: Event) -> None:
        if event.key is not None:
            if event.key in self.keys:
                return
            self.keys.add(event.key)
        at = from_micros(self.clock)
        self.history.append(event._replace(run_id=RUN, seq=len(self.history) + 1, timestamp=at))

    def _tick(self) -> None:
        if not self.plain:
            self.clock += self.random.choice([0, 0, 1, 7, 500])

    # --- a turn -----------------------------------------------------------------------------

    def take(self) -> None:
        for command in self.replay.take():
            match command:
                case RunStep(op):
                    _, kwargs_or_args = command.step.name, decode_arguments(command.args)[0]
                    ends = self.clock + duration(int(kwargs_or_args[0]))
                    if not self.plain and (
                        command.step.name == "queued" or self.random.random() < 0.2
                    ):
                        data: dict[str, Any] = {
                            "name": command.step.name, "digest": command.digest,
                        }  # fmt: skip
                        self.buffer.append(Event("step.scheduled", "C", data, op))
                        self.items[op] = (command, ends)
                    else:
                        self.running[op] = (command, ends)
                case CancelStep(op, name):
                    entry = self.running.pop(op, None)
                    found = self.replay.op(op)
                    if found.recorded and not found.cancel_recorded:
                        self.buffer.append(Event("step.cancelled", "C", {"name": name}, op))
                        if self.random.random() < 0.5:
                            self.items.pop(op, None)  # else its result comes all the same
                    elif entry is not None and not self.plain and self.random.random() < 0.2:
                        self.items[op] = entry  # a worker that was given up reports it later
                case StartSleep(op, until):
                    data = {"until": from_micros(until).isoformat()}
                    self.buffer.append(Event("sleep.created", "C", data, op))
                case MarkVersion(id):
                    key = f"marker:{id}"
                    self.buffer.append(Event("version.marked", "C", {"id": id}, None, key))
                case EmitLog(level, message):
                    data = {"message": message, "fields": {}}
                    self.buffer.append(Event(f"log.{level}", "O", data))

    def commit(self, inputs: list[Event]) -> None:
        """Commit what has gathered, with ``inputs``; deliver by seq what is new."""
        self._tick()
        seen = self.replay.seen
        for event in self.buffer:
            self._record(event)
        self.buffer = []
        for event in inputs:
            self._record(event)
        self.seen = seen
        self.replay.acknowledge(seen)

    def deliver(self) -> None:
        """Feed what is durable, in one go or in several."""
        rest = [e for e in self.history if e.seq > self.replay.fed]
        while rest:
            size = len(rest) if self.plain else self.random.randint(1, len(rest))
            self.replay.feed(rest[:size])
            rest = rest[size:]

    def crash(self) -> None:
        """The worker is gone, or the coroutine was evicted: all that was not committed is lost."""
        self.crashes += 1
        self.replay.close()
        self.buffer, self.running = [], {}
        self.replay = Replay(self.workflow, RUN)
        self.replay.acknowledge(self.seen)
        self.deliver()

    def result(self, command: RunStep) -> Event:
        arguments = decode_arguments(command.args)[0]
        n: Any = arguments[0]
        name = command.step.name
        data: dict[str, Any] = {"name": name, "digest": command.digest, "attempt": 1}
        key = f"step:{command.op}"
        if name == "fails":
            data |= {"kind": "error", "error": encode_error(ValueError(f"step {n}"))}
            return Event("step.failed", "I", data, command.op, key)
        value = n + 4 if name == "of_a_set" else n
        data["result"] = command.step.encode_result(value)
        return Event("step.completed", "I", data, command.op, key)

    def due(self) -> list[Event]:
        found: list[Event] = []
        for op, type, until in self.replay.due_timers(self.clock):
            data: dict[str, Any] = {"until": from_micros(until).isoformat(), "lag": 0}
            if op == DEADLINE_OP:
                data = {"deadline": data["until"]}
            found.append(Event(type, "I", data, op, f"timer:{op}"))
        return found

    def _next_instant(self) -> int | None:
        instants = [ends for _, ends in (*self.running.values(), *self.items.values())]
        timer = self.replay.next_timer()
        if timer is not None:
            instants.append(timer)
        return min(instants, default=None)

    def _choose(self) -> list[Event]:
        """Which inputs come now."""
        if self.plain:
            instant = self._next_instant()
            assert instant is not None, f"nothing can happen: {self.replay.waiting_for()}"
            self.clock = max(self.clock, instant)
            ready = [op for op, (_, ends) in self.running.items() if ends <= self.clock]
            return [*self.due(), *[self.result(self.running.pop(op)[0]) for op in ready]]
        found: list[Event] = []
        pick = self.random
        # A program that does not ask for an order may still have time limits.
        early = self.foreign or not (self.running or self.items)
        if early and pick.random() < 0.3 and (timer := self.replay.next_timer()) is not None:
            self.clock = max(self.clock, timer)
        found += self.due()
        for source in (self.running, self.items):
            for op in list(source):
                if pick.random() < 0.4:
                    found.append(self.result(source.pop(op)[0]))
        if self.foreign and pick.random() < 0.06:
            number = len(self.history)
            found.append(Event("cancel.requested", "I", {"reason": "r"}, None, f"cancel:{number}"))
        if not found and (instant := self._next_instant()) is not None:
            self.clock = max(self.clock, instant)
        if pick.random() < 0.8:
            # Timers that fire together keep their order; all else may come in any.
            timers = [e for e in found if (e.key or "").startswith("timer:")]
            rest = [e for e in found if e not in timers]
            pick.shuffle(rest)
            for event in timers:
                low = 0 if event is timers[0] else rest.index(timers[timers.index(event) - 1]) + 1
                rest.insert(pick.randint(low, len(rest)), event)
            found = rest
        return found

    def run(self, check: Any = None) -> World:
        for _ in range(3000):
            assert self.replay.problem is None, self.replay.problem
            self.take()
            if self.replay.outcome is not None:
                return self._finish()
            if self._next_instant() is None:
                self.replay.close()  # it swallowed a cancellation, and waits for what never comes
                return self
            if not self.plain and self.random.random() < 0.1:
                self.crash()
                continue
            self.commit(self._choose())
            if self.random.random() < 0.1 and not self.plain:
                self.crash()
            self.deliver()
            if check is not None:
                check(self)
        raise AssertionError("the program does not end")

    def _finish(self) -> World:
        last = {
            CompleteRun: "workflow.completed", FailRun: "workflow.failed",
            CancelRun: "workflow.cancelled",
        }[type(self.replay.outcome)]  # fmt: skip
        data: dict[str, Any] = {}
        if isinstance(self.replay.outcome, CompleteRun):
            data = {"result": self.replay.outcome.result}
        self.buffer.append(Event(last, "C", data))
        self.commit([])
        return self


# --- what a replay shows --------------------------------------------------------------------------


def outcome_of(replay: Replay) -> tuple[str, str]:
    match replay.outcome:
        case CompleteRun(result):
            return "completed", result
        case FailRun(error):
            return "failed", repr(error)
        case CancelRun(reason):
            return "cancelled", reason
        case None:
            return "open", ""


def emitted(replay: Replay) -> list[tuple[Any, ...]]:
    """Every op that the code emitted, in order of creation; nothing of what was recorded."""
    context = replay.context
    assert context is not None
    return [(name, op.kind, op.name, op.digest, op.until) for name, op in context.ops.items()]


def picture(replay: Replay) -> dict[str, Any]:
    """All that decides what a session does next."""
    context = replay.context
    assert context is not None
    return {
        "outcome": outcome_of(replay),
        "problem": replay.problem,
        "ops": [
            (name, op.kind, op.state, op.recorded, op.cancel_recorded, op.until, op.digest)
            for name, op in context.ops.items()
        ],
        "timer": replay.next_timer(),
        "due": replay.due_timers(2**62),
        "now": context.now,
        "seen": replay.seen,
        "deadline": replay.deadline,
        "grace": replay.grace,
        "random": replay.context.random.getstate() if replay.context else None,
    }


def fresh(world: World, events: list[Event], seen_seq: int = 0) -> Replay:
    replay = Replay(world.workflow, RUN)
    replay.acknowledge(seen_seq)
    replay.feed(events)
    return replay


pytestmark = pytest.mark.filterwarnings(
    # Code in a ``finally`` that is refused while a coroutine is closed leaves such traces.
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore:coroutine .* was never awaited:RuntimeWarning",
)
seeds = st.integers(0, 2**32)


@settings(max_examples=examples(120))
@given(programs(), seeds, st.booleans())
def test_replay_of_a_history_is_a_fixed_point(node: Any, seed: int, bare: bool) -> None:
    world = World(node, seed, bare=bare).run()
    again = fresh(world, world.history)
    assert again.problem is None
    assert outcome_of(again) == outcome_of(world.replay)
    assert emitted(again) == emitted(world.replay)
    assert not [c for c in again.take() if isinstance(c, RunStep | StartSleep)]
    again.close()


@settings(max_examples=examples(60))
@given(programs(), seeds)
def test_a_fresh_replay_stands_where_the_live_one_stands(node: Any, seed: int) -> None:
    def check(world: World) -> None:
        if world.replay.outcome is not None:
            return
        other = fresh(world, world.history, world.seen)
        live = picture(world.replay)
        assert picture(other) == live
        owed = {c.op for c in other.take() if isinstance(c, RunStep)}
        assert owed == {
            name
            for name, _, state, *_ in live["ops"]
            if state is OpState.EMITTED and name.endswith(":step")
        }
        other.close()

    World(node, seed).run(check)


@settings(max_examples=examples(60))
@given(programs(), seeds)
def test_every_prefix_of_a_history_replays_and_goes_on_to_the_same_end(
    node: Any, seed: int
) -> None:
    world = World(node, seed).run()
    whole = emitted(world.replay)
    for length in range(1, len(world.history)):
        replay = fresh(world, world.history[:length])
        assert replay.problem is None
        ops = emitted(replay)
        assert ops == whole[: len(ops)]
        replay.take()
        replay.feed(world.history[length:])
        assert replay.problem is None
        assert outcome_of(replay) == outcome_of(world.replay)
        replay.close()


@settings(max_examples=examples(80))
@given(programs(), seeds, st.randoms(use_true_random=False))
def test_what_is_emitted_follows_from_the_inputs_alone(
    node: Any, seed: int, pick: random.Random
) -> None:
    world = World(node, seed).run()
    # Whatever was recorded, and in how many turns the inputs came, with evictions between.
    events = [e for e in world.history if e.klass == "I" or pick.random() < 0.5]
    replay = fresh(world, [])
    fed: list[Event] = []
    for event in events:
        fed.append(event)
        if pick.random() < 0.5 or event is events[-1]:
            replay.feed(fed)
            if pick.random() < 0.5:
                replay.take()
            if pick.random() < 0.2 and event is not events[-1]:
                replay.close()
                replay = fresh(world, [])
                if pick.random() < 0.5:
                    replay.feed(fed)
    assert replay.problem is None
    assert outcome_of(replay) == outcome_of(world.replay)
    assert emitted(replay) == emitted(world.replay)
    replay.close()


@settings(max_examples=examples(80))
@given(programs(), seeds)
def test_log_lines_are_recorded_once(node: Any, seed: int) -> None:
    world = World(node, seed).run()
    recorded = [e.data["message"] for e in world.history if e.type.startswith("log.")]
    again = fresh(world, world.history)
    assert recorded == [c.message for c in again.take() if isinstance(c, EmitLog)]
    again.close()


@settings(max_examples=examples(150))
@given(programs(draws=False))
def test_a_workflow_does_what_the_ordinary_program_does(node: Any) -> None:
    world = World(node, 1, plain=True, foreign=False).run()
    plain_value, plain_trace = run_plain(node)  # type: ignore[misc]
    if plain_value == CANCELLED:
        assert isinstance(world.replay.outcome, FailRun)
        assert isinstance(world.replay.outcome.error, asyncio.CancelledError)
        return
    assert isinstance(world.replay.outcome, CompleteRun), world.replay.outcome
    value, trace = decode(world.replay.outcome.result)  # type: ignore[misc]
    assert value == plain_value
    # Plain asyncio cancels the tasks of a group in the order of their addresses.
    assert sorted(map(repr, trace)) == sorted(repr(t) for t in plain_trace if t[0] != "log")


@settings(max_examples=examples(60))
@given(programs(confluent=True), seeds)
def test_the_order_of_events_does_not_matter_where_the_program_does_not_ask(
    node: Any, seed: int
) -> None:
    world = World(node, seed, foreign=False).run()
    assert isinstance(world.replay.outcome, CompleteRun), world.replay.outcome
    value, _ = decode(world.replay.outcome.result)  # type: ignore[misc]
    assert value == run_plain(node)[0]  # type: ignore[index]


def test_futures_of_gather_keep_their_place_in_sets() -> None:
    node = ["race", [["step", "ok", n] for n in range(12)] + [["spin", 1]], True]
    traces = {outcome_of(World(node, 1, foreign=False).run().replay) for _ in range(10)}
    assert len(traces) == 1


# --- the hash seed --------------------------------------------------------------------------------


def _histories(count: int) -> str:
    """A digest of histories: run with different hash seeds, it must be the same."""
    found: list[str] = []

    @settings(max_examples=count, database=None)
    @given(programs(), seeds)
    def collect(node: Any, seed: int) -> None:
        world = World(node, seed).run()
        found.append(
            json.dumps(
                [[e.type, e.op, e.seq, dict(e.data), str(e.timestamp)] for e in world.history]
            )
        )

    collect()
    return hashlib.sha256("\n".join(found).encode()).hexdigest()


def test_histories_do_not_depend_on_the_hash_seed() -> None:
    code = (
        "from tests.core.test_replay_property import _histories; import tests.conftest; "
        f"print(_histories({examples(40)}))"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            cwd=Path.cwd(),
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        ).stdout
        for seed in ("1", "4711")
    }
    assert len(printed) == 1, printed
