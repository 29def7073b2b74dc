"""The workloads, written once for all engines. Runs inside a peer's environment: no imports but Python's.

A program beside this file adapts one engine (``Engine``) and calls ``main``. It is started anew for
each measurement, with one argument, the settings as JSON, and prints a JSON object a line.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any, Protocol

#: How many runs are started at a time where many are wanted but the start is not what is measured.
CHUNK = 500


class Engine(Protocol):
    """What a program offers. ``async with`` begins and ends its client and its worker.

    Kinds of workflows, with their arguments:

    - ``sequence(steps)``: steps that return their argument, one after the other;
    - ``fan(width)``: that many of them at once;
    - ``nap(seconds)``: a step that returns the time, a sleep, the step again; returns both times;
    - ``doze(seconds)``: a sleep;
    - ``work(run, steps, log)``: steps that call ``effect`` and return its answer, one after the other.
    """

    async def __aenter__(self) -> Any: ...

    async def __aexit__(self, *exc: object) -> None: ...

    async def run(self, kind: str, *args: Any) -> Any:
        """Start a run and wait for its result, in the shortest way."""
        ...

    async def start(self, kind: str, *args: Any) -> Any:
        """Start a run; returns when it is durable."""
        ...

    async def result(self, handle: Any) -> Any:
        """Wait for a run's end."""
        ...

    async def existing(self) -> list[Any]:
        """Handles of all runs that there are."""
        ...

    async def recorded(self) -> list[list[int]]:
        """What the recorded steps of all ``work`` runs returned. Called on an engine not entered."""
        ...

    def facts(self) -> dict[str, str]:
        """Versions, and how durable the store is."""
        ...


def emit(what: str, value: object, unit: str = "") -> None:
    print(json.dumps({"what": what, "value": value, "unit": unit}), flush=True)


async def effect(log: str, run: int, step: int) -> list[int]:
    """A step of 50 ms whose effect is a line in a file, on disk before the step returns."""
    await asyncio.sleep(0.05)
    fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(fd, f"{run} {step} {time.time():.6f}\n".encode())
        os.fsync(fd)
    finally:
        os.close(fd)
    return [run, step]


def memory() -> dict[str, float]:
    """MB of this process: resident, and its proportional share of what it shares with others."""
    gc.collect()
    found = {}
    for line in Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines():
        name, _, rest = line.partition(":")
        if name in {"Rss", "Pss"}:
            found[name.lower()] = int(rest.split()[0]) / 1024
    return found


async def settle(patience: float) -> float:
    """Wait until this process does nothing any more; how long that took."""
    began = time.perf_counter()
    calm = 0
    used = time.process_time()
    while calm < 3 and time.perf_counter() - began < patience:
        await asyncio.sleep(1)
        now = time.process_time()
        calm = calm + 1 if now - used < 0.1 else 0
        used = now
    return max(0.0, time.perf_counter() - began - calm)


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


async def w1(engine: Engine, size: dict[str, int]) -> None:
    for _ in range(3):
        await engine.run("sequence", size["steps"])
    took = []
    for _ in range(size["runs"]):
        began = time.perf_counter()
        await engine.run("sequence", size["steps"])
        took.append((time.perf_counter() - began) * 1e3)
    emit("p50", statistics.median(took), "ms")
    emit("p99", percentile(took, 0.99), "ms")


async def w2(engine: Engine, size: dict[str, int]) -> None:
    await engine.run("sequence", size["steps"])
    cpu = time.process_time()
    began = time.perf_counter()
    handles = await asyncio.gather(
        *[engine.start("sequence", size["steps"]) for _ in range(size["runs"])]
    )
    await asyncio.gather(*[engine.result(handle) for handle in handles])
    steps = size["runs"] * size["steps"]
    emit("rate", steps / (time.perf_counter() - began), "steps/s")
    emit("cpu", (time.process_time() - cpu) / steps * 1e6, "us/step")


async def w3(engine: Engine, size: dict[str, int]) -> None:
    await engine.run("fan", 10)
    took = []
    for _ in range(size["times"]):
        began = time.perf_counter()
        await engine.run("fan", size["width"])
        took.append((time.perf_counter() - began) * 1e3)
    emit("time", statistics.median(took), "ms")


