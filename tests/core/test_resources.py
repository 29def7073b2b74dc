"""Resources of steps: opened once, closed in order, failing with the attempt alone."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import logging
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any, Self

import pytest

from pyworkflow import (
    DefinitionError,
    Resource,
    WorkflowContextError,
    current,
    resource,
    step,
    workflow,
)
from pyworkflow._engine import resources as engine_resources
from pyworkflow.storage.memory import MemoryStorageBackend
from pyworkflow.testing import TestEnvironment, override, start_local
from tests.core._driving import bench


class Opened:
    """What a factory gives."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.thread = threading.current_thread().name
        self.where = current()


def _recording(log: list[str], name: str, *, is_async: bool = True, scope: Any = None) -> Any:
    """A resource that writes down when it opens and closes."""

    async def opened() -> AsyncIterator[Opened]:
        log.append(f"open {name}")
        await asyncio.sleep(0)
        try:
            yield Opened(name)
        finally:
            log.append(f"close {name}")

    def opened_sync() -> Iterator[Opened]:
        log.append(f"open {name}")
        try:
            yield Opened(name)
        finally:
            log.append(f"close {name}")

    return Resource(opened if is_async else opened_sync, scope=scope)


@pytest.mark.parametrize("is_async", [True, False])
@pytest.mark.parametrize("scope", ["loop", "process"])
def test_n09_one_is_opened_for_all_steps_and_closed_with_the_worker(
    is_async: bool, scope: str
) -> None:
    log: list[str] = []
    seen: list[Opened] = []
    shared = _recording(log, "db", is_async=is_async, scope=scope)

    @step
    async def n09_async(n: int) -> None:
        seen.append(await shared.get())
        log.append("step")

    @step
    def n09_sync(n: int) -> None:
        seen.append(shared.get_sync())
        log.append("step")

    @workflow
    async def n09_shared() -> None:
        await asyncio.gather(*[n09_async(n) for n in range(10)], *[n09_sync(n) for n in range(10)])
        await n09_async(11)
        await n09_sync(11)

    async def main() -> None:
        async with bench() as b:
            await b.result(await b.start(n09_shared))
            assert log == ["open db", *["step"] * 22]
            await b.result(await b.start(n09_shared))
            await b.rest()
            assert log == ["open db", *["step"] * 44, "close db"]
            await b.work()
            await b.result(await b.start(n09_shared))

    asyncio.run(main())
    # Another worker opens its own.
    assert log[45:] == ["close db", "open db", *["step"] * 22, "close db"]
    assert len({id(one) for one in seen}) == 2
    # It belongs to no step, whichever was first.
    assert {one.where for one in seen} == {None}


def test_n09_async_factories_run_on_the_loop_and_sync_ones_in_threads() -> None:
    here = threading.current_thread().name
    log: list[str] = []
    on_loop = _recording(log, "loop")
    in_thread = _recording(log, "thread", is_async=False)

    @step
    async def n09_a_loop() -> list[str]:
        return [(await on_loop.get()).thread, (await in_thread.get()).thread]

    @step
    def n09_a_thread() -> list[str]:
        return [on_loop.get_sync().thread, in_thread.get_sync().thread]

    @workflow
    async def n09_where(first: str) -> list[str]:
        return await (n09_a_loop if first == "loop" else n09_a_thread)()

    async def main(first: str) -> list[str]:
        async with bench() as b:
            found: list[str] = await b.result(await b.start(n09_where, first))
            return found

    for first in ("loop", "thread"):
        found = asyncio.run(main(first))
        assert found[0] == here
        assert found[1].startswith("pyworkflow-step")


