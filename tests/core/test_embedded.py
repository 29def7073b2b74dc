"""The way of operations to a store in this process: pace, watchers, dispatcher, ownership, forks."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from collections.abc import Callable, Coroutine, Hashable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from pyworkflow.errors import StorageError, StorageUnavailable
from pyworkflow.spi import (
    Capabilities,
    Change,
    Claimed,
    ClaimRef,
    ClaimRequest,
    Event,
    NewRun,
    StorageInfo,
)
from pyworkflow.storekit import ReferenceStore
from pyworkflow.storekit.embedded import (
    Answers,
    Dispatcher,
    EmbeddedBackend,
    News,
    Operation,
    Pace,
    Watchers,
    add_forkable,
    copy_error,
    nothing,
)

FAST, SLOW = 150_000, 12_000_000
MINUTE = timedelta(minutes=1)


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), 60))


# --- pace -------------------------------------------------------------------------------------


def test_nothing_is_fast_before_the_first_flush() -> None:
    pace = Pace()
    assert not pace.is_fast
    pace.flushed(FAST)
    assert pace.is_fast


def test_slow_flushes_leave_the_next_ones_to_the_thread_and_then_it_is_asked_again() -> None:
    pace = Pace()
    pace.flushed(FAST)
    pace.flushed(SLOW)
    pace.flushed(FAST)
    assert pace.is_fast  # one alone may be anything
    pace.flushed(SLOW)
    for _ in range(64):
        assert not pace.is_fast
        pace.flushed(FAST)
    assert pace.is_fast


def test_a_disk_that_stays_slow_is_never_waited_for() -> None:
    pace = Pace()
    for _ in range(1000):
        pace.flushed(SLOW)
        assert not pace.is_fast


def test_stalls_far_from_each_other_change_nothing() -> None:
    pace = Pace()
    for took in (FAST, 60_000_000_000, *[FAST] * 10, SLOW, *[FAST] * 10, 2_000_000, 2_000_000):
        pace.flushed(took)
        assert pace.is_fast


def test_a_mean_of_more_than_a_millisecond_is_slow() -> None:
    pace = Pace()
    pace.flushed(FAST)
    for _ in range(30):
        pace.flushed(1_200_000)
    assert not pace.is_fast


# --- watchers ---------------------------------------------------------------------------------


class Timer:
    def __init__(self, when: float, call: Callable[[], None]) -> None:
        self.when, self.call = when, call
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True


class Clock:
    """A loop whose time the test moves; it keeps what is to be called when."""

    def __init__(self) -> None:
        self.now = 100.0
        self.timers: list[Timer] = []

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, call: Callable[[], None]) -> Timer:
        timer = Timer(when, call)
        self.timers.append(timer)
        return timer

    def call_later(self, delay: float, call: Callable[[], None]) -> Timer:
        return self.call_at(self.now + delay, call)

    async def advance(self, seconds: float) -> None:
        self.now += seconds
        due = [timer for timer in self.timers if timer.when <= self.now]
        self.timers = [timer for timer in self.timers if timer not in due]
        for timer in due:
            if not timer.is_cancelled:
                timer.call()
        await asyncio.sleep(0)


class Watched:
    """Watchers with a clock, and a look that the test ends."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.looks: list[asyncio.Future[None]] = []
        self.ends_at_once = True
        self.watchers = Watchers(self.clock, self.look)  # type: ignore[arg-type]  # as much as is used

    def look(self) -> asyncio.Future[None]:
        future = asyncio.get_running_loop().create_future()
        self.looks.append(future)
        if self.ends_at_once:
            future.set_result(None)
        return future

    def wait(self, run_id: str | None, after: int = 0) -> asyncio.Future[None]:
        news: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.watchers.add(run_id, after, news)
        return news


def test_batches_that_read_all_that_others_wrote_take_the_place_of_polls() -> None:
    async def main() -> None:
        watched = Watched()
        news = watched.wait("r")
        for _ in range(500):  # somebody commits every millisecond
            watched.watchers.tell({"other": (1, False)}, 0, looked=True)
            await watched.clock.advance(0.001)
        assert watched.looks == []
        for _ in range(40):  # and stops
            await watched.clock.advance(0.001)
        assert len(watched.looks) in {1, 2}
        watched.watchers.tell({"r": (1, False)}, 0, looked=True)
        assert news.done()
        watched.watchers.drop("r", news)
        await watched.clock.advance(1)
        assert watched.clock.timers == []

    run(main)


