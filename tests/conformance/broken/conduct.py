"""Objects that behave badly in their process, made by ``broken://`` URLs."""

from __future__ import annotations

import asyncio
import socket
import threading
import weakref
from dataclasses import replace
from urllib.parse import urlsplit

from pyworkflow.errors import StorageUnavailable
from pyworkflow.spi import hookimpl
from tests.conformance.broken.stores import Broken

#: What belongs to the first loop that used a store.
FIRST = weakref.WeakKeyDictionary()


class Plugin:
    """Serves ``broken://`` URLs with one broken store."""

    def __init__(self, kind):
        self.kind = kind

    @hookimpl
    def pyworkflow_make_storage(self, url, options):
        if urlsplit(url).scheme != "broken":
            return None
        store = self.kind(namespace=options["namespace"])
        store.connect(url)
        return store


class Polite(Broken):
    """Nothing is wrong: its server is not there, and it says so."""

    url = None

    def connect(self, url):
        self.url = url

    async def open(self):
        if self.url is not None:
            raise StorageUnavailable(f"no server: host={urlsplit(self.url).hostname}")
        await super().open()


class SecretInLocation(Polite):
    def info(self):
        return replace(super().info(), location=self.url or "memory")


class SecretInRepr(Polite):
    def __repr__(self):
        return f"SecretInRepr({self.url!r})"


class SecretInError(Polite):
    async def open(self):
        if self.url is not None:
            raise StorageUnavailable(f"the server does not answer: {self.url}")
        await super().open()


class SecretInCause(Polite):
    async def open(self):
        if self.url is not None:
            try:
                raise OSError(f"connection refused: {self.url}")
            except OSError as error:
                raise StorageUnavailable("the server does not answer") from error
        await super().open()


class ConnectsInConstructor(Polite):
    def connect(self, url):
        super().connect(url)
        parts = urlsplit(url)
        socket.create_connection((parts.hostname, parts.port), timeout=5).close()


class NoLoopCheck(Broken):
    """Waits in any loop for what belongs to its first one."""

    async def get_run(self, run_id):
        turn = FIRST.get(self._shared)
        if turn is None:
            turn = FIRST[self._shared] = asyncio.get_running_loop().create_future()
            turn.get_loop().call_soon(turn.set_result, None)
        elif turn.get_loop() is not asyncio.get_running_loop():
            turn = turn.get_loop().create_future()
        await turn
        return await super().get_run(run_id)


class RefusesLoopsAsOutage(Broken):
    """Calls a second loop an outage, which the engine waits out for ever."""

    async def get_run(self, run_id):
        loop = asyncio.get_running_loop()
        if FIRST.setdefault(self._shared, loop) is not loop:
            raise StorageUnavailable("the connection belongs to another loop")
        return await super().get_run(run_id)


class Gate:
    """A server that answers when it is not paused."""

    def __init__(self):
        self.open = threading.Event()
        self.open.set()

    def pause(self):
        self.open.clear()

    def resume(self):
        self.open.set()


GATE = Gate()


class Waits(Broken):
    async def get_run(self, run_id):
        await asyncio.to_thread(GATE.open.wait)
        return await super().get_run(run_id)


class BlocksLoop(Broken):
    """Calls a blocking driver in the loop."""

    async def get_run(self, run_id):
        GATE.open.wait()
        return await super().get_run(run_id)