def test_n09_they_close_in_the_reverse_order_of_opening() -> None:
    log: list[str] = []
    base = _recording(log, "base")
    model = _recording(log, "model", is_async=False, scope="loop")

    @resource
    async def client() -> AsyncIterator[str]:
        await base.get()
        log.append("open client")
        yield "client"
        log.append("close client")

    @resource(scope="process")
    def config() -> Iterator[str]:
        log.append("open config")
        yield "config"
        log.append("close config")

    @step
    async def n09_uses() -> None:
        await model.get()
        await client.get()
        await config.get()

    @workflow
    async def n09_order() -> None:
        await n09_uses()

    async def main() -> None:
        async with bench() as b:
            await b.result(await b.start(n09_order))

    asyncio.run(main())
    opened = ["model", "base", "client", "config"]
    assert log == [f"open {n}" for n in opened] + [f"close {n}" for n in reversed(opened)]


@pytest.mark.parametrize("is_async", [True, False])
def test_n09_an_opening_that_fails_fails_the_attempts_and_is_tried_again(is_async: bool) -> None:
    tries: list[int] = []

    async def later() -> AsyncIterator[str]:
        tries.append(1)
        if len(tries) < 3:
            raise ConnectionRefusedError("the database starts")
        yield "open"

    def later_sync() -> Iterator[str]:
        tries.append(1)
        if len(tries) < 3:
            raise ConnectionRefusedError("the database starts")
        yield "open"

    database: Resource[str] = Resource(later if is_async else later_sync)

    @step(retry_delay=0)
    async def n09_asks() -> str:
        return await database.get()

    @step(retry_delay=0)
    def n09_asks_sync() -> str:
        return database.get_sync()

    @workflow
    async def n09_flaky(sync: bool) -> str:
        return await (n09_asks_sync if sync else n09_asks)()

    async def main(sync: bool) -> None:
        tries.clear()
        async with bench() as b:
            run_id = await b.start(n09_flaky, sync)
            assert await b.result(run_id) == "open"
            errors = [e.data["error"] for e in await b.events(run_id, "step.retrying")]
            assert [e["type"] for e in errors] == ["builtins:ConnectionRefusedError"] * 2
            assert {e["message"] for e in errors} == {"the database starts"}
        assert len(tries) == 3

    asyncio.run(main(False))
    asyncio.run(main(True))


@pytest.mark.parametrize("is_async", [True, False])
@pytest.mark.parametrize("wrong", [SystemExit(3), KeyboardInterrupt(), StopIteration(1)])
def test_n09_whatever_an_opening_raises_the_worker_lives(
    wrong: BaseException, is_async: bool
) -> None:
    async def bad() -> AsyncIterator[str]:
        raise wrong
        yield ""  # type: ignore[unreachable]  # makes it a generator

    def bad_sync() -> Iterator[str]:
        raise wrong
        yield ""  # type: ignore[unreachable]  # makes it a generator

    broken: Resource[str] = Resource(bad if is_async else bad_sync)

    @step(max_retries=0)
    async def n09_broken() -> None:
        await broken.get()

    @step(max_retries=0)
    def n09_broken_sync() -> None:
        broken.get_sync()

    @workflow
    async def n09_survives() -> list[str]:
        said = []
        for each in (n09_broken, n09_broken_sync):
            try:
                await each()
            except RuntimeError as error:
                said.append(str(error))
        return said

    async def main() -> list[str]:
        async with bench() as b:
            found: list[str] = await b.result(await b.start(n09_survives))
            return found

    said = asyncio.run(main())
    assert len(said) == 2
    if not isinstance(wrong, StopIteration):
        assert all(type(wrong).__name__ in one and "resource=" in one for one in said)


@pytest.mark.parametrize("is_async", [True, False])
def test_a_resource_whose_factory_does_not_yield_is_named(is_async: bool) -> None:
    async def empty() -> AsyncIterator[str]:
        for name in ():
            yield name

    def empty_sync() -> Iterator[str]:
        yield from ()

    broken: Resource[str] = Resource(empty if is_async else empty_sync)

    @step(max_retries=0)
    async def empty_step() -> None:
        await broken.get()

    @workflow
    async def empty_flow() -> str:
        try:
            await empty_step()
        except RuntimeError as error:
            return str(error)
        return ""

    async def main() -> str:
        async with bench() as b:
            found: str = await b.result(await b.start(empty_flow))
            return found

    said = asyncio.run(main())
    assert said == (
        f"opening a resource raised RuntimeError: generator didn't yield; resource={broken.name}"
    )


