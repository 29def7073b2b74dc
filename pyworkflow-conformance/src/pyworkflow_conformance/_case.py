"""What every check works with: a store of its own, and short ways to write changes."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast, overload
from uuid import uuid4

import pytest

from pyworkflow.errors import ConfigurationError, WorkflowError
from pyworkflow.events import Event, Json
from pyworkflow.runs import ItemKind, Run, RunStatus, WorkItem
from pyworkflow.spi.capabilities import Capabilities
from pyworkflow.spi.storage import (
    TURN,
    Change,
    Claim,
    ClaimRef,
    ClaimRequest,
    Committed,
    NewRun,
    Put,
    StorageBackend,
)
from pyworkflow.storekit import fsck
from pyworkflow.testing.internals import make_storage
from pyworkflow_conformance._clock import shift_clock
from pyworkflow_conformance._record import Record
from pyworkflow_conformance._told import from_check, headline

__all__ = [
    "Case",
    "Server",
    "Suite",
    "command",
    "deliver",
    "given",
    "in_threads",
    "incoming",
    "note",
    "overrides",
    "scenario",
    "seconds",
    "started",
    "step",
    "turn",
    "under",
]

E = TypeVar("E", bound=WorkflowError)
S = TypeVar("S", bound="Suite")
R = TypeVar("R")

SEED = "PYWORKFLOW_CONFORMANCE_SEED"
LIMIT = "PYWORKFLOW_CONFORMANCE_LIMIT"
LIMIT_S = 600.0
#: Seconds that a check of a declared gap may take to fail.
GAP_PATIENCE = 60.0
#: Changes that a check sends at once.
BATCH = 200


def _seed_given() -> int:
    text = os.environ.get(SEED, "0")
    try:
        return int(text)
    except ValueError:
        raise ConfigurationError(f"the seed is no whole number: {SEED}={text!r}") from None


def seconds(number: float) -> timedelta:
    """A duration, shorter to read."""
    return timedelta(seconds=number)


def started() -> Event:
    """The first event of a run."""
    return Event("workflow.started", "I", {"workflow": "flow", "args": "[]"})


def incoming(key: str | None = None, **data: Json) -> Event:
    """An input."""
    return Event("timer.fired", "I", data, key=key)


def command(op: str = "1#1:sleep", **data: Json) -> Event:
    """A command."""
    return Event("sleep.created", "C", data, op=op)


def note(message: str = "", key: str | None = None) -> Event:
    """An observation."""
    return Event("log.info", "O", {"message": message}, key=key)


def turn(**fields: Any) -> Put:
    """A put of the turn."""
    return Put(item_id=TURN, kind=ItemKind.TURN, **fields)


def step(name: str = "1", **fields: Any) -> Put:
    """A put of a step."""
    return Put(item_id=f"step:{name}", kind=ItemKind.STEP, **fields)


def deliver(name: str = "1", **fields: Any) -> Put:
    """A put of a delivery."""
    return Put(item_id=f"deliver:{name}", kind=ItemKind.DELIVER, **fields)


def under(claim: Claim | WorkItem, n: int = 1, **fields: Any) -> Change:
    """The ``n``-th change under a claim."""
    item = claim.item if isinstance(claim, Claim) else claim
    assert item.lease is not None
    ref = ClaimRef(item.run_id, item.item_id, item.lease.token)
    return Change(run_id=item.run_id, key=f"{ref.token}:{n}", claim=ref, **fields)


def overrides(store: StorageBackend, method: str) -> bool:
    """Whether the backend has a method of its own instead of the contract's default."""
    used: object = getattr(store, "recorded", store)
    return getattr(type(used), method) is not getattr(StorageBackend, method)


