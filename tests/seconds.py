"""Seconds of each test file, as a table below pytest's ``--durations``."""

from __future__ import annotations

from collections import defaultdict

import pytest

__all__ = ["LONG_S", "pytest_terminal_summary", "table"]

#: A file that takes longer is marked: its tests wait for something, or belong to several files.
LONG_S = 20.0
#: Files below this are summed up in one line.
SHORT_S = 1.0


def table(seconds: dict[str, float]) -> list[str]:
    """A line per file, the slowest first; files that take longer than ``LONG_S`` are marked."""
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    lines = [
        f"{taken:8.1f} s {'!' if taken > LONG_S else ' '} {name}"
        for name, taken in ordered
        if taken >= SHORT_S
    ]
    short = [taken for taken in seconds.values() if taken < SHORT_S]
    if short:
        lines.append(f"{sum(short):8.1f} s   in {len(short)} files below {SHORT_S:g} s each")
    return [*lines, f"{sum(seconds.values()):8.1f} s   in all, of every worker"]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config
) -> None:
    """Print the table where ``--durations`` asks for times."""
    if config.getoption("durations") is None:
        return
    seconds: defaultdict[str, float] = defaultdict(float)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.nodeid.partition("::")[0]] += report.duration
    terminalreporter.section(f"seconds per file, ! above {LONG_S:g}")
    for line in table(seconds):
        terminalreporter.write_line(line)
