"""When the loop may write by itself, and who waits for news: both without a clock of their own."""

import asyncio

from pyworkflow_storage_file._pace import Pace
from pyworkflow_storage_file._watchers import Watchers

FAST, SLOW = 150_000, 12_000_000


def test_nothing_is_fast_before_the_first_flush():
    pace = Pace()
    assert not pace.is_fast
    pace.flushed(FAST)
    assert pace.is_fast


def test_slow_flushes_leave_the_next_ones_to_the_thread_and_then_it_is_asked_again():
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


def test_a_disk_that_stays_slow_is_never_waited_for():
    pace = Pace()
    for _ in range(1000):
        pace.flushed(SLOW)
        assert not pace.is_fast


def test_stalls_far_from_each_other_change_nothing():
    pace = Pace()
    for took in (FAST, 60_000_000_000, *[FAST] * 10, SLOW, *[FAST] * 10, 2_000_000, 2_000_000):
        pace.flushed(took)
        assert pace.is_fast


def test_a_mean_of_more_than_a_millisecond_is_slow():
    pace = Pace()
    pace.flushed(FAST)
    for _ in range(30):
        pace.flushed(1_200_000)
    assert not pace.is_fast


class Loop:
    """A loop whose time the test moves; it keeps what is to be called when."""

    def __init__(self):
        self.now = 0.0
        self.timers = []

    def time(self):
        return self.now

    def call_at(self, when, call):
        self.timers.append((when, call))
        return self

    def call_later(self, delay, call):
        return self.call_at(self.now + delay, call)

    def advance(self, seconds):
        self.now += seconds
        due = [timer for timer in self.timers if timer[0] <= self.now]
        self.timers = [timer for timer in self.timers if timer not in due]
        for _, call in due:
            call()


def test_operations_that_were_answered_take_the_place_of_a_poll():
    async def main():
        looks = []

        def look():
            looks.append(time.now)
            future = asyncio.get_running_loop().create_future()
            future.set_result(None)
            return future

        time = Loop()
        watchers = Watchers(time, look)
        news = asyncio.get_running_loop().create_future()
        watchers.add("r", 0, news)
        for _ in range(500):  # somebody commits every millisecond
            watchers.tell({"other": (1, False)}, False)
            time.advance(0.001)
        assert looks == []
        for _ in range(40):  # and stops
            time.advance(0.001)
            await asyncio.sleep(0)
        assert len(looks) in {1, 2}
        watchers.tell({"r": (1, False)}, False)
        assert news.done()
        watchers.drop("r", news)
        time.advance(1)
        await asyncio.sleep(0)
        assert time.timers == []

    asyncio.run(main())