class Case:
    """One check's store."""

    def __init__(self, suite: Suite, namespace: str) -> None:
        self.suite = suite
        self.namespace = namespace
        self.record = Record()
        self._opened: list[StorageBackend] = []
        self._keys = 0
        self.store: StorageBackend

    async def open(self, namespace: str | None = None, *, url: str | None = None) -> StorageBackend:
        """Another object, as a second process has it; on the check's namespace unless given.

        Args:
            namespace: Another one than the check's.
            url: A store of its own, not the suite's.
        """
        namespace = namespace or self.namespace
        made = await self.suite.make(namespace) if url is None else make_storage(url, namespace)
        store = self.record.of(made)
        await store.open()
        self._opened.append(store)
        return store

    async def close(self) -> None:
        """Close every object that the check made."""
        for store in self._opened:
            await store.close()

    def outside(self, run_id: str = "run", key: str | None = None, **fields: Any) -> Change:
        """A change from outside, under a key of its own unless given."""
        self._keys += 1
        return Change(run_id=run_id, key=key or f"outside:{self._keys}", **fields)

    async def start(
        self,
        run_id: str = "run",
        *,
        key: str = "start",
        put: Sequence[Put] = (),
        events: Sequence[Event] | None = None,
        store: StorageBackend | None = None,
        **new: Any,
    ) -> Committed:
        """Create a run with its first event, and so with a due turn."""
        fields: dict[str, Any] = {"workflow": "flow", "version": "1", "args": "[]", **new}
        create = NewRun(**fields)
        return await (store or self.store).commit_one(
            Change(
                run_id=run_id,
                key=key,
                create=create,
                events=[started()] if events is None else events,
                put=put,
            )
        )

    async def write(self, change: Change, *, store: StorageBackend | None = None) -> Committed:
        """Commit one change; raises its refusal."""
        return await (store or self.store).commit_one(change)

    async def write_all(self, changes: Sequence[Change]) -> None:
        """Commit many changes, in batches; each must be accepted."""
        for first in range(0, len(changes), BATCH):
            for answer in await self.store.commit(changes[first : first + BATCH]):
                if isinstance(answer, Exception):
                    raise answer

    async def start_many(self, number: int, **new: Any) -> list[str]:
        """Create runs ``run-00000`` and so on, each with its first event; their ids."""
        ids = [f"run-{n:05}" for n in range(number)]
        fields: dict[str, Any] = {"workflow": "flow", "version": "1", "args": "[]", **new}
        await self.write_all(
            [
                Change(
                    run_id=run_id,
                    key="start",
                    create=NewRun(**dict[str, Any](fields, idempotency_key=f"key-of-{run_id}")),
                    events=[started()],
                )
                for run_id in ids
            ]
        )
        return ids

    async def send(self, *events: Event, run_id: str = "run") -> Committed:
        """Events from outside."""
        return await self.store.commit_one(self.outside(run_id, events=list(events)))

    async def claim(
        self,
        *items: tuple[str, str],
        owner: str = "worker-a",
        lease: float = 60,
        store: StorageBackend | None = None,
        **fields: Any,
    ) -> list[Claim]:
        """Claim by reference, or by poll when no item is named."""
        fields.setdefault("limit", max(1, len(items)))
        request = ClaimRequest(owner=owner, lease=seconds(lease), items=items or None, **fields)
        return list((await (store or self.store).claim(request)).claims)

    async def turn(self, run_id: str = "run", **fields: Any) -> Claim:
        """Claim the run's turn, which must be there to be claimed."""
        claims = await self.claim((run_id, TURN), **fields)
        assert len(claims) == 1, f"the turn of {run_id!r} cannot be claimed"
        return claims[0]

    async def run(self, run_id: str = "run") -> Run:
        """The run, which must exist."""
        run = await self.store.get_run(run_id)
        assert run is not None, f"no run {run_id!r}"
        return run

    async def items(self, run_id: str = "run") -> dict[str, WorkItem]:
        """The run's items by id."""
        return {item.item_id: item for item in await self.store.list_work(run_id)}

    async def end(self, run_id: str = "run", status: RunStatus = RunStatus.COMPLETED) -> None:
        """Claim the run's turn and end the run."""
        claim = await self.turn(run_id)
        done = Event("workflow.completed", "C", {"result": "null"})
        await self.store.commit_one(
            under(claim, 99, seen=claim.run.history_length, events=[done], final=status)
        )

    async def shift(self, by: float) -> None:
        """Move the storage's clock by seconds."""
        await shift_clock(self.store, seconds(by))

    async def picture(self, run_id: str = "run") -> object:
        """Everything that the store shows of a run, to compare."""
        run = await self.store.get_run(run_id)
        return (
            run and replace(run, status=RunStatus.PENDING),
            await self.store.get_events(run_id),
            await self.store.list_work(run_id),
        )

    async def refused(self, kind: type[E], change: Change, *, run_id: str = "run") -> E:
        """The refusal of a change, after proof that nothing was written."""
        before = await self.picture(run_id)
        try:
            await self.store.commit_one(change)
        except WorkflowError as error:
            if not isinstance(error, kind):
                raise AssertionError(f"expected {kind.__name__}, got {error!r}") from error
            refusal = error
        else:
            raise AssertionError(f"expected {kind.__name__}, but the change was accepted")
        assert await self.picture(run_id) == before, "a refused change wrote something"
        return refusal