def test_n09_a_step_that_gives_up_while_it_opens_takes_it_from_no_other() -> None:
    opens: list[int] = []

    async def main() -> None:
        may_open = asyncio.Event()

        @resource
        async def slow() -> AsyncIterator[str]:
            opens.append(1)
            await may_open.wait()
            yield "open"

        @step(timeout="50ms", max_retries=0)
        async def n09_impatient() -> None:
            await slow.get()

        @step
        async def n09_patient() -> str:
            return await slow.get()

        @workflow
        async def n09_both() -> list[Any]:
            patient = asyncio.create_task(n09_patient())
            with contextlib.suppress(TimeoutError):
                await n09_impatient()
                return ["no timeout"]
            await _let()
            return [await patient]

        @step
        async def _let() -> None:
            may_open.set()

        async with bench() as b:
            found = await b.result(await b.start(n09_both))
        assert found == ["open"]

    asyncio.run(main())
    assert opens == [1]


def test_n09_a_failed_close_is_logged_and_the_others_close(
    caplog: pytest.LogCaptureFixture,
) -> None:
    log: list[str] = []
    first = _recording(log, "first")

    @resource
    async def bad() -> AsyncIterator[str]:
        yield "bad"
        raise OSError("no goodbye")

    @resource
    def bad_sync() -> Iterator[str]:
        yield "bad"
        raise OSError("no goodbye in a thread")

    @step
    async def n09_all() -> None:
        await first.get()
        await bad.get()
        await bad_sync.get()

    @workflow
    async def n09_bad_ends() -> None:
        await n09_all()

    async def main() -> None:
        async with bench() as b:
            await b.result(await b.start(n09_bad_ends))

    asyncio.run(main())
    assert log == ["open first", "close first"]
    errors = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert [str(r.exc_info[1]) for r in errors if r.exc_info] == [
        "no goodbye in a thread",
        "no goodbye",
    ]
    assert all("resource=tests.core.test_resources." in r.getMessage() for r in errors)


def test_n09_a_close_that_hangs_does_not_stop_the_end(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_resources, "CLOSING", 0.2)
    log: list[str] = []
    first = _recording(log, "first")

    @resource
    async def hangs() -> AsyncIterator[str]:
        yield "hangs"
        await asyncio.Event().wait()

    @step
    async def n09_hangs() -> None:
        await first.get()
        await hangs.get()

    @workflow
    async def n09_hanging() -> None:
        await n09_hangs()

    async def main() -> None:
        async with bench() as b:
            await b.result(await b.start(n09_hanging))

    asyncio.run(main())
    assert log == ["open first", "close first"]
    assert "takes too long to close" in caplog.text


def test_n09_task_groups_in_factories_are_left_in_the_task_that_entered_them() -> None:
    ends: list[str] = []

    @resource
    async def beating() -> AsyncIterator[asyncio.Event]:
        beaten = asyncio.Event()

        async def beat() -> None:
            beaten.set()
            await asyncio.Event().wait()

        async with asyncio.TaskGroup() as group:
            task = group.create_task(beat())
            yield beaten
            task.cancel()
        ends.append("left")

    @step
    async def n09_listens() -> None:
        await (await beating.get()).wait()

    @workflow
    async def n09_beats() -> None:
        await n09_listens()

    async def main() -> None:
        async with bench() as b:
            await b.result(await b.start(n09_beats))

    asyncio.run(main())
    assert ends == ["left"]


# --- where they can be asked for ------------------------------------------------------------------


