"""How a store object behaves in its process: secrets, constructors, loops, and whose clock."""
# ruff: noqa: N802 - the ids are part of the names

from __future__ import annotations

import asyncio
import os
import socket
import threading
import traceback
from collections.abc import Awaitable, Callable
from contextlib import closing
from urllib.parse import parse_qs, urlsplit, urlunsplit

from pyworkflow.errors import StorageError, StorageUnavailable
from pyworkflow.spi.storage import ClaimRequest, StorageBackend
from pyworkflow.testing.internals import make_storage
from pyworkflow_conformance import _false_clock
from pyworkflow_conformance._case import Case, Suite, note, scenario, seconds, turn
from pyworkflow_conformance._children import Child

__all__ = ["ConductChecks"]

SECRET = "conformance-s3cret"
#: Seconds for a call that should fail at once.
PATIENCE = 20.0
#: Seconds for which a server is paused, and turns of the loop that it must make meanwhile.
PAUSED, TURNS = 10.0, 5
#: Claims that find nothing, and how often they are made until nothing was written.
EMPTY, LOOKS = 5, 8


class ConductChecks(Suite):
    """META-06, META-07, CON-18, CON-19, CLM-32, TIM-08."""

    @scenario(needs=("url",))
    async def test_META_06_no_password_shown(self, t: Case) -> None:
        """META-06: a password of the URL occurs in no location, ``repr`` or message.

        Locations and messages are logged, and are in the reports of this suite. Usual cause: the
        URL is kept as text and shown, or the driver's message is passed on as it is.
        """
        url = self.url(t.namespace)
        assert url is not None
        parts = urlsplit(url)
        secrets = [parts.password, *parse_qs(parts.query).get("password", [])]
        for secret in filter(None, secrets):
            _hides(secret, repr(t.store.info()), _shown(t.store))
        if not parts.hostname:
            return
        with closing(_listener()) as server:
            port = server.getsockname()[1]
        # The server is gone: what is said of it must not repeat the URL.
        at = f"user:{SECRET}@127.0.0.1:{port}"
        query = f"{parts.query}&password={SECRET}".lstrip("&")
        for location, options in ((at, parts.query), (f"127.0.0.1:{port}", query)):
            dead = urlunsplit((parts.scheme, location, parts.path, options, ""))
            try:
                store = make_storage(dead, t.namespace)
                _hides(SECRET, repr(store.info()), _shown(store))
                try:
                    async with asyncio.timeout(PATIENCE):
                        await store.open()
                        await store.now()
                finally:
                    await store.close()
            except Exception as error:  # noqa: BLE001 - whatever it raises is shown to users
                _hides(SECRET, repr(error), "".join(traceback.format_exception(error)))

    @scenario(needs=("url",))
    async def test_META_07_making_one_does_no_io(self, t: Case) -> None:
        """META-07: making an object of a URL, and asking for its ``info``, connects to nothing.

        Objects are made where waiting is forbidden, and before the server is there. Usual cause:
        a constructor that opens a pool, or asks the server for its limits.
        """
        url = self.url(t.namespace)
        assert url is not None
        parts = urlsplit(url)
        if not parts.hostname:
            return
        with closing(_listener()) as server:
            server.settimeout(0.2)
            at = f"127.0.0.1:{server.getsockname()[1]}"
            silent = urlunsplit((parts.scheme, at, parts.path, parts.query, ""))
            made = threading.Thread(target=_make, args=(silent, t.namespace), daemon=True)
            made.start()
            try:
                server.accept()[0].close()
            except TimeoutError:
                pass
            else:
                raise AssertionError("making the object, or its info, connects to the server")
            await asyncio.to_thread(made.join, PATIENCE)
            assert not made.is_alive(), "making the object waits for the server"

    @scenario
    async def test_CON_18_another_loop_works_or_is_refused(self, t: Case) -> None:
        """CON-18: an object used from a second event loop works, or says what to do instead.

        A ``StorageError`` that is no outage: the engine would repeat the call for ever. Usual
        cause: locks and connections of the first loop are awaited in the second.
        """
        await t.start()
        store = getattr(t.store, "recorded", t.store)
        request = ClaimRequest(owner="other", lease=seconds(60), items=[("nothing", "turn")])
        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: store.get_run("run"),
            store.now,
            lambda: store.claim(request),
            lambda: store.commit_one(t.outside(events=[note()])),
        ]
        for call in calls:
            try:
                await asyncio.to_thread(asyncio.run, _within(call))
            except StorageUnavailable as error:
                raise AssertionError(f"refused as an outage: {error!r}") from error
            except StorageError:
                pass
            assert (await t.run()).run_id == "run", "the object's own loop was disturbed"
            await t.send(note())

    @scenario(needs=("server",))
    async def test_CON_19_a_slow_server_blocks_no_loop(self, t: Case) -> None:
        """CON-19: while a call waits for the server, the event loop goes on.

        A worker renews its leases and runs other steps meanwhile. Usual cause: a blocking driver
        is called in the loop, not in a thread.
        """
        await t.start()
        server = self.server(t.namespace)
        assert server is not None
        await t.run()
        await asyncio.to_thread(server.pause)
        # Only for a loop that is blocked: nothing in it could resume the server.
        rescue = threading.Timer(PAUSED, server.resume)
        rescue.start()
        try:
            call = asyncio.ensure_future(t.store.get_run("run"))
            for _ in range(TURNS):
                await asyncio.sleep(0.01)
            blocked = not rescue.is_alive()
            assert blocked or not call.done(), "the call was answered while the server was paused"
        finally:
            rescue.cancel()
            await asyncio.to_thread(server.resume)
        assert not blocked, f"the loop was blocked for the {PAUSED} s that the server was paused"
        assert await call is not None

    @scenario(needs=("writes",))
    async def test_CLM_32_a_claim_of_nothing_writes_nothing(self, t: Case) -> None:
        """CLM-32: a claim of whatever is due, when nothing is, leaves no trace in the store.

        Every idle worker asks once a second. Usual cause: a statement that notes the time of the
        look or the worker that asked, or a row that is written back as it was.
        """
        later = await t.store.now() + seconds(3600)
        await t.start("later", events=[], put=[turn(due_at=later)])
        await t.start("held")
        await t.turn("held")
        await t.start("elsewhere", queue="another")
        before = await asyncio.to_thread(self.writes, t.namespace)
        await t.send(note(), run_id="held")
        after = await asyncio.to_thread(self.writes, t.namespace)
        assert after != before, "the suite's writes does not notice an event that was written"
        mine = frozenset({"default"})
        for _ in range(LOOKS):  # a server may write something of its own meanwhile
            before = await asyncio.to_thread(self.writes, t.namespace)
            for _ in range(EMPTY):
                assert await t.claim(queues=mine) == []
            after = await asyncio.to_thread(self.writes, t.namespace)
            if after == before:
                return
        raise AssertionError(f"claims of nothing wrote: before={before} after={after}")

    @scenario(needs=("multi_host", "server_clock", "url"))
    async def test_TIM_08_a_client_with_a_false_clock(self, t: Case) -> None:
        """TIM-08: a process whose clock is an hour ahead sees, stamps and claims by the store's.

        Clocks of machines differ. Usual cause: the time comes from the client, as a parameter of
        the statement.
        """
        before = await t.store.now()
        now = before.timestamp()
        await t.start(events=[], put=[turn(due_at=before + seconds(1800))])
        async with Child(t, "clock", script=_false_clock.__file__) as child:
            found = await child.line("now")
            await child.finished()
        assert abs((await t.store.now()).timestamp() - now) < 600, "the client moved the clock"
        assert abs(found["now"] - now) < 600, f"now is the client's: {found['now']}, {now}"
        assert abs(found["stamped"] - now) < 600, "events are stamped by the client's clock"
        assert found["claimed"] == ["of-child"], "a timer of half an hour fired at once"
        assert abs(found["until"] - now) < 600, "the lease ends by the client's clock"


def _hides(secret: str, *texts: str) -> None:
    # The message does not repeat the text either: it would be shown in turn.
    for text in texts:
        assert (secret in text) is False, f"the password is shown: {text.replace(secret, '***')}"


def _shown(store: StorageBackend) -> str:
    store = getattr(store, "recorded", store)
    return f"{store!r} {store} {store.info().location}"


def _listener() -> socket.socket:
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    server.listen()
    return server


def _make(url: str, namespace: str) -> None:
    make_storage(url, namespace).info()


async def _within(call: Callable[[], Awaitable[object]]) -> object:
    try:
        async with asyncio.timeout(PATIENCE):
            return await call()
    except TimeoutError:
        raise AssertionError(f"a call from another loop hangs: pid={os.getpid()}") from None