class Suite:
    """What the groups of checks have in common."""

    #: What the backend declares; the suite proves it.
    capabilities = Capabilities()

    #: Decides all that a check leaves to chance. A failure names it: give it again to repeat it,
    #: here or as PYWORKFLOW_CONFORMANCE_SEED.
    seed: int = _seed_given()

    #: Begins the name of every namespace that the checks use.
    namespace_prefix = ""

    #: Versions whose stores are kept; ``make_released`` puts one in place. For MIG-02.
    released: Sequence[str] = ()

    #: When a run has a URL and no ``make_fresh``: what went wrong as eight processes opened the
    #: store at once, before anything else did. None: not tried.
    opened_first: Sequence[str] | None = None

    #: The namespaces that these processes used.
    opened_namespaces: Sequence[str] = ()

    async def make(self, namespace: str) -> StorageBackend:
        """A store object, not opened.

        The first call with a namespace makes an empty store; later ones are further objects on
        it, as another process or a restart has them.
        """
        raise NotImplementedError

    def url(self, namespace: str) -> str | None:
        """The storage URL under which another process opens the same store, if there is one.

        Checks with processes of their own need it. ``namespace`` is given to ``make_storage``
        beside the URL and need not be part of it.
        """
        return None

    def server(self, namespace: str) -> Server | None:
        """Control over the server behind the store, for checks that kill and restart it."""
        return None

    def files(self, namespace: str) -> list[Path]:
        """The files that hold the namespace, for checks that damage them; empty for none."""
        return []

    def writes(self, namespace: str) -> object:
        """What differs once something was written to the store, for CLM-32. Blocks.

        A server's position in its log, its count of written rows; sizes and times of files.
        """
        raise NotImplementedError

    async def make_fresh(self) -> str:
        """The URL of a place where nothing was made yet, for MIG-08: another one with each call.

        An empty database, server or folder. A new namespace is not enough where namespaces share
        tables, and harmless where they do not.
        """
        raise NotImplementedError

    async def make_newer(self, namespace: str) -> None:
        """Mark the existing store as written by a later version, for MIG-06."""
        raise NotImplementedError

    async def make_released(self, version: str, namespace: str) -> None:
        """Put the kept store of a released version in place, for MIG-02."""
        raise NotImplementedError

    async def finished(self) -> None:
        """Called after every check, with its stores closed: tidy up what ``make`` left behind."""


class Server(Protocol):
    """A server that the suite may stop: no other test uses it at that time.

    The four methods block, and are called in a thread. One object may serve all namespaces.
    """

    def kill(self) -> None:
        """SIGKILL to the whole server; returns when it is gone."""
        ...

    def start(self) -> None:
        """Start it again on the same data and address; returns when it answers."""
        ...

    def pause(self) -> None:
        """SIGSTOP."""
        ...

    def resume(self) -> None:
        """SIGCONT."""
        ...


Body = Callable[[S, Case], Awaitable[None]]


@overload
def scenario(check: Body[S]) -> Callable[[S], None]: ...


@overload
def scenario(
    *, needs: Sequence[str], sampled: bool = False
) -> Callable[[Body[S]], Callable[[S], None]]: ...


def scenario(
    check: Body[S] | None = None, *, needs: Sequence[str] = (), sampled: bool = False
) -> Callable[[S], None] | Callable[[Body[S]], Callable[[S], None]]:
    """Make a test of a check: a store of its own, a loop of its own, ``fsck`` at the end.

    ``needs``: capabilities without which the check does not apply, and of ``url``, ``server``,
    ``files``, ``make_fresh``, ``writes`` what the suite must know how to give. ``sampled``: it looks at a sample, so that a
    declared gap may pass.
    """
    if check is None:
        return lambda check: _test_of(check, needs, sampled)
    return _test_of(check, needs, sampled)


def _test_of(check: Body[S], needs: Sequence[str], sampled: bool) -> Callable[[S], None]:
    name = check.__name__
    group, number = name.removeprefix("test_").split("_")[:2]
    check_id = f"{group}-{number}"

    def test(self: S) -> None:
        __tracebackhide__ = True
        missing = [need for need in needs if not _has(self, need)]
        if missing:
            pytest.skip(f"does not apply: {check_id} needs {', '.join(missing)}")
        gap = self.capabilities.gaps.get(check_id)
        if gap is None:
            try:
                asyncio.run(_drive(self, check, check_id))
            except Exception as error:  # noqa: BLE001 - raised again, without the loop's frames
                raise error.with_traceback(
                    from_check(error.__traceback__, check.__code__)
                ) from error.__cause__
            return
        try:
            asyncio.run(asyncio.wait_for(_drive(self, check, check_id), GAP_PATIENCE))
        except Exception:  # noqa: BLE001 - a gap may fail in any way
            pytest.xfail(f"declared gap: {gap}")
        if sampled:
            pytest.xfail(f"declared gap, not met by this sample: {gap}")
        pytest.fail(f"{check_id} is declared a gap and passes: take it out of Capabilities.gaps")

    # Not functools.wraps: pytest would look at the check's own signature.
    test.__name__, test.__qualname__ = name, check.__qualname__
    test.__doc__, test.__module__ = check.__doc__, check.__module__
    vars(test)["needs"] = tuple(needs)
    return test


