"""Write the stores of 0.1.0: ``V010_WRONG=1 python -m tests.e2e.stores_of_0_1_0.record FOLDER``.

Runs on the code of 0.1.0 alone (commit 293b782, with this folder copied into it). What it wrote is
checked in and never written again: that today's code opens it is what it is for.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyworkflow
from pyworkflow import Client, configure
from pyworkflow._definitions import RunOptions
from pyworkflow._operations import Operations
from pyworkflow._plugins import make_storage
from tests.e2e.stores_of_0_1_0 import program
from tests.servers import PostgresServer, ValkeyServer, _postgres

LONG = "order-" + "é" * 300
"""An idempotency key longer than later releases take."""


async def statuses(client: Client, ids: dict[str, str]) -> dict[str, str]:
    return {name: str((await client.get_run(run_id)).status) for name, run_id in ids.items()}


async def fill(url: str) -> dict[str, str]:
    """One run of each kind; their ids."""
    storage = make_storage(url, "default")
    ids: dict[str, str] = {}
    async with Client(storage=storage, executor="local://") as client:
        purged = await client.start(program.large, 10, idempotency_key="purged")
        await client.result(purged)
        assert await storage.purge(before=await storage.now() + timedelta(seconds=1)) == 1
        ids["purged"] = purged
        ids["done"] = await client.start(program.done, program.ORDER, idempotency_key=LONG)
        ids["failed"] = await client.start(program.failed, "this")
        ids["large"] = await client.start(program.large, 100_000)
        ids["cancelled"] = await client.start(program.cancelled)
        ids["stalled"] = await client.start(program.stalled, 4)
        wanted = {"done": "completed", "failed": "failed", "large": "completed"}
        wanted |= {"cancelled": "suspended", "stalled": "stalled"}
        while (seen := await statuses(client, {name: ids[name] for name in wanted})) != wanted:
            await asyncio.sleep(0.01)
            print(seen)
        await client.cancel(ids["cancelled"], reason="no longer wanted")
        while (await client.get_run(ids["cancelled"])).status != "cancelled":  # noqa: ASYNC110 - another process' news
            await asyncio.sleep(0.01)
        ids["sleeper"] = await client.start(program.sleeper, 5)
        ids["flaky"] = await client.start(program.flaky)
        wanted = {"sleeper": "suspended", "flaky": "suspended"}
        while await statuses(client, {name: ids[name] for name in wanted}) != wanted:  # noqa: ASYNC110 - the same
            await asyncio.sleep(0.005)
    ids["pending"] = await Operations(storage, None, None).start(
        program.done, (program.ORDER,), {}, RunOptions(idempotency_key="pending", priority=3)
    )
    await storage.close()
    return ids


async def redis_keys(url: str) -> list[Any]:
    """Every key as (name, type, content), readable by any later server."""
    from redis.asyncio import Redis

    found: list[Any] = []
    async with Redis.from_url(url) as redis:
        for key in sorted([key async for key in redis.scan_iter()]):
            kind = (await redis.type(key)).decode()
            content: Any
            match kind:
                case "string":
                    content = (await redis.get(key)).decode("latin-1")
                case "hash":
                    content = [
                        (a.decode("latin-1"), b.decode("latin-1"))
                        for a, b in (await redis.hgetall(key)).items()
                    ]
                case "zset":
                    content = [
                        (member.decode("latin-1"), score)
                        for member, score in await redis.zrange(key, 0, -1, withscores=True)
                    ]
                case "list":
                    content = [x.decode("latin-1") for x in await redis.lrange(key, 0, -1)]
                case "set":
                    content = [x.decode("latin-1") for x in sorted(await redis.smembers(key))]
                case _:
                    raise AssertionError(kind)
            assert await redis.ttl(key) == -1, key
            found.append((key.decode("latin-1"), kind, content))
    return found


def main(folder: Path) -> None:
    assert pyworkflow.__version__ == "0.1.0"
    configure(codecs="zlib")
    ids: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        ids["file"] = asyncio.run(fill(f"file:{place}/store"))
        with tarfile.open(folder / "file.tar.gz", "w:gz") as archive:
            archive.add(place / "store", arcname=".")
        ids["sqlite"] = asyncio.run(fill(f"sqlite:///{place}/store.db"))
        assert sorted(p.name for p in place.glob("store.db*")) == ["store.db"]
        packed = gzip.compress((place / "store.db").read_bytes(), mtime=0)
        (folder / "sqlite.db.gz").write_bytes(packed)
    with PostgresServer() as server:
        url = server.database()
        ids["postgresql"] = asyncio.run(fill(url))
        dump = [str(_postgres() / "bin" / "pg_dump"), "--no-owner", "--inserts", "-d", url]
        text = subprocess.run(dump, check=True, capture_output=True, text=True).stdout
        # What older servers and other programs than psql do not take.
        text = re.sub(
            r"^(\\(un)?restrict .*|SET transaction_timeout = 0;)\n", "", text, flags=re.MULTILINE
        )
        (folder / "postgresql.sql.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    with ValkeyServer() as server:
        ids["redis"] = asyncio.run(fill(server.url))
        (folder / "redis.json").write_text(
            json.dumps(asyncio.run(redis_keys(server.url)), indent=0), "utf-8"
        )
    (folder / "runs.json").write_text(json.dumps(ids, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
