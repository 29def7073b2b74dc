"""``pyworkflow-sim``: many seeds, what they came to, and what a failing one needs to fail."""

# ruff: noqa: T201 - printing is what this command is for

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pyworkflow.errors import ConfigurationError
from pyworkflow_conformance.simulation._coverage import ENOUGH, missing, table
from pyworkflow_conformance.simulation._faults import PROFILES, Fault, make_plan
from pyworkflow_conformance.simulation._many import (
    Total,
    backend_of,
    check_backend,
    explain,
    run_many,
    shrink,
)
from pyworkflow_conformance.simulation._simulate import simulate

__all__ = ["main"]

_NAMED = 10
"""Failing seeds that are named at the end."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0 when everything held and every path was taken."""
    try:
        status = _main(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader has seen enough (`| head`). The exit's own flush must not complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as if the signal had ended it: not everything was told
    return status


def _main(arguments: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="pyworkflow-sim",
        description="Simulate clusters: every seed is one, with its own programs and faults.",
    )
    parser.add_argument("--seeds", default="0:1000", help="FIRST:END, or one seed")
    parser.add_argument(
        "--profile",
        default="all",
        help=f"what goes wrong: {', '.join(PROFILES)} (all: everything at once), several with "
        "commas, or each",
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes; 0: one per core")
    parser.add_argument(
        "--backend", default="memory", help="memory, or module:callable that makes an empty store"
    )
    parser.add_argument("--keep", help="of the plan's faults only these, by number: 0,3")
    parser.add_argument("--trace", action="store_true", help="print all that happens")
    options = parser.parse_args(arguments)
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # where the backend may be
    try:
        seeds = _seeds(options.seeds)
        profiles = list(PROFILES) if options.profile == "each" else options.profile.split(",")
        for profile in profiles:
            if profile not in PROFILES:
                raise ConfigurationError(
                    f"no such profile: profile={profile}; there are {', '.join(PROFILES)}, "
                    "and each, alone"
                )
        if options.jobs < 0:
            raise ConfigurationError(f"no such number of processes: jobs={options.jobs}")
        check_backend(options.backend)
        alone = options.keep is not None or options.trace
        if alone and (len(seeds) > 1 or len(profiles) > 1):
            raise ConfigurationError("--keep and --trace show one seed of one profile: name them")
        kept = _kept(options.keep, seeds[0], profiles[0])
    except ConfigurationError as exc:
        parser.error(str(exc))
    if alone:
        return _one(seeds[0], profiles[0], kept, options)
    jobs = options.jobs or os.cpu_count() or 1
    good = [_profile(seeds, profile, jobs, options.backend) for profile in profiles]
    return 0 if all(good) else 1


def _seeds(text: str) -> range:
    first, colon, end = text.partition(":")
    try:
        seeds = range(int(first), int(end)) if colon else range(int(first), int(first) + 1)
    except ValueError:
        seeds = range(0)
    if not seeds or seeds[0] < 0:
        raise ConfigurationError(
            f"no seeds: seeds={text}; give FIRST:END with 0 <= FIRST < END, or one"
        )
    return seeds


def _kept(text: str | None, seed: int, profile: str) -> tuple[Fault, ...] | None:
    """The faults of a seed's plan that ``--keep`` names; None for all."""
    if text is None:
        return None
    planned = make_plan(seed, profile).faults
    try:
        return () if text == "none" else tuple(planned[_number(each)] for each in text.split(","))
    except (ValueError, IndexError):
        raise ConfigurationError(
            f"no such faults: keep={text}; this plan has {len(planned)}: give their numbers from "
            "0, with commas, or none"
        ) from None


def _number(text: str) -> int:
    number = int(text)
    if number < 0:
        raise ValueError(text)
    return number


def _profile(seeds: range, profile: str, jobs: int, backend: str) -> bool:
    """Run all seeds of a profile; whether everything held."""
    began = time.perf_counter()
    total = Total()
    told = 0

    def progress(so_far: Total) -> None:
        nonlocal total, told
        total = so_far
        for seed, rule, _ in total.failed[told:]:
            print(f"{clear}failed: seed={seed} profile={profile}: {rule}", file=sys.stderr)
        told = len(total.failed)
        if clear:
            rate = total.seeds / (time.perf_counter() - began)
            print(
                f"{clear}{profile}: {total.seeds:,} seeds, {rate:,.0f}/s", end="", file=sys.stderr
            )

    clear = "\r\x1b[K" if sys.stderr.isatty() else ""
    try:
        run_many(seeds, profile, jobs=jobs, backend=backend, on_progress=progress)
    finally:  # of an interrupt, too
        print(end=clear, file=sys.stderr)
        took = time.perf_counter() - began
        print(
            f"profile={profile} seeds={total.seeds:,} failed={len(total.failed)} "
            f"seeds/s={total.seeds / took:,.1f} store calls={total.calls:,} "
            f"callbacks={total.steps:,} virtual hours={total.seconds / 3600:,.1f}",
            flush=True,
        )
    print(table(profile, total.seen))
    if total.seeds < ENOUGH:
        print(f"  (paths that were never taken count from {ENOUGH} seeds on)")
    never = [] if total.failed else missing(profile, total.seeds, total.seen)
    if never:
        print(
            f"FAILED: paths that {ENOUGH} seeds of profile={profile} should take were never taken: "
            + ", ".join(never)
        )
    for seed, _, found in total.failed[:_NAMED]:
        print(f"FAILED: seed={seed} profile={profile}: {found}")
    if len(total.failed) > _NAMED:
        print(f"  … and {len(total.failed) - _NAMED} more")
    if total.seeds < len(seeds):
        print(
            f"stopped after {len(total.failed)} failures: {len(seeds) - total.seeds:,} seeds left"
        )
    if total.failed:
        report, kept = shrink(total.failed[0][0], profile, make_store=backend_of(backend))
        print("\n" + explain(report, kept, backend))
    return not total.failed and not never


def _one(
    seed: int, profile: str, kept: tuple[Fault, ...] | None, options: argparse.Namespace
) -> int:
    """Run one seed, and say all that happens."""
    report = simulate(
        seed,
        profile,
        faults=kept,
        make_store=backend_of(options.backend),
        tracing=options.trace,
        on_trace=print if options.trace else None,
    )
    print(f"seed={seed} profile={profile}: {report.broken or 'everything held'}")
    return 0 if report.broken is None else 1