def given(suite: Suite, member: str) -> bool:
    """Whether the suite knows how to give it: overridden, only then it does."""
    return getattr(type(suite), member) is not getattr(Suite, member)


def _has(suite: Suite, need: str) -> bool:
    if need == "make_fresh" and suite.opened_first is not None:
        return True
    if need in {"url", "server", "files", "make_fresh", "writes"}:
        return given(suite, need)
    return bool(getattr(suite.capabilities, need))


async def _drive(suite: S, check: Callable[[S, Case], Awaitable[None]], check_id: str) -> None:
    name = f"{suite.namespace_prefix}{check_id}-{uuid4().hex[:12]}".lower()
    case = Case(suite, name)
    limit = time_limit()
    # A loop that is blocked can end nothing: a thread says where it is.
    watchdog = threading.Timer(limit + 10, _blocked, (case, check_id, threading.get_ident()))
    watchdog.daemon = True
    watchdog.start()
    waiting: list[str] = []

    def over(patience: asyncio.Timeout) -> None:
        # Before the calls are cancelled.
        waiting.append(_in_progress(case))
        patience.reschedule(0)

    patience = asyncio.timeout(None)
    try:
        async with patience:
            asyncio.get_running_loop().call_later(limit, over, patience)
            case.store = await case.open()
            await check(suite, case)
            violations = await fsck(await case.open())
            assert not violations, "fsck: " + "; ".join(map(str, violations[:10]))
    except Exception as error:  # noqa: BLE001 - raised again below, as a failure of the check
        told = (
            f"{error}" if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
        )
        if patience.expired():
            told = f"not over after {limit:g} s; calls in progress:\n  {waiting[0]}"
        # A new one: the docstring comes first, and what it says is not repeated.
        failure = AssertionError(f"{headline(check.__doc__)}{told}")
        failure.add_note(await _circumstances(suite, case, check_id))
        cause = error.__cause__ if isinstance(error, AssertionError) else error
        raise failure.with_traceback(error.__traceback__) from cause
    finally:
        watchdog.cancel()
        await case.close()
        await suite.finished()


def time_limit() -> float:
    """Seconds that a check may take: ``PYWORKFLOW_CONFORMANCE_LIMIT``, or ten minutes."""
    text = os.environ.get(LIMIT, "")
    try:
        return float(text) if text else LIMIT_S * (20 if os.environ.get("PYWORKFLOW_FULL") else 1)
    except ValueError:
        raise ConfigurationError(f"the limit is no number of seconds: {LIMIT}={text!r}") from None


def _in_progress(case: Case) -> str:
    return "\n  ".join(case.record.in_progress()) or "none: the check itself waits"


def _blocked(case: Case, check_id: str, thread: int) -> None:
    """Say on stderr where a check is whose event loop does not come back."""
    frame = sys._current_frames().get(thread)
    stack = "".join(traceback.format_stack(frame)) if frame is not None else ""
    out = sys.__stderr__ or sys.stderr
    out.write(
        f"\n{check_id} is over its time, and its event loop is blocked; calls in progress:\n"
        f"  {_in_progress(case)}\n{stack}"
    )
    out.flush()


async def _circumstances(suite: Suite, case: Case, check_id: str) -> str:
    """What helps to understand and to repeat a failure."""
    calls = "\n  ".join(case.record.lines())
    try:
        async with asyncio.timeout(10):
            violations = await fsck(await case.open())
        state = "; ".join(map(str, violations[:10])) or "sound"
    except Exception as error:  # noqa: BLE001 - a broken store breaks here, too
        state = f"cannot be read: {type(error).__name__}: {error}"
    return (
        f"check={check_id} seed={suite.seed} namespace={case.namespace}\n"
        f"repeat: {SEED}={suite.seed} pytest -k {check_id.replace('-', '_')}, "
        f"or pyworkflow conformance URL --seed {suite.seed} --only {check_id}\n"
        f"state check (fsck): {state}\n"
        f"calls, oldest first:\n  {calls}"
    )


async def in_threads(
    case: Case, number: int, work: Callable[[StorageBackend, int], Awaitable[R]]
) -> list[R]:
    """The results of ``work`` done at the same time in threads, each with an object and loop."""
    results: list[R | BaseException | None] = [None] * number
    stores = [case.store.clone() for _ in range(number)]
    gate = threading.Barrier(number)

    async def one(index: int) -> None:
        async with stores[index] as store:
            gate.wait()
            results[index] = await work(store, index)

    def body(index: int) -> None:
        try:
            asyncio.run(one(index))
        except BaseException as error:  # noqa: BLE001 - raised again below, in the test's thread
            results[index] = error
            gate.abort()

    threads = [threading.Thread(target=body, args=(n,)) for n in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        await asyncio.to_thread(thread.join)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return cast("list[R]", results)
