"""Workflow programs as JSON trees that one workflow function interprets, and how they are made up.

Every program has one result, whatever the order in which its branches end: a race is between what
ends and what never does, a timeout is far too long or far too short. So whatever happens to the
cluster, the result is that of the undisturbed run.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from random import Random
from typing import Any

from pyworkflow.errors import StepInterrupted
from pyworkflow.events import Json
from pyworkflow.testing.internals import Step, Workflow, logger
from pyworkflow.testing.internals import primitives as _primitives
from pyworkflow_conformance.simulation import _reality

__all__ = ["FAR", "KINDS", "STEPS", "VERSIONS", "kinds_of", "make_program"]

_DAY = 86_400.0
FAR = _DAY
"""Seconds that pass in no run: jumps of the clock included."""


async def _pause(n: int) -> None:
    for _ in range(n % 3):
        await asyncio.sleep(0)


async def _ok(n: int) -> int:
    with _reality.body("ok"):
        await _pause(n)
        return n


async def _fails(n: int) -> int:
    with _reality.body("fails"):
        await _pause(n)
        raise ValueError(f"step {n}")


async def _flaky(n: int) -> int:
    with _reality.body("flaky") as attempt:
        await _pause(n)
        if attempt <= 1 + n % 2:
            raise OSError(f"step {n}")
        return n


async def _queued(n: int) -> int:
    with _reality.body("queued"):
        await _pause(n)
        return n


async def _slow(n: int) -> int:
    with _reality.body("slow"):
        await _pause(n)
        await asyncio.sleep((0.12, 0.3, 0.9)[n % 3])
        return n


async def _long(n: int) -> int:
    with _reality.body("long"):
        await _pause(n)
        await asyncio.sleep(2.5)
        return n


async def _forever(n: int) -> int:
    with _reality.body("forever"):
        await _pause(n)
        await asyncio.sleep(_DAY)
        return n


async def _timed(n: int) -> int:
    with _reality.body("timed"):
        await _pause(n)
        await asyncio.sleep(_DAY)
        return n


async def _once(n: int) -> int:
    with _reality.body("once"):
        await _pause(n)
        await asyncio.sleep((0, 0.2)[n % 2])
        return n


def _sync(n: int) -> int:
    with _reality.body("sync"):
        return n


_step: Any = Step
_DEFINED: tuple[Step[Any, Any], ...] = (
    _step(_ok, name="sim_ok", max_retries=0),
    _step(_fails, name="sim_fails", max_retries=0),
    _step(_flaky, name="sim_flaky", max_retries=4, retry_delay=0.4),
    _step(_queued, name="sim_queued", max_retries=0, dispatch="queue"),
    _step(_slow, name="sim_slow", max_retries=0),
    _step(_long, name="sim_long", max_retries=0),
    _step(_forever, name="sim_forever", max_retries=0),
    _step(_timed, name="sim_timed", max_retries=1, retry_delay=0.2, timeout=0.3),
    _step(_once, name="sim_once", semantics="at_most_once"),
    _step(_sync, name="sim_sync", max_retries=0),
)
STEPS: dict[str, Step[Any, Any]] = {made.name: made for made in _DEFINED}
"""By name; none of them is registered, and workers find them here."""


class Interpreter:
    """Runs nodes."""

    def __init__(self, *, patches: bool = False) -> None:
        self._patches = patches
        self._places = 0

    async def run(self, node: Any) -> Json:
        """The value of a node; exceptions are those of the node."""
        value: Json = await getattr(self, f"do_{node[0]}")(*node[1:])
        return value

    async def caught(self, node: Any) -> Json:
        """The value of a node, or the name of the exception that it ends in."""
        try:
            return await self.run(node)
        except Exception as exc:  # noqa: BLE001 - whatever the program raises is a value
            return type(exc).__name__

    async def do_step(self, name: str, n: int) -> Json:
        value: Json = await STEPS[f"sim_{name}"](n)
        return value

    async def do_once(self, n: int) -> Json:
        try:
            await STEPS["sim_once"](n)
        except StepInterrupted:
            pass  # its worker disappeared: it may or may not have run, and runs never again
        return "once"

    async def do_sleep(self, seconds: float) -> Json:
        await _primitives.sleep(seconds)
        return "slept"

    async def do_asleep(self, seconds: float) -> Json:
        await asyncio.sleep(seconds)
        return "slept"

    async def do_log(self, n: int) -> Json:
        logger.info("line %d", n)
        return n

    async def do_draw(self) -> Json:
        drawn = (_primitives.uuid4(), _primitives.random().random(), _primitives.now())
        return len(drawn)

    async def do_raise(self, n: int) -> Json:
        raise ValueError(f"node {n}")

    async def do_seq(self, nodes: list[Any]) -> Json:
        found: list[Json] = []
        for node in nodes:
            found.append(await self.run(node))
            if self._patches:
                self._places += 1
                if _primitives.patched(f"place {self._places}"):
                    await STEPS["sim_ok"](1000)
        return found

    async def do_branch(self, test: Any, yes: Any, no: Any) -> Json:
        value = await self.caught(test)
        return await self.run(yes if len(str(value)) % 2 else no)

    async def do_loop(self, times: int, node: Any) -> Json:
        return [await self.run(node) for _ in range(times)]

    async def do_try(self, node: Any, handler: Any) -> Json:
        try:
            return await self.run(node)
        except Exception as exc:  # noqa: BLE001 - as a careless program has it
            return [type(exc).__name__, await self.run(handler)]

    async def do_finally(self, node: Any, last: Any) -> Json:
        try:
            return await self.run(node)
        finally:
            if not _primitives.is_evicting():  # closing a coroutine waits for nothing
                await self.caught(last)

    async def do_gather(self, nodes: list[Any]) -> Json:
        return list(await asyncio.gather(*[self.caught(n) for n in nodes]))

    async def do_group(self, nodes: list[Any]) -> Json:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self.caught(n)) for n in nodes]
        return [t.result() for t in tasks]

    async def do_race(self, node: Any, never: Any) -> Json:
        runners = [asyncio.create_task(self.caught(n)) for n in (node, never)]
        try:
            done, _ = await asyncio.wait(runners, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for runner in runners:
                runner.cancel()
        await asyncio.gather(*runners, return_exceptions=True)
        return [[i, r.result()] for i, r in enumerate(runners) if r in done]

    async def do_timeout(self, seconds: float, node: Any) -> Json:
        try:
            async with asyncio.timeout(seconds):
                return await self.caught(node)
        except TimeoutError:
            return "timeout"

    async def do_cancelled(self, never: Any, until: Any, cleanup: Any) -> Json:
        """A task that is cancelled, and cleans up."""

        async def compensates() -> Json:
            try:
                return await self.run(never)
            except asyncio.CancelledError:
                return ["cleaned", await self.caught(cleanup)]

        task = asyncio.create_task(compensates())
        await self.caught(["asleep", 0.01])
        value = await self.caught(until)
        task.cancel()
        (ended,) = await asyncio.gather(task, return_exceptions=True)
        return [value, type(ended).__name__ if isinstance(ended, BaseException) else ended]

    async def do_limited(self, nodes: list[Any]) -> Json:
        limit = asyncio.Semaphore(2)

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

    async def do_consumed(self, nodes: list[Any]) -> Json:
        """Two consumers share a queue."""
        queue: asyncio.Queue[tuple[int, Any]] = asyncio.Queue(maxsize=2)
        found: dict[int, Json] = {}

        async def consume() -> None:
            while True:
                number, node = await queue.get()
                found[number] = await self.caught(node)
                queue.task_done()

        consumers = [asyncio.create_task(consume()) for _ in range(2)]
        try:
            for entry in enumerate(nodes):
                await queue.put(entry)
            await queue.join()
        finally:
            for consumer in consumers:
                consumer.cancel()
        await asyncio.gather(*consumers, return_exceptions=True)
        return [found[number] for number in range(len(nodes))]

    async def do_shielded(self, seconds: float, node: Any) -> Json:
        """A timeout gives up waiting, and what it waited for goes on."""
        task = asyncio.create_task(self.caught(node))
        try:
            async with asyncio.timeout(seconds):
                return await asyncio.shield(task)
        except TimeoutError:
            return await task

    async def do_generated(self, nodes: list[Any], last: Any) -> Json:
        async def values() -> AsyncGenerator[Json]:
            try:
                for node in nodes:
                    yield await self.caught(node)
            finally:
                if not _primitives.is_evicting():
                    await self.caught(last)

        found: list[Json] = []
        async with aclosing(values()) as generator:
            async for value in generator:
                found.append(value)
                if len(found) == 2:
                    break
        return found

    async def do_left(self, never: Any) -> Json:
        self.left = asyncio.create_task(self.caught(never))
        await asyncio.sleep(0)
        return "left"


async def _program(node: list[Any]) -> Any:
    return await Interpreter().caught(node)


async def _patched(node: list[Any]) -> Any:
    return await Interpreter(patches=True).caught(node)


async def _broken(node: list[Any]) -> Any:
    asyncio.get_running_loop().call_soon_threadsafe(print)  # refused: the run stalls
    return node


VERSIONS: dict[str, Workflow[Any, Any] | None] = {
    "1": Workflow(_program, name="sim_program", version="1"),
    "2": Workflow(_patched, name="sim_program", version="2"),
    "broken": Workflow(_broken, name="sim_program", version="3"),
    "missing": None,
}
"""What a worker may have under the one name."""

KINDS = frozenset(name.removeprefix("do_") for name in vars(Interpreter) if name[:3] == "do_")
"""What programs are made of."""


def kinds_of(program: list[Any]) -> list[str]:
    """What occurs in a program."""
    text = repr(program)
    return [kind for kind in sorted(KINDS) if f"['{kind}'" in text]


# --- made up ------------------------------------------------------------------------------------

_LEAVES = (
    "ok", "ok", "ok", "ok", "ok", "queued", "queued", "slow", "slow", "flaky", "fails", "sync",
    "once", "long", "timed",
)  # fmt: skip


def make_program(random: Random, size: int) -> list[Any]:
    """A program of about so many leaves."""
    return ["seq", [_node(random, random.randint(1, max(1, size // 2))), _node(random, size)]]


def _leaf(random: Random) -> list[Any]:
    kind = random.random()
    if kind < 0.72:
        name = random.choice(_LEAVES)
        n = random.randrange(100)
        return ["once", n] if name == "once" else ["step", name, n]
    if kind < 0.9:
        seconds = random.choice((0.0, 0.001, 0.05, 0.5, 1.5)) + random.randrange(1000) / 1_000_000
        return [random.choice(("sleep", "asleep")), seconds]
    others: tuple[list[Any], ...] = (["log", random.randrange(10)], ["draw"], ["raise", 1])
    return random.choice(others)


def _never(random: Random) -> list[Any]:
    return random.choice((["step", "forever", 0], ["sleep", _DAY], ["asleep", _DAY]))


def _node(random: Random, size: int) -> list[Any]:
    """A tree of about so many leaves."""
    if size <= 1:
        return _leaf(random)
    kind = random.choice(_KINDS)
    if kind in ("race", "left", "expire", "far", "loop", "cancelled", "shielded"):
        inner = _node(random, size - 1)
        match kind:
            case "race":
                return ["race", inner, _never(random)]
            case "left":
                return ["seq", [["left", _never(random)], inner]]
            case "expire":
                seconds = random.choice((0.01, 0.15, 0.6))
                return ["seq", [["timeout", seconds, _never(random)], inner]]
            case "shielded":
                return ["shielded", random.choice((0.01, 0.15, 0.6)), inner]
            case "loop":
                return ["loop", random.randint(2, 3), _node(random, max(1, (size - 1) // 2))]
            case "cancelled":
                return ["cancelled", _never(random), inner, _leaf(random)]
            case _:
                return ["timeout", _DAY, inner]
    parts = 2 if kind in ("try", "finally", "event") else 3 if kind == "branch" else None
    number = parts or random.randint(2, min(4, max(2, size)))
    share = max(1, size // number)
    nodes = [_node(random, share) for _ in range(number)]
    if parts is not None:
        return [kind, *nodes]
    if kind == "generated":
        return [kind, nodes, _leaf(random)]
    return [kind, nodes]


_KINDS = (
    "seq", "seq", "gather", "gather", "group", "branch", "try", "finally", "event", "limited",
    "generated", "race", "left", "expire", "far", "loop", "cancelled", "consumed", "shielded",
)  # fmt: skip
