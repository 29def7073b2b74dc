"""The sweeper of a worker: rings for what is due as soon as it is, and sleeps in between.

Any number may run, in any number of workers: what one rang for is mute for the others.
"""

from __future__ import annotations

import asyncio
import logging
import random
from time import monotonic

from pyworkflow.errors import ConfigurationError
from pyworkflow.worker import Backoff
from pyworkflow_celery._process import Host

__all__ = ["sweep_for_ever"]

_SWEEP = 100
"""Items of one sweep."""
_LONGEST = 5.0
"""Seconds between looks at a store that has nothing to do and no news."""
_NEWS = 0.1
"""Seconds between looks at a store that has news all the time."""
_WAITING = (0.05, 0.1, 0.2, 0.4, 0.5)
"""Seconds between looks while what is due was rung for and waits for workers: soon, since what
becomes due meanwhile is not seen behind it, and then more seldom, since nobody may come.
"""
_ASKED = 4
"""Every how many such looks the store is asked whether something still waits."""
_GONE = 2.0
"""Seconds between looks for processes of this machine that are gone and held something."""


async def sweep_for_ever(standing: Host) -> None:
    """Sweep until the host drains."""
    outages = standing.outages
    backoff = Backoff(outages.jitter)
    looks, looked = 0, monotonic()
    while not standing.draining:
        try:
            if monotonic() - looked > _GONE:
                looked = monotonic()
                await (await standing.runtime()).free_gone()
            looks = await _sweep_once(standing, looks)
        except ConfigurationError as exc:
            outages.failed("sweep", "no sweep, this worker cannot work", exc, level=logging.ERROR)
            await outages.pause(backoff.seconds(exc))
        except Exception as exc:  # noqa: BLE001 - a backend's own bug must not end the sweeper
            outages.failed("sweep", "no sweep, the storage does not answer", exc)
            await outages.pause(backoff.seconds(exc))
        else:
            backoff.reset()
            outages.worked("sweep")


async def _sweep_once(standing: Host, looks: int) -> int:
    """Sweep and sleep; how often in a row there may have been nothing but what was rung for."""
    runtime = await standing.runtime()
    began = monotonic()
    rang = await runtime.sweep(_SWEEP)
    if rang >= _SWEEP:
        await asyncio.sleep(0)
        return 0
    if rang:
        # It is due until a worker has it: to ask when the next is due would tell nothing.
        return await _rest(0)
    if looks % _ASKED > 1:
        return await _rest(looks)
    left = await runtime.seconds_until_due()
    if left is not None and left <= 0:
        return await _rest(looks)
    timeout = _LONGEST if left is None else min(left, _LONGEST)
    if await runtime.wait_for_news(timeout):
        # News come with every commit: a busy store is not looked at for each of them.
        rest = began + min(timeout, _NEWS) - monotonic()
        await asyncio.sleep(max(0.0, rest))
    return 0


async def _rest(looks: int) -> int:
    # Not all sweepers look at the same time.
    pause = _WAITING[min(looks, len(_WAITING) - 1)] * random.uniform(0.8, 1.2)
    await asyncio.sleep(pause)
    return looks + 1
