"""``pyworkflow conformance``: prove a store, given by URL, with the conformance suite."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pyworkflow.cli._options import Unusable, opening, settle_settings, shared
from pyworkflow.errors import StorageError

if TYPE_CHECKING:
    from pyworkflow.conformance import Report, Result

__all__ = ["command"]

_KINDS = ("terminal", "junit", "json", "md", "badge", "shields")
_LEVELS = ("base", "durable", "distributed", "full")


@click.command("conformance", short_help="Prove a storage backend.")
@click.argument("targets", metavar="URL", nargs=-1)
@click.option(
    "--profile",
    type=click.Choice(_LEVELS),
    default="full",
    show_default=True,
    help="The level to reach; higher checks are not run.",
)
@click.option(
    "--report",
    "reports",
    multiple=True,
    metavar="KIND[=FILE]",
    help=f"{', '.join(_KINDS)}; to stdout or a file. May be given several times.",
)
@click.option(
    "-o", "--output", metavar="FILE", help="Where the one report goes that names no file."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Repeats what was chance.")
@click.option("--only", multiple=True, metavar="ID", help="A check (CON-01) or group (CON).")
@click.option(
    "-k",
    "--keyword",
    default="",
    metavar="EXPR",
    help="Words with and, or, not, in the names of checks.",
)
@click.option(
    "--namespace-prefix",
    default="conformance-",
    show_default=True,
    metavar="TEXT",
    help="Begins the name of every namespace that the suite uses.",
)
@click.option("--matrix", is_flag=True, help="Make one page of several JSON reports, run nothing.")
@shared
def command(
    targets: tuple[str, ...],
    profile: str,
    reports: tuple[str, ...],
    output: str | None,
    seed: int,
    only: tuple[str, ...],
    keyword: str,
    namespace_prefix: str,
    matrix: bool,
) -> int:
    r"""Prove that the store at URL keeps the storage contract, and say which level it reaches.

    Works in new namespaces, never touches other ones, and removes its runs afterwards. Needs the
    distribution `pyworkflow-conformance`.

    \b
    pyworkflow conformance file:/tmp/try --profile durable
    pyworkflow conformance redis://localhost:6379/9 --report terminal --report json=redis.json
    pyworkflow conformance --matrix file.json redis.json > matrix.md

    Exit status: 0 the profile is reached, 1 it is not, 2 wrong use, 3 the store or the suite
    cannot be used.
    """
    _need_suite()
    from pyworkflow.conformance import FORMATS, summary

    if click.get_current_context().meta.get("pyworkflow.cli.storage"):
        raise click.UsageError("conformance takes the store as URL: leave out --storage")
    settle_settings()
    places = _places(reports, output)
    if matrix:
        if reports:
            raise click.UsageError("--matrix makes a page of JSON reports: leave out --report")
        _write(_matrix(targets), output)
        return 0
    if len(targets) != 1:
        raise click.UsageError("give one storage URL, for example file:/tmp/try")
    report = _run(targets[0], profile, seed, only, keyword, namespace_prefix)
    for kind, file in places:
        _write(FORMATS[kind](report), file)
    if ("terminal", None) not in places:
        click.echo(summary(report), err=True)
    if only or keyword:
        # A part of the suite reaches no level: the status says whether that part is right.
        wrong = any(one.status in {"failed", "skipped"} for one in report.results)
        return 1 if wrong else 0
    return 0 if report.reached else 1


def _need_suite() -> None:
    try:
        importlib.import_module("pyworkflow.conformance")
    except ModuleNotFoundError as error:
        raise Unusable(str(error)) from None


def _places(reports: Sequence[str], output: str | None) -> list[tuple[str, str | None]]:
    """Kind and file of each report; None for stdout."""
    found: list[tuple[str, str | None]] = []
    for text in reports or ("terminal",):
        kind, _, place = text.partition("=")
        if kind not in _KINDS:
            raise click.BadParameter(
                f"{kind!r} is no kind of report: give one of {', '.join(_KINDS)}",
                param_hint="--report",
            )
        found.append((kind, place or None))
    homeless = [number for number, (_, place) in enumerate(found) if place is None]
    if len(homeless) > 1:
        raise click.UsageError("only one report goes to stdout: write the others as KIND=FILE")
    if output is not None:
        if not homeless:
            raise click.UsageError("every report has a file already: leave out -o")
        found[homeless[0]] = (found[homeless[0]][0], output)
    for _, file in found:
        if file is not None and not Path(file).absolute().parent.is_dir():
            # Before the suite runs for minutes.
            raise click.UsageError(f"the folder of the report is not there: file={file}")
    return found


def _run(
    url: str, profile: str, seed: int, only: Sequence[str], keyword: str, prefix: str
) -> Report:
    from pyworkflow.conformance import LEVELS, check_prefix, look, run_conformance, wants_at_once

    level = LEVELS[_LEVELS.index(profile)]
    check_prefix(prefix)
    at_once = wants_at_once(level, only, keyword)
    with opening():
        seen = look(url, prefix, at_once=at_once)
    try:
        return run_conformance(
            url,
            profile=level,
            seed=seed,
            only=only,
            keyword=keyword,
            prefix=prefix,
            progress=_progress,
            seen=seen,
        )
    except OSError as error:
        raise StorageError(f"the store cannot be used: {error}") from error


def _progress(result: Result) -> None:
    """Print a line for each check as it ends: a store that hangs shows after which one."""
    status = result.status.replace("_", " ")
    click.echo(f"{status:<15}{result.id} {result.title} {result.seconds:.1f} s", err=True)


def _matrix(files: Sequence[str]) -> str:
    from pyworkflow.conformance import matrix, read_report

    if not files:
        raise click.UsageError(
            "--matrix needs JSON reports: pyworkflow conformance --matrix a.json"
        )
    found: list[dict[str, object]] = []
    for name in files:
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise click.UsageError(f"the report cannot be read: file={name}: {error}") from None
        found.append(read_report(text, name))
    return matrix(found)


def _write(text: str, place: str | None) -> None:
    if place is None:
        click.echo(text, nl=False)
    else:
        Path(place).write_text(text, encoding="utf-8")