def test_other_batches_do_not_take_the_place_of_polls() -> None:
    async def main() -> None:
        watched = Watched()
        watched.wait("r")
        for _ in range(500):
            watched.watchers.tell({"other": (1, False)}, 0)
            await watched.clock.advance(0.001)
        assert len(watched.looks) >= 5

    run(main)


def test_one_look_at_a_time_and_the_next_one_when_it_ended() -> None:
    async def main() -> None:
        watched = Watched()
        watched.ends_at_once = False
        watched.wait("r")
        await watched.clock.advance(0.05)
        watched.wait("s")  # begins to poll anew
        for _ in range(10):
            await watched.clock.advance(0.1)
        assert len(watched.looks) == 1
        watched.looks[0].set_result(None)
        await asyncio.sleep(0)
        await watched.clock.advance(0.1)
        assert len(watched.looks) == 2
        watched.watchers.close()
        await asyncio.sleep(0)
        await watched.clock.advance(1)
        assert len(watched.looks) == 2
        assert watched.looks[1].cancelled()

    run(main)


def test_a_look_that_fails_wakes_all_so_that_they_learn_why() -> None:
    async def main() -> None:
        watched = Watched()
        watched.ends_at_once = False
        waiting = [watched.wait("r"), watched.wait(None)]
        await watched.clock.advance(0.05)
        watched.looks[0].set_exception(StorageError("gone"))
        await asyncio.sleep(0)
        assert all(news.done() for news in waiting)

    run(main)


def test_watchers_hear_of_what_they_wait_for_only() -> None:
    async def main() -> None:
        watched = Watched()
        later, ended, other, work = (
            watched.wait("r", 5),
            watched.wait("s", 5),
            watched.wait("t", 0),
            watched.wait(None),
        )
        watched.watchers.tell({"r": (5, False), "s": (3, True)}, 0)
        assert [f.done() for f in (later, ended, other, work)] == [False, True, False, False]
        watched.watchers.tell({"r": (6, False)}, 1)
        assert [f.done() for f in (later, ended, other, work)] == [True, True, False, True]
        assert watched.watchers.take_work_news()
        assert not watched.watchers.take_work_news()
        watched.watchers.tell({}, 1)  # nothing that was not told before
        assert not watched.watchers.take_work_news()

    run(main)


# --- dispatcher -------------------------------------------------------------------------------


class Batch:
    def __init__(self, store: Store) -> None:
        self.now = datetime.now(UTC)
        self.store = store.reference
        self.note = store.noted.append


class Store:
    """What writers of one place share."""

    def __init__(self) -> None:
        self.reference = ReferenceStore()
        self.noted: list[str] = []
        self.lock = threading.Lock()
        self.work = 0


class Writer:
    """Keeps everything in memory, and notes who did how much."""

    def __init__(self, store: Store | None = None, *, takes: int = FAST, most: int = 1000) -> None:
        self.mutex = threading.Lock()
        self.is_open = False
        self.pace = Pace()
        self.store = store or Store()
        self.takes = takes
        self.most = most
        self.batches: list[tuple[str, int]] = []
        self.touched: dict[str, tuple[int, bool]] = {}
        self.recovered = self.closed = self.kept = 0
        self.wants_upkeep = False

    def take(self, waiting: list[Operation[Batch]], answers: Answers[Batch], *, wait: bool) -> bool:
        assert self.mutex.locked()
        if not self.store.lock.acquire(blocking=wait):
            return False
        try:
            self.is_open = True
            del waiting[self.most :]
            self.batches.append((who(), len(waiting)))
            batch = Batch(self.store)
            for operation in waiting:
                if operation.future.done():
                    continue
                try:
                    answers.append((operation, operation.run(batch), None))
                except Exception as error:  # noqa: BLE001  the caller's answer
                    answers.append((operation, None, error))
            if any(operation.writes for operation in waiting):
                self.pace.flushed(self.takes)
                self.store.work += 1
                self.touched["r"] = (self.store.work, False)
        finally:
            self.store.lock.release()
        return True

    def take_news(self) -> News:
        touched, self.touched = self.touched, {}
        return touched, self.store.work

    def recover(self) -> None:
        self.recovered += 1

    def close(self) -> None:
        self.is_open = False
        self.closed += 1

    def upkeep(self) -> None:
        assert who() == "thread"
        self.wants_upkeep = False
        self.kept += 1


