"""``pyworkflow storage``: check a store, count what is in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

from pyworkflow.cli import _output as output
from pyworkflow.cli._options import in_store, shared, wants_json

if TYPE_CHECKING:
    from pyworkflow._operations import Operations
    from pyworkflow.spi._fsck import Violation

__all__ = ["command"]


@click.group("storage", short_help="Check a store, count what is in it.")
@shared
def command() -> None:
    """Check a store, count what is in it."""


@command.command("check")
@shared
def check() -> int:
    """Read every run and say what must not be. Safe while workers use the store.

    Exit status: 0 sound, 1 something is wrong, 3 the store cannot be read.
    """
    from pyworkflow.spi import fsck

    async def read(operations: Operations) -> tuple[list[Violation], str]:
        return await fsck(operations.storage), operations.storage.info().location

    found, location = in_store(read)
    if wants_json():
        output.print_json(
            {
                "storage": location,
                "violations": [
                    {"rule": one.rule, "run_id": one.run_id, "detail": one.detail} for one in found
                ],
            }
        )
    else:
        for one in found:
            output.styled(str(one), "red")
        if not found:
            output.styled(f"sound: {location}", "green")
    return 1 if found else 0


@command.command("stats")
@shared
def stats() -> None:
    """Show where the store is, what it can do, and how many runs it has by status."""
    from dataclasses import asdict

    async def read(operations: Operations) -> tuple[Mapping[str, int], dict[str, object]]:
        info = operations.storage.info()
        facts: dict[str, object] = {
            "name": info.name,
            "location": info.location,
            "contract_version": info.contract_version,
            "max_payload": info.max_payload,
            "capabilities": asdict(info.capabilities),
        }
        return dict(await operations.storage.stats()), facts

    counts, facts = in_store(read)
    if wants_json():
        output.print_json({**facts, "counts": counts})
        return
    able = [name for name, has in asdict_of(facts).items() if has is True]
    output.print_pairs(
        {
            "storage": str(facts["name"]),
            "location": str(facts["location"]),
            "capabilities": ", ".join(able),
            **{name: str(count) for name, count in counts.items()},
        }
    )


def asdict_of(facts: Mapping[str, object]) -> Mapping[str, object]:
    """The capabilities among the facts."""
    found = facts["capabilities"]
    assert isinstance(found, dict)
    return found  # pyright: ignore[reportUnknownVariableType] # made by asdict
