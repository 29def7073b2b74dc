"""Bad input gets a clear, early error and loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pydantic
import pytest

from pyworkflow import (
    ArgumentError,
    Client,
    ConfigurationError,
    DefinitionError,
    DuplicateName,
    PayloadTooLarge,
    PluginNotFound,
    SchemaTooNew,
    SerializationError,
    StorageDamaged,
    StorageError,
    WorkflowContextError,
    deprecate_patch,
    get_run,
    logger,
    now,
    patched,
    random,
    run,
    sleep,
    start,
    step,
    step_context,
    uuid4,
    workflow,
)
from pyworkflow.storage.file import FileStorageBackend
from pyworkflow.storage.memory import MemoryStorageBackend
from tests.core._driving import bench, eventually


class Opaque:
    """A value without a stored form."""


class Basket(pydantic.BaseModel):
    items: list[int]


# --- arguments and results ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (Opaque(), "Opaque"),
        (lambda: 1, "function"),
        ([1, {"deep": {2: Opaque()}}], "Opaque"),
        (threading.Lock(), "lock"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        ("\ud800", "surrogate"),
        (iter([1]), "iterator"),
    ],
)
def test_an_argument_that_cannot_be_stored_is_refused_before_anything_starts(
    value: Any, told: str
) -> None:
    @workflow
    async def bi_takes_anything(value: Any) -> None:
        raise AssertionError

    async def main() -> None:
        async with bench() as b:
            with pytest.raises(SerializationError) as caught:
                await b.start(bi_takes_anything, value)
            assert told in str(caught.value)
            assert (await b.ops.list_runs(None, None, 10, None)).items == []

    asyncio.run(main())


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("many", {"items": [1]}), "n: "),
        ((1, {"items": ["x"]}), "basket['items'][0]: "),
        ((1,), "basket"),
        ((1, {"items": []}, 3), "too many positional arguments"),
        ((None, None), "n: "),
    ],
)
def test_wrong_types_fail_at_the_caller_and_name_the_argument(args: Any, told: str) -> None:
    @workflow
    async def bi_typed(n: int, basket: Basket) -> None:
        raise AssertionError

    async def main() -> None:
        async with bench() as b:
            with pytest.raises(ArgumentError) as caught:
                await b.start(bi_typed, *args)
            assert told in str(caught.value)
            assert "bi_typed" in str(caught.value)
            assert isinstance(caught.value, ValueError)
            assert (await b.ops.list_runs(None, None, 10, None)).items == []

    asyncio.run(main())


def test_parameters_without_annotations_take_anything() -> None:
    @step
    def bi_bare_step(value, *more, **named):  # type: ignore[no-untyped-def]
        return (value, more, named)

    @workflow
    async def bi_bare(value, *more, extra=None, **named):  # type: ignore[no-untyped-def]
        return await bi_bare_step(value, *more, extra=extra, **named)

    async def main() -> None:
        async with bench() as b:
            for value in (1, "text", None, (1, 2), {"a": {3}}):
                assert await b.run(bi_bare, value, value) == (value, (value,), {"extra": None})

    asyncio.run(main())


def test_a_step_argument_that_cannot_be_stored_raises_at_the_call_and_may_be_caught() -> None:
    @step
    async def bi_step(value: Any) -> None:
        raise AssertionError

    @step
    async def bi_after() -> str:
        return "after"

    @workflow
    async def bi_catches() -> list[str]:
        found: list[str] = []
        for value in (Opaque(), float("nan")):
            try:
                await bi_step(value)
            except SerializationError as exc:
                found.append(str(exc)[:20])
        await sleep("1h")
        return [*found, await bi_after()]

    async def main() -> None:
        async with bench() as b:
            run_id = await b.start(bi_catches)
            await b.asleep(run_id)
            await b.restart()
            await b.pass_time("1h")
            assert (await b.result(run_id))[-1] == "after"

    asyncio.run(main())


def test_a_step_result_that_cannot_be_stored_fails_the_step_once_and_names_it() -> None:
    calls: list[int] = []

    @step
    async def bi_returns_opaque() -> Any:
        calls.append(1)
        return {"a": [Opaque()]}

    @workflow
    async def bi_gets_opaque() -> str:
        try:
            await bi_returns_opaque()
        except SerializationError as exc:
            return str(exc)
        return "?"

    async def main() -> None:
        async with bench() as b:
            told = await b.run(bi_gets_opaque)
            assert "bi_returns_opaque" in told
            assert "Opaque" in told
        assert calls == [1]  # trying again would only repeat the effect

    asyncio.run(main())


def test_a_workflow_result_that_cannot_be_stored_fails_the_run() -> None:
    @workflow
    async def bi_result() -> Any:
        return Opaque()

    async def main() -> None:
        async with bench() as b:
            with pytest.raises(SerializationError, match="Opaque"):
                await b.run(bi_result)

    asyncio.run(main())


@pytest.mark.parametrize("text", ["x" * 3000, "ü" * 1200])
def test_payloads_over_the_limit_are_refused_by_bytes_everywhere(text: str) -> None:
    calls: list[str] = []

    @step
    async def bi_eats(text: str) -> int:
        calls.append("eats")
        return len(text)

    @step
    async def bi_grows(count: int) -> str:
        calls.append("grows")
        return text[0] * count

    @workflow
    async def bi_limits(count: int) -> list[str]:
        found: list[str] = []
        for attempt in (bi_eats(text[0] * count), bi_grows(count)):
            try:
                await attempt
            except PayloadTooLarge as exc:
                found.append(f"{exc.what} {exc.limit}")
        await sleep("1h")
        return found

    @workflow
    async def bi_big_result(count: int) -> str:
        return text[0] * count

    @workflow
    async def bi_big_argument(text: str) -> None:
        raise AssertionError

    async def main() -> None:
        async with bench(max_payload=2000) as b:
            with pytest.raises(PayloadTooLarge, match="bi_big_argument") as caught:
                await b.start(bi_big_argument, text)
            assert caught.value.limit == 2000
            with pytest.raises(PayloadTooLarge, match="bi_big_result"):
                await b.run(bi_big_result, len(text))
            run_id = await b.start(bi_limits, len(text))
            await b.asleep(run_id)
            await b.restart()  # and the same on replay
            await b.pass_time("1h")
            assert await b.result(run_id) == [
                "the arguments of step 'bi_eats' 2000",
                "the result of step 'bi_grows' 2000",
            ]
        assert calls == ["grows"]

    asyncio.run(main())


def test_an_exception_larger_than_the_store_takes_ends_the_step_and_troubles_nobody() -> None:
    calls: list[int] = []

    @step(max_retries=0)
    async def bi_shouts() -> None:
        calls.append(1)
        raise ValueError("x" * 17 * 1024 * 1024)

    @workflow
    async def bi_shouted_at() -> int:
        try:
            await bi_shouts()
        except Exception as exc:  # noqa: BLE001 - whatever is left of it
            return len(str(exc))
        return -1

    @workflow
    async def bi_quiet() -> str:
        return "quiet"

    async def main() -> None:
        async with bench() as b:
            ids = [await b.start(w) for w in (bi_quiet, bi_shouted_at, bi_quiet)]
            quiet, length, also = [await b.result(i) for i in ids]
            assert (quiet, also) == ("quiet", "quiet")
            assert 0 < length < 2 * 1024 * 1024
        assert calls == [1]

    asyncio.run(main())


def test_a_log_line_larger_than_the_store_takes_does_not_hold_up_the_run() -> None:
    @workflow
    async def bi_talks() -> str:
        logger.info("y" * 17 * 1024 * 1024)
        logger.info("fields %s", "z" * 17 * 1024 * 1024)
        return "said"

    async def main() -> None:
        async with bench() as b:
            assert await b.run(bi_talks) == "said"

    asyncio.run(main())


# --- definitions --------------------------------------------------------------------------------


def test_definitions_that_cannot_work_are_refused_when_decorated() -> None:
    with pytest.raises(DefinitionError, match="async def"):

        @workflow  # type: ignore[arg-type]
        def bi_sync() -> None: ...

    with pytest.raises(DefinitionError, match="async generator"):

        @workflow  # type: ignore[arg-type]
        async def bi_generator() -> Any:
            yield 1

    with pytest.raises(DefinitionError, match="lambda"):
        step(lambda: 1)

    with pytest.raises(DefinitionError, match="generator"):

        @step
        def bi_step_generator() -> Any:
            yield 1

    class Holder:
        with pytest.raises(DefinitionError, match="method"):

            @step
            def bi_method(self) -> None: ...

    for name in ("idempotency_key", "storage", "wait", "timeout"):
        scope: dict[str, Any] = {}
        source = f"async def bi_reserved({name}): ..."
        exec(source, scope)
        with pytest.raises(DefinitionError, match=name):
            workflow(scope["bi_reserved"])


@pytest.mark.parametrize(
    "settings",
    [
        {"max_retries": -1},
        {"max_retries": 1.5},
        {"max_retries": True},
        {"timeout": "soon"},
        {"timeout": -1},
        {"retry_delay": "sometimes"},
        {"retry_delay": None},
        {"semantics": "exactly_once"},
        {"dispatch": "maybe"},
        {"semantics": "at_most_once", "max_retries": 2},
        {"hard_timeout": True},
    ],
)
def test_settings_of_a_step_that_make_no_sense_are_refused(settings: Any) -> None:
    with pytest.raises(DefinitionError):

        @step(**settings)
        async def bi_senseless() -> None: ...


def test_two_different_functions_of_one_name_are_refused() -> None:
    async def bi_first() -> None: ...

    async def bi_second() -> None: ...

    bi_first.__qualname__, bi_second.__qualname__ = "bi_first", "bi_second"  # of a module
    step(name="bi-taken")(bi_first)
    with pytest.raises(DuplicateName) as caught:
        step(name="bi-taken")(bi_second)

    assert caught.value.name == "bi-taken"
    assert "bi_first" in str(caught.value)
    assert "bi_second" in str(caught.value)


def test_what_is_no_workflow_cannot_be_started() -> None:
    async def bi_plain() -> None: ...

    @step
    async def bi_a_step() -> None: ...

    for what in (bi_plain, bi_a_step, "bi_name", None):
        with pytest.raises(ArgumentError, match="workflow"):
            start(what)  # type: ignore[arg-type]


def test_primitives_outside_of_a_workflow_name_the_remedy() -> None:
    for call in (now, uuid4, random):
        with pytest.raises(WorkflowContextError, match="workflow code only"):
            call()
    with pytest.raises(WorkflowContextError, match=r"asyncio\.sleep"):
        asyncio.run(sleep(1))
    with pytest.raises(WorkflowContextError, match="step"):
        step_context()

    @workflow
    async def bi_uncalled() -> None: ...

    with pytest.raises(WorkflowContextError, match="start"):
        bi_uncalled()


def test_a_bad_duration_in_a_workflow_fails_the_run_with_the_formats() -> None:
    @workflow
    async def bi_bad_sleep() -> None:
        await sleep("later")

    async def main() -> None:
        async with bench() as b:
            with pytest.raises(ValueError, match="later"):
                await b.run(bi_bad_sleep)

    asyncio.run(main())


def test_a_naive_datetime_is_utc_with_a_warning() -> None:
    @workflow
    async def bi_naive() -> None:
        with pytest.warns(UserWarning, match="UTC"):
            await sleep(datetime(2001, 1, 1))  # noqa: DTZ001 - the very thing under test

    async def main() -> None:
        async with bench() as b:
            await b.run(bi_naive)

    asyncio.run(main())


# --- real input, output, threads and time in workflow code --------------------------------------


def io_open(_: Path) -> None:
    with open(os.devnull, encoding="ascii"):  # noqa: PTH123 - the very thing under test
        pass


def io_write(path: Path) -> None:
    (path / "effect").write_text("done")


def io_read(path: Path) -> None:
    (path / "nothing").read_bytes()


def io_socket(_: Path) -> None:
    socket.socket()


def io_connect(_: Path) -> None:
    socket.create_connection(("127.0.0.1", 9))


def io_process(_: Path) -> None:
    subprocess.run(["true"], check=True)


def io_system(_: Path) -> None:
    os.system("true")


def io_mkdir(path: Path) -> None:
    (path / "effect").mkdir()


def io_remove(path: Path) -> None:
    (path / "nothing").unlink()


def io_listdir(path: Path) -> None:
    os.listdir(path)  # noqa: PTH208 - the very thing under test


def io_scandir(path: Path) -> None:
    list(os.scandir(path))


def io_sqlite(path: Path) -> None:
    import sqlite3

    sqlite3.connect(path / "effect")


def io_sleep(_: Path) -> None:
    time.sleep(0.001)


def io_thread(path: Path) -> None:
    thread = threading.Thread(target=io_write, args=(path,))
    thread.start()
    thread.join()


def io_run(_: Path) -> None:
    run(bi_target)


def io_start(_: Path) -> None:
    start(bi_target)


def io_get(_: Path) -> None:
    get_run("run_x")


@workflow
async def bi_target() -> None:
    """Nothing may start it."""


async def aio_to_thread(path: Path) -> None:
    await asyncio.to_thread(io_write, path)


async def aio_executor(path: Path) -> None:
    await asyncio.get_running_loop().run_in_executor(None, io_write, path)


async def aio_connect(_: Path) -> None:
    await asyncio.open_connection("127.0.0.1", 9)


async def aio_process(_: Path) -> None:
    await asyncio.create_subprocess_exec("true")


async def aio_threadsafe(_: Path) -> None:
    asyncio.get_running_loop().call_soon_threadsafe(print)


async def aio_client(_: Path) -> None:
    await Client(storage=MemoryStorageBackend()).get_run("run_x")


SYNC = [
    io_open, io_write, io_read, io_socket, io_connect, io_process, io_system, io_mkdir, io_remove,
    io_listdir, io_scandir, io_sqlite, io_sleep, io_thread, io_run, io_start, io_get,
]  # fmt: skip
ASYNC = [aio_to_thread, aio_executor, aio_connect, aio_process, aio_threadsafe, aio_client]


def make_offender(act: Callable[[Path], Any] | None, swallow: bool, seen: list[Any]) -> Any:
    @step
    async def bi_effect() -> str:
        return "effect"

    @workflow
    async def bi_offends(path: Path) -> str:
        found = await bi_effect()
        if act is None:
            return found
        try:
            answer = act(path)
            if asyncio.iscoroutine(answer):
                await answer
        except WorkflowContextError as exc:
            import traceback

            frames = traceback.extract_tb(exc.__traceback__)
            seen.append((str(exc), [f.name for f in frames]))
            if not swallow:
                raise
        except Exception as exc:  # noqa: BLE001 - a library turned it into its own
            seen.append((repr(exc.__context__), []))
        return "swallowed"

    return bi_offends, bi_effect


@pytest.mark.parametrize("swallow", [False, True], ids=["raised", "swallowed"])
@pytest.mark.parametrize("act", [*SYNC, *ASYNC], ids=lambda act: act.__name__)
def test_real_effects_in_workflow_code_raise_at_the_line_stall_the_run_and_heal(
    act: Callable[[Path], Any], swallow: bool, tmp_path: Path
) -> None:
    seen: list[Any] = []

    async def main() -> None:
        async with bench() as b:
            wrong = make_offender(act, swallow, seen)
            run_id = await b.start(wrong[0], tmp_path)
            run = await b.until(run_id, "stalled", "completed", "failed")
            assert run.status == "stalled", run
            assert run.stalled is not None
            assert "WorkflowContextError" in run.stalled
            assert "step" in run.stalled or "sleep" in run.stalled  # the remedy
            message, frames = seen[0]
            assert "WorkflowContextError" in message or act.__name__ in frames
            right = make_offender(None, swallow, seen)
            await b.pass_time("30s")
            assert await b.result(run_id) == "effect"
            del wrong, right

    asyncio.run(main())
    assert list(tmp_path.iterdir()) == []


def test_what_looks_like_effects_and_is_none_is_let_through(tmp_path: Path) -> None:
    import logging
    import tomllib  # noqa: F401 - so that only the one below is new

    (tmp_path / "bi_late_module.py").write_text("VALUE = 7\n")
    sys.path.insert(0, str(tmp_path))

    @workflow
    async def bi_innocent() -> list[Any]:
        import bi_late_module  # type: ignore[import-not-found]

        logging.getLogger("bi").debug("not shown")
        found = [bi_late_module.VALUE, str(Path("a") / "b"), json.dumps({"a": 1})]
        try:
            raise ValueError("shown")
        except ValueError:
            import traceback

            found.append("shown" in traceback.format_exc())
        return found

    async def main() -> None:
        async with bench() as b:
            assert await b.run(bi_innocent) == [7, "a/b", '{"a": 1}', True]

    try:
        asyncio.run(main())
    finally:
        sys.path.remove(str(tmp_path))


def test_time_zones_may_be_used_in_workflow_code() -> None:
    from zoneinfo import ZoneInfo

    ZoneInfo.clear_cache(only_keys=["Europe/Rome"])
    if not any(Path(p, "Europe/Rome").exists() for p in __import__("zoneinfo").TZPATH):
        pytest.skip("no time zone data here")

    @workflow
    async def bi_zones() -> str:
        return now().astimezone(ZoneInfo("Europe/Rome")).tzname() or ""

    async def main() -> None:
        async with bench() as b:
            assert await b.run(bi_zones) in ("CET", "CEST")

    asyncio.run(main())


def test_files_and_threads_of_steps_and_of_the_process_are_not_touched(tmp_path: Path) -> None:
    @step
    def bi_writes(path: Path) -> str:
        io_write(path)
        io_thread(path)
        time.sleep(0.001)
        return (path / "effect").read_text()

    @step
    async def bi_awaits(path: Path) -> str:
        return await asyncio.to_thread((path / "effect").read_text)

    @workflow
    async def bi_proper(path: Path) -> list[str]:
        return [await bi_writes(path), await bi_awaits(path)]

    async def main() -> None:
        async with bench() as b:
            assert await b.run(bi_proper, tmp_path) == ["done", "done"]

    asyncio.run(main())


# --- stores -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "error", "told"),
    [
        ("nosuch://host/x", PluginNotFound, "nosuch"),
        ("not a url", ConfigurationError, "not a url"),
        ("memory://x?colour=red", ConfigurationError, "colour"),
        ("", ConfigurationError, ""),
    ],
)
def test_an_unusable_storage_url_is_told_before_anything_starts(
    url: str, error: type[Exception], told: str
) -> None:
    @workflow
    async def bi_unstored() -> None: ...

    async def main() -> None:
        with pytest.raises(error) as caught:
            async with Client(storage=url) as client:
                await client.start(bi_unstored)
        assert told in str(caught.value)

    asyncio.run(main())


def test_a_file_store_where_a_file_is_says_so(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")

    async def main() -> None:
        storage = FileStorageBackend(tmp_path / "taken")
        with pytest.raises((StorageError, ConfigurationError), match="taken"):
            await storage.open()
        await storage.close()

    asyncio.run(main())
    assert (tmp_path / "taken").read_text() == "a file"


async def some_history(path: Path) -> str:
    @step
    async def bi_recorded(n: int) -> int:
        return n

    @workflow
    async def bi_history() -> None:
        for n in range(5):
            await bi_recorded(n)
        await sleep("1h")

    storage = FileStorageBackend(path, fsync=False)
    async with bench(storage) as b:
        run_id = await b.start(bi_history)
        await b.asleep(run_id)
    await storage.close()
    return run_id


def journal_of(path: Path) -> Path:
    (journal,) = [p for p in path.rglob("*") if p.is_file() and p.stat().st_size > 2000]
    return journal


def test_a_damaged_journal_is_named_by_file_and_offset_and_left_alone(tmp_path: Path) -> None:
    async def main() -> None:
        await some_history(tmp_path)
        journal = journal_of(tmp_path)
        data = bytearray(journal.read_bytes())
        middle = data.index(b"bi_recorded", len(data) // 3)
        data[middle] ^= 1
        journal.write_bytes(data)
        line = data.rindex(b"\n", 0, middle) + 1
        storage = FileStorageBackend(tmp_path)
        with pytest.raises(StorageDamaged) as caught:
            await storage.open()
        assert caught.value.file.endswith(journal.name)
        assert caught.value.offset == line
        assert journal.name in str(caught.value)
        await storage.close()
        assert journal.read_bytes() == bytes(data)
        data[middle] ^= 1
        journal.write_bytes(data)
        async with FileStorageBackend(tmp_path) as healed:
            assert (await healed.stats())["runs"] == 1

    asyncio.run(main())


def test_a_store_of_a_newer_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    def files() -> dict[Path, bytes]:
        found = [p for p in tmp_path.rglob("*") if p.is_file() and "lock" not in p.name]
        return {p: p.read_bytes() for p in found}

    async def main() -> None:
        await some_history(tmp_path)
        (manifest,) = [p for p in files() if p.name == "manifest.json"]
        text = manifest.read_text()
        newer = json.loads(text)
        (key,) = [k for k, v in newer.items() if k in ("format", "v", "version") and v == 1]
        manifest.write_text(json.dumps(newer | {key: 99}))
        before = files()
        storage = FileStorageBackend(tmp_path)
        with pytest.raises(SchemaTooNew) as caught:
            await storage.open()
        assert (caught.value.found, caught.value.supported) == (99, 2)  # 2: with packs
        await storage.close()
        assert files() == before

    asyncio.run(main())


def test_an_event_of_a_newer_version_stalls_its_run_and_is_still_shown() -> None:
    from pyworkflow.runs import ItemKind
    from pyworkflow.spi import Change, Event, NewRun, Put

    @workflow
    async def bi_future() -> str:
        return "past"

    async def main() -> None:
        async with bench() as b:
            data = {
                "workflow": "bi_future",
                "version": "1",
                "args": '{"args":[]}',
                "seed": "0" * 32,
            }
            for run_id, unknown in (
                ("type", Event("teleport.arrived", "I", {"to": "mars"}, None, "t")),
                ("version", Event("signal.received", "I", {"name": "x"}, None, "s", v=2)),
            ):
                await b.storage.commit_one(
                    Change(
                        run_id=run_id,
                        key=f"start:{run_id}",
                        create=NewRun(workflow="bi_future", version="1", args='{"args":[]}'),
                        events=[
                            Event("workflow.started", "I", data, None, "started"),
                            unknown,
                        ],
                        put=[Put(item_id="turn", kind=ItemKind.TURN)],
                    )
                )
                run = await b.until(run_id, "stalled")
                assert "upgrade" in str(run.stalled)
                assert unknown.type in str(run.stalled)
                assert (await b.events(run_id))[1].type == unknown.type

    asyncio.run(main())


def test_a_full_disk_refuses_the_start_and_keeps_what_is_there(tmp_path: Path) -> None:
    import errno

    from pyworkflow import StorageFull
    from pyworkflow_storage_file._calls import Calls

    class FullDisk(Calls):
        full = False

        def write(self, fd: int, data: Any, offset: int) -> int:
            if self.full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(fd, data, offset)

    @workflow
    async def bi_disk() -> str:
        return "stored"

    async def main() -> None:
        storage = FileStorageBackend(tmp_path, fsync=False)
        storage._calls = calls = FullDisk()
        async with bench(storage) as b:
            first = await b.start(bi_disk)
            assert await b.result(first) == "stored"
            await b.rest()
            calls.full = True
            with pytest.raises(StorageFull):
                await b.start(bi_disk)
            calls.full = False
            await b.work()
            assert await b.run(bi_disk) == "stored"
            assert len((await b.ops.list_runs(None, None, 10, None)).items) == 2
        await storage.close()

    asyncio.run(main())


def test_a_store_that_fails_while_runs_go_on_loses_nothing() -> None:
    class Fails(MemoryStorageBackend):
        broken = False

        async def commit(self, changes: Any) -> Any:
            if self.broken:
                raise StorageError("the disk is gone")
            return await super().commit(changes)

    calls: list[int] = []

    @step
    async def bi_breaks(n: int) -> int:
        calls.append(n)
        if n == 2 and calls.count(2) == 1:
            store.broken = True
        return n

    @workflow
    async def bi_goes_on() -> int:
        return sum([await bi_breaks(n) for n in range(5)])

    store = Fails()

    async def main() -> None:
        async with bench(store) as b:
            run_id = await b.start(bi_goes_on)
            await eventually(lambda: store.broken)
            await eventually(lambda: b.worker is not None and not b.worker.is_busy)
            store.broken = False
            await b.pass_time("31s")
            assert await b.result(run_id) == 10
        assert calls == [0, 1, 2, 2, 3, 4]

    with contextlib.suppress(asyncio.CancelledError):
        asyncio.run(main())


@pytest.mark.parametrize("wrong", ["", 3, None, "x" * 201])
@pytest.mark.parametrize("ask", [patched, deprecate_patch])
def test_the_id_of_a_patch_is_short_text(ask: Callable[[Any], object], wrong: Any) -> None:
    @workflow
    async def bi_patches() -> str:
        with pytest.raises(ArgumentError, match="the id of a patch is text of 1 to 200 characters"):
            ask(wrong)
        return "refused"

    async def main() -> None:
        async with bench() as b:
            assert await b.run(bi_patches) == "refused"

    asyncio.run(main())