def who() -> str:
    return "loop" if threading.current_thread() is threading.main_thread() else "thread"


def begin(
    writer: Writer,
    *,
    place: Hashable = None,
    upkeep: bool = False,
    stuck: Callable[[], StorageError | None] | None = None,
    close_timeout: float = 30,
) -> Dispatcher[Batch]:
    return Dispatcher(
        writer,
        asyncio.get_running_loop(),
        name="embedded-test",
        close_timeout=close_timeout,
        place=place,
        upkeep=writer if upkeep else None,
        stuck=stuck,
    )


def noting(text: str) -> Callable[[Batch], str]:
    def note(batch: Batch) -> str:
        batch.note(text)
        return text

    return note


async def write(dispatcher: Dispatcher[Batch], text: str) -> str:
    return await dispatcher.submit(noting(text), writes=True, small=True)


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not true():  # noqa: ASYNC110  what is waited for sets no event
            await asyncio.sleep(0.001)


def test_a_lone_small_operation_is_done_by_the_loop_while_flushes_are_fast() -> None:
    async def main() -> None:
        writer = Writer()
        dispatcher = begin(writer)
        for n in range(5):
            assert await write(dispatcher, str(n)) == str(n)
        assert writer.batches == [("thread", 1), *[("loop", 1)] * 4]
        await dispatcher.submit(nothing, writes=True)
        assert writer.batches[-1] == ("thread", 1)
        await dispatcher.close()
        assert writer.closed == 1

    run(main)


def test_slow_flushes_go_to_the_thread_and_reads_do_not() -> None:
    async def main() -> None:
        writer = Writer(takes=SLOW)
        dispatcher = begin(writer)
        for n in range(3):
            await write(dispatcher, str(n))
        await dispatcher.submit(nothing, writes=False, small=True)
        assert writer.batches == [*[("thread", 1)] * 3, ("loop", 1)]
        await dispatcher.close()

    run(main)


def test_operations_of_one_turn_go_together_and_in_order() -> None:
    async def main() -> None:
        writer = Writer()
        dispatcher = begin(writer)
        await write(dispatcher, "first")
        await asyncio.gather(*(write(dispatcher, str(n)) for n in range(50)))
        assert writer.store.noted == ["first", *map(str, range(50))]
        assert len(writer.batches) <= 6
        await dispatcher.close()

    run(main)


def test_a_batch_that_grows_too_large_ends_and_the_rest_comes_again() -> None:
    async def main() -> None:
        writer = Writer(most=3)
        dispatcher = begin(writer)
        with writer.store.lock:
            answers = [dispatcher.submit(noting(str(n)), writes=True) for n in range(20)]
        assert await asyncio.gather(*answers) == [str(n) for n in range(20)]
        assert writer.store.noted == [str(n) for n in range(20)]
        assert max(count for _, count in writer.batches) <= 3
        await dispatcher.close()

    run(main)


def test_who_has_the_lock_makes_the_thread_wait_and_never_the_loop() -> None:
    async def main() -> None:
        writer = Writer()
        dispatcher = begin(writer)
        await write(dispatcher, "first")
        with writer.store.lock:
            answer = asyncio.ensure_future(write(dispatcher, "second"))
            for _ in range(20):
                await asyncio.sleep(0)
            assert not answer.done()
        await answer
        assert [by for by, _ in writer.batches] == ["thread", "thread"]
        await dispatcher.close()

    run(main)


def test_an_error_is_its_callers_alone() -> None:
    async def main() -> None:
        writer = Writer()
        dispatcher = begin(writer)

        def broken(_: Batch) -> str:
            raise LookupError("of this caller")

        answers = [
            dispatcher.submit(noting("a"), writes=True),
            dispatcher.submit(broken, writes=True),
            dispatcher.submit(noting("b"), writes=True),
        ]
        a, error, b = await asyncio.gather(*answers, return_exceptions=True)
        assert (a, type(error), b) == ("a", LookupError, "b")
        await dispatcher.close()

    run(main)