def test_n09_misuse_is_answered_with_the_right_way() -> None:
    log: list[str] = []
    shared = _recording(log, "db")
    said: dict[str, str] = {}

    def attempt(place: str, call: Any) -> None:
        try:
            call()
        except WorkflowContextError as error:
            said[place] = str(error)

    async def awaited() -> None:
        try:
            await shared.get()
        except WorkflowContextError as error:
            said["own loop"] = str(error)

    @step
    async def n09_blocks() -> None:
        attempt("sync on the loop", shared.get_sync)

    @step
    def n09_threads() -> None:
        attempt("async in a thread", shared.get)
        asyncio.run(awaited())
        thread = threading.Thread(target=lambda: attempt("own thread", shared.get_sync))
        thread.start()
        thread.join()
        # With the step's context a thread of its own may ask.
        context = contextvars.copy_context()
        thread = threading.Thread(target=lambda: context.run(shared.get_sync))
        thread.start()
        thread.join()

    @workflow
    async def n09_misuse() -> None:
        await n09_blocks()
        await n09_threads()

    async def main() -> None:
        async with bench() as b:
            await b.result(await b.start(n09_misuse))

    asyncio.run(main())
    attempt("outside", shared.get_sync)
    assert "await get()" in said["sync on the loop"]
    assert "get_sync()" in said["async in a thread"]
    assert "in another" in said["own loop"]
    assert "override()" in said["own thread"]
    assert "override()" in said["outside"]
    assert all("resource=tests.core.test_resources." in one for one in said.values())
    assert log == ["open db", "close db"]


def test_n09_workflow_code_that_asks_stalls_with_the_remedy() -> None:
    shared = _recording([], "db")

    @workflow
    async def n09_in_workflow() -> None:
        await shared.get()

    async def main() -> None:
        async with bench() as b:
            run_id = await b.start(n09_in_workflow)
            run = await b.until(run_id, "stalled")
            assert "call it in the step that uses it" in run.stalled

    asyncio.run(main())


@pytest.mark.parametrize("is_async", [True, False])
def test_n09_two_that_need_each_other_are_refused(is_async: bool) -> None:
    found: list[Resource[str]] = []

    def make(other: int) -> Resource[str]:
        async def one() -> AsyncIterator[str]:
            yield await found[other].get()

        def one_sync() -> Iterator[str]:
            yield found[other].get_sync()

        return Resource(one if is_async else one_sync)

    found.extend([make(1), make(0)])

    @step(max_retries=0)
    async def n09_circle(n: int) -> str:
        return await found[n].get()

    @workflow
    async def n09_circles() -> list[str]:
        ends = await asyncio.gather(n09_circle(0), n09_circle(1), return_exceptions=True)
        return [str(end) for end in ends]

    async def main() -> list[str]:
        async with bench() as b:
            said: list[str] = await b.result(await b.start(n09_circles))
            return said

    assert all("need each other" in one for one in asyncio.run(main()))


def test_n09_one_of_the_process_cannot_use_one_of_a_loop() -> None:
    loops = _recording([], "loop")

    @resource(scope="process")
    def whole() -> Iterator[str]:
        yield loops.get_sync().name

    @step(max_retries=0)
    async def n09_mixed() -> None:
        await whole.get()

    @workflow
    async def n09_mixes() -> None:
        await n09_mixed()

    async def main() -> None:
        async with bench() as b:
            with pytest.raises(DefinitionError, match="same scope"):
                await b.result(await b.start(n09_mixes))

    asyncio.run(main())


# --- definitions ----------------------------------------------------------------------------------


class Manager:
    """A context manager as libraries have them."""

    def __init__(self, size: int = 1) -> None:
        self.size = size

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.size = -1


@contextlib.asynccontextmanager
async def made_by_contextlib() -> AsyncIterator[Manager]:
    yield Manager(2)


@contextlib.contextmanager
def made_in_threads() -> Iterator[Manager]:
    yield Manager(3)


