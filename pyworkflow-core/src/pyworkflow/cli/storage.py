"""``pyworkflow storage``: check a store, count, copy and purge what is in it, set its clock."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import click

from pyworkflow._clock import AHEAD, utcnow
from pyworkflow._duration import parse_duration
from pyworkflow.cli import _output as output
from pyworkflow.cli._options import (
    Unusable,
    in_store,
    opening,
    refuse_absent,
    settle_settings,
    shared,
    wants_json,
)
from pyworkflow.runs import RunStatus

if TYPE_CHECKING:
    from pyworkflow._operations import Operations
    from pyworkflow.spi.storage import StorageBackend
    from pyworkflow.storekit._fsck import Violation

__all__ = ["command"]

_AHEAD_S = 1.0
"""Seconds between two clocks that are worth a word."""
_BEHIND = (
    "the store's clock is behind this machine's: what is due fires that much later by this "
    "machine's clock; set the clock of the machine that is wrong"
)


@click.group("storage", short_help="Check, count, copy, purge what is in a store; set its clock.")
@shared
def command() -> None:
    """Check, count, copy or purge what is in a store."""


@command.command("check")
@shared
def check() -> int:
    """Read every run and say what must not be. Safe while workers use the store.

    Says, too, by how much the store's clock is ahead of this machine's.

    Exit status: 0 sound, 1 something is wrong, 3 the store cannot be read.
    """
    from pyworkflow.storekit import fsck

    async def read(operations: Operations) -> tuple[list[Violation], float, str]:
        store = operations.storage
        return await fsck(store), await _clock_ahead(store), store.info().location

    found, ahead, location = in_store(read)
    if wants_json():
        output.print_json(
            {
                "storage": location,
                "clock_ahead_s": round(ahead, 3),
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
        if ahead >= _AHEAD_S:
            output.styled(f"clock: ahead={ahead:.0f}s; {AHEAD}", "yellow")
        elif ahead <= -_AHEAD_S:
            output.styled(f"clock: ahead={ahead:.0f}s; {_BEHIND}", "yellow")
    return 1 if found else 0


@command.command("set-clock")
@click.option("--to-now", is_flag=True, required=True, help="To the clock of this machine.")
@shared
def set_clock(*, to_now: bool) -> None:
    """Set the store's clock, which was ahead, to the clock of this machine.

    Stop all workers first: it is refused while a lease has not ended. All leases are over
    afterwards, and no token is issued twice. Waits that began while the clock was ahead end by the
    instant that was computed then, hence later by as much.
    """
    from pyworkflow.spi.storage import has_test_clock

    assert to_now

    async def correct(operations: Operations) -> tuple[float, float, str]:
        store = operations.storage
        if owners := await store.holders():
            raise Unusable(
                f"workers use the store: owners={', '.join(owners[:5])}; stop them, and wait until "
                "their leases have ended"
            )
        clock: object = store
        if not has_test_clock(clock):
            raise Unusable(f"the store's clock cannot be set: storage={store.info().name}")
        before = await _clock_ahead(store)
        await store.recover()
        await clock.shift_clock(utcnow() - await store.now())
        return before, await _clock_ahead(store), store.info().location

    before, after, location = in_store(correct)
    if wants_json():
        output.print_json(
            {
                "storage": location,
                "clock_ahead_before_s": round(before, 3),
                "clock_ahead_s": round(after, 3),
            }
        )
    else:
        click.echo(
            f"the clock was set: was_ahead={round(before)}s ahead={round(after)}s: {location}"
        )


async def _clock_ahead(store: StorageBackend) -> float:
    """Seconds that the store's clock is ahead of this machine's."""
    return (await store.now() - utcnow()).total_seconds()


@command.command("stats")
@shared
def stats() -> None:
    """Show where the store is, what it can do, and how many runs it has by status."""

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


@command.command("copy")
@click.argument("source", metavar="FROM")
@click.argument("target", metavar="TO")
@click.option("--namespace", help="Namespace in both (default: the setting, else default).")
@click.option("--to-namespace", help="Namespace in TO, if it is another one.")
@click.option("--in-use", is_flag=True, help="Copy although workers hold work in FROM.")
@click.option("--not-durable", is_flag=True, help="Copy although TO may lose what it was given.")
@click.option("--abandon-parts", is_flag=True, help="End runs in TO that FROM has no more of.")
@shared
def copy(
    source: str,
    target: str,
    namespace: str | None,
    to_namespace: str | None,
    in_use: bool,
    not_durable: bool,
    abandon_parts: bool,
) -> int:
    r"""Copy all runs and keys from the store FROM to the store TO (storage URLs), and compare.

    Stop the workers first. Goes on where it stopped when it is run again; never overwrites a run
    that is different in TO. Ids, histories and times stay as they are, what is due stays due.

    Exit status: 0 all is there, 1 FROM is empty or a run differs, 3 a store cannot be used.

    \b
    pyworkflow storage copy file:.pyworkflow postgresql://user@host/db
    """
    import asyncio

    from pyworkflow._config import settings
    from pyworkflow._copy import CopyConflict, CopyReport, copy_store
    from pyworkflow._plugins import make_storage

    if click.get_current_context().meta.get("pyworkflow.cli.storage"):
        raise click.UsageError("copy takes the stores as FROM and TO: leave out --storage")
    settle_settings()
    given = namespace or settings().namespace

    so_far = CopyReport()

    def show(report: CopyReport) -> None:
        nonlocal so_far
        so_far = report
        if report.copied % 1000 == 0 and report.copied and not wants_json():
            click.echo(f"copied: runs={report.copied} events={report.events}", err=True)

    async def main() -> tuple[CopyReport, str, str]:
        with opening():
            old = make_storage(source, given)
            new = make_storage(target, to_namespace or given)
        await refuse_absent(old, "FROM")
        async with AsyncExitStack() as stack:
            with opening():
                await stack.enter_async_context(old)
                await stack.enter_async_context(new)
            if not (not_durable or new.info().capabilities.durable):
                raise Unusable(
                    f"the target may lose what it was given: location={new.info().location}; "
                    "copy into a durable store, or with --not-durable"
                )
            report = await copy_store(
                old, new, in_use=in_use, abandon_parts=abandon_parts, progress=show
            )
            return report, old.info().location, new.info().location

    try:
        report, old, new = asyncio.run(main())
    except CopyConflict as error:
        if wants_json():
            output.print_json({**asdict(so_far), "error": str(error)})
        else:
            click.echo(f"copied: runs={so_far.copied} events={so_far.events}", err=True)
        raise
    facts: dict[str, Any] = {"from": old, "to": new, **asdict(report)}
    if wants_json():
        output.print_json(facts)
    else:
        output.print_pairs({name: str(value) for name, value in facts.items()})
    if not (report.runs or report.keys):
        click.echo(f"Error: nothing was copied: there are no runs in FROM: {old}", err=True)
        return 1
    if not wants_json():
        new_here = bool(report.copied or report.keys)
        output.styled(
            "copied and compared" if new_here else "compared: everything was there already", "green"
        )
    return 0


@command.command("purge")
@click.option("--older-than", required=True, metavar="D", help="For example 30d or 12h.")
@click.option("--key-retention", default="30d", metavar="D", show_default=True)
@click.option("--dry-run", is_flag=True, help="Count, remove nothing.")
@shared
def purge(older_than: str, key_retention: str, dry_run: bool) -> None:
    """Remove runs that ended longer ago than a duration. Safe while workers use the store.

    Runs that still owe a message to another run, or whose parent is open, stay. Idempotency keys
    stay taken until --key-retention after the end of their run.
    """
    age, retention = (
        _duration("--older-than", older_than),
        _duration("--key-retention", key_retention),
    )

    async def remove(operations: Operations) -> tuple[int, str]:
        store = operations.storage
        try:
            before = await store.now() - age
        except OverflowError:  # longer ago than there are dates
            return 0, store.info().location
        if dry_run:
            return await _ended_before(store, before), store.info().location
        total = 0
        while removed := await store.purge(before=before, key_retention=retention):
            total += removed
        return total, store.info().location

    number, location = in_store(remove)
    if wants_json():
        output.print_json({"storage": location, "runs": number, "removed": not dry_run})
    elif dry_run:
        click.echo(f"would remove up to {number} runs: {location}")
    else:
        click.echo(f"removed {output.counted(number, 'run')}: {location}")


@command.command("sweep-offloaded")
@click.option("--older-than", default="1d", metavar="D", show_default=True, help="At least 1h.")
@click.option("--also", multiple=True, metavar="URL", help="Another store that uses the directory.")
@click.option("--namespace", multiple=True, help="Another namespace that uses the directory.")
@click.option("--allow-empty", is_flag=True, help="Also when one of the stores has no runs.")
@click.option("--dry-run", is_flag=True, help="Show what would go, remove nothing.")
@shared
def sweep_offloaded(
    older_than: str,
    also: tuple[str, ...],
    namespace: tuple[str, ...],
    allow_empty: bool,
    dry_run: bool,
) -> None:
    """Remove files of the setting codec_offload_dir that no run refers to any more.

    Every store, in every namespace, that offloads to the directory must be named: a file of one
    that is left out is lost. Files younger than --older-than stay: their commit may be under way.

    A store or namespace without any run is refused: it is more often a mistyped one. --namespace
    counts for every store.
    """
    import asyncio
    from pathlib import Path

    from pyworkflow._codecs import sweep_offloaded
    from pyworkflow._config import settings
    from pyworkflow._plugins import make_storage

    age = _duration("--older-than", older_than)
    if age < timedelta(hours=1):
        raise click.BadParameter("an hour at least", param_hint="--older-than")
    settle_settings()
    chosen = settings()
    directory = chosen.codec_offload_dir
    if not directory:
        raise click.UsageError("there is no directory to sweep: set codec_offload_dir")
    if not isinstance(chosen.storage, str):
        raise click.UsageError("the store is an object of the application: name it with --storage")
    urls, names = (chosen.storage, *also), (chosen.namespace, *namespace)

    async def main() -> list[Path]:
        async with AsyncExitStack() as stack:
            stores: list[StorageBackend] = []
            for url in dict.fromkeys(urls):
                for name in dict.fromkeys(names):
                    with opening():
                        store = make_storage(url, name)
                        await refuse_absent(store, "--storage and --also")
                        stores.append(await stack.enter_async_context(store))
            return await sweep_offloaded(
                *stores,
                directory=Path(directory),
                older_than=age,
                allow_empty=allow_empty,
                dry_run=dry_run,
            )

    removed = asyncio.run(main())
    if wants_json():
        files = [str(path) for path in removed]
        told = {"would_remove": files, "removed": []} if dry_run else {"removed": files}
        output.print_json({"directory": str(directory), **told})
    elif dry_run:
        for path in removed:
            click.echo(str(path))
        click.echo(f"would remove {output.counted(len(removed), 'file')}: {directory}")
    else:
        click.echo(f"removed {output.counted(len(removed), 'file')}: {directory}")


def _duration(option: str, text: str) -> timedelta:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint=option) from None


async def _ended_before(store: StorageBackend, before: datetime) -> int:
    from pyworkflow.spi.storage import RunQuery

    ended = frozenset(status for status in RunStatus if status.is_terminal)
    number = 0
    cursor: str | None = None
    while True:
        page = await store.list_runs(RunQuery(status=ended, limit=1000), cursor)
        number += sum(
            run.finished_at is not None and run.finished_at < before for run in page.items
        )
        cursor = page.cursor
        if cursor is None:
            return number


def asdict_of(facts: Mapping[str, object]) -> Mapping[str, object]:
    """The capabilities among the facts."""
    found = facts["capabilities"]
    assert isinstance(found, dict)
    return found  # pyright: ignore[reportUnknownVariableType] # made by asdict