def test_an_answer_that_nobody_takes_is_undone() -> None:
    async def main() -> None:
        writer = Writer()
        dispatcher = begin(writer)
        undone: list[str] = []

        def cancelled_meanwhile(batch: Batch) -> str:
            loop.call_soon_threadsafe(answer.cancel)
            return noting("done")(batch)

        loop = asyncio.get_running_loop()
        answer = dispatcher.submit(cancelled_meanwhile, writes=True, undo=undone.append)
        await until(lambda: undone)
        assert undone == ["done"]
        await dispatcher.close()

    run(main)


def test_a_signals_handler_that_raises_leaves_the_outcome_open() -> None:
    async def main() -> None:
        writer = Writer()
        dispatcher = begin(writer)
        await write(dispatcher, "first")

        def interrupted(_: Batch) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            dispatcher.submit(interrupted, writes=True, small=True)
        assert writer.recovered == 1
        await asyncio.sleep(0)  # the next turn
        assert await write(dispatcher, "second") == "second"
        await dispatcher.close()

    run(main)


def test_upkeep_comes_behind_the_answers_and_on_the_thread() -> None:
    async def main() -> None:
        writer = Writer()
        dispatcher = begin(writer, upkeep=True)
        writer.wants_upkeep = True
        await write(dispatcher, "by the thread")
        await until(lambda: writer.kept == 1)
        await asyncio.sleep(0)
        writer.wants_upkeep = True
        await write(dispatcher, "by the loop")
        assert writer.batches[-1][0] == "loop" or writer.kept == 2
        await until(lambda: writer.kept == 2)
        await dispatcher.close()

    run(main)


def test_what_waits_in_vain_is_told_so_each_with_an_error_of_its_own() -> None:
    async def main() -> None:
        writer = Writer()
        dispatcher = begin(writer, stuck=lambda: StorageUnavailable("another process has the lock"))
        with writer.store.lock:
            answers = [dispatcher.submit(noting(str(n)), writes=True) for n in range(2)]
            errors = await asyncio.gather(*answers, return_exceptions=True)
        assert [str(error) for error in errors] == ["another process has the lock"] * 2
        assert errors[0] is not errors[1]
        await dispatcher.close()

    run(main)


def test_close_finishes_what_was_begun_and_ends_the_thread() -> None:
    async def main() -> None:
        writer = Writer()
        dispatcher = begin(writer)
        await write(dispatcher, "first")
        answers = [asyncio.ensure_future(write(dispatcher, str(n))) for n in range(5)]
        await asyncio.sleep(0)
        await dispatcher.close()
        assert await asyncio.gather(*answers) == [str(n) for n in range(5)]
        assert all(thread.name != "embedded-test" for thread in threading.enumerate())

    run(main)


def test_close_does_not_wait_for_ever() -> None:
    async def main() -> None:
        writer = Writer()
        dispatcher = begin(writer, close_timeout=0.05)
        with writer.store.lock:
            answer = dispatcher.submit(noting("late"), writes=True)
            await asyncio.sleep(0)
            await dispatcher.close()
            with pytest.raises(StorageError, match="closed"):
                await answer

    run(main)


def test_neighbours_hear_at_once_and_strangers_do_not() -> None:
    async def main() -> None:
        store = Store()
        a, b = (begin(Writer(store), place=("test", id(store))) for _ in range(2))
        stranger = begin(Writer(store))
        loop = asyncio.get_running_loop()
        waiting: list[asyncio.Future[None]] = []
        for dispatcher in (b, stranger):
            waiting.append(loop.create_future())
            dispatcher.watchers.add("r", 0, waiting[-1])
        await write(a, "by the thread")
        await until(waiting[0].done)  # no poll of b would have found it
        assert not waiting[1].done()
        assert b.watchers.take_work_news()
        for dispatcher in (a, b, stranger):
            await dispatcher.close()

    run(main)


def test_an_error_for_many_is_copied_unless_its_class_cannot_be() -> None:
    class Odd(Exception):
        def __init__(self, *, name: str) -> None:
            super().__init__(name)

    error = StorageUnavailable("lost")
    error.__cause__ = cause = OSError("io")
    copy = copy_error(error)
    assert copy is not error
    assert (type(copy), copy.args, copy.__cause__) == (StorageUnavailable, ("lost",), cause)
    odd = Odd(name="x")
    assert copy_error(odd) is odd


# --- the backend ------------------------------------------------------------------------------


