"""Random workflow programs: trees of nodes that one workflow function interprets.

A program is JSON, so that it travels as an argument. The same interpreter runs it under replay,
under the engine, and under plain asyncio on virtual time, which is what "as in ordinary Python"
is measured by. ``confluent`` programs have one result, whatever the order in which steps end.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from typing import Any

from hypothesis import strategies as st

import pyworkflow
from pyworkflow import step, workflow
from pyworkflow.events import Json

FULL = os.environ.get("PYWORKFLOW_FULL") == "1"
Node = list[Json]

#: Called as each body begins, with (run_id, op, attempt).
on_body: list[Callable[[str, str, int], None]] = []
#: How often a flaky step of (run_id, op) has been tried.
tried: Counter[tuple[str, str]] = Counter()


def examples(number: int) -> int:
    """How many examples a test takes: twenty times as many in the full run."""
    return number * 20 if FULL else number


async def _begin(n: int) -> None:
    try:
        context = pyworkflow.step_context()
    except pyworkflow.WorkflowContextError:
        return  # under plain asyncio
    for call in on_body:
        call(context.run_id, context.step_id, context.attempt)
    for _ in range(n % 4):
        await asyncio.sleep(0)


@step(max_retries=0)
async def ok(n: int) -> int:
    await _begin(n)
    return n


@step(max_retries=0)
async def fails(n: int) -> int:
    await _begin(n)
    raise ValueError(f"step {n}")


@step(max_retries=5, retry_delay="5s")
async def flaky(n: int) -> int:
    await _begin(n)
    context = pyworkflow.step_context()
    place = (context.run_id, context.step_id)
    tried[place] += 1
    if tried[place] <= n % 3:
        raise OSError(f"step {n}")
    return n


@step(max_retries=0, dispatch="queue")
async def queued(n: int) -> int:
    await _begin(n)
    return n


@step(max_retries=0)
async def slow(n: int) -> int:
    await _begin(n)
    await asyncio.sleep(0.004)
    return n


@step(max_retries=0)
async def of_a_set(n: int, names: set[str]) -> int:
    await _begin(n)
    return n + len(names)


STEPS: dict[str, Any] = {
    "ok": ok, "fails": fails, "flaky": flaky, "queued": queued, "slow": slow,
}  # fmt: skip


class Interpreter:
    """Runs nodes. Everything that a run shares lives here: the trace, and how steps are called."""

    def __init__(self) -> None:
        self.trace: list[Json] = []

    def call(self, name: str, n: int) -> Coroutine[Any, Any, int]:
        """A step."""
        if name == "set":
            return of_a_set(n, {"alice", "bob", f"carol{n}", "dave"})
        found: Coroutine[Any, Any, int] = STEPS[name](n)
        return found

    async def durable_sleep(self, micros: int) -> None:
        """``pyworkflow.sleep``."""
        await pyworkflow.sleep(micros / 1_000_000)

    def draw(self, what: str) -> Json:
        """Something that the run's seed or history decides."""
        match what:
            case "uuid":
                return str(pyworkflow.uuid4())
            case "random":
                return pyworkflow.random().random()
            case _:
                return pyworkflow.now().isoformat()

    def log(self, n: int) -> None:
        """A line of the workflow's logger."""
        pyworkflow.logger.info("line %d", n)

    def note(self, *what: Json) -> None:
        """Something happened at this place of the program."""
        self.trace.append(list(what))

    async def run(self, node: Any) -> Json:
        """The value of a node; exceptions are those of the node."""
        return await getattr(self, f"do_{node[0]}")(*node[1:])  # type: ignore[no-any-return]

    async def caught(self, node: Any) -> Json:
        """The value of a node, or the name of the exception that it ends in."""
        try:
            return await self.run(node)
        except Exception as exc:  # noqa: BLE001 - whatever the program raises is a value
            return type(exc).__name__

    # --- leaves ---------------------------------------------------------------------------------

    async def do_step(self, name: str, n: int) -> Json:
        try:
            value = await self.call(name, n)
        except asyncio.CancelledError:
            self.note("step cancelled", n)
            raise
        self.note("step", n)
        return value

    async def do_sleep(self, micros: int) -> Json:
        await self.durable_sleep(micros)
        self.note("slept", micros)
        return "slept"

    async def do_asleep(self, micros: int) -> Json:
        await asyncio.sleep(micros / 1_000_000)
        self.note("slept", micros)
        return "slept"

    async def do_spin(self, n: int) -> Json:
        for _ in range(n):
            await asyncio.sleep(0)
        return n

    async def do_draw(self, what: str) -> Json:
        self.note(what, self.draw(what))
        return what

    async def do_log(self, n: int) -> Json:
        self.log(n)
        return n

    async def do_raise(self, n: int) -> Json:
        raise ValueError(f"node {n}")

    # --- sequences ------------------------------------------------------------------------------

    async def do_seq(self, nodes: list[Any]) -> Json:
        return [await self.run(n) for n in nodes]

    async def do_branch(self, test: Any, yes: Any, no: Any) -> Json:
        value = await self.caught(test)
        return await self.run(yes if len(str(value)) % 2 else no)

    async def do_loop(self, times: int, node: Any) -> Json:
        return [await self.run(node) for _ in range(times)]

    async def do_try(self, node: Any, handler: Any) -> Json:
        try:
            return await self.run(node)
        except Exception as exc:  # noqa: BLE001 - as a careless program has it
            self.note("caught", type(exc).__name__)
            return [type(exc).__name__, await self.run(handler)]

    async def do_finally(self, node: Any, last: Any) -> Json:
        try:
            return await self.run(node)
        finally:
            self.note("finally", await self.caught(last))

    async def do_compensate(self, node: Any, cleanup: Any, swallow: bool) -> Json:
        try:
            return await self.run(node)
        except asyncio.CancelledError:
            self.note("compensate", await self.caught(cleanup))
            if swallow:
                return "swallowed"
            raise

    async def do_agen(self, nodes: list[Any], take: int, last: Any, closing: bool) -> Json:
        async def values() -> Any:
            try:
                for n in nodes:
                    yield await self.caught(n)
            finally:
                if closing:
                    self.note("generator", await self.caught(last))

        taken: list[Json] = []
        if closing:
            async with aclosing(values()) as generator:
                async for value in generator:
                    taken.append(value)
                    if len(taken) >= take:
                        break
            return taken
        async for value in values():
            taken.append(value)
            if len(taken) >= take:
                break
        return [*taken, *[v async for v in values()]]

    # --- side by side ---------------------------------------------------------------------------

    async def do_gather(self, nodes: list[Any], exceptions: bool) -> Json:
        found = await asyncio.gather(*[self.run(n) for n in nodes], return_exceptions=exceptions)
        return [type(v).__name__ if isinstance(v, BaseException) else v for v in found]

    async def do_group(self, nodes: list[Any]) -> Json:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self.run(n)) for n in nodes]
        return [t.result() for t in tasks]

    async def do_race(self, nodes: list[Any], gathered: bool) -> Json:
        runners: list[Any] = [
            asyncio.gather(self.caught(n), self.do_spin(1))
            if gathered
            else asyncio.create_task(self.caught(n))
            for n in nodes
        ]
        try:
            done, rest = await asyncio.wait(runners, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            for runner in runners:
                runner.cancel()
            raise
        for runner in rest:  # a set: its order must be the same on every replay
            runner.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
        first = [i for i, runner in enumerate(runners) if runner in done]
        self.note("race", first)
        return [first, [runners[i].result() for i in first]]

    async def do_cancelled(self, node: Any, until: Any) -> Json:
        task = asyncio.create_task(self.run(node))
        await self.caught(until)
        task.cancel()
        found = await asyncio.gather(task, return_exceptions=True)
        return [type(v).__name__ if isinstance(v, BaseException) else v for v in found]

    async def do_left(self, node: Any) -> Json:
        task = asyncio.create_task(self.caught(node))
        await asyncio.sleep(0)
        self.left = task
        return "left"

    async def do_shield(self, node: Any, micros: int) -> Json:
        task = asyncio.create_task(self.caught(node))
        try:
            async with asyncio.timeout(micros / 1_000_000):
                return await asyncio.shield(task)
        except TimeoutError:
            return ["late", await task]

    async def do_timeout(self, micros: int, node: Any) -> Json:
        try:
            async with asyncio.timeout(micros / 1_000_000):
                return await self.run(node)
        except TimeoutError:
            self.note("timeout", micros)
            return "timeout"

    async def wait_for(self, awaitable: Any, seconds: float) -> Json:
        """``asyncio.wait_for``; plain asyncio of 3.11 has another one than replay."""
        return await asyncio.wait_for(awaitable, seconds)  # type: ignore[no-any-return]

    async def do_wait_for(self, micros: int, node: Any) -> Json:
        try:
            return await self.wait_for(self.run(node), micros / 1_000_000)
        except TimeoutError:
            self.note("timeout", micros)
            return "timeout"

    async def do_queue(self, nodes: list[Any], consumers: int) -> Json:
        queue: asyncio.Queue[Any] = asyncio.Queue(1)
        found: dict[int, Json] = {}

        over = False

        async def consume() -> None:
            # A consumer that swallows its cancellation must not wait for entries for ever.
            while not over and (entry := await queue.get()) is not None:
                found[entry[0]] = await self.caught(entry[1])

        async with asyncio.TaskGroup() as group:
            for _ in range(consumers):
                group.create_task(consume())
            try:
                for entry in [*enumerate(nodes), *[None] * consumers]:
                    await queue.put(entry)
            finally:
                over = sys.exc_info()[0] is not None
        return [found[i] for i in sorted(found)]

    async def do_limited(self, nodes: list[Any], slots: int) -> Json:
        limit = asyncio.Lock() if slots == 1 else asyncio.Semaphore(slots)

        async def one(node: Any) -> Json:
            async with limit:
                return await self.caught(node)

        return list(await asyncio.gather(*[one(n) for n in nodes]))

    async def do_event(self, first: Any, second: Any) -> Json:
        event = asyncio.Event()

        async def before() -> Json:
            try:
                return await self.caught(first)
            finally:
                event.set()

        async def after() -> Json:
            await event.wait()
            return await self.caught(second)

        return list(await asyncio.gather(before(), after()))


@workflow(name="program")
async def program(node: list[Any], traced: bool) -> Any:
    interpreter = Interpreter()
    value = await interpreter.caught(node)
    return [value, interpreter.trace] if traced else value


@workflow(name="program_bare")
async def program_bare(node: list[Any], traced: bool) -> Any:
    interpreter = Interpreter()
    value = await interpreter.run(node)
    return [value, interpreter.trace] if traced else value


# --- generating -----------------------------------------------------------------------------------


def numbered(node: Any) -> Any:
    """The same tree with every leaf told apart by its number, and so by its duration."""
    numbers = itertools.count(1)

    def walk(part: Any) -> Any:
        if isinstance(part, list) and part and part[0] == "step":
            return [part[0], part[1], part[2] * 64 + next(numbers)]
        if isinstance(part, list) and part and part[0] in ("sleep", "asleep"):
            return [part[0], part[1] * 1000 + next(numbers)]
        if isinstance(part, list) and part and part[0] in ("timeout", "wait_for"):
            return [part[0], part[1] * 1000 + next(numbers), walk(part[2])]
        if isinstance(part, list) and part and part[0] == "shield":
            return [part[0], walk(part[1]), part[2] * 1000 + next(numbers)]
        if isinstance(part, list) and part and part[0] == "log":
            return [part[0], next(numbers)]
        return [walk(p) for p in part] if isinstance(part, list) else part

    return walk(node)


def duration(n: int) -> int:
    """How long step ``n`` takes on virtual time, in µs."""
    return 700 + (n * 7919) % 9973


def programs(*, confluent: bool = False, draws: bool = True, depth: int = 3) -> Any:
    """Programs. ``confluent``: the result depends on nothing but the program."""
    names = ["ok", "ok", "fails", "queued", "slow", "set"] + (["flaky"] if confluent else [])
    millis = st.integers(1, 12)
    leaves: list[Any] = [
        st.builds(lambda name, n: ["step", name, n], st.sampled_from(names), st.integers(0, 7)),
        st.builds(lambda name, n: ["step", name, n], st.sampled_from(names), st.integers(0, 7)),
        st.builds(lambda k, ms: [k, ms], st.sampled_from(["sleep", "asleep"]), millis),
        st.sampled_from([["log", 0], ["raise", 1], ["spin", 1], ["spin", 2]]),
    ]
    if draws and not confluent:
        leaves.append(st.sampled_from([["draw", "uuid"], ["draw", "random"], ["draw", "now"]]))

    def grow(child: Any) -> Any:
        some = st.lists(child, min_size=1, max_size=3)
        several = st.lists(child, min_size=2, max_size=4)
        kinds = [
            st.builds(lambda a: ["seq", a], several),
            st.builds(lambda a, b, c: ["branch", a, b, c], child, child, child),
            st.builds(lambda n, a: ["loop", n, a], st.integers(1, 3), child),
            st.builds(lambda a, e: ["gather", a, e], several, st.booleans()),
            st.builds(lambda a: ["group", a], several),
            st.builds(lambda a, b: ["try", a, b], child, child),
            st.builds(lambda a, b: ["finally", a, b], child, child),
            st.builds(lambda a, b, s: ["compensate", a, b, s], child, child, st.booleans()),
            st.builds(
                lambda a, n, b, c: ["agen", a, n, b, c],
                some, st.integers(1, 3), child, st.booleans(),
            ),
            st.builds(lambda a, n: ["queue", a, n], several, st.integers(1, 2)),
            st.builds(lambda a, n: ["limited", a, n], several, st.integers(1, 2)),
            st.builds(lambda a, b: ["event", a, b], child, child),
            st.builds(lambda a, b: ["seq", [["left", a], b]], child, child),
        ]  # fmt: skip
        if confluent:
            kinds.append(st.builds(lambda a: ["timeout", 86_400_000, a], child))
        else:
            kinds += [
                st.builds(lambda a, g: ["race", a, g], several, st.booleans()),
                st.builds(lambda a, b: ["cancelled", a, b], child, child),
                st.builds(lambda a, t: ["shield", a, t], child, millis),
                st.builds(lambda t, a: ["timeout", t, a], millis, child),
                st.builds(lambda t, a: ["wait_for", t, a], millis, child),
            ]
        return st.one_of(kinds)

    tree = st.one_of(leaves)
    for _ in range(depth - 1):
        tree = st.one_of(grow(tree), grow(tree), *leaves)
    return grow(tree).map(numbered)


# --- plain asyncio on virtual time ----------------------------------------------------------------


class _VirtualLoop(asyncio.SelectorEventLoop):
    """An ordinary event loop whose clock jumps to the next timer."""

    def __init__(self) -> None:
        super().__init__()
        self._virtual = 0.0
        self._clock_resolution = 1e-9

    def time(self) -> float:
        return self._virtual

    def _run_once(self) -> None:
        while self._scheduled and self._scheduled[0]._cancelled:  # type: ignore[attr-defined]
            handle = __import__("heapq").heappop(self._scheduled)  # type: ignore[attr-defined]
            handle._scheduled = False
            self._timer_cancelled_count -= 1  # type: ignore[attr-defined]
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self._virtual = max(self._virtual, self._scheduled[0]._when)  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


class PlainInterpreter(Interpreter):
    """The same program with steps and sleeps of plain asyncio."""

    async def call(self, name: str, n: int) -> int:
        await asyncio.sleep(duration(n) / 1_000_000)
        if name == "fails":
            raise ValueError(f"step {n}")
        return n + 4 if name == "set" else n

    async def durable_sleep(self, micros: int) -> None:
        await asyncio.sleep(micros / 1_000_000)

    def draw(self, what: str) -> Json:
        return what

    def log(self, n: int) -> None:
        self.trace.append(["log", n])

    async def wait_for(self, awaitable: Any, seconds: float) -> Json:
        async with asyncio.timeout(seconds):
            return await awaitable  # type: ignore[no-any-return]


CANCELLED = "CancelledError"


def run_plain(node: Any) -> Json:
    """What an ordinary Python program makes of it: its value, and the trace."""
    loop = _VirtualLoop()
    loop.set_exception_handler(lambda loop, context: None)
    interpreter = PlainInterpreter()

    async def main() -> list[Any]:
        value = await interpreter.caught(node)
        # As of now: what tasks left behind still do is no part of the program's outcome, and a
        # workflow's end stops them.
        return [value, list(interpreter.trace)]

    try:
        try:
            value, trace = loop.run_until_complete(main())
        except asyncio.CancelledError:
            # Of its own making: 3.11 lets it out of some nestings.
            value, trace = CANCELLED, list(interpreter.trace)
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0.1))
        return [value, trace]
    finally:
        loop.close()