def test_n09_context_managers_of_libraries_are_taken() -> None:
    several = [
        resource(Manager),
        resource(made_by_contextlib),
        resource(made_in_threads),
        resource(functools.partial(Manager, size=4)),
    ]
    assert [one.scope for one in several] == ["loop", "loop", "process", "loop"]

    @step
    async def n09_sizes() -> list[int]:
        return [(await one.get()).size for one in several]

    @workflow
    async def n09_taken() -> list[int]:
        return await n09_sizes()

    async def main() -> list[int]:
        async with bench() as b:
            found: list[int] = await b.result(await b.start(n09_taken))
            return found

    assert asyncio.run(main()) == [1, 2, 3, 4]


def test_n09_what_is_no_resource_is_refused_when_defined() -> None:
    async def returns() -> int:
        return 1

    def needs(url: str) -> Iterator[str]:
        yield url

    for wrong in (returns, lambda: 1, int, 5):
        with pytest.raises(DefinitionError, match="yield"):
            resource(wrong)  # type: ignore[call-overload]
    with pytest.raises(DefinitionError, match="parameters=url"):
        resource(needs)  # type: ignore[call-overload]
    with pytest.raises(DefinitionError, match="scope='thread'"):
        resource(scope="thread")(made_in_threads)  # type: ignore[call-overload]
    assert repr(resource(made_by_contextlib)).endswith(".made_by_contextlib>")


# --- fakes ----------------------------------------------------------------------------------------


def test_n09_tests_give_steps_a_fake() -> None:
    log: list[str] = []
    shared = _recording(log, "db")
    other = _recording(log, "sqlite")

    @step
    async def n09_name() -> str:
        return (await shared.get()).name

    @step
    def n09_name_sync() -> str:
        return str(shared.get_sync().name)

    @workflow
    async def n09_names() -> list[str]:
        return [await n09_name(), await n09_name_sync()]

    async def main() -> None:
        async with TestEnvironment() as env:
            env.override(shared, Opened("fake"))
            assert await env.run(n09_names) == ["fake", "fake"]
            env.override(shared, other)
            assert await env.run(n09_names) == ["sqlite", "sqlite"]
            with override(shared, Opened("all")):
                assert await n09_name() == "all"
        async with TestEnvironment() as env:
            with override(shared, Opened("all")), override(shared, Opened("inner")):
                assert await env.run(n09_names) == ["inner", "inner"]
            assert await env.run(n09_names) == ["db", "db"]
        env = TestEnvironment()
        env.override(shared, Opened("before"))
        async with env:
            assert await env.run(n09_names) == ["before", "before"]

    asyncio.run(main())
    assert log == ["open sqlite", "close sqlite", "open db", "close db"]
    with override(shared, Opened("plain")):
        assert shared.get_sync().name == "plain"


def test_n09_start_local_closes_what_its_steps_opened() -> None:
    log: list[str] = []
    shared = _recording(log, "db")

    @step
    async def n09_local_step() -> str:
        return (await shared.get()).name

    @workflow
    async def n09_local() -> str:
        return await n09_local_step()

    async def main() -> None:
        storage = MemoryStorageBackend()
        run_id = await start_local(n09_local, storage=storage)
        run = await storage.get_run(run_id)
        assert run is not None
        assert run.status == "completed"

    asyncio.run(main())
    assert log == ["open db", "close db"]


def test_n09_one_of_the_process_closes_with_the_last_worker_that_used_it() -> None:
    log: list[str] = []
    shared = _recording(log, "model", is_async=False)

    @step
    async def n09_two() -> str:
        return (await shared.get()).name

    @workflow
    async def n09_workers() -> str:
        return await n09_two()

    async def main() -> None:
        async with TestEnvironment() as one:
            async with TestEnvironment() as two:
                await one.run(n09_workers)
                await two.run(n09_workers)
            assert log == ["open model"]
            await one.run(n09_workers)
        assert log == ["open model", "close model"]

    asyncio.run(main())
