"""URLs and options: each is understood or refused, and none of it gives a secret away."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta
from uuid import uuid4

import pytest

from pyworkflow.spi import (
    Change,
    ClaimRequest,
    ConfigurationError,
    Event,
    ItemKind,
    LeaseFor,
    NewRun,
    Put,
    StorageBackend,
)
from pyworkflow_storage_redis import RedisStorageBackend
from pyworkflow_storage_redis._keys import prefix_of
from pyworkflow_storage_redis._plugin import pyworkflow_make_storage
from tests.servers import GivenServer, ValkeyServer


def make(url: str, **options: str) -> StorageBackend:
    made = pyworkflow_make_storage(url=url, options=options)
    assert made is not None
    return made


def test_urls_of_other_schemes_are_left_to_others() -> None:
    assert pyworkflow_make_storage(url="file:x", options={}) is None


def test_options_reach_the_backend() -> None:
    store = make("rediss://me:pa%40ss@host.example:7000/3", namespace="shop", durable="true")
    info = store.info()
    assert (info.name, info.location) == ("redis", "rediss://host.example:7000/3")
    assert info.capabilities.durable
    assert "shop" in repr(store)
    assert "pa" not in repr(store).replace("namespace", "")


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("redis://:hidden@h/0", {"decode": "yes"}),
        ("redis://:hidden@h/0", {"timeout": "soon"}),
        ("redis://:hidden@h/0", {"timeout": "0"}),
        ("redis://:hidden@h/0", {"durable": "perhaps"}),
        ("redis://:hidden@h/0", {"ssl_ca_certs": "/ca.pem"}),
        ("redis://:hidden@h/name", {}),
        ("redis://:hidden@h:port/0", {}),
    ],
)
def test_what_is_not_understood_is_refused(url: str, options: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        make(url, **options)
    assert "hidden" not in f"{caught.value} {caught.value.__cause__}"


def test_all_keys_of_a_namespace_are_in_one_hash_slot() -> None:
    for namespace in ("default", "}", "{", "a}b{c", "ü/\0", ""):
        assert prefix_of(namespace).partition("{")[2].partition("}")[0]
        assert prefix_of(namespace).count("}") == 1
    assert prefix_of("a") != prefix_of("A")


def test_watchers_by_the_thousand_share_one_connection(
    valkey: ValkeyServer | GivenServer,
) -> None:
    async def main() -> None:
        async with RedisStorageBackend(valkey.url, namespace=uuid4().hex) as store:
            ids = [f"run-{n}" for n in range(600)]
            waits = [
                asyncio.create_task(store.watch(run, after=0, timeout=timedelta(seconds=30)))
                for run in ids
            ]
            new = NewRun(workflow="flow", version="1", args="[]")
            event = Event("workflow.started", "I", {})
            await store.commit(
                [Change(run_id=run, key="start", create=new, events=[event]) for run in ids]
            )
            assert await asyncio.gather(*waits) == [True] * len(ids)
            assert not await store.watch("none", after=0, timeout=timedelta(seconds=0))

    asyncio.run(main())


def test_a_run_that_is_created_with_a_lease_is_no_news_for_workers(
    valkey: ValkeyServer | GivenServer,
) -> None:
    async def main() -> None:
        async with RedisStorageBackend(valkey.url, namespace=uuid4().hex) as store:
            minute = timedelta(minutes=1)
            new = NewRun(workflow="flow", version="1", args="[]")
            event = Event("workflow.started", "I", {})
            free = Change(run_id="free", key="start", create=new, events=[event])
            lease = LeaseFor(owner="me", lease=minute)
            put = Put(item_id="turn", kind=ItemKind.TURN, claimed=lease)
            await store.claim(ClaimRequest(owner="me", lease=minute))
            assert (await store.commit_one(replace(free, run_id="held", put=[put]))).claims
            assert not await store.watch(None, after=0, timeout=timedelta(0))
            await store.commit_one(free)
            assert await store.watch(None, after=0, timeout=timedelta(0))

    asyncio.run(main())
