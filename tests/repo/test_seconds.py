"""The table of seconds per test file."""

from __future__ import annotations

from tests.seconds import table


def test_files_are_listed_by_their_seconds_and_long_ones_are_marked() -> None:
    seconds = {"a.py": 0.25, "b.py": 3.0, "c.py": 20.5, "d.py": 0.5}
    assert table(seconds) == [
        "    20.5 s ! c.py",
        "     3.0 s   b.py",
        "     0.8 s   in 2 files below 1 s each",
        "    24.2 s   in all, of every worker",
    ]


def test_a_run_without_short_files_has_no_line_for_them() -> None:
    assert table({"a.py": 2.0}) == ["     2.0 s   a.py", "     2.0 s   in all, of every worker"]