class Backend(EmbeddedBackend[Batch]):
    """The calls that these tests need; the others stay abstract."""

    def __init__(self, store: Store | None = None) -> None:
        super().__init__()
        self.store = store or Store()
        self.writers: list[Writer] = []

    def _begin(self, loop: asyncio.AbstractEventLoop) -> Dispatcher[Batch]:
        writer = Writer(self.store)
        self.writers.append(writer)
        return Dispatcher(writer, loop, name="embedded-test", close_timeout=30)

    def info(self) -> StorageInfo:
        return StorageInfo(
            contract_version=2,
            name="test",
            location="a place",
            namespace="default",
            capabilities=Capabilities(),
        )

    async def open(self) -> None:
        await self._read(nothing, small=True)

    async def commit(self, changes: Sequence[Change]) -> Any:
        def commit(batch: Batch) -> Any:
            store, now = batch.store, batch.now
            return [store.commit(change, now=now, token=lambda: "t")[0] for change in changes]

        return await self._write(commit, small=True)

    async def get_run(self, run_id: str) -> Any:
        return await self._read(lambda batch: batch.store.get_run(run_id, now=batch.now))

    async def claim(self, request: ClaimRequest) -> Claimed:
        def claim(batch: Batch) -> Claimed:
            claims, _ = batch.store.claim(request, now=batch.now, token=lambda: "c")
            return Claimed(claims=claims, now=batch.now)

        def release(ref: ClaimRef, batch: Batch) -> bool:
            return batch.store.release(ref, None, now=batch.now)[0]

        return await self._claim(claim, release, small=True)


Backend.__abstractmethods__ = frozenset()  # the contract's other calls are nothing to these tests


def create(run_id: str) -> Change:
    return Change(
        run_id=run_id,
        key=f"start:{run_id}",
        create=NewRun(workflow="w", version="1", args="[]"),
        events=[Event("workflow.started", "I", {"workflow": "w"}, key="started")],
    )


def test_an_object_belongs_to_the_loop_that_first_used_it() -> None:
    backend = Backend()
    asyncio.run(backend.open())
    with pytest.raises(StorageError, match=r"another event loop: location=a place; use clone\(\)"):
        asyncio.run(backend.open())
    asyncio.run(backend.close())
    with pytest.raises(StorageError, match="was closed: location=a place; make another object"):
        asyncio.run(backend.open())


def test_an_object_that_nobody_closed_ends_its_thread_when_it_is_gone() -> None:
    backend = Backend()
    asyncio.run(backend.open())
    (writer,) = backend.writers
    del backend
    gc.collect()
    end = time.monotonic() + 20
    while not writer.closed and time.monotonic() < end:
        time.sleep(0.001)
    assert writer.closed == 1


def test_a_claim_whose_caller_was_cancelled_is_given_back() -> None:
    async def main() -> None:
        backend = Backend()
        await backend.commit_one(create("r"))
        request = ClaimRequest(owner="o", limit=1, lease=MINUTE)
        with backend.store.lock:
            claim = asyncio.ensure_future(backend.claim(request))
            for _ in range(5):
                await asyncio.sleep(0)
            claim.cancel()
        with pytest.raises(asyncio.CancelledError):
            await claim
        # Cancelled before or behind the batch, the item is free in the end.
        async with asyncio.timeout(20):
            while not (await backend.claim(request)).claims:  # noqa: ASYNC110  no event to wait for
                await asyncio.sleep(0.001)
        await backend.close()

    run(main)


def test_watch_hears_of_this_objects_changes_and_times_out() -> None:
    async def main() -> None:
        backend = Backend()
        watch = asyncio.ensure_future(backend.watch("r", after=0, timeout=MINUTE))
        await asyncio.sleep(0)
        await backend.commit_one(create("r"))
        assert await watch
        assert not await backend.watch("r", after=1, timeout=timedelta(milliseconds=5))
        await backend.close()

    run(main)


# --- forks ------------------------------------------------------------------------------------


class Thing:
    def __init__(self) -> None:
        self.told: list[str] = []
        add_forkable(self)

    def before_fork(self) -> None:
        self.told.append("before")

    def after_fork(self) -> None:
        self.told.append("after")

    def after_fork_in_child(self) -> None:
        self.told.append("after_fork_in_child")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # other tests left threads
def test_a_fork_is_told_to_both_sides() -> None:
    thing = Thing()
    child = os.fork()
    if child == 0:
        os._exit(0 if thing.told == ["before", "after_fork_in_child"] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert thing.told == ["before", "after"]
