"""The table of faults in the docs and the tests that are named after its rows say the same."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from pathlib import Path

from tests.repo.clone import ROOT

PAGE = ROOT / "docs" / "explanation" / "reliability.md"
ROW = re.compile(r"^\| (\d+) \| .* \|$", re.MULTILINE)
NAMED = re.compile(r"`([\w/-]+\.py)::(test_\w+)`")
TEST = re.compile(r"^\s*(?:async )?def (test_\w+)\(", re.MULTILINE)


@cache
def defined_in(path: Path) -> frozenset[str]:
    return frozenset(TEST.findall(path.read_text("utf-8")))


def table() -> dict[int, set[tuple[str, str]]]:
    """The tests that each row names."""
    rows = ROW.finditer(PAGE.read_text("utf-8"))
    return {int(row[1]): set(NAMED.findall(row[0])) for row in rows}


def rows_of(name: str) -> list[int]:
    """The rows that a test is named after: ``test_f06_f07_…`` after two."""
    numbers = re.match(r"test_((?:f\d\d_)+)", name)
    return [] if numbers is None else [int(n) for n in re.findall(r"f(\d\d)_", numbers[1])]


def test_every_row_is_there_once_and_names_a_test() -> None:
    numbers = Counter(int(row[1]) for row in ROW.finditer(PAGE.read_text("utf-8")))
    assert numbers == Counter(range(1, 51))
    assert [number for number, named in table().items() if not named] == []


def test_every_test_in_the_table_exists() -> None:
    missing = [
        f"row {number}: {file}::{name}"
        for number, named in table().items()
        for file, name in sorted(named)
        if not (ROOT / "tests" / file).is_file() or name not in defined_in(ROOT / "tests" / file)
    ]
    assert missing == []


def test_every_test_named_after_a_row_is_in_that_row() -> None:
    rows = table()
    missing = [
        f"row {number}: {path.relative_to(ROOT / 'tests')}::{name}"
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        for name in sorted(defined_in(path))
        for number in rows_of(name)
        if (str(path.relative_to(ROOT / "tests")), name) not in rows.get(number, set())
    ]
    assert missing == []


def test_every_row_that_can_be_provoked_has_a_test_of_its_name() -> None:
    without = [
        number
        for number, named in table().items()
        if not any(number in rows_of(name) for _, name in named)
    ]
    assert without == [39]  # the language has no child workflows yet