async def w4(engine: Engine, size: dict[str, int]) -> None:
    await engine.run("sequence", 10)
    for name in ("short", "long"):
        began = time.perf_counter()
        await engine.run("sequence", size[name])
        emit(name, time.perf_counter() - began, "s")


async def w5(engine: Engine, size: dict[str, int]) -> None:
    await engine.run("nap", 0.1)
    began = time.perf_counter()
    handles = await asyncio.gather(
        *[engine.start("nap", size["seconds"]) for _ in range(size["runs"])]
    )
    emit("started", time.perf_counter() - began, "s")
    times = await asyncio.gather(*[engine.result(handle) for handle in handles])
    emit("all", time.perf_counter() - began, "s")
    late = [(end - start - size["seconds"]) * 1e3 for start, end in times]
    emit("late p50", statistics.median(late), "ms")
    emit("late p99", percentile(late, 0.99), "ms")


async def w6_begin(engine: Engine, size: dict[str, int], log: str) -> None:
    """Ends by being killed."""
    handles = await asyncio.gather(
        *[engine.start("work", run, size["steps"], log) for run in range(size["runs"])]
    )
    os.close(os.open(f"{log}.started", os.O_WRONLY | os.O_CREAT))
    await asyncio.gather(*[engine.result(handle) for handle in handles])


async def w6_again(engine: Engine, size: dict[str, int]) -> None:
    handles = await engine.existing()
    if len(handles) != size["runs"]:
        raise RuntimeError(f"runs={len(handles)} of {size['runs']}: some are lost")
    await asyncio.gather(*[engine.result(handle) for handle in handles])
    emit("done", time.time())


async def w6_stand(engine: Engine, size: dict[str, int], log: str) -> None:
    """A worker that is there already when the other one is killed."""
    os.close(os.open(f"{log}.standing", os.O_WRONLY | os.O_CREAT))
    await asyncio.to_thread(_until_there, f"{log}.killed")
    await w6_again(engine, size)


def _until_there(name: str) -> None:
    while not Path(name).exists():
        time.sleep(0.02)


async def w7_begin(engine: Engine, size: dict[str, int]) -> None:
    began = time.perf_counter()
    for first in range(0, size["runs"], CHUNK):
        many = min(CHUNK, size["runs"] - first)
        await asyncio.gather(*[engine.start("doze", 86_400) for _ in range(many)])
    emit("created", size["runs"] / (time.perf_counter() - began), "runs/s")
    await settle(600)
    os._exit(0)  # an orderly end would wait for the runs, or cancel them


async def w7_again(engine: Engine, size: dict[str, int], began: float) -> None:
    begun = time.perf_counter() - began
    emit("ready", begun + await settle(600), "s")
    for name, value in memory().items():
        emit(name, value, "MB")
    late = []
    for _ in range(size["naps"]):
        start, end = await engine.run("nap", 1)
        late.append((end - start - 1) * 1e3)
    emit("late", statistics.median(late), "ms")
    os._exit(0)


async def _measure(engine: Engine, told: dict[str, Any]) -> None:
    if told["do"] == "W6-recorded":
        emit("recorded", await engine.recorded())
        return
    began = time.perf_counter()
    if told["do"] == "W6-again":
        emit("ready", time.time())
    async with engine:
        emit("facts", engine.facts())
        size = told["size"]
        what = told["do"]
        if what in {"W6-begin", "W6-stand"}:
            do = w6_begin if what == "W6-begin" else w6_stand
            await do(engine, size, told["log"])
        elif what == "W7-again":
            await w7_again(engine, size, began)
        else:
            await _WORK[what](engine, size)


_WORK = {
    "W1": w1, "W2": w2, "W3": w3, "W4": w4, "W5": w5, "W6-again": w6_again, "W7-begin": w7_begin,
}  # fmt: skip


def main(make: Any) -> None:
    """Measure what the command line says on the engine that ``make`` returns."""
    told = json.loads(sys.argv[1])
    # Workers of this engine set the collector so; all that are compared get the same.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)
    if told.get("leash"):
        threading.Thread(target=_orphan, daemon=True).start()
    asyncio.run(_measure(make(told), told))
    sys.stdout.flush()
    os._exit(0)  # all is said; some libraries' native threads do not survive an orderly end


def _orphan() -> None:
    """End with whoever began this program: its pipe is at our standard input."""
    os.read(0, 1)  # by number: the object would be locked when Python ends
    os._exit(1)
