"""Claims: how a worker asks for them, names them and releases them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from time import monotonic

from pyworkflow.errors import StorageUnavailable
from pyworkflow.runs import WorkItem
from pyworkflow.spi.storage import Claimed, ClaimRef, ClaimRequest, StorageBackend
from pyworkflow.storekit import failpoints

__all__ = ["claim", "give_back", "ref_of", "still_held"]

failpoints.register(
    __name__,
    StorageUnavailable,
    {
        "claim.before": "a worker is about to ask for due items",
        "claim.after": "items are claimed, and nothing of them has begun",
        "drain.before_release": "a worker that drains is about to give an item back",
    },
)

_log = logging.getLogger("pyworkflow.engine")


async def claim(storage: StorageBackend, request: ClaimRequest) -> Claimed:
    """Claim what is due; of a late answer, what is still held."""
    if failpoints.active:
        failpoints.hit("claim.before")
    asked = monotonic()
    claimed = await storage.claim(request)
    if failpoints.active:
        failpoints.hit("claim.after")
    if claimed.claims and monotonic() - asked > request.lease.total_seconds() / 2:
        kept = await still_held(storage, [claim.ref for claim in claimed.claims], request.lease)
        return replace(claimed, claims=[claim for claim in claimed.claims if claim.ref in kept])
    return claimed


def ref_of(item: WorkItem) -> ClaimRef:
    """How the holder of an item names its claim in changes."""
    assert item.lease is not None
    return ClaimRef(item.run_id, item.item_id, item.lease.token)


async def still_held(
    storage: StorageBackend, refs: Sequence[ClaimRef], lease: timedelta
) -> set[ClaimRef]:
    """Of claims whose answer was long under way, those that others have not taken, renewed.

    All of them when the storage cannot tell: under a lost claim nothing can be committed.
    """
    try:
        kept = await storage.renew(refs, lease)
    except Exception as exc:  # noqa: BLE001 - the answer counts, whatever this is
        _log.warning("the storage cannot say which claims stand: %r", exc)
        return set(refs)
    return {ref for ref, ok in zip(refs, kept, strict=True) if ok}


async def give_back(storage: StorageBackend, ref: ClaimRef) -> None:
    """Release what a worker that drains holds."""
    if failpoints.active:
        failpoints.hit("drain.before_release")
    await storage.release(ref)
